"""What a stage says while it runs: metrics.jsonl, which is the truth, and a bar or plain lines on stderr.

On a terminal a rich bar with the key figures and the time left; elsewhere one plain line every few seconds. Only rank 0
writes. `Stop` turns SIGTERM and SIGINT into a flag that the stage's loop looks at, so that a step is never torn.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from pipeline.errors import Halt, Interrupted, Stopped

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

SECONDS_BETWEEN_LINES = 5.0


class Stop:
    """The wish to stop, from a signal. A second SIGINT, a second or more after the first, kills as usual."""

    def __init__(self) -> None:
        self.asked: type[Halt] | None = None
        self._when = 0.0

    def listen(self) -> None:
        """Take over SIGTERM and SIGINT of this process (main thread only)."""
        signal.signal(signal.SIGTERM, self._hear)
        signal.signal(signal.SIGINT, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        # A terminal sends SIGINT to the whole group and the launching process passes on its own: count both as one.
        if self.asked is Interrupted and number == signal.SIGINT and time.monotonic() - self._when > 1:
            os._exit(Interrupted.exit_code)
        self._when = time.monotonic()
        self.asked = Interrupted if number == signal.SIGINT else Stopped


def leave_on_signals(speaks: bool = True) -> None:
    """Until a stage listens, SIGTERM and SIGINT end the process at once; there is nothing yet to save.

    An exception would not do: it lands in whatever is being imported, and libraries swallow it or abort on it.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        kind, how = (Interrupted, "interrupted") if number == signal.SIGINT else (Stopped, "stopped")
        if speaks:
            error = kind(f"{how} before anything was saved", mend="run the same command again")
            os.write(2, f"{error}\n".encode())
        os._exit(kind.exit_code)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)


class Metrics:
    """metrics.jsonl: one object a line with step, time (seconds of work so far), tokens and figures."""

    def __init__(self, path: Path, is_main: bool = True) -> None:
        self.path, self.is_main = path, is_main
        self.figures: dict[str, float] = {}
        self.tokens = 0
        self.also: Callable[[Mapping[str, float | int | str | None]], None] | None = None
        """Told every line as it is written, on the main process; it never raises."""
        self._before = 0.0
        self._start = time.monotonic()

    def seconds(self) -> float:
        """Seconds of work, those before a resume included."""
        return self._before + time.monotonic() - self._start

    def log(self, step: int, tokens: int | None = None, **figures: float | int | str | None) -> None:
        """Append a line. A figure that is not finite is written as null."""
        if tokens is not None:
            self.tokens = tokens
        self.figures = {k: float(v) for k, v in figures.items() if isinstance(v, int | float)}
        if not self.is_main:
            return
        line = {"step": step, "time": round(self.seconds(), 3), "tokens": self.tokens}
        line |= {key: _finite(value) for key, value in figures.items()}  # type: ignore[misc]
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.also is not None:
            self.also(line)

    def sync(self) -> int:
        """Bytes written so far, on disk when it returns."""
        if not self.path.exists():
            return 0
        with self.path.open("a", encoding="utf-8") as file:
            os.fsync(file.fileno())
            return file.tell()

    def cut(self, length: int, seconds: float) -> None:
        """Drop what a killed run wrote after its last checkpoint; the clock goes on from there."""
        if self.path.exists():
            os.truncate(self.path, length)
        self._before, self._start = seconds, time.monotonic()


def _finite(value: float | int | str | None) -> float | int | str | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Bar:
    """One phase's progress; `advance` after each unit."""

    def __init__(self, phase: str, total: int | None, unit: str, rich: Progress | None, quiet: bool) -> None:
        self.phase, self.total, self.unit, self.quiet = phase, total, unit, quiet
        self.done = self.shown = 0
        self._rich = rich
        self._task: TaskID | None = rich.add_task(phase, total=total, figures="") if rich else None
        self._start = self._last = time.monotonic()
        self._first: int | None = None

    def advance(self, n: int = 1, **figures: float) -> None:
        """`n` more units are done; `figures` are the key figures to show."""
        self.done += n
        is_due = not self.quiet and time.monotonic() - self._last >= SECONDS_BETWEEN_LINES
        if self._rich is None and not is_due:
            return  # before anything is formatted: a phase may have a hundred thousand short units
        text = "  ".join(f"{name} {_compact(value)}" for name, value in figures.items())
        if self._rich is not None and self._task is not None:
            self._rich.update(self._task, completed=self.done, total=self.total)
            if text:
                self._rich.update(self._task, figures=text)
        else:
            self._last = time.monotonic()
            _line(f"{self.phase}  {self._share()}  {text}{self._left()}")

    def start_at(self, done: int) -> None:
        """Begin at `done`: a resumed phase, whose speed is counted from here."""
        self.done = self.shown = done
        self.advance(0)

    def finish(self) -> None:
        """Say how long it took, where lines are plain."""
        if self._rich is None and not self.quiet:
            _line(f"{self.phase}  {self._share()}  done in {clock(time.monotonic() - self._start)}")

    def _share(self) -> str:
        return f"{self.done:,}/{self.total:,} {self.unit}" if self.total else f"{self.done:,} {self.unit}"

    def _left(self) -> str:
        fresh = self.done - self.shown
        if not self.total or not fresh:
            return ""
        return f"  ETA {clock((time.monotonic() - self._start) / fresh * (self.total - self.done))}"


@contextmanager
def bar(phase: str, total: int | None, unit: str, *, quiet: bool) -> Iterator[Bar]:
    """A bar on a terminal, plain lines elsewhere, nothing when `quiet`."""
    if quiet or not sys.stderr.isatty():
        plain = Bar(phase, total, unit, None, quiet)
        yield plain
        plain.finish()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[figures]}"),
    )
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as progress:
        yield Bar(phase, total, unit, progress, quiet)


def clock(seconds: float) -> str:
    """`1:02:03`, `3:05` or `8.2 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def figure(value: float, digits: int = 4) -> str:
    """`516,206`, `4.17` or `2.39e+13`: counts in full, else so many significant digits."""
    return f"{value:,.0f}" if 10_000 <= abs(value) < 1e10 else f"{value:.{digits}g}"


def _compact(value: float) -> str:
    if isinstance(value, float) and (abs(value) < 1e-3 and value != 0):
        return f"{value:.1e}"
    return f"{value / 1000:.1f}k" if abs(value) >= 10_000 else f"{value:,.4g}"


def _line(text: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(f"  {text}", file=sys.stderr, flush=True)
