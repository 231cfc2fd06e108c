"""Compiled blocks: the block that a model repeats is compiled once, for one static shape."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

import torch
from transformers import PreTrainedModel

WORTH = 5e14
"""FLOPs of a run on a CPU from which compiling pays: about half an hour on two cores, of which it saves a tenth, for
the half minute that it takes."""


def blocks_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The repeated blocks, as the family names them for splitting over devices; [] where it names none. (A sharded one
    is of a class derived from the family's.)"""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if names.intersection(kind.__name__ for kind in type(module).__mro__)]


def can_compile() -> bool:
    """Whether torch's compiler finds what it needs on a CPU: g++ (or CXX) and Python's headers."""
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return shutil.which(os.environ.get("CXX", "g++")) is not None and headers.exists()


def compile_blocks(model: PreTrainedModel, wanted: bool | None, flops: float) -> str:
    """Compile the model's blocks where that is wanted, or pays; says what was done and why.

    `wanted` None compiles on a CPU for runs above WORTH; elsewhere it has not been measured. `flops` is the run's.
    """
    on_cpu = model.device.type == "cpu"
    if wanted is False:
        return "not compiled: torch_compile is false"
    if not blocks_of(model):
        return f"not compiled: {type(model).__name__} names no repeated block"
    if on_cpu and not can_compile():
        return "not compiled: there is no C++ compiler (g++), or Python's headers are missing"
    if wanted is None and not on_cpu:
        return f"not compiled: not measured on {model.device.type} yet (torch_compile: true compiles)"
    if wanted is None and flops < WORTH:
        return "not compiled: the run is too short to gain by it (torch_compile: true compiles)"
    for block in blocks_of(model):
        block.compile(dynamic=False)
    return f"compiled: {len(blocks_of(model))} blocks of one static shape"
