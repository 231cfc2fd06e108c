"""From logits to a token: the distribution, the draw, and what the log-probability of the drawn token is.

Letters: B rows, T steps, V vocabulary.

Randomness is one number in [0, 1) a row and step, drawn ahead and turned into a token by inverting the cumulative
distribution: what a row says depends on its own numbers only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Temperature 0 is greedy; top_k 0 and top_p 1 leave the distribution whole."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def is_cut(self) -> bool:
        """Whether some tokens can not be drawn."""
        return self.top_k > 0 or self.top_p < 1


GREEDY = Sampling(temperature=0.0)


def draw_uniforms(rows: int, steps: int, generator: torch.Generator) -> Tensor:
    """Float64 [rows, steps] in [0, 1): all the randomness that generation takes."""
    return torch.rand(rows, steps, dtype=torch.float64, generator=generator)


def _tempered(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """logits / temperature in float32; as they are at 1, for a large vocabulary's copy is not free."""
    return logits_BV.float() if sampling.temperature == 1 else logits_BV.float() / sampling.temperature


def probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """softmax(logits / temperature), cut to the top_k largest, then to the nucleus (Holtzman et al. 2020).
    [B, V]

    The nucleus is the smallest set of most likely tokens whose probability reaches top_p; at least one token.
    Tokens as likely as the k-th are kept with it. What is cut off has probability 0, the rest sums to 1.
    """
    logits_BV = _tempered(logits_BV, sampling)
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        kth_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)
    probs_BV = logits_BV.softmax(dim=-1)
    if sampling.top_p < 1:
        sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True)
        before_BV = sorted_BV.cumsum(dim=-1) - sorted_BV
        sorted_BV = sorted_BV.masked_fill((before_BV >= sampling.top_p), 0)
        probs_BV = torch.zeros_like(probs_BV).scatter(-1, order_BV, sorted_BV)
        probs_BV = probs_BV / probs_BV.sum(dim=-1, keepdim=True)
    return probs_BV


CHUNK = 128
"""Tokens whose probability is summed first. The cumulative distribution of a vocabulary in float64 is the largest
tensor of a step; of chunks, and inside the one that is drawn, it takes an eighth of the time.
"""


def sample(probs_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """The token at which the cumulative distribution passes `uniforms_B`: [B, V], [B] in [0, 1) -> ids [B].

    A token of probability 0 is never drawn: the cumulative sum does not rise there, and the total that
    rounding left over (not quite 1) is what the uniform number is a share of.
    """
    wide = torch.float32 if probs_BV.device.type == "mps" else torch.float64
    missing = -probs_BV.shape[1] % CHUNK
    probs_BCK = (F.pad(probs_BV, (0, missing)) if missing else probs_BV).reshape(len(probs_BV), -1, CHUNK)
    sums_BC = probs_BCK.sum(dim=2, dtype=wide)
    before_BC = sums_BC.cumsum(dim=1)
    targets_B1 = uniforms_B.to(probs_BV.device, wide)[:, None] * before_BC[:, -1:]
    chunk_B1 = _first_above(before_BC, targets_B1)
    inside_BK = probs_BCK.gather(1, chunk_B1[:, :, None].expand(-1, -1, CHUNK))[:, 0].to(wide).cumsum(dim=1)
    rest_B1 = targets_B1 - (before_BC - sums_BC).gather(1, chunk_B1)
    rest_B1 = rest_B1.clamp(min=0)  # below 0 by rounding it would stand before the first token that has a probability
    return (chunk_B1 * CHUNK + _first_above(inside_BK, rest_B1)).squeeze(1)


def _first_above(cumulative_BN: Tensor, targets_B1: Tensor) -> Tensor:
    """The first place whose sum is above the target; where rounding leaves none, the last that adds to the sum."""
    above_B1 = torch.searchsorted(cumulative_BN, targets_B1, right=True)
    last_B1 = torch.searchsorted(cumulative_BN, cumulative_BN[:, -1:].contiguous())
    return torch.minimum(above_B1, last_B1)


def choose(logits_BV: Tensor, sampling: Sampling, uniforms_B: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, log-probs under what they were drawn from, log-probs under the whole distribution), each [B].

    The whole distribution is softmax(logits / temperature), and softmax(logits) where the choice is greedy. A greedy
    choice is certain, so that its first log-prob is 0. Without top_k and top_p a draw has both the same.
    """
    if uniforms_B is None:
        ids_B = logits_BV.argmax(dim=-1)
        return ids_B, torch.zeros(len(ids_B), device=ids_B.device), _whole(logits_BV.float(), ids_B)
    probs_BV = probabilities(logits_BV, sampling)
    ids_B = sample(probs_BV, uniforms_B)
    drawn_B = probs_BV.gather(1, ids_B[:, None]).squeeze(1).log()
    if not sampling.is_cut:
        return ids_B, drawn_B, drawn_B
    return ids_B, drawn_B, _whole(_tempered(logits_BV, sampling), ids_B)


def _whole(logits_BV: Tensor, ids_B: Tensor) -> Tensor:
    """log softmax(logits)[id]: [B, V], [B] -> [B]."""
    return logits_BV.gather(1, ids_B[:, None]).squeeze(1) - logits_BV.logsumexp(dim=-1)
