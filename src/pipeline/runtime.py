"""What a stage runs in: device, precision, ranks, randomness, the wish to stop, metrics and checkpoints.

Randomness is derived, never carried: every generator comes from (seed, what it is for, step, rank), so that a
checkpoint holds no random state and another world size or a resume changes nothing that it should not.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
import transformers
from accelerate import Accelerator, PartialState

from pipeline.checkpoint import Checkpoints
from pipeline.errors import ConfigError, Halt, MachineError, Stopped
from pipeline.progress import Bar, Metrics, Stop, bar

if TYPE_CHECKING:
    from torch import Generator


def derive_seed(*keys: int | str) -> int:
    """A seed below 2^63, a pure function of the keys."""
    text = "\x1f".join(f"{type(key).__name__}:{key}" for key in keys)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@functools.cache
def cpu_multiplies_bf16() -> bool:
    """Whether the CPU has bf16 products: by tiles (AMX, about six times fp32) or by vectors (AVX-512, twice)."""
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and any(flag in cpu.read_text() for flag in ("amx_bf16", "avx512_bf16"))


def bf16_pays(device: torch.device) -> bool:
    """Whether autocast to bf16 is the faster choice on this device."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))  # V100 and T4 only imitate it, slowly
    return device.type == "cpu" and cpu_multiplies_bf16()


WAIT = timedelta(days=30)
"""How long a rank waits for the others: rank 0 may work alone for hours (tokenize, a judge), and torch gives up after
ten minutes on GPUs, after thirty on CPUs. One that died is noticed by who started the ranks."""


def join_ranks() -> PartialState:
    """This process among the ranks, on its device. MachineError where a machine has fewer GPUs than processes."""
    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if 0 < gpus < local:
        raise MachineError(f"{local} processes and {gpus} GPUs: each takes one", mend=f"--num-processes {gpus}")
    on_cpu = not torch.cuda.is_available() and not torch.backends.mps.is_available()
    return PartialState(cpu=True, timeout=WAIT) if on_cpu else PartialState(timeout=WAIT)


def numbered(device: torch.device) -> torch.device:
    """The device with its number, which a lone process is not told and torch asks for (`torch.cuda.set_device`)."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


@dataclass
class Runtime:
    """Handed to a stage's `run`, one in every process."""

    device: torch.device
    rank: int
    world_size: int
    seed: int
    bf16: bool
    threads: int
    metrics: Metrics
    checkpoints: Checkpoints
    halt: Stop = field(default_factory=Stop)
    quiet: bool = False
    shards: bool = False
    """Whether the stage is to keep its model in shards over the ranks."""

    @classmethod
    def start(
        cls, out: Path, *, seed: int, threads: int, world_size: int = 1, quiet: bool = False, shards: bool = False
    ) -> Runtime:
        """Join the other ranks and set up this process. `world_size` is what was asked for: fewer is an error."""
        transformers.utils.logging.disable_progress_bar()
        state = join_ranks()
        if state.num_processes != world_size:
            raise MachineError(
                f"{world_size} processes were asked for and {state.num_processes} came up",
                mend="--num-processes 1, or accelerate's own launcher",
            )
        rank = state.process_index
        metrics = Metrics(out / "metrics.jsonl", is_main=rank == 0)
        barrier = state.wait_for_everyone if world_size > 1 else lambda: None
        checkpoints = Checkpoints(
            out / "checkpoints", metrics, rank == 0, threads, barrier, rank=rank, world_size=world_size
        )
        newest = checkpoints.peek()
        if newest is not None:  # other thread counts give other bits
            checkpoints.threads = threads = newest.threads
        elif rank == 0:
            metrics.cut(0, 0.0)  # what a run wrote that ended before its first checkpoint
        torch.set_num_threads(threads)
        torch.manual_seed(derive_seed(seed, "process", rank))
        device = numbered(torch.device(state.device))
        return cls(
            device=device,
            rank=rank,
            world_size=world_size,
            seed=seed,
            bf16=bf16_pays(device),
            threads=threads,
            metrics=metrics,
            checkpoints=checkpoints,
            quiet=quiet,
            shards=shards,
        )

    @functools.cached_property
    def accelerator(self) -> Accelerator:
        """Accelerate's handle, in full precision: autocast is the stage's. Stages on TRL's trainers never make it."""
        return Accelerator(cpu=self.device.type == "cpu", mixed_precision="no")

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes and speaks."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """One line on stderr, from rank 0."""
        if self.is_main and not self.quiet:
            print(f"  {text}", file=sys.stderr, flush=True)

    @contextmanager
    def progress(self, phase: str, total: int | None, unit: str = "steps") -> Iterator[Bar]:
        """A bar (or plain lines) for one phase."""
        with bar(phase, total, unit, quiet=self.quiet or not self.is_main) as shown:
            yield shown

    def generator(self, *keys: int | str) -> Generator:
        """A CPU generator that is a pure function of the stage's seed and the keys."""
        return torch.Generator().manual_seed(derive_seed(self.seed, *keys))

    def stop_requested(self) -> bool:
        """Whether to stop after this step, agreed over all ranks. A collective: call it on every rank, once a step."""
        if self.world_size == 1:
            return self.halt.asked is not None
        flag = torch.tensor([float(self.halt.asked is not None)], device=self.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())

    def check_stop(self) -> None:
        """Raise if asked to stop: for phases with nothing to save."""
        if self.halt.asked is not None:
            raise self.halt.asked("stopped before anything was saved", mend="run the same command again")

    def heed(self) -> None:
        """Raise if any rank is asked to stop, on all of them: in what is done again when the stage goes on. Who has
        something to save catches it. A collective: call it on every rank, equally often."""
        if self.stop_requested():
            kind: type[Halt] = self.halt.asked or Stopped
            raise kind("stopped while it measured", mend="run the same command again to measure anew")

    def stop(self, step: int) -> NoReturn:
        """Raise, after the stage has saved its state at `step`."""
        kind: type[Halt] = self.halt.asked or Stopped
        raise kind(f"stopped at step {step:,} and saved", mend="run the same command again to go on from there")

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.checkpoints.barrier()


def share_batch(rows: int, micro_steps: int, world_size: int, where: str) -> tuple[int, int]:
    """(rows of a micro-step, micro-steps) of each process, so that together they see the batch that one would.

    The recipe's batch is `rows` × `micro_steps`, however many processes share it: how a stage is launched does not
    change its result. Raises ConfigError where they cannot share it evenly.
    """
    if micro_steps % world_size == 0:
        return rows, micro_steps // world_size
    if rows % world_size == 0:
        return rows // world_size, micro_steps
    raise ConfigError(
        f"{world_size} processes cannot share {rows} rows × {micro_steps} accumulation steps evenly",
        where=where,
        mend=f"--set {where}={math.ceil(rows / world_size) * world_size}",
    )


def check_batch(batch: int, mini_batches: int, group: int, world_size: int, where: str) -> None:
    """ConfigError where a step of `batch` answers, `group` to a prompt, is not cut evenly into `mini_batches`, or whole
    groups not shared evenly by the processes."""
    shared = f"processes with {group} answers a prompt" if group > 1 else "processes"
    for name, parts in (("num_mini_batches", mini_batches), (shared, world_size * group)):
        if batch % parts:
            raise ConfigError(
                f"a batch of {batch} is not divisible by {parts} {name}",
                where=where,
                mend=f"--set {where}={math.ceil(batch / parts) * parts}",
            )


def default_threads(processes: int) -> int:
    """Threads a process may use: OMP_NUM_THREADS, else the cores this process may run on, shared out."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit():
        return max(1, int(asked))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes)
