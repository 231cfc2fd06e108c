"""A teacher beside the text: what a larger model of the same tokens says of every position (Hinton et al. 2015)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.model.build import check_reach, load_causal_lm


@dataclass
class Teacher:
    """A model that is not trained, and how much it counts. Its logits are its head's plain product."""

    model: PreTrainedModel
    alpha: float
    """Share of its part of the loss; the rest is the text's."""
    temperature: float
    """Of both sides in that part."""
    tally: Tensor = field(init=False)
    """[cross entropy, divergence, targets] summed since the last look."""

    def __post_init__(self) -> None:
        self.tally = torch.zeros(3, device=self.model.device)

    @torch.no_grad()
    def hidden(self, inputs_BT: Tensor, positions_BT: Tensor | None) -> Tensor:
        """The trunk's output [B · T, width]."""
        given = {} if positions_BT is None else {"position_ids": positions_BT}
        found: Tensor = self.model.base_model(inputs_BT, use_cache=False, **given).last_hidden_state
        return found.flatten(0, 1)

    def head(self) -> Tensor:
        """The head's matrix."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    def add(self, cross_entropy: Tensor, divergence: Tensor, targets: Tensor) -> None:
        """Count a micro-batch; no wait for the device."""
        self.tally += torch.stack([cross_entropy, divergence, targets.float()])

    def look(self, world_size: int) -> dict[str, float]:
        """Means a token, in nats, since the last look, over all ranks."""
        if world_size > 1:
            torch.distributed.all_reduce(self.tally)
        cross_entropy, divergence, targets = self.tally.tolist()
        self.tally.zero_()
        return {"cross_entropy": cross_entropy / targets, "teacher_kl": divergence / targets} if targets else {}


def load_teacher(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    length: int,
    alpha: float,
    temperature: float,
    where: str = "pretrain.context_length",
) -> Teacher:
    """The teacher in `folder`. ConfigError where it does not reach the `length` tokens that the field `where` asks."""
    model = load_causal_lm(folder, dtype=dtype).to(device).eval()
    check_reach(model, length, "the teacher's", where)
    return Teacher(model.requires_grad_(False), alpha, temperature)
