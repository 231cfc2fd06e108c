"""Where a run's tensors are and which rank this is: what the parts of an RL loop share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pipeline.rl.masking import Reduce, alone, sum_over_ranks
from pipeline.runtime import Runtime


@dataclass(frozen=True)
class Place:
    """One process of a run."""

    device: torch.device
    bf16: bool
    """Products in bf16 by autocast; weights stay as they are."""
    rank: int
    world_size: int
    reduce: Reduce
    generator: Callable[..., torch.Generator]
    """A CPU generator that is a pure function of the run's seed and the keys given."""

    @classmethod
    def of(cls, runtime: Runtime, bf16: bool | None) -> Place:
        """This process; `bf16` as asked for, None by the hardware."""
        reduce = alone if runtime.world_size == 1 else sum_over_ranks
        wanted = runtime.bf16 if bf16 is None else bf16
        return cls(runtime.device, wanted, runtime.rank, runtime.world_size, reduce, runtime.generator)
