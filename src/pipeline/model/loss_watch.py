"""The losses of a run's steps: kept on the device, looked at once a logging interval; one not finite ends the run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from pipeline.errors import TrainingError

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


class Verdicts:
    """What is said of a run's steps, and when it ends: for a loss or a gradient that is not finite and may not be
    stepped over. A loss that leaps is said.

    `documents` names the documents of a step; `allowed` is how many steps may be stepped over.
    """

    def __init__(
        self, documents: Callable[[int], Sequence[int]], world_size: int, allowed: int, say: Callable[[str], None]
    ) -> None:
        self.documents, self.world_size, self.allowed, self.say = documents, world_size, allowed, say
        self.watch = LossWatch()
        self.skipped = 0
        self.grad_norm = torch.zeros(())

    def steps_over(self, step: int, loss: Tensor, grad_norm: Tensor) -> bool:
        """Takes in a step: this rank's part of its loss and the whole gradient's norm. Returns whether the weights stay
        as they are (the device is waited for only where that is allowed at all). TrainingError at one too many."""
        self.watch.add(step, loss)
        self.grad_norm = grad_norm
        is_bad = self.allowed > 0 and not bool(grad_norm.isfinite())
        self.skipped += is_bad
        if self.skipped > self.allowed:
            self.check()
        return is_bad

    def figures(self) -> tuple[dict[str, float], int]:
        """(mean loss since the last look in nats a token, the last gradient's norm, what was stepped over; how many
        steps). Says which steps leapt or were stepped over; TrainingError for one that is not finite."""
        losses = self.watch.look(self.world_size)
        bad = [each for each in losses if not each.is_finite]
        if bad and self.allowed == 0:
            self._refuse(bad[0])
        for each in bad:
            self.say(f"{self._where(each.step)}: the loss is {each.loss}, stepped over")
        for each in spikes(losses):
            self.say(f"{self._where(each.step)}: the loss leapt to {each.loss:.3f}")
        finite = [each.loss for each in losses if each.is_finite]
        mean = sum(finite) / len(finite) if finite else math.nan
        skipped = {"skipped_steps": float(self.skipped)} if self.skipped else {}
        return {"loss": mean, "grad_norm": float(self.grad_norm), **skipped}, len(losses)

    def check(self) -> None:
        """TrainingError where a step since the last look was not finite, as before a checkpoint is written."""
        losses = self.watch.look(self.world_size, keep=True)
        bad = [each for each in losses if not each.is_finite]
        if bad and not 0 < self.skipped <= self.allowed:
            self._refuse(bad[-1] if self.skipped else bad[0])
        if losses and self.skipped == 0 and not math.isfinite(float(self.grad_norm)):
            self._refuse(StepLoss(losses[-1].step, float(self.grad_norm)), "gradient's norm")

    def _refuse(self, bad: StepLoss, what: str = "loss") -> NoReturn:
        raise TrainingError(
            f"the {what} is {bad.loss}",
            where=self._where(bad.step),
            mend="a lower learning_rate, a longer warmup, or skip_nonfinite; the last checkpoint is kept",
        )

    def _where(self, step: int) -> str:
        """The step and the training documents that its batch reads from."""
        found = self.documents(step)
        shown = ", ".join(map(str, found[:8])) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
        return f"step {step + 1:,} (documents {shown} of train.ds)"
