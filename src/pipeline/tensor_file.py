"""A safetensors file that several processes may write at once, each its own rows of the tensors, in any order.

The format is 8 bytes with the header's length, the header (JSON, padded to 8 bytes), then the tensors end to end, each
in row-major order: a shard of rows is one stretch of the file. The bytes are those that `safetensors.torch.save_file`
writes of the whole tensors, though no process has to hold one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ORDER = ("BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "F64", "I64")
"""As safetensors ranks them: those last here come first in a file, so that all are aligned."""
AT_ONCE = 1 << 28
"""Bytes of one write: Linux takes no more than 2 GiB."""


class Piece(NamedTuple):
    """Part of the tensor `name`: its elements from `start` on, in row-major order."""

    name: str
    values: Tensor
    start: int = 0


@dataclass(frozen=True)
class Layout:
    """Where the tensors of a file lie."""

    header: bytes
    begins: Mapping[str, int]
    """Name -> its first byte in the file."""
    size: int
    """Bytes of the whole file."""


def layout(shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> Layout:
    """The layout of tensors of these dtypes and shapes; the same in every process that is given the same."""
    ranked = sorted(shapes, key=lambda name: (-ORDER.index(DTYPES[shapes[name][0]]), name.encode()))
    entries, ends, end = {}, {}, 0
    for name in ranked:
        dtype, shape = shapes[name]
        ends[name], end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPES[dtype], "shape": [*shape], "data_offsets": [ends[name], end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return Layout(header, {name: len(header) + begin for name, begin in ends.items()}, len(header) + end)


def write_pieces(path: Path, plan: Layout, pieces: Iterable[Piece], *, with_header: bool) -> None:
    """Write this process's pieces into the file, made if need be, and one of the processes the header: on disk when it
    returns. One tensor at a time is copied to the host, where it is not there already. OSError for a full disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        if with_header:
            _write_at(descriptor, plan.header, 0)
        for name, values, start in pieces:
            flat = values.detach().cpu().contiguous().reshape(-1)
            if flat.numel():
                _write_at(descriptor, flat.view(torch.uint8).numpy().data, plan.begins[name] + start * flat.itemsize)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_at(descriptor: int, content: bytes | memoryview, offset: int) -> None:
    done = 0
    while done < len(content):
        done += os.pwrite(descriptor, content[done : done + AT_ONCE], offset + done)
