"""This rank's micro-batches, made ready by a thread while the step before is at work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.data.packing import Batch
from pipeline.model.losses import IGNORED


@dataclass(frozen=True)
class MicroBatch:
    """inputs_BT, targets_BT (IGNORED where nothing is learnt) and positions_BT (None: 0, 1, 2, …), all int64."""

    inputs_BT: Tensor
    targets_BT: Tensor
    positions_BT: Tensor | None

    def to(self, device: torch.device) -> MicroBatch:
        """On a device, without waiting for the copy."""
        return self._each(lambda part: part.to(device, non_blocking=True))

    def pinned(self) -> MicroBatch:
        """In memory that a GPU copies from by itself: in one piece, or it would be gathered into other memory first."""
        return self._each(lambda part: part.contiguous().pin_memory())

    def _each(self, do: Callable[[Tensor], Tensor]) -> MicroBatch:
        positions = None if self.positions_BT is None else do(self.positions_BT)
        return MicroBatch(do(self.inputs_BT), do(self.targets_BT), positions)


def micro_batch(batch: Batch) -> MicroBatch:
    """A batch as tensors."""
    rows_BT = torch.from_numpy(batch.rows_BT)
    targets_BT = rows_BT[:, 1:]
    if batch.is_target_BT is not None:
        targets_BT = targets_BT.masked_fill(~torch.from_numpy(batch.is_target_BT), IGNORED)
    positions_BT = None if batch.positions_BT is None else torch.from_numpy(batch.positions_BT)
    return MicroBatch(rows_BT[:, :-1], targets_BT, positions_BT)


class Feed:
    """The micro-batches of each step, in order. `take`: positions of the run -> their samples.

    A run has `steps` steps of `batch` positions; this rank has `rows` of a step's positions from each of
    `starts`. A fault of `take` is raised by the step that wanted the samples.
    """

    def __init__(
        self,
        take: Callable[[range], Batch],
        *,
        steps: int,
        batch: int,
        rows: int,
        starts: Sequence[int],
        device: torch.device,
    ) -> None:
        self.take, self.steps, self.batch = take, steps, batch
        self.rows, self.starts, self.pins = rows, starts, device.type == "cuda"
        own_device = (torch.cuda.set_device, (device,)) if self.pins else (None, ())  # a thread begins on the first
        self.thread = ThreadPoolExecutor(1, "feed", *own_device)
        self.ahead: tuple[int, Future[list[MicroBatch]]] | None = None

    def step(self, step: int) -> list[MicroBatch]:
        """The micro-batches of `step` (0-based), and the next step's begun."""
        if self.ahead is None or self.ahead[0] != step:
            self.ahead = step, self.thread.submit(self._make, step)
        found = self.ahead[1].result()
        self.ahead = (step + 1, self.thread.submit(self._make, step + 1)) if step + 1 < self.steps else None
        return found

    def close(self) -> None:
        """End the thread; what it has ready is dropped."""
        self.thread.shutdown(cancel_futures=True)

    def _make(self, step: int) -> list[MicroBatch]:
        begins = [step * self.batch + start for start in self.starts]
        made = [micro_batch(self.take(range(begin, begin + self.rows))) for begin in begins]
        return [each.pinned() for each in made] if self.pins else made
