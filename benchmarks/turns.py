"""Sides of a benchmark that take turns, step by step, each a process of its own: a busy machine is as busy for all.

A side's process makes `Turns()` and calls `take()` after every step; `timed` starts the sides and asks them for their
steps one after another, in an order that alternates. CLOCK=processor counts time of the processor (over all threads),
for a machine that others use; else it is the wall's.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

clock = time.process_time if os.environ.get("CLOCK") == "processor" else time.perf_counter
CLOCK = "processor" if clock is time.process_time else "wall"


class Turns:
    """Tells what a step took and waits to be asked for the next."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever else prints is no part of the conversation
        self.start = 0.0

    def take(self) -> None:
        """A step is over; the clock starts when the next may begin. Ends the process where none is asked for."""
        self._tell(clock() - self.start)
        if not sys.stdin.readline():
            os._exit(0)
        self.start = clock()

    def end(self, found: dict[str, Any]) -> None:
        """All steps are over, and this is what came of them."""
        self._tell(found)

    def _tell(self, value: Any) -> None:
        self.out.write(json.dumps(value) + "\n")
        self.out.flush()


def timed(
    commands: dict[str, list[str]], steps: int, warm_up: int, *, to_the_end: bool = False
) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """(seconds of each side's steps after the first `warm_up`; what each told `to_the_end`, else nothing).

    A side whose process ends before that ends this one.
    """
    sides = {
        name: subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name, command in commands.items()
    }

    def read(name: str) -> Any:
        line = sides[name].stdout.readline()  # type: ignore[union-attr]
        if not line:
            sys.exit(f"{name} ended: {sides[name].wait()}")
        return json.loads(line)

    def ask(name: str) -> Any:
        stdin = sides[name].stdin
        assert stdin is not None
        stdin.write("go\n")
        stdin.flush()
        return read(name)

    found = {name: [read(name)] for name in sides}  # the first steps, on clocks that began before they were there
    for number in range(steps - 1):
        for name in sides if number % 2 else reversed(sides):
            found[name].append(ask(name))
    ends = {name: ask(name) for name in sides} if to_the_end else {}
    for process in sides.values():
        process.communicate()  # the end of its input ends it
    return {name: values[warm_up:] for name, values in found.items()}, ends


def ratios(values: list[float], others: list[float]) -> list[float]:
    """Pair by pair, in order of size."""
    return sorted(own / theirs for own, theirs in zip(values, others, strict=True))


def spread(values: list[float]) -> tuple[float, float, float]:
    """(median, and the two between which half of them lie) of sorted values."""
    quarter = len(values) // 4
    return statistics.median(values), values[quarter], values[-1 - quarter]
