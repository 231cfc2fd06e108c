"""The losses of a run's steps: kept on the device, looked at once a logging interval; one not finite ends the run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from pipeline.errors import TrainingError

SPIKE = 8.0
"""Deviations above the median from which a step's loss is a spike."""
FEWEST = 10
"""Steps below which nothing is called a spike."""
RECENT = 20
"""Steps before an interval with which it is compared, so that one of a step or two is no exception."""


class StepLoss(NamedTuple):
    """The loss of one optimiser step, in nats a token, and the norm of its gradient."""

    step: int
    loss: float
    grad_norm: float = 0.0

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def fault(self) -> str:
        """What of it is not finite."""
        return (
            f"the loss is {self.loss}" if not math.isfinite(self.loss) else f"the gradient's norm is {self.grad_norm}"
        )


class LossWatch:
    """The steps since the last look. Each rank adds its part of a step's loss; `look` sums them over the ranks."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.parts: list[Tensor] = []
        self.norms: list[Tensor] = []

    def add(self, step: int, part: Tensor, grad_norm: Tensor) -> None:
        """This rank's part of the loss of `step`, and the whole gradient's norm; no sync with the device."""
        self.steps.append(step)
        self.parts.append(part.detach())
        self.norms.append(grad_norm.detach())

    def look(self, world_size: int = 1, *, keep: bool = False) -> list[StepLoss]:
        """All since the last look, in one sync; `keep` leaves them for the next. Collective over several ranks."""
        if not self.steps:
            return []
        losses = torch.stack(self.parts)
        if world_size > 1:
            torch.distributed.all_reduce(losses)
        figures = torch.stack([losses, torch.stack(self.norms)]).tolist()
        found = [StepLoss(*each) for each in zip(self.steps, *figures, strict=True)]
        if not keep:
            self.steps, self.parts, self.norms = [], [], []
        return found


def spikes(losses: Sequence[StepLoss], before: Sequence[float] = ()) -> list[StepLoss]:
    """Steps whose loss stands more than SPIKE robust deviations (1.48 × the median distance) above the median of them
    all and of the losses `before` them, behind one that does not: a loss that falls from its start has not leapt."""
    values = [*before, *(each.loss for each in losses if math.isfinite(each.loss))]
    if len(values) < FEWEST:
        return []
    middle = statistics.median(values)
    bar = middle + SPIKE * 1.4826 * statistics.median(abs(value - middle) for value in values)
    was_below, found = any(value <= bar for value in before), []
    for each in losses:
        if math.isfinite(each.loss) and was_below and each.loss > bar > middle:
            found.append(each)
        was_below = was_below or each.loss <= bar
    return found


class Verdicts:
    """What is said of a run's steps, and when it ends: for a loss or a gradient that is not finite and may not be
    stepped over. A loss that leaps is said.

    `documents` names the documents of a step; `allowed` is how many steps may be stepped over: it decides whether a run
    comes to its end, never what it ends with.
    """

    def __init__(
        self, documents: Callable[[int], Sequence[int]], world_size: int, allowed: int, say: Callable[[str], None]
    ) -> None:
        self.documents, self.world_size, self.allowed, self.say = documents, world_size, allowed, say
        self.watch = LossWatch()
        self.recent: list[float] = []
        """The losses looked at last, RECENT at most."""
        self.skipped = 0
        self.saved_at = 0
        """The step of the last checkpoint."""

    def steps_over(self, step: int, loss: Tensor, grad_norm: Tensor) -> bool:
        """Takes in a step: this rank's part of its loss and the whole gradient's norm. Returns whether the weights stay
        as they are (the device is waited for only where that is allowed at all). TrainingError at one too many."""
        self.watch.add(step, loss, grad_norm)
        if self.allowed == 0:
            return False
        whole = loss.detach().clone()
        if self.world_size > 1:
            torch.distributed.all_reduce(whole)
        is_bad = not bool(whole.isfinite() & grad_norm.isfinite())
        self.skipped += is_bad
        if self.skipped > self.allowed:
            self.check()
        return is_bad

    def figures(self) -> tuple[dict[str, float], int]:
        """(mean loss since the last look in nats a token, the last gradient's norm, what was stepped over; how many
        steps). Says which steps leapt or were stepped over; TrainingError for one that is not finite."""
        losses = self.watch.look(self.world_size)
        for each in losses:
            if not each.is_finite:
                if self.allowed == 0:
                    self._refuse(each)
                self.say(f"{self._where(each.step)}: {each.fault}, stepped over")
        for each in spikes(losses, self.recent):
            self.say(f"{self._where(each.step)}: the loss leapt to {each.loss:.3f} ({self._last_good()})")
        finite = [each.loss for each in losses if math.isfinite(each.loss)]
        self.recent = [*self.recent, *finite][-RECENT:]
        mean = sum(finite) / len(finite) if finite else math.nan
        skipped = {"skipped_steps": float(self.skipped)} if self.skipped else {}
        return {"loss": mean, "grad_norm": losses[-1].grad_norm, **skipped}, len(losses)

    def check(self) -> list[StepLoss]:
        """The steps since the last look, which are left for it. TrainingError where one was not finite, as before a
        checkpoint is written."""
        losses = self.watch.look(self.world_size, keep=True)
        bad = [each for each in losses if not each.is_finite]
        if bad and not 0 < self.skipped <= self.allowed:
            self._refuse(bad[-1] if self.skipped else bad[0])
        return losses

    def state(self, losses: Sequence[StepLoss]) -> dict[str, Any]:
        """Plain JSON for a checkpoint: with it the next look says what it would have said. `losses` are by `check`."""
        return {"skipped": self.skipped, "losses": [[*each] for each in losses], "recent": self.recent}

    def restore(self, state: Mapping[str, Any], step: int, device: torch.device, is_main: bool) -> None:
        """Put back what `state` gave in a checkpoint of `step`; the losses are rank 0's to add."""
        self.skipped, self.recent, self.saved_at = state["skipped"], state["recent"], step
        for number, loss, norm in state["losses"]:
            part = torch.tensor(loss if is_main else 0.0, device=device)
            self.watch.add(number, part, torch.tensor(norm, device=device))

    def _refuse(self, bad: StepLoss) -> NoReturn:
        again = f"{self.allowed + 1}" + (", which goes on from there" if self.saved_at else "")
        raise TrainingError(
            f"{bad.fault}; {self._last_good()}",
            where=self._where(bad.step),
            mend=f"a lower learning_rate or a longer warmup, from the start; or skip_nonfinite: {again}",
        )

    def _last_good(self) -> str:
        return f"the last checkpoint is of step {self.saved_at:,}" if self.saved_at else "there is no checkpoint yet"

    def _where(self, step: int) -> str:
        """The step and the training documents that its batch reads from."""
        found = self.documents(step)
        shown = ", ".join(map(str, found[:8])) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
        return f"step {step + 1:,} (documents {shown} of train.ds)"
