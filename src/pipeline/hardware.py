"""The device found, and what it does."""

from __future__ import annotations

import functools
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.errors import ConfigError
from pipeline.runtime import bf16_pays, default_threads


@dataclass(frozen=True)
class Device:
    """The hardware a stage would run on."""

    name: str
    kind: str
    count: int
    memory: float
    """Bytes a process can have."""
    flops_per_second: float
    """Of a product of matrices, in bf16 where that is what training uses."""
    bf16: bool
    is_here: bool = True
    """False for one that was named: nothing has run on it."""


KNOWN = {
    "h100": (80, 989e12),
    "h200": (141, 989e12),
    "a100": (80, 312e12),
    "a100-40": (40, 312e12),
    "l40s": (48, 362e12),
    "4090": (24, 165e12),
    "3090": (24, 71e12),
}
"""Name -> GiB, and the peak of dense bf16 products with fp32 sums, in FLOP/s, as the makers state them."""


def known_device(name: str) -> Device:
    """`h100` or `h100x8`: a device that is not here. ConfigError for one that is not known."""
    kind, _, count = name.partition("x")
    if kind not in KNOWN or not (count or "1").isdigit() or int(count or "1") < 1:
        raise ConfigError(f"--on {name}: not known", mend=f"one of {', '.join(KNOWN)}, with x8 behind it for eight")
    memory, peak = KNOWN[kind]
    return Device(kind, "cuda", int(count or "1"), memory * 2.0**30, peak, bf16=True, is_here=False)


PEAKS = [
    *(({"h100", "pcie"}, 756e12), ({"h100", "nvl"}, 835e12), ({"h200", "nvl"}, 836e12)),
    *(({name}, peak) for name, (_, peak) in KNOWN.items() if "-" not in name),
    *(({"gh200"}, 989e12), ({"b200"}, 2250e12), ({"l4"}, 121e12), ({"5090"}, 209e12)),
]
"""Words of a card's name -> its peak, as in KNOWN; the first that fits."""


def known_peak(name: str) -> float | None:
    """The maker's peak of the card that calls itself so (`NVIDIA H100 PCIe`), in bf16, FLOP/s. None where it is not a
    known one: also of a part of a card (MIG), and of a laptop's, which is another than its name says."""
    words = set(name.lower().replace("-", " ").split())
    if words & {"mig", "laptop"}:
        return None
    return next((peak for needed, peak in PEAKS if needed <= words), None)


@functools.cache
def peak_flops(kind: str, bf16: bool) -> float:
    """FLOP/s that utilisation is measured against, of one process on this device (`cuda`, `cpu`, `mps`).

    The maker's peak of dense products where the GPU is a known one; elsewhere what a product of matrices does here, on
    the threads this process has, measured for a third of a second.
    """
    if kind == "cuda" and bf16:
        known = known_peak(torch.cuda.get_device_name())
        if known is not None:
            return known
    return product_rate(torch.device(kind), 8192 if kind == "cuda" else 1024, bf16, 0.3)


def measure_device(seconds: float = 2.0, processes: int = 1) -> Device:
    """The device found, and the FLOP/s of a product of matrices there, measured for about `seconds`; of a CPU the part
    that each of `processes` has: its share of the cores and of the memory."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        device, memory, name, size = torch.device("cuda"), float(properties.total_memory), properties.name, 8192
    elif torch.backends.mps.is_available():
        memory, name = float(torch.mps.recommended_max_memory()), f"{platform.machine()} GPU (mps)"
        device, size = torch.device("mps"), 4096
    else:
        device, memory, size = torch.device("cpu"), _memory() / processes, 2048
        if processes > 1:
            torch.set_num_threads(default_threads(processes))
        threads = torch.get_num_threads()
        name = f"{threads} CPU core" + ("s" if threads > 1 else "")
    bf16 = bf16_pays(device)
    best = product_rate(device, size, bf16, seconds)
    count = max(1, torch.cuda.device_count())
    return Device(name, device.type, count, memory, best, bf16)


def product_rate(device: torch.device, size: int, bf16: bool, seconds: float) -> float:
    """FLOP/s of a product of two square matrices, the best of what `seconds` have time for."""
    numbers = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if bf16 else torch.float32
    left, right = (torch.randn(size, size, generator=numbers).to(device, dtype) for _ in range(2))
    left @ right
    best, until = 0.0, time.monotonic() + seconds
    while time.monotonic() < until:
        began = time.monotonic()
        for _ in range(3):
            left @ right
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        best = max(best, 3 * 2 * size**3 / (time.monotonic() - began))
    return best


LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where Linux says what a container may have, by the newer and the older way."""


def _memory() -> float:
    """Bytes of the machine's memory, or of what this container may have of it."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    said = [file.read_text().strip() for file in LIMITS if file.is_file()]
    return float(min(found + [int(limit) for limit in said if limit.isdigit()]))
