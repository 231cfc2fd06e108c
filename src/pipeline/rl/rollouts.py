"""Prompts and the policy's responses as tensors, laid out for training.

Letters: B rows, L prompt and response, T response tokens, N response tokens of all rows in one line.

A row is its prompt and then its response, padded on the right. Attention is causal, so no token sees the padding and
no mask is needed; positions count from 0 as they do in every other stage. Which tokens are whose comes from lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.model.generation import Sampling, generate
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
    """True where the response ends with the stop token."""

    @property
    def response_mask_BT(self) -> Tensor:
        """True for a token the policy wrote."""
        return length_mask(self.lengths_B, self.response_ids_BT.shape[1])

    @property
    def targets_N(self) -> Tensor:
        """The ids of all response tokens, row by row."""
        return self.response_ids_BT[self.response_mask_BT]

    @property
    def before_N(self) -> Tensor:
        """For every response token the place before it, where it is predicted and its value read: into [B * L]."""
        rows_B1 = torch.arange(len(self.lengths_B), device=self.ids_BL.device)[:, None] * self.ids_BL.shape[1]
        columns_T = torch.arange(self.response_ids_BT.shape[1], device=self.ids_BL.device)
        return (rows_B1 + self.prompt_lengths_B[:, None] - 1 + columns_T)[self.response_mask_BT]

    def select(self, rows: Tensor) -> Rollout:
        """These rows only, without the columns that they all leave empty; T stays."""
        longest = int((self.prompt_lengths_B[rows] + self.lengths_B[rows]).max())
        return Rollout(
            ids_BL=self.ids_BL[rows, :longest],
            prompt_lengths_B=self.prompt_lengths_B[rows],
            response_ids_BT=self.response_ids_BT[rows],
            lengths_B=self.lengths_B[rows],
            is_ended_B=self.is_ended_B[rows],
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
    logprobs_BT: Tensor
    values_BT: Tensor
    advantages_BT: Tensor
    returns_BT: Tensor

    def select(self, rows: Tensor) -> Experience:
        """These rows only."""
        return Experience(
            self.rollout.select(rows),
            self.logprobs_BT[rows],
            self.values_BT[rows],
            self.advantages_BT[rows],
            self.returns_BT[rows],
        )


def roll_out(
    policy: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    uniforms_BT: Tensor,
    *,
    stop_id: int,
    pad_id: int,
    temperature: float,
    batch_size: int,
) -> tuple[Rollout, Tensor]:
    """The policy's responses to `prompts`, and their log-probs as they were sampled, [B, T].

    `uniforms_BT` [B, greatest response length] is all the randomness. Precision is that of the caller's autocast.
    """
    written = generate(
        policy,
        prompts,
        max_new_tokens=uniforms_BT.shape[1],
        stop_ids=[stop_id],
        pad_id=pad_id,
        sampling=Sampling(temperature),
        uniforms_BT=uniforms_BT,
        batch_size=batch_size,
    )
    device, longest = policy.device, int(written.lengths_B.max())
    ids_BT, lengths_B = written.ids_BT[:, :longest].to(device), written.lengths_B.to(device)
    rollout = assemble(prompts, ids_BT, lengths_B, written.is_ended_B.to(device), pad_id)
    return rollout, written.logprobs_BT[:, :longest].to(device)


def assemble(
    prompts: Sequence[Sequence[int]], response_ids_BT: Tensor, lengths_B: Tensor, is_ended_B: Tensor, pad_id: int
) -> Rollout:
    """The rollout of `prompts` (ids, none empty) and their responses, on the device of these."""
    rows = [
        [*prompt, *ids[:length]]
        for prompt, ids, length in zip(prompts, response_ids_BT.tolist(), lengths_B.tolist(), strict=True)
    ]
    return Rollout(
        ids_BL=pad_right(rows, pad_id).to(response_ids_BT.device),
        prompt_lengths_B=torch.tensor([len(prompt) for prompt in prompts], device=response_ids_BT.device),
        response_ids_BT=response_ids_BT,
        lengths_B=lengths_B,
        is_ended_B=is_ended_B,
    )


def closed_rows(rollout: Rollout, suffix_ids: Sequence[int]) -> list[list[int]]:
    """What a reward model reads: each row to its end, one that was cut off with the suffix that it was trained on."""
    totals = (rollout.prompt_lengths_B + rollout.lengths_B).tolist()
    return [
        ids[:total] + ([] if is_ended else list(suffix_ids))
        for ids, total, is_ended in zip(rollout.ids_BL.tolist(), totals, rollout.is_ended_B.tolist(), strict=True)
    ]


def pad_right(rows: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Ids [B, L] with the padding on the right."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *([pad_id] * (longest - len(row)))] for row in rows])


def microbatches(lengths_B: Tensor, size: int, rows: Tensor | None = None) -> list[Tensor]:
    """Indices of the rows (all unless given) in groups of at most `size`, rows of like length together."""
    chosen = torch.arange(len(lengths_B), device=lengths_B.device) if rows is None else rows
    order = lengths_B[chosen].argsort(descending=True, stable=True)
    return [part for part in torch.split(chosen[order], size) if len(part)]
