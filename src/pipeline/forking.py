"""Stages' processes, forked from the command's: one a rank, whose failures and signals are one story.

A forked process begins with torch imported, in a tenth of a second. It ends with the one that forked it; of several
ranks that fail the first says why; a signal is passed on to all of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType

from pipeline.errors import Halt, Interrupted, MachineError, PipelineError, Stopped, TrainingError
from pipeline.failure import say_error
from pipeline.progress import leave_on_signals

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # what asks a run to stop


def fork(work: Callable[[int], None], processes: int) -> None:
    """Run `work(rank)` in forked children and wait; a child's failure becomes the exception it reported."""
    port = _free_port() if processes > 1 else 0
    # one byte: the rank that takes it tells why the stage failed, and the others' ends follow from that
    word, given = os.pipe()
    os.write(given, b".")
    os.set_blocking(word, False)
    parent, on_gpu = os.getpid(), has_gpu()
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
            _child(work, rank, processes, port, parent, word, on_gpu=on_gpu)
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
    work: Callable[[int], None], rank: int, processes: int, port: int, parent: int, word: int, *, on_gpu: bool
) -> None:
    """The life of a forked child; never returns."""
    code = 1
    try:
        _die_with(parent)
        if on_gpu:
            _check_cuda_is_unopened()
        if processes > 1:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(processes),
                LOCAL_WORLD_SIZE=str(processes),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
                ACCELERATE_USE_CPU="false" if on_gpu else "true",
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


def has_gpu() -> bool:
    """Whether torch sees a GPU. It asks the driver, and opens nothing, where PYTORCH_NVML_BASED_CUDA_CHECK is set."""
    import torch

    return torch.cuda.device_count() > 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
