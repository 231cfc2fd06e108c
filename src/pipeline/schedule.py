"""Which row stands where in a run: a pure function of the seed, the rows' lengths and the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.runtime import Runtime
from pipeline.trainer_config import TrainerConfig

Row = dict[str, Any]

WINDOW = 64
"""Steps whose rows are sorted together by length: enough for little padding, few enough to stay shuffled."""


@dataclass(frozen=True)
class Schedule:
    """The rows of a run in the order they are read, and what has been read after each step."""

    batch: int
    """Rows of an optimiser step, over all processes."""
    order: npt.NDArray[np.int64]
    """[steps × batch]: which row."""
    tokens: npt.NDArray[np.int64]
    """[steps]: tokens read up to and with the step."""

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return len(self.tokens)


def schedule(lengths: Sequence[int], config: TrainerConfig, runtime: Runtime) -> Schedule:
    """The order of a run over rows of these lengths (tokens): a pure function of the seed, the lengths and the batch.

    Every epoch is a new shuffle, joined to the one before without a gap. With "group_by_length" the rows of WINDOW
    steps are sorted by length and their batches shuffled.
    """
    count = len(lengths)
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * count / batch)
    epochs = [
        torch.randperm(count, generator=runtime.generator("order", epoch)).numpy()
        for epoch in range(math.ceil(steps * batch / count))
    ]
    order = np.concatenate(epochs)[: steps * batch]
    lengths_N = np.asarray(lengths, dtype=np.int64)
    if config.train_sampling_strategy == "group_by_length":
        windows = [
            _grouped(order[start : start + WINDOW * batch], lengths_N, batch, runtime.generator("window", start))
            for start in range(0, len(order), WINDOW * batch)
        ]
        order = np.concatenate(windows)
    return Schedule(batch, order, lengths_N[order].reshape(steps, batch).sum(axis=1).cumsum())


def _grouped(
    rows: npt.NDArray[np.int64], lengths_N: npt.NDArray[np.int64], batch: int, generator: torch.Generator
) -> npt.NDArray[np.int64]:
    """The rows sorted by length and cut into batches, the batches shuffled."""
    by_length = rows[np.argsort(lengths_N[rows], kind="stable")].reshape(-1, batch)
    shuffled: npt.NDArray[np.int64] = by_length[torch.randperm(len(by_length), generator=generator).numpy()]
    return shuffled.reshape(-1)


class Unrolled(torch.utils.data.Dataset[Any]):
    """A run's rows as one long epoch, read in sequence."""

    def __init__(self, rows: Sequence[Row], order: npt.NDArray[np.int64]) -> None:
        self.rows, self.order = rows, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Row:
        row: Row = self.rows[self.order[index]]
        return row
