"""Prompts and the policy's responses as tensors, laid out for training.

Letters: B rows, L prompt and response, T response tokens, N response tokens of all rows in one line.

A row is its prompt and then its response, padded on the right. Attention is causal, so no token sees the padding and
no mask is needed; positions count from 0 as they do in every other stage. Which tokens are whose comes from lengths. A
response may hold text that the policy did not write (what a tool answered, a user's next turn): it is read and never
trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.model.generation import Generation
from pipeline.rl.masking import length_mask


@dataclass(frozen=True)
class Rollout:
    """Prompts with their responses."""

    ids_BL: Tensor
    prompt_lengths_B: Tensor
    response_ids_BT: Tensor
    """Padded on the right."""
    lengths_B: Tensor
    """Tokens of each response, the stop token included; at least 1."""
    is_ended_B: Tensor
    """True where the response came to its end: the stop token, or a stop string."""
    response_mask_BT: Tensor
    """True for a token the policy wrote."""
    sampled_BT: Tensor
    """Log-prob of each such token when it was drawn, zero elsewhere."""
    is_stopped_B: Tensor
    """True where the last token is the stop token."""

    @property
    def targets_N(self) -> Tensor:
        """The ids of all tokens the policy wrote, row by row."""
        return self.response_ids_BT[self.response_mask_BT]

    @property
    def before_N(self) -> Tensor:
        """For every such token the place before it, where it is predicted and its value read: into [B * L]."""
        rows_B1 = torch.arange(len(self.lengths_B), device=self.ids_BL.device)[:, None] * self.ids_BL.shape[1]
        columns_T = torch.arange(self.response_ids_BT.shape[1], device=self.ids_BL.device)
        return (rows_B1 + self.prompt_lengths_B[:, None] - 1 + columns_T)[self.response_mask_BT]

    def select(self, rows: Tensor) -> Rollout:
        """These rows only, without the columns that they all leave empty; T stays."""
        longest = max((self.prompt_lengths_B[rows] + self.lengths_B[rows]).tolist(), default=1)
        return Rollout(
            ids_BL=self.ids_BL[rows, :longest],
            prompt_lengths_B=self.prompt_lengths_B[rows],
            response_ids_BT=self.response_ids_BT[rows],
            lengths_B=self.lengths_B[rows],
            is_ended_B=self.is_ended_B[rows],
            response_mask_BT=self.response_mask_BT[rows],
            sampled_BT=self.sampled_BT[rows],
            is_stopped_B=self.is_stopped_B[rows],
        )

    def spread(self, values_N: Tensor) -> Tensor:
        """One number a response token, back at its place: [N] -> [B, T], zero outside the responses."""
        mask_BT = self.response_mask_BT
        return torch.zeros(mask_BT.shape, dtype=values_N.dtype, device=values_N.device).masked_scatter(
            mask_BT, values_N
        )


@dataclass(frozen=True)
class Experience:
    """A rollout with what an update needs; tensors are [B, T], zero outside the responses."""

    rollout: Rollout
    is_trained_BT: Tensor
    """True for a token that counts in the losses: one the policy wrote, in a response that is not left out."""
    logprobs_BT: Tensor
    reference_BT: Tensor
    advantages_BT: Tensor
    values_BT: Tensor
    """With `returns_BT`: the critic's; zeros where there is none."""
    returns_BT: Tensor

    def select(self, rows: Tensor) -> Experience:
        """These rows only."""
        return Experience(
            rollout=self.rollout.select(rows),
            is_trained_BT=self.is_trained_BT[rows],
            logprobs_BT=self.logprobs_BT[rows],
            reference_BT=self.reference_BT[rows],
            advantages_BT=self.advantages_BT[rows],
            values_BT=self.values_BT[rows],
            returns_BT=self.returns_BT[rows],
        )


def rollout_of(
    prompts: Sequence[Sequence[int]],
    written: Generation,
    pad_id: int,
    device: torch.device,
    response_mask_BT: Tensor | None = None,
    stop_id: int | None = None,
) -> Rollout:
    """The rollout of `prompts` (ids, none empty) and what was written, on `device`; as `assemble` otherwise."""
    used = int(written.lengths_B.max())
    return assemble(
        prompts,
        written.ids_BT[:, :used].to(device),
        written.lengths_B.to(device),
        written.is_ended_B.to(device),
        pad_id,
        written.logprobs_BT[:, :used].to(device),
        None if response_mask_BT is None else response_mask_BT[:, :used].to(device),
        stop_id,
    )


def assemble(
    prompts: Sequence[Sequence[int]],
    response_ids_BT: Tensor,
    lengths_B: Tensor,
    is_ended_B: Tensor,
    pad_id: int,
    sampled_BT: Tensor | None = None,
    response_mask_BT: Tensor | None = None,
    stop_id: int | None = None,
) -> Rollout:
    """The rollout of `prompts` (ids, none empty) and their responses, on the device of these; the policy wrote all of
    them unless `response_mask_BT` says otherwise. What has ended has ended with the stop token, unless `stop_id` says
    which that is: then it may have been a stop string."""
    rows = [
        [*prompt, *ids[:length]]
        for prompt, ids, length in zip(prompts, response_ids_BT.tolist(), lengths_B.tolist(), strict=True)
    ]
    whole_BT = length_mask(lengths_B, response_ids_BT.shape[1])
    last_B = response_ids_BT.gather(1, lengths_B[:, None] - 1)[:, 0]
    return Rollout(
        ids_BL=pad_right(rows, pad_id).to(response_ids_BT.device),
        prompt_lengths_B=torch.tensor([len(prompt) for prompt in prompts], device=response_ids_BT.device),
        response_ids_BT=response_ids_BT,
        lengths_B=lengths_B,
        is_ended_B=is_ended_B,
        response_mask_BT=whole_BT if response_mask_BT is None else whole_BT & response_mask_BT,
        sampled_BT=torch.zeros(response_ids_BT.shape, device=lengths_B.device) if sampled_BT is None else sampled_BT,
        is_stopped_B=is_ended_B if stop_id is None else is_ended_B & (last_B == stop_id),
    )


def concatenate(parts: Sequence[Rollout], pad_id: int) -> Rollout:
    """The rows of all parts, in their order."""
    if len(parts) == 1:
        return parts[0]
    length, used = (
        max(sizes) for sizes in zip(*((part.ids_BL.shape[1], part.response_ids_BT.shape[1]) for part in parts))
    )

    def joined(tensors: list[Tensor], width: int, value: int = 0) -> Tensor:
        return torch.cat([F.pad(tensor, (0, width - tensor.shape[1]), value=value) for tensor in tensors])

    return Rollout(
        ids_BL=joined([part.ids_BL for part in parts], length, pad_id),
        prompt_lengths_B=torch.cat([part.prompt_lengths_B for part in parts]),
        response_ids_BT=joined([part.response_ids_BT for part in parts], used, pad_id),
        lengths_B=torch.cat([part.lengths_B for part in parts]),
        is_ended_B=torch.cat([part.is_ended_B for part in parts]),
        response_mask_BT=joined([part.response_mask_BT for part in parts], used),
        sampled_BT=joined([part.sampled_BT for part in parts], used),
        is_stopped_B=torch.cat([part.is_stopped_B for part in parts]),
    )


def closed_rows(rollout: Rollout, suffix_ids: Sequence[int]) -> list[list[int]]:
    """What a reward model reads: each row to its end, with the suffix that it was trained on where the row lacks it."""
    totals = (rollout.prompt_lengths_B + rollout.lengths_B).tolist()
    return [
        ids[:total] + ([] if is_stopped else list(suffix_ids))
        for ids, total, is_stopped in zip(rollout.ids_BL.tolist(), totals, rollout.is_stopped_B.tolist(), strict=True)
    ]


def last_turns(rollout: Rollout) -> list[list[int]]:
    """The ids of the last turn that the policy wrote in each row, without the stop token."""
    found = []
    lengths, stopped = rollout.lengths_B.tolist(), rollout.is_stopped_B.tolist()
    rows = zip(rollout.response_ids_BT.tolist(), rollout.response_mask_BT.tolist(), lengths, stopped, strict=True)
    for ids, is_policys, length, is_stopped in rows:
        end = max(place for place in range(length) if is_policys[place]) + 1
        start = max((place + 1 for place in range(end) if not is_policys[place]), default=0)
        was_replied_to = end < length  # cut off in the reply
        found.append(ids[start : end - int(is_stopped or was_replied_to)])
    return found


def turns(response_mask_BT: Tensor) -> Tensor:
    """How often the policy spoke in each row. [B, T] -> [B]"""
    before_BT = F.pad(response_mask_BT[:, :-1], (1, 0))
    return (response_mask_BT & ~before_BT).sum(dim=1)


def pad_right(rows: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Ids [B, L] with the padding on the right."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *([pad_id] * (longest - len(row)))] for row in rows])


def microbatches(
    lengths_B: Tensor, size: int, rows: Tensor | None = None, token_budget: int | None = None
) -> list[Tensor]:
    """Indices of the rows (all unless given) in groups, rows of like length together.

    A group has at most `size` rows; with a `token_budget` instead as many as fit into it, padding included (one row of
    more than the budget is a group of its own).
    """
    chosen = torch.arange(len(lengths_B), device=lengths_B.device) if rows is None else rows
    order = lengths_B[chosen].argsort(descending=True, stable=True)
    sorted_B = chosen[order]
    if token_budget is None:
        return [part for part in torch.split(sorted_B, size) if len(part)]
    lengths, parts, start = lengths_B[sorted_B].tolist(), [], 0
    while start < len(lengths):
        end = start + max(1, token_budget // lengths[start])  # the first is the longest
        parts.append(sorted_B[start:end])
        start = end
    return parts


CACHED_TOKENS = 2048
"""Tokens of a forward without gradients on a CPU, at most, so that what the layers hand on stays in its cache."""


def in_cache(parts: list[Tensor], lengths_B: Tensor) -> list[Tensor]:
    """`microbatches` for forwards without gradients: on a CPU cut further, to CACHED_TOKENS each. A quarter less time
    than 64 rows of 96 at once, 5.5 M parameters; on a GPU as they are."""
    if lengths_B.device.type != "cpu":
        return parts
    sizes = [max(1, CACHED_TOKENS // int(lengths_B[part[0]])) for part in parts]  # the first row is the longest
    return [piece for part, size in zip(parts, sizes, strict=True) for piece in torch.split(part, size)]
