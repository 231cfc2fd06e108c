"""Text from a causal language model: batched, cached, exact, and the same whatever leaves the batch.

Small functions that nest: logits to probabilities, sample, decode one token, generate a batch, generate.
Works on any transformers causal LM. Letters: B rows, P prompt length, T new tokens, L prompt and new tokens
so far, V vocabulary.

Randomness is one number in [0, 1) a row and step, drawn before anything is generated and turned into a token
by inverting the cumulative distribution. What a row says then depends on neither its batch nor the ranks it
was split over, and a row that has ended can leave the batch without changing the others.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

SHRINK_BELOW = 0.8
"""Ended rows leave when no more than this share of the batch is unfinished: leaving copies the cache of all
others.
"""


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Temperature 0 is greedy; top_k 0 and top_p 1 leave the distribution whole."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True)
class Generation:
    """What was written, a row a prompt, on the CPU."""

    ids_BT: Tensor
    """Token ids, padded right with the pad id; T is the greatest number of new tokens."""
    lengths_B: Tensor
    """Tokens written, the stop token included; at least 1."""
    is_ended_B: Tensor
    """True where the row ended with a stop token; False where it was cut off."""
    logprobs_BT: Tensor
    """Log-probability of each token under the distribution it was drawn from (0 when greedy), 0 after the
    end.
    """

    def responses(self) -> list[list[int]]:
        """The written ids of each row, without padding."""
        return [ids[:length] for ids, length in zip(self.ids_BT.tolist(), self.lengths_B.tolist(), strict=True)]


def draw_uniforms(rows: int, steps: int, generator: torch.Generator) -> Tensor:
    """Float64 [rows, steps] in [0, 1): all the randomness that `generate` takes."""
    return torch.rand(rows, steps, dtype=torch.float64, generator=generator)


def probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """softmax(logits / temperature), cut to the top_k largest, then to the nucleus (Holtzman et al. 2020).
    [B, V]

    The nucleus is the smallest set of most likely tokens whose probability reaches top_p; at least one token.
    Tokens as likely as the k-th are kept with it. What is cut off has probability 0, the rest sums to 1.
    """
    logits_BV = logits_BV.float() / sampling.temperature
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


def sample(probs_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """The token at which the cumulative distribution passes `uniforms_B`: [B, V], [B] in [0, 1) -> ids [B].

    A token of probability 0 is never drawn: the cumulative sum does not rise there, and the total that
    rounding left over (not quite 1) is what the uniform number is a share of.
    """
    wide = torch.float32 if probs_BV.device.type == "mps" else torch.float64
    cumulative_BV = probs_BV.to(wide).cumsum(dim=-1)  # five times as fast as cumsum(dtype=wide)
    targets_B1 = uniforms_B.to(probs_BV.device, wide)[:, None] * cumulative_BV[:, -1:]
    ids_B = torch.searchsorted(cumulative_BV, targets_B1, right=True).squeeze(-1)
    return ids_B.clamp(max=probs_BV.shape[-1] - 1)


class _RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer, [B, heads, L, channels], in memory that has room for all that will be written.

    DynamicLayer copies everything it holds at every token, which is a fifth of the time of decoding 200 of them.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new positions; all keys and values so far."""
        held = self.get_seq_length()
        if held == 0:
            self.lazy_initialization(key_states, value_states)
            self.key_room, self.value_room = (
                states.new_empty(*states.shape[:2], self.room, states.shape[3]) for states in (key_states, value_states)
            )
        end = held + key_states.shape[2]
        self.key_room[:, :, held:end] = key_states
        self.value_room[:, :, held:end] = value_states
        self.keys, self.values = self.key_room[:, :, :end], self.value_room[:, :, :end]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows."""
        end = self.keys.shape[2]
        self.key_room, self.value_room = self.key_room[beam_idx], self.value_room[beam_idx]
        self.keys, self.values = self.key_room[:, :, :end], self.value_room[:, :, :end]


class Decoder:
    """A model in the middle of writing a batch: its cache, which columns are real, and where each row stands.

    `logits_BV` are those of the next token. Prompts are padded on the left, so that all rows write side by
    side.
    """

    def __init__(self, model: PreTrainedModel, prompt_ids_BP: Tensor, is_real_BP: Tensor, max_new_tokens: int) -> None:
        parameters = inspect.signature(model.forward).parameters
        self.model = model
        self.cache = DynamicCache(config=model.config)
        room = prompt_ids_BP.shape[1] + max_new_tokens
        # Plain attention only: sliding windows and recurrent states have layers of their own kind.
        self.cache.layers = [_RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in self.cache.layers]
        self.takes_positions = "position_ids" in parameters  # not where positions are biases (BLOOM, MPT)
        self.is_recurrent = "cache_params" in parameters  # Mamba: a state a layer, no keys to mask
        self.is_real_BL = is_real_BP.long()
        positions_BP = (self.is_real_BL.cumsum(dim=1) - 1).clamp(min=0)
        self.positions_B = positions_BP[:, -1]
        self.logits_BV = self._forward(prompt_ids_BP, positions_BP)

    def decode_one(self, ids_B: Tensor) -> None:
        """Write one token a row."""
        self.positions_B = self.positions_B + 1
        self.is_real_BL = torch.nn.functional.pad(self.is_real_BL, (0, 1), value=1)
        self.logits_BV = self._forward(ids_B[:, None], self.positions_B[:, None])

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these (indices into the present batch). Their next token has been chosen."""
        self.cache.reorder_cache(rows)
        self.is_real_BL, self.positions_B = self.is_real_BL[rows], self.positions_B[rows]

    def _forward(self, ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
        arguments: dict[str, Any]
        if self.is_recurrent:
            is_prefill = ids_BT.shape == self.is_real_BL.shape
            arguments = {"cache_params": self.cache, "attention_mask": self.is_real_BL if is_prefill else None}
        else:
            arguments = {"past_key_values": self.cache, "attention_mask": self.is_real_BL}
        if self.takes_positions:
            arguments["position_ids"] = positions_BT
        output = self.model(input_ids=ids_BT, use_cache=True, logits_to_keep=1, **arguments)
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids [B, P] with the padding on the left, and True where they are real, [B, P]."""
    longest = max(len(prompt) for prompt in prompts)
    ids_BP = torch.full((len(prompts), longest), pad_id)
    for row, prompt in enumerate(prompts):
        ids_BP[row, longest - len(prompt) :] = torch.tensor(prompt)
    lengths_B = torch.tensor([len(prompt) for prompt in prompts])
    return ids_BP, torch.arange(longest)[None, :] >= longest - lengths_B[:, None]


@torch.no_grad()
def generate_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    sampling: Sampling,
    uniforms_BT: Tensor | None,
) -> Generation:
    """As `generate`, for prompts that go through the model side by side."""
    device = model.device
    prompt_ids_BP, is_real_BP = pad_left(prompts, pad_id)
    stops_S = torch.tensor(stop_ids, device=device)
    rows = len(prompts)
    ids_BT = torch.full((rows, max_new_tokens), pad_id, device=device)
    logprobs_BT = torch.zeros(rows, max_new_tokens, device=device)
    lengths_B = torch.full((rows,), max_new_tokens, device=device)
    is_ended_B = torch.zeros(rows, dtype=torch.bool, device=device)
    uniforms_BT = None if uniforms_BT is None else uniforms_BT.to(device)

    decoder = Decoder(model, prompt_ids_BP.to(device), is_real_BP.to(device), max_new_tokens)
    present_B = torch.arange(rows, device=device)  # the rows still in the batch
    for t in range(max_new_tokens):
        if uniforms_BT is None:
            next_B = decoder.logits_BV.argmax(dim=-1)
        else:
            probs_BV = probabilities(decoder.logits_BV, sampling)
            next_B = sample(probs_BV, uniforms_BT[present_B, t])
            logprobs_BT[present_B, t] = probs_BV.gather(1, next_B[:, None]).squeeze(1).log()
        ids_BT[present_B, t] = next_B
        ends_B = torch.isin(next_B, stops_S) & ~is_ended_B[present_B]
        lengths_B[present_B[ends_B]] = t + 1
        is_ended_B[present_B[ends_B]] = True
        going = (~is_ended_B[present_B]).nonzero().squeeze(1)
        if len(going) == 0 or t + 1 == max_new_tokens:
            break
        if len(going) <= SHRINK_BELOW * len(present_B):
            decoder.keep(going)
            present_B, next_B = present_B[going], next_B[going]
        decoder.decode_one(next_B)

    is_after_BT = torch.arange(max_new_tokens, device=device)[None, :] >= lengths_B[:, None]
    ids_BT, logprobs_BT = ids_BT.masked_fill(is_after_BT, pad_id), logprobs_BT.masked_fill(is_after_BT, 0)
    return Generation(ids_BT.cpu(), lengths_B.cpu(), is_ended_B.cpu(), logprobs_BT.cpu())


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    sampling: Sampling = GREEDY,
    uniforms_BT: Tensor | None = None,
    batch_size: int = 64,
) -> Generation:
    """The model's answers to `prompts` (ids, none empty), in their order.

    `model` is any transformers causal LM in eval mode; `stop_ids` end a row and are part of it. `uniforms_BT`
    ([prompts, max_new_tokens], see `draw_uniforms`) is needed unless `sampling` is greedy. Prompts of like
    length go together, `batch_size` at a time. Precision is that of the caller's autocast.
    """
    assert all(prompts), "an empty prompt leaves nothing to predict from"
    assert (sampling.temperature == 0) == (uniforms_BT is None), "greedy takes no randomness, sampling needs it"
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    parts = []
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        part = generate_batch(
            model,
            [prompts[row] for row in chunk],
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            pad_id=pad_id,
            sampling=sampling,
            uniforms_BT=None if uniforms_BT is None else uniforms_BT[chunk],
        )
        parts.append(part)
    place = torch.tensor(order).argsort()
    return Generation(
        ids_BT=torch.cat([part.ids_BT for part in parts])[place],
        lengths_B=torch.cat([part.lengths_B for part in parts])[place],
        is_ended_B=torch.cat([part.is_ended_B for part in parts])[place],
        logprobs_BT=torch.cat([part.logprobs_BT for part in parts])[place],
    )


@torch.no_grad()
def stream(
    model: PreTrainedModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    sampling: Sampling = GREEDY,
    uniforms_T: Tensor | None = None,
) -> Iterator[int]:
    """The ids of one answer as they are written, without the stop token. As `generate` otherwise."""
    assert (sampling.temperature == 0) == (uniforms_T is None), "greedy takes no randomness, sampling needs it"
    prompt_ids_BP = torch.tensor([list(prompt)], device=model.device)
    decoder = Decoder(model, prompt_ids_BP, torch.ones_like(prompt_ids_BP), max_new_tokens)
    for t in range(max_new_tokens):
        if uniforms_T is None:
            next_B = decoder.logits_BV.argmax(dim=-1)
        else:
            next_B = sample(probabilities(decoder.logits_BV, sampling), uniforms_T[t : t + 1])
        if int(next_B) in stop_ids:
            return
        yield int(next_B)
        if t + 1 < max_new_tokens:
            decoder.decode_one(next_B)
