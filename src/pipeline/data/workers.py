"""Processes that are called one function at a time, and end with the one that started them.

Plain interpreters with pipes, not those of `multiprocessing`: those import the parent's script, wait for ever where one
dies, and a signal to the whole group (Ctrl-C) reaches them before the parent can end its work.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

from pipeline.errors import MachineError, PipelineError

Tell = Callable[[int], None]
"""Told how much more is done; its unit is the work's."""
T = TypeVar("T")

SECONDS_BETWEEN_TELLS = 0.2
SECONDS_TO_END = 1.0


class Worker:
    """One process. It ends when its stdin does: closed, or the parent killed."""

    def __init__(self) -> None:
        code = f"import sys; sys.path[:] = {sys.path!r}; from pipeline.data.workers import serve; serve()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )

    def call(self, tell: Tell, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args, tell)` in the process: a function of a module, and what pickle knows. PipelineErrors come
        back as they are; MachineError if the process has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            pickle.dump((function, args), self.process.stdin, protocol=5)
            self.process.stdin.flush()
            while True:
                kind, value = pickle.load(self.process.stdout)
                if kind == "error":
                    raise value
                if kind == "done":
                    return value
                tell(value)
        except (BrokenPipeError, EOFError, pickle.UnpicklingError) as error:
            code = self.process.wait()
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            raise MachineError(
                f"a process that reads and encodes text {how} before its work was done",
                where="tokenize.num_proc",
                mend="look for what ended it (too little memory?), or num_proc: 1",
            ) from error

    def end(self, until: float) -> None:
        """Ends the process: by itself, or at `until` (of the monotonic clock) in the middle of its work."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # of what a dead one has not read
            self.process.stdin.close()
        try:
            self.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def serve() -> None:
    """A worker's life: calls on stdin, what they tell and return on stdout, until there are no more."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is for people
    told, last = 0, time.monotonic()

    def send(kind: str, value: Any) -> None:
        pickle.dump((kind, value), out, protocol=5)
        out.flush()

    def tell(more: int) -> None:
        nonlocal told, last
        told += more
        if time.monotonic() - last > SECONDS_BETWEEN_TELLS:
            send("told", told)  # and learns so whether anybody is left to hear it
            told, last = 0, time.monotonic()

    try:
        while True:
            function, args = pickle.load(sys.stdin.buffer)
            told = 0
            try:
                found = ("done", function(*args, tell))
                send("told", told)
            except PipelineError as error:
                found = ("error", error)
            send(*found)
    except (EOFError, BrokenPipeError):
        os._exit(0)  # the parent is done or dead; an ordinary exit would complain of what it has not read


class Crew:
    """Some workers, each call to the next that is free. `with` ends them, in the middle of their work where need be."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.workers = [Worker() for _ in range(count)]
        self.idle: SimpleQueue[Worker] = SimpleQueue()
        for worker in self.workers:
            self.idle.put(worker)
        self.threads = ThreadPoolExecutor(count)  # one waits for each worker

    def submit(self, tell: Tell, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """`function(*args, tell)` by the next worker that is free; `tell` is called in a thread."""
        return self.threads.submit(self._by_the_next, tell, function, args)

    def _by_the_next(self, tell: Tell, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        worker = self.idle.get()
        try:
            return worker.call(tell, function, *args)
        finally:
            self.idle.put(worker)

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self.threads.shutdown(wait=False, cancel_futures=True)
        until = time.monotonic() + SECONDS_TO_END
        for worker in self.workers:
            worker.end(until)
        self.threads.shutdown()
        for worker in self.workers:
            assert worker.process.stdout is not None
            worker.process.stdout.close()


def in_order(items: Iterable[T], submit: Callable[[T], Future[Any] | None], ahead: int) -> Iterator[tuple[T, Any]]:
    """Each item with what was submitted for it, in order, submitted at most `ahead` before it is asked for."""
    waiting: deque[tuple[T, Future[Any] | None]] = deque()
    for item in items:
        waiting.append((item, submit(item)))
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting


def result_of(future: Future[T], look_up: Callable[[], None]) -> T:
    """The future's result; `look_up` is called while it is waited for, and may raise."""
    while True:
        try:
            return future.result(timeout=SECONDS_BETWEEN_TELLS)
        except TimeoutError:
            if future.done():
                raise
            look_up()
