"""The losses of a run's steps: kept on the device, looked at once a logging interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SPIKE = 8.0
"""Deviations above the interval's median from which a step's loss is a spike."""
FEWEST = 10
"""Steps of an interval below which nothing is called a spike."""


class StepLoss(NamedTuple):
    """The loss of one optimiser step, in nats a token."""

    step: int
    loss: float

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss)


class LossWatch:
    """The steps since the last look. Each rank adds its part of a step's loss; `look` sums them over the ranks."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.parts: list[Tensor] = []

    def add(self, step: int, part: Tensor) -> None:
        """This rank's part of the loss of `step`; no sync with the device."""
        self.steps.append(step)
        self.parts.append(part.detach())

    def look(self, world_size: int = 1, *, keep: bool = False) -> list[StepLoss]:
        """All since the last look, in one sync; `keep` leaves them for the next. Collective over several ranks."""
        if not self.steps:
            return []
        losses = torch.stack(self.parts)
        if world_size > 1:
            torch.distributed.all_reduce(losses)
        found = [StepLoss(step, loss) for step, loss in zip(self.steps, losses.tolist(), strict=True)]
        if not keep:
            self.steps, self.parts = [], []
        return found


def spikes(losses: Sequence[StepLoss]) -> list[StepLoss]:
    """Steps whose loss stands more than SPIKE robust deviations (1.48 × the median distance) above the median."""
    values = [each.loss for each in losses if each.is_finite]
    if len(values) < FEWEST:
        return []
    middle = statistics.median(values)
    spread = 1.4826 * statistics.median(abs(value - middle) for value in values)
    return [each for each in losses if each.is_finite and spread > 0 and each.loss > middle + SPIKE * spread]
