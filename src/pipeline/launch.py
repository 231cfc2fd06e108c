"""One stage as one process or many, under accelerate.

The command's process imports torch once and forks a child for every stage (a fresh state in a tenth of a second); with
several processes it forks one child a rank and gives them the variables that accelerate and torch.distributed read.
Started by torchrun or `accelerate launch` (WORLD_SIZE is set) the process itself is a rank and forks nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic_core import to_jsonable_python

from pipeline import failure
from pipeline.artifacts import BEGUN, Artifact, Store, need_disk, now, template_hash, tokenizer_hash, write_begun
from pipeline.errors import ConfigError, Halt, Interrupted, MachineError, PipelineError, Stopped, TrainingError
from pipeline.fingerprint import PACKAGES, reached
from pipeline.lineage import Standing
from pipeline.progress import leave_on_signals
from pipeline.tracking import TRACK, Sender, Track

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # what asks a run to stop
STRATEGIES = ("auto", "single", "ddp", "fsdp")
VERSIONS_OF = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "tokenizers", "llmpipe")


@dataclass(frozen=True)
class Launch:
    """How stages are started; none of it changes a result beyond float order."""

    num_processes: int | None = None
    strategy: str = "auto"
    quiet: bool = False
    tracks: tuple[Track, ...] = ()

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ConfigError(f"--strategy is one of {', '.join(STRATEGIES)}, not {self.strategy!r}")
        if self.num_processes is not None and self.num_processes < 1:
            raise ConfigError("--num-processes is at least 1")
        if self.strategy == "single" and (self.num_processes or 1) > 1:
            raise ConfigError("--strategy single is one process", mend="--strategy ddp")

    def processes(self) -> int:
        """How many processes: what was asked for, else one a GPU, else one."""
        if self.num_processes is not None:
            return self.num_processes
        if self.strategy == "single":
            return 1
        import torch

        return max(1, torch.cuda.device_count())  # asks the driver, opens no context


def world_size_from_outside() -> int:
    """Ranks that torchrun or `accelerate launch` started, 0 when neither did."""
    return int(os.environ.get("WORLD_SIZE", "0"))


def rank_from_outside() -> int:
    """This process's place among them; the first speaks."""
    return int(os.environ.get("RANK", "0"))


def run_stage(standing: Standing, inputs: Mapping[str, Any], store: Store, run: str, launch: Launch) -> None:
    """Run the stage to its published artifact; call with its lock held. Raises what the stage raised."""
    partial = store.partial(run, standing.node.name, standing.planned)
    need_disk(partial, 256 * 2**20, f"{run}/{standing.node.name}")
    _preload(standing.node.stage.file)
    processes = launch.processes()

    def work(rank: int) -> None:
        execute(standing, inputs, store, run, partial, processes, launch)

    if sys.platform != "linux" and processes == 1:
        work(0)
        return
    _fork(work, processes)


def _preload(stage_file: Path) -> None:
    """Import what the stage will need before forking, so that it is imported once a command.

    Where there is a GPU, only what does not look at it: bitsandbytes, which peft imports where it is installed, opens
    CUDA, and no forked process can open it again.

    Waiting threads of OpenMP sleep almost at once: spinning for them costs up to twenty times on cores that somebody
    else uses too, and nothing that can be measured on cores of one's own (docs/notes.md).
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # is there one? Asked of the driver, nothing opened
    import pipeline.runtime

    if not _has_gpu() and PACKAGES / "pipeline" / "trainer.py" in reached(stage_file):
        import pipeline.trainer  # noqa: F401


def _fork(work: Callable[[int], None], processes: int) -> None:
    """Run `work(rank)` in forked children and wait; a child's failure becomes the exception it reported."""
    port = _free_port() if processes > 1 else 0
    # one byte: the rank that takes it tells why the stage failed, and the others' ends follow from that
    word, given = os.pipe()
    os.write(given, b".")
    os.set_blocking(word, False)
    parent, has_gpu = os.getpid(), _has_gpu()
    sys.stdout.flush()
    sys.stderr.flush()
    children: dict[int, int] = {}
    asked: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for pid in children:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # one that comes now is heard once all are forked
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            leave_on_signals(speaks=rank == 0)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            _child(work, rank, processes, port, parent, word, has_gpu=has_gpu)
        children[pid] = rank
    for number in SIGNALS:
        signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        failed = _wait(children)
    finally:
        os.close(word)
        os.close(given)
        for number, handler in before.items():
            signal.signal(number, handler)
    if failed:
        raise ChildFailed(failed)
    if asked:
        raise (Interrupted if asked[0] == signal.SIGINT else Stopped)(
            "stopped after the stage was done", mend="run the same command again for the rest"
        )


class ChildFailed(PipelineError):
    """A stage's process failed and has said why; carries its exit code."""

    def __init__(self, code: int) -> None:
        super().__init__("the stage failed")
        self.exit_code = code


def _child(
    work: Callable[[int], None], rank: int, processes: int, port: int, parent: int, word: int, *, has_gpu: bool
) -> None:
    """The life of a forked child; never returns."""
    code = 1
    try:
        _die_with(parent)
        if has_gpu:
            _check_cuda_is_unopened()
        if processes > 1:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(processes),
                LOCAL_WORLD_SIZE=str(processes),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
                ACCELERATE_USE_CPU="false" if has_gpu else "true",
            )
        work(rank)
        code = 0
    except PipelineError as error:
        code = error.exit_code
        if rank == 0 if isinstance(error, Halt) else _has_the_word(word):
            say_error(error)
    except BaseException as error:
        if _has_the_word(word):
            say_error(error)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _has_the_word(word: int) -> bool:
    """Whether this rank is the first to fail; all may speak where everything is shown."""
    try:
        return bool(os.read(word, 1))
    except BlockingIOError:
        return os.environ.get("LLMPIPE_DEBUG") == "1"


def _wait(children: dict[int, int]) -> int:
    """Wait for all children; the first failure stops the others. Returns its exit code, 0 if there was none."""
    failed = 0
    while children:
        try:
            pid, status = os.wait()
        except InterruptedError:
            continue
        rank = children.pop(pid, None)
        code = os.waitstatus_to_exitcode(status)
        if rank is None or code == 0:
            continue
        if code < 0 and not failed:
            say_error(
                TrainingError(
                    f"the stage's process {pid} was killed by {signal.Signals(-code).name}",
                    mend="run the same command again to go on from its last checkpoint"
                    + (" (out of memory? a smaller batch helps)" if code == -9 else ""),
                )
            )
        if code < 0:
            code = 1
        if not failed and code not in (Stopped.exit_code, Interrupted.exit_code):
            for other in children:
                os.kill(other, signal.SIGKILL)  # they would wait for the dead rank for ever
        failed = failed or code
    return failed


def execute(
    standing: Standing,
    inputs: Mapping[str, Any],
    store: Store,
    run: str,
    partial: Path,
    processes: int,
    launch: Launch,
    *,
    last: bool = True,
) -> None:
    """In the process that works: set up the runtime, run the stage, publish on rank 0.

    `last` says that this process does nothing after it, so that the ranks part here.
    """
    from pipeline.data.places import naming_rows
    from pipeline.model.merging import drop_merged, merged_inputs
    from pipeline.progress import Stop
    from pipeline.runtime import Runtime, default_threads

    node = standing.node
    halt = Stop()
    halt.listen()
    runtime = Runtime.start(
        partial,
        seed=node.config.seed,
        threads=default_threads(processes),
        world_size=processes,
        quiet=launch.quiet,
        shards=launch.strategy == "fsdp" and node.stage.shards and processes > 1,
    )
    runtime.halt = halt
    if launch.strategy == "fsdp" and node.stage.shards and not runtime.shards:
        runtime.say("--strategy fsdp: one process keeps the model whole")
    if runtime.is_main:
        failure.forget(partial)
        _write_config(partial / "config.yaml", to_jsonable_python(node.config))
        write_begun(partial, node.stage.type, standing.parts)
    runtime.barrier()
    folder = store.folder(run, node.name).parent / TRACK / f"{node.name}-{standing.planned[:16]}"
    tracks = launch.tracks if runtime.is_main else ()
    sender = Sender(tracks, folder, run, node.name, to_jsonable_python(node.config))
    with failure.noted(partial), naming_rows(node.config), sender.following(runtime.metrics):
        inputs = merged_inputs(inputs, partial, runtime.is_main, runtime.barrier)
        figures = node.stage.run(node.config, inputs, partial, runtime)
    runtime.barrier()
    if runtime.is_main:
        drop_merged(partial)
        (partial / BEGUN).unlink()
        runtime.metrics.sync()
        (partial / "metrics.jsonl").touch()
        store.publish(partial, run, node.name, _manifest(standing, inputs, run, partial, figures, runtime))
    runtime.barrier()
    if runtime.stop_requested():  # heard too late to stop the stage: at least nothing follows it
        kind: type[Halt] = halt.asked or Stopped
        raise kind("stopped after the stage was done", mend="run the same command again for the rest")
    if processes > 1 and last:
        import torch

        torch.distributed.destroy_process_group()


def _manifest(
    standing: Standing,
    inputs: Mapping[str, Any],
    run: str,
    partial: Path,
    figures: Mapping[str, float],
    runtime: Any,
) -> dict[str, Any]:
    node = standing.node
    parents = {
        role: [{"reference": a.reference, "fingerprint": a.fingerprint} for a in _each(value)]
        for role, value in inputs.items()
    }
    if node.rows:
        writers = zip(dict.fromkeys(node.rows.values()), standing.parts["inputs"]["data"], strict=True)
        parents["data"] = [{"reference": f"{run}/{name}", "fingerprint": fingerprint} for name, fingerprint in writers]
    return {
        "stage": node.stage.type,
        "name": node.name,
        "run": run,
        "kind": node.stage.kind,
        "fingerprint": standing.planned,
        "parts": standing.parts,
        "config": to_jsonable_python(node.config),
        "inputs": parents,
        "tokenizer_hash": tokenizer_hash(partial / "model"),
        "template_hash": template_hash(partial / "model"),
        "metrics": {name: float(value) for name, value in figures.items()},
        "tokens": runtime.metrics.tokens,
        "flops": figures.get("flops", 0.0),
        "seconds": round(runtime.metrics.seconds(), 3),
        "resumed_from": runtime.checkpoints.resumed_from,
        "processes": runtime.world_size,
        "shards": runtime.shards,
        "threads": runtime.threads,
        "device": _device(runtime.device),
        "versions": versions(),
        "git_commit": _git_commit(),
        "created": now(),
    }


def _each(value: Any) -> list[Artifact]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def versions() -> dict[str, str]:
    """Versions of what computes a stage."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in VERSIONS_OF:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _device(device: Any) -> str:
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.processor() or platform.machine()}, {os.cpu_count()} cores)"


def _git_commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=PACKAGES.parent, capture_output=True, text=True, check=False
    )
    return found.stdout.strip()


def _write_config(path: Path, values: Mapping[str, Any]) -> None:
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    with path.open("w", encoding="utf-8") as file:
        yaml.dump(json.loads(json.dumps(values)), file)


def _die_with(parent: int) -> None:
    """Ask Linux for SIGTERM when the launching process dies: the stage then saves and ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != parent:
        raise Stopped("the launching process is gone", mend="run the same command again")


def _check_cuda_is_unopened() -> None:
    """MachineError in a forked process that could not open CUDA, since its parent has."""
    import torch

    if torch.cuda._is_in_bad_fork():
        problem = "CUDA was opened before the stage's process began (by a package that is imported, or without NVML)"
        raise MachineError(problem, mend="torchrun --nproc-per-node 1 -m pipeline run RECIPE starts it without a fork")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.device_count() > 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def say_error(error: BaseException) -> None:
    """The error as a user reads it: what, where, the mend; a traceback only with LLMPIPE_DEBUG=1."""
    if os.environ.get("LLMPIPE_DEBUG") == "1":
        traceback.print_exception(error)
        return
    if isinstance(error, Halt):
        print(f"{error}", file=sys.stderr)
    elif isinstance(error, PipelineError):
        print(f"error: {error}", file=sys.stderr)
    else:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        print(
            f"error: {type(error).__name__}: {error}\n  at {frame.filename}:{frame.lineno}\n"
            "  mend: this is a fault of llmpipe or of a file of yours; LLMPIPE_DEBUG=1 shows the whole story",
            file=sys.stderr,
        )
    sys.stderr.flush()


def wait_line(run: str, stage: str) -> Callable[[str], None]:
    """What is said while another process works on the same stage."""
    began = time.strftime("%H:%M:%S")
    return lambda who: print(f"  {began} waiting for {who}, which works on {run}/{stage}", file=sys.stderr, flush=True)
