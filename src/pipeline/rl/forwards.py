"""What the models say of a rollout: log-probs, entropies and values of its response tokens, and of those only.

Letters: B rows, L prompt and response, T response tokens, N response tokens of all rows in one line, V vocabulary, D
width. Models are transformers' and in eval mode (no dropout); precision is that of the caller's autocast, and what
comes back is float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.rl.logprobs import chunk_of, logprobs_of_hidden
from pipeline.rl.losses import entropy
from pipeline.rl.rollouts import Rollout, in_cache, microbatches


@dataclass(frozen=True)
class Cut:
    """How a batch is cut for a forward: as many `rows` at most, or as many as fit into `tokens`, padding included."""

    rows: int
    tokens: int | None = None

    def parts(self, rollout: Rollout, rows: Tensor | None = None) -> list[Tensor]:
        """Indices of the rows (all unless given) in groups, rows of like length together."""
        return microbatches(rollout.prompt_lengths_B + rollout.lengths_B, self.rows, rows, self.tokens)


@dataclass(frozen=True)
class Reading:
    """How the log-probs of a model are taken."""

    temperature: float
    """The logits are divided by it, as they were in sampling."""
    plain_head: bool
    """Whether logits are the trunk's output times the head's weight and nothing else (`has_plain_head`): only then can
    they be taken in chunks."""


def precision(device: torch.device, bf16: bool) -> torch.autocast:
    """bf16 products with the weights as they are, or nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)


def token_logprobs(policy: PreTrainedModel, rollout: Rollout, reading: Reading) -> Tensor:
    """log pi(token | what stands before it) of the response tokens, [B, T], zero elsewhere."""
    if _in_chunks(policy, rollout, reading):
        return rollout.spread(_chunked(policy, rollout, reading, has_entropy=False)[0])
    logits_NV = response_logits(policy, rollout, reading.temperature)
    return rollout.spread(-F.cross_entropy(logits_NV, rollout.targets_N, reduction="none"))


def logprobs_and_entropies(policy: PreTrainedModel, rollout: Rollout, reading: Reading) -> tuple[Tensor, Tensor]:
    """As `token_logprobs`, with the entropy in nats of the distribution of each token, [B, T] each."""
    if _in_chunks(policy, rollout, reading):
        logprobs_N, entropies_N = _chunked(policy, rollout, reading, has_entropy=True)
    else:
        all_NV = response_logits(policy, rollout, reading.temperature).log_softmax(dim=-1)
        logprobs_N, entropies_N = all_NV.gather(1, rollout.targets_N[:, None])[:, 0], entropy(all_NV)
    return rollout.spread(logprobs_N), rollout.spread(entropies_N)


def _in_chunks(policy: PreTrainedModel, rollout: Rollout, reading: Reading) -> bool:
    """Whether the logits of all response tokens are too many to be held, or to stay in a CPU's cache."""
    vocabulary = policy.get_output_embeddings().weight.shape[0]
    is_cached = rollout.ids_BL.device.type == "cpu" and not torch.is_grad_enabled()
    return reading.plain_head and int(rollout.response_mask_BT.sum()) > chunk_of(vocabulary, is_cached=is_cached)


def _chunked(
    policy: PreTrainedModel, rollout: Rollout, reading: Reading, *, has_entropy: bool
) -> tuple[Tensor, Tensor]:
    hidden_BLD = policy.base_model(input_ids=rollout.ids_BL, use_cache=False).last_hidden_state
    hidden_ND = hidden_BLD.flatten(0, 1).index_select(0, rollout.before_N)
    head_VD = policy.get_output_embeddings().weight
    return logprobs_of_hidden(hidden_ND, head_VD, rollout.targets_N, reading.temperature, has_entropy=has_entropy)


def response_logits(policy: PreTrainedModel, rollout: Rollout, temperature: float) -> Tensor:
    """logits / temperature at the response tokens, float32 [N, V].

    The hidden states are narrowed to those places on their way into the head: most of a row is prompt and padding,
    and [B, L, V] logits are the largest tensor there is. The model's own forward runs the head, so that whatever it
    does around it (a bias, a scale, a soft cap) is done.
    """
    before_N = rollout.before_N

    def narrow(head: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor]:
        return (arguments[0].flatten(0, 1).index_select(0, before_N)[None],)

    hook = policy.get_output_embeddings().register_forward_pre_hook(narrow)
    try:
        logits_NV: Tensor = policy(input_ids=rollout.ids_BL, use_cache=False).logits[0]
    finally:
        hook.remove()
    return logits_NV.float() if temperature == 1 else logits_NV.float() / temperature


def response_values(critic: PreTrainedModel, rollout: Rollout, mean: float, std: float) -> Tensor:
    """V of the text before each response token, [B, T], zero outside the responses.

    `critic` is a sequence-classification model of one label; its raw number x is read as (x - mean) / std, the units
    of the normalised reward.
    """
    hidden_BLD = critic.base_model(input_ids=rollout.ids_BL, use_cache=False).last_hidden_state
    hidden_ND = hidden_BLD.flatten(0, 1).index_select(0, rollout.before_N)
    return rollout.spread((critic.score(hidden_ND)[:, 0].float() - mean) / std)


@torch.no_grad()
def sweep(
    rollout: Rollout, cut: Cut, count: int, function: Callable[[Rollout], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """`function` over all rows, some of like length at a time: `count` tensors of [rows, T] each, together [B, T]."""
    shape, device = rollout.response_ids_BT.shape, rollout.ids_BL.device
    totals = tuple(torch.zeros(shape, device=device) for _ in range(count))
    lengths_B = rollout.prompt_lengths_B + rollout.lengths_B
    for rows in in_cache(cut.parts(rollout), lengths_B):
        for total, part in zip(totals, function(rollout.select(rows)), strict=True):
            total[rows] = part
    return totals
