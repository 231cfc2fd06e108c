"""Training state inside a stage: whole or ignored, pruned only after the next is whole. JSON and safetensors.

    checkpoints/step-00000040/state.safetensors    tensors by name
    checkpoints/step-00000040/whole.json           the marker, written last: step, the stage's state, where
                                                   metrics.jsonl ended, seconds so far, threads

A folder that the Hugging Face Trainer wrote becomes a checkpoint by `adopt`, which adds the marker.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifacts import write_json
from pipeline.errors import CheckpointError, MachineError

if TYPE_CHECKING:
    import torch

    from pipeline.progress import Metrics

MARKER = "whole.json"


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

        return load_file(self.path / "state.safetensors")


@dataclass
class Checkpoints:
    """The checkpoints of one stage at work. `save` and `adopt` are called on every rank; rank 0 writes."""

    folder: Path
    metrics: Metrics
    is_main: bool = True
    threads: int = 1
    barrier: Callable[[], None] = lambda: None
    keep: int = 2
    behind: bool = False
    """Whether `save` returns when the tensors are copied and a thread writes them; `wait` before the stage ends."""
    resumed_from: int = field(default=0, init=False)
    _writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"), init=False)
    _writing: Future[None] | None = field(default=None, init=False)

    def peek(self) -> Checkpoint | None:
        """The newest whole checkpoint, nothing changed."""
        return newest_checkpoint(self.folder)

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint; what is half-written is removed and metrics.jsonl cut back to it."""
        newest = self.peek()
        self.barrier()
        if self.is_main:
            whole = {checkpoint.path for checkpoint in _whole(self.folder)}
            for path in self.folder.glob("*"):
                if path not in whole:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            marker = _marker(newest.path) if newest else {}
            self.metrics.cut(int(marker.get("metrics_bytes", 0)), float(marker.get("seconds", 0)))
        self.resumed_from = newest.step if newest else 0
        self.barrier()
        return newest

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        """Write the checkpoint of `step`: after this returns, or after the next `wait`, it is whole on disk. `state` is
        plain JSON. What went wrong with the one before is raised here."""
        self.wait()
        if self.is_main:
            marker = self._marker(step, state)
            held = _separate(tensors, copy=self.behind)
            if self.behind:
                self._writing = self._writer.submit(self._write, step, held, marker)
                return
            self._write(step, held, marker)
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

    def _write(self, step: int, tensors: Mapping[str, torch.Tensor], marker: Mapping[str, Any]) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        path = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".step-{step:08d}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            save_file(dict(tensors), temporary / "state.safetensors")
            temporary.rename(path)  # never onto a whole one: a run goes on from the newest
            _sync_file(self.folder)
            self._mark(path, marker)
        except (OSError, SafetensorError) as error:
            mend = "free some space, and run the same command again: the checkpoint before it is whole"
            raise MachineError(f"the checkpoint could not be written: {error}", where=str(path), mend=mend) from error

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
        for file in path.rglob("*"):
            if file.is_file():
                _sync_file(file)
        write_json(path / MARKER, marker)
        for old in _whole(self.folder)[: -self.keep]:
            (old.path / MARKER).unlink()
            shutil.rmtree(old.path)


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


def _separate(tensors: Mapping[str, torch.Tensor], copy: bool = False) -> dict[str, torch.Tensor]:
    """Contiguous CPU tensors of which no two share memory, as safetensors wants them; `copy`: nor with the model."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        is_models = own.data_ptr() == tensor.data_ptr()
        if (
            (copy and is_models)
            or own.untyped_storage().data_ptr() in seen
            or own.untyped_storage().nbytes() != own.nbytes
        ):
            own = own.clone()
        seen.add(own.untyped_storage().data_ptr())
        result[name] = own
    return result


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
