"""Work in parts that a kill does not undo: each a file of its own, written whole or not at all.

A part is some places of a list and what was found for them. The parts are the same however many ranks share them and
wherever a run went on, and no part needs another, so that neither changes a bit of what comes out (on a CPU, with the
threads it was begun with: every part's file names them). With several ranks the parts are dealt out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.artifacts import write_json
from pipeline.errors import PipelineError
from pipeline.runtime import Runtime

Item = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What is done to each part, and how it is spoken of."""

    phase: str
    unit: str
    find: Callable[[Sequence[int]], list[Item]]
    """Places -> an item for each; plain JSON."""
    count: Callable[[Item], int]
    """Units in an item."""
    shown: Callable[[Sequence[Item]], Mapping[str, float]]
    """The key figures of what this rank has found so far."""


def cut(lengths: Sequence[int], size: int) -> list[list[int]]:
    """The places of `lengths` in parts of `size`, like lengths together and the longest first, so that what does not
    fit into memory is known at once."""
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    return [order[start : start + size] for start in range(0, len(order), size)]


def do(work: Work, parts: Sequence[Sequence[int]], runtime: Runtime) -> tuple[list[Item], float]:
    """(the item of every place, in their order; seconds of work over all ranks). Every rank returns the same.

    Parts that an earlier try has left in the checkpoints' folder are not done again. Asked to stop, a rank ends after
    the part it is at.
    """
    folder = runtime.checkpoints.folder / "parts"
    files = [folder / f"{number:06d}.json" for number in range(len(parts))]
    if runtime.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    runtime.barrier()
    done = [file for file in files if file.exists()]
    runtime.checkpoints.resumed_from = len(done)
    before = [_read(file) for file in done]
    if before:  # another thread count gives other bits
        runtime.threads = before[0]["threads"]
        torch.set_num_threads(runtime.threads)
    if runtime.is_main:
        runtime.metrics.cut(0, sum(each["seconds"] for each in before) / runtime.world_size)
    runtime.barrier()  # every rank has looked before any writes: they must agree on what is left
    todo = [(part, file) for part, file in zip(parts, files, strict=True) if file not in done]
    total = sum(map(len, parts))
    _work(work, todo, total, total - sum(len(part) for part, _ in todo), runtime)
    is_stopping = runtime.stop_requested()  # every rank comes here, and all that was written is there
    finished = sum(file.exists() for file in files)
    if is_stopping and finished < len(files):
        runtime.stop(finished)
    found: list[Item] = [{}] * total
    seconds = 0.0
    for part, file in zip(parts, files, strict=True):
        written = _read(file)
        seconds += written["seconds"]
        for place, item in zip(part, written["items"], strict=True):
            found[place] = item
    return found, seconds


def _work(work: Work, todo: Sequence[tuple[Sequence[int], Path]], total: int, done: int, runtime: Runtime) -> None:
    """This rank's share of the parts that are left, or as many as were done when it was asked to stop. The bar counts
    the places of all ranks, as far as this one is."""
    own: list[Item] = []
    began, units = time.monotonic(), 0
    with runtime.progress(work.phase, total, "prompts") as bar:
        bar.start_at(done)
        for number, (part, file) in enumerate(todo):
            if number % runtime.world_size == runtime.rank:
                if runtime.halt.asked is not None:
                    return
                start = time.monotonic()
                items = work.find(part)
                assert len(items) == len(part), "an item a place"
                seconds = round(time.monotonic() - start, 3)
                write_json(file, {"seconds": seconds, "threads": runtime.threads, "items": items})
                own += items
                units += sum(map(work.count, items))
            speed = units * runtime.world_size / max(1e-9, time.monotonic() - began)
            bar.advance(len(part), **{f"{work.unit}/s": speed}, **(work.shown(own) if own else {}))


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


@contextmanager
def said_of(stage: str) -> Iterator[None]:
    """What ppo shares with other stages names ppo's fields in its errors: here they are named as `stage`'s own."""
    try:
        yield
    except PipelineError as error:
        error.where, error.mend = (text.replace("ppo.", f"{stage}.") for text in (error.where, error.mend))
        raise
