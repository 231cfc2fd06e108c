"""Frozen models that lie in the CPU's memory and are on the device only while they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Offload:
    """Where frozen models are when nothing reads them: on the device, or `is_on` in the CPU's memory."""

    device: torch.device
    is_on: bool

    @classmethod
    def of(cls, device: torch.device, wanted: bool) -> Offload:
        """As wanted; on a CPU there is nowhere else to be."""
        return cls(device, wanted and device.type != "cpu")

    def put_away(self, models: Sequence[PreTrainedModel]) -> None:
        """Take models that are on the device off it. Page-locked, so that they come back at the bus's speed."""
        if self.is_on:
            is_cuda = self.device.type == "cuda"
            _replace(models, lambda tensor: tensor.cpu().pin_memory() if is_cuda else tensor.cpu())

    @contextmanager
    def brought(self, models: Sequence[PreTrainedModel]) -> Iterator[None]:
        """Models that were put away on the device for a while. Nothing is copied back, since nothing changes them."""
        if not self.is_on:
            yield
            return
        homes = _replace(models, lambda tensor: tensor.to(self.device, non_blocking=True))
        try:
            yield
        finally:
            for module, name, tensor in homes:
                setattr(module, name, tensor)


def _replace(
    models: Sequence[PreTrainedModel], move: Callable[[Tensor], Tensor]
) -> list[tuple[torch.nn.Module, str, Tensor]]:
    """Put what `move` makes of it in the place of every parameter and buffer, tied ones tied; returns what was there.

    Replaced, not changed: `tensor.data` of one kind of device can't be that of any other.
    """
    homes = [
        (module, name, tensor)
        for model in models
        for module in model.modules()
        for held in (module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        for name, tensor in held
    ]
    moved: dict[int, Tensor] = {}
    for module, name, tensor in homes:
        if id(tensor) not in moved:
            there = move(tensor.detach())
            moved[id(tensor)] = torch.nn.Parameter(there, False) if isinstance(tensor, torch.nn.Parameter) else there
        setattr(module, name, moved[id(tensor)])
    return homes
