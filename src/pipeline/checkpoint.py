"""Training state inside a stage: whole or ignored, pruned only after the next is whole. JSON and safetensors.

    checkpoints/step-00000040/state.safetensors    tensors by name
    checkpoints/step-00000040/whole.json           the marker, written last: step, the stage's state, where
                                                   metrics.jsonl ended, seconds so far, threads, the other files' sums

A folder that the Hugging Face Trainer wrote becomes a checkpoint by `adopt`, which adds the marker. Nothing goes on
from one whose bytes have changed since: the one before it is taken.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifacts import write_json
from pipeline.errors import CheckpointError, MachineError

if TYPE_CHECKING:
    import torch

    from pipeline.progress import Metrics
    from pipeline.tensor_file import Layout, Piece

MARKER = "whole.json"
STATE = "state.safetensors"


def _to_stderr(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Checkpoint:
    """One whole checkpoint."""

    path: Path
    step: int
    state: dict[str, Any]
    threads: int

    def tensors(self) -> dict[str, torch.Tensor]:
        """The saved tensors by name, on the CPU."""
        from safetensors.torch import load_file

        return load_file(self.path / STATE)


@dataclass
class Checkpoints:
    """The checkpoints of one stage at work. `save` and `adopt` are called on every rank; rank 0 writes, and of tensors
    in shards every rank its own rows."""

    folder: Path
    metrics: Metrics
    is_main: bool = True
    threads: int = 1
    barrier: Callable[[], None] = lambda: None
    keep: int = 2
    behind: bool = False
    """Whether `save` returns when the tensors are copied and a thread writes them; `wait` before the stage ends."""
    rank: int = 0
    world_size: int = 1
    say: Callable[[str], None] = _to_stderr
    resumed_from: int = field(default=0, init=False)
    _writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"), init=False)
    _writing: Future[None] | None = field(default=None, init=False)

    def peek(self) -> Checkpoint | None:
        """The newest whole checkpoint, nothing changed."""
        return newest_checkpoint(self.folder)

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint; what is half-written or damaged is removed and metrics.jsonl cut back to it.
        CheckpointError where all are damaged."""
        self.barrier()
        if self.is_main:
            newest = self._newest_intact()
            whole = {checkpoint.path for checkpoint in _whole(self.folder)}
            for path in self.folder.glob("*"):
                if path not in whole:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            marker = _marker(newest.path) if newest else {}
            self.metrics.cut(int(marker.get("metrics_bytes", 0)), float(marker.get("seconds", 0)))
        self.barrier()
        newest = self.peek()
        self.resumed_from = newest.step if newest else 0
        return newest

    def _newest_intact(self) -> Checkpoint | None:
        """The newest whole one whose bytes are those that were written; newer ones are removed."""
        found = _whole(self.folder)
        while found and (wrong := _damage(found[-1].path)):
            damaged = found.pop()
            if not found:
                mend = f"rm -r {damaged.path} begins anew"
                raise CheckpointError(
                    f"damaged ({wrong}), and there is no older one", where=str(damaged.path), mend=mend
                )
            self.say(f"the checkpoint of step {damaged.step:,} is damaged ({wrong}): the one before it is taken")
            _remove(damaged.path)
        return found[-1] if found else None

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        """Write the checkpoint of `step`: after this returns, or after the next `wait`, it is whole on disk. `state` is
        plain JSON. What went wrong with the one before is raised here."""
        from pipeline.model.sharding import has_shards, own_pieces
        from pipeline.tensor_file import layout

        self.wait()
        in_shards = has_shards(tensors.values())
        temporary = self.folder / f".step-{step:08d}"
        if self.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            with _told(temporary):
                temporary.mkdir(parents=True)
        if in_shards:
            self.barrier()  # the folder is there
        if self.is_main or in_shards:
            marker = self._marker(step, state) if self.is_main else {}
            plan = layout({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})
            pieces = own_pieces(tensors, self.is_main)
            writers = self.world_size if in_shards else 1
            if self.behind:
                held = [piece._replace(values=piece.values.detach().to("cpu", copy=True)) for piece in pieces]
                self._writing = self._writer.submit(self._write, temporary, plan, held, marker, writers)
            else:
                self._write(temporary, plan, pieces, marker, writers)
        if not self.behind:
            self.barrier()

    def begin_anew(self, step: int, state: Mapping[str, Any], made: Path) -> None:
        """A checkpoint without tensors, from which all begins anew but what `state` says and `made` holds (rank 0 sees
        it on disk first); the others are dropped."""
        if self.is_main:
            for file in filter(Path.is_file, made.rglob("*")):
                _sync_file(file)
        keep, self.keep = self.keep, 1
        self.save(step, {}, state)
        self.keep = keep

    def wait(self) -> None:
        """Until what is being written is whole on disk; raises what went wrong with it."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(
        self, temporary: Path, plan: Layout, pieces: Iterable[Piece], marker: Mapping[str, Any], writers: int
    ) -> None:
        """This rank's part of the checkpoint; rank 0 ends it when `writers` ranks have written theirs. (They tell so by
        a file: a thread must not take part in collectives.)"""
        from pipeline.tensor_file import write_pieces

        path = self.folder / temporary.name[1:]
        with _told(path):
            if not self.is_main:
                with _noting(temporary / f"rank-{self.rank}.json"):
                    write_pieces(temporary / STATE, plan, pieces, with_header=False)
                return
            write_pieces(temporary / STATE, plan, pieces, with_header=True)
            for rank in range(1, writers):
                _await(temporary / f"rank-{rank}.json")
            temporary.rename(path)  # never onto a whole one: a run goes on from the newest
            _sync_file(self.folder)
            self._mark(path, marker)

    def adopt(self, path: Path, step: int, state: Mapping[str, Any]) -> None:
        """Declare the folder that somebody else wrote at `path` to be the whole checkpoint of `step`."""
        if self.is_main:
            self._mark(path, self._marker(step, state))
        self.barrier()

    def _marker(self, step: int, state: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "step": step,
            "state": dict(state),
            "metrics_bytes": self.metrics.sync(),
            "seconds": self.metrics.seconds(),
            "threads": self.threads,
        }

    def _mark(self, path: Path, marker: Mapping[str, Any]) -> None:
        for file in _files(path):
            _sync_file(file)
        marker = {**marker, "files": {str(each.relative_to(path)): _sum(each) for each in _files(path)}}
        write_json(path / MARKER, {**marker, "sum": _sum_of(marker)})
        for old in _whole(self.folder)[: -self.keep]:
            _remove(old.path)


def _remove(path: Path) -> None:
    (path / MARKER).unlink()  # first, so that no half of it is taken for whole
    shutil.rmtree(path, ignore_errors=True)  # a network disk keeps a file that is mapped: `latest` tries again


def _files(path: Path) -> list[Path]:
    """The files of a checkpoint but its marker."""
    return sorted(file for file in path.rglob("*") if file.is_file() and file.name not in (MARKER, f".{MARKER}.tmp"))


def _sum(path: Path) -> list[int]:
    """[bytes, CRC-32] of a file: ten times as fast as a cryptographic hash, and nobody forges a checkpoint."""
    size = value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            size, value = size + len(chunk), zlib.crc32(chunk, value)
    return [size, value]


def _sum_of(marker: Mapping[str, Any]) -> int:
    as_read = json.loads(json.dumps(marker))  # numbers that are keys come back as text, which sorts otherwise
    return zlib.crc32(json.dumps(as_read, sort_keys=True).encode())


def _damage(path: Path) -> str:
    """Which file of a whole checkpoint is not as it was written; empty where all are."""
    marker = _marker(path)
    if marker.pop("sum", None) != _sum_of(marker):
        return f"what {MARKER} says has changed"
    for name, expected in marker["files"].items():
        file = path / name
        if not file.exists():
            return f"{name} is missing"
        if file.stat().st_size != expected[0]:
            return f"{name} has {file.stat().st_size:,} of {expected[0]:,} bytes"
        if _sum(file) != expected:
            return f"the bytes of {name} have changed"
    return ""


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """MachineError for what the disk does not take."""
    try:
        yield
    except OSError as error:
        mend = "free some space, and run the same command again: what was saved before is whole"
        raise MachineError(f"the checkpoint could not be written: {error}", where=str(path), mend=mend) from error


@contextmanager
def _noting(note: Path) -> Iterator[None]:
    """What rank 0 waits for: how this rank's part of a checkpoint went."""
    try:
        yield
    except OSError as error:
        with suppress(OSError):  # then rank 0 waits until this one's end ends it too
            write_json(note, {"error": str(error)})
        raise
    write_json(note, {"error": ""})


def _await(note: Path) -> None:
    """Until another rank has written its part; OSError with what it met."""
    while not note.exists():
        time.sleep(0.02)
    error = json.loads(note.read_text(encoding="utf-8"))["error"]
    note.unlink()
    if error:
        raise OSError(error)


def _marker(path: Path) -> dict[str, Any]:
    try:
        marker: dict[str, Any] = json.loads((path / MARKER).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"unreadable marker ({error})", where=str(path), mend=f"rm -r {path}") from error
    return marker


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint in the folder, that of a stage at work too."""
    found = _whole(folder)
    return found[-1] if found else None


def _whole(folder: Path) -> list[Checkpoint]:
    """All whole checkpoints, oldest first."""
    found = []
    for path in folder.glob(f"[!.]*/{MARKER}"):
        marker = _marker(path.parent)
        found.append(Checkpoint(path.parent, marker["step"], marker["state"], marker["threads"]))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The optimizer's state as (tensors named `prefix.<parameter>.<name>`, plain JSON); undone by `load_optimizer`."""
    import torch

    saved = optimizer.state_dict()
    tensors, numbers = {}, {}
    for index, state in saved["state"].items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{prefix}.{index}.{name}"] = value
            else:
                numbers[f"{index}.{name}"] = value
    return tensors, {"groups": saved["param_groups"], "numbers": numbers}


def load_optimizer(
    optimizer: torch.optim.Optimizer, prefix: str, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]
) -> None:
    """Put back what `optimizer_tensors` took out; `tensors` are whole, also for parameters in shards."""
    from pipeline.model.sharding import cut_like

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    restored: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        if key.startswith(f"{prefix}."):
            index, name = key.removeprefix(f"{prefix}.").split(".", 1)
            restored.setdefault(int(index), {})[name] = cut_like(tensor, parameters[int(index)])
    for key, number in state["numbers"].items():
        index, name = key.split(".", 1)
        restored.setdefault(int(index), {})[name] = number
    optimizer.load_state_dict({"state": restored, "param_groups": state["groups"]})
