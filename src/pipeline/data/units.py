"""A corpus in units: parts that any process can read by itself, in the corpus' order.

A unit is about UNIT_BYTES of text: some files, a part of a large `.jsonl` or parquet file, rows of a hub dataset, a
side of what is built in. What can't be cut is one unit whatever its size: a compressed file, a list, a source with a
`limit`. The cut follows from the files alone, not from how many processes there are: any number of them can go on with
what was broken off.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.data.files import COMPRESSED, Bad, BadRows, Row, Span, kind, spans
from pipeline.data.hub_rows import HUB, hub_dataset, streamed_rows
from pipeline.data.sources import (
    BUILT_IN,
    Document,
    Split,
    check_documents_entry,
    documents_in,
    file_documents,
    is_few_documents,
    line_in_file,
    local_files,
    read_documents,
)
from pipeline.recipe import DataEntry

FEW = 100
UNIT_BYTES = 8_000_000
UNPACKED = 3
"""Text in a byte of a compressed file, about."""
STREAMED_BYTES = 500_000_000
"""Text in a file of a streamed dataset, until it is read."""
BUILT_IN_BYTES = {"pydocs": 30_000_000, "arithmetic": 2_000_000}


@dataclass(frozen=True)
class Division:
    """How a source's documents are divided: a share `held_out` of them by hash, or the last share `tail` of each."""

    held_out: float
    tail: float | None = None


@dataclass(frozen=True)
class Unit:
    """A part of the corpus: `files` (none: all that the entry has), or a `span` of the only one of them."""

    entry: DataEntry
    source: int
    """Which of the entries it is from."""
    division: Division
    bytes: int
    """Of text, as far as can be told without reading."""
    files: tuple[Path, ...] = ()
    span: Span | None = None
    """Bytes or row groups (`files.spans`), rows of a hub dataset, or files of a streamed one."""
    split: Split = "train"
    """For what is built in, which comes divided."""

    def content(self) -> list[Any]:
        """What tells it from a unit of other data: kinds and sizes of its files, wherever they lie, and its part."""
        files = [[kind(path), path.stat().st_size] for path in self.files]
        return [self.source, self.bytes, files, self.span, self.split]


def cut(entries: Sequence[DataEntry], held_out: float, tail: float, say: Callable[[str], None]) -> list[Unit]:
    """All units of all entries, in order.

    A share `held_out` of the documents of a source is held out; of a source with fewer than FEW documents the last
    share `tail` of each, which `say` is told of.
    """
    found: list[Unit] = []
    for place, entry in enumerate(entries):
        check_documents_entry(entry)
        is_few = is_few_documents(entry, FEW)
        if is_few:
            say(f"{entry.source}: fewer than {FEW} documents, so the last {tail:.0%} of each is held out")
        whole = Unit(entry, place, Division(held_out, tail if is_few else None), 0)
        if entry.source in BUILT_IN:
            size = BUILT_IN_BYTES[entry.source]
            found += [replace(whole, bytes=size), replace(whole, bytes=size // 20, split="held_out")]
        elif entry.source.startswith(HUB):
            found += cut_rows(whole)
        else:
            found += cut_files(whole)
    return found


def cut_rows(whole: Unit) -> list[Unit]:
    """A hub dataset by its rows; a streamed one by its files, of which neither rows nor sizes are known."""
    rows = cached_rows(whole.entry)
    if whole.entry.streaming:
        parts = [None] if whole.entry.limit is not None else [(place, place + 1) for place in range(rows.num_shards)]
        return [replace(whole, bytes=STREAMED_BYTES, span=part) for part in parts]
    count, size = len(rows), int(rows.data.nbytes)
    if whole.entry.limit is not None or not count:
        return [replace(whole, bytes=size)]
    step = max(1, count * UNIT_BYTES // max(1, size))
    parts = [(start, min(start + step, count)) for start in range(0, count, step)]
    return [replace(whole, bytes=size * (end - start) // count, span=(start, end)) for start, end in parts]


def cut_files(whole: Unit) -> list[Unit]:
    """Files in a row until they are a unit; a larger one in parts."""
    files = local_files(whole.entry)
    if whole.entry.limit is not None:
        return [replace(whole, bytes=sum(map(text_in, files)))]
    found: list[Unit] = []
    group: list[Path] = []
    held = 0

    def close() -> None:
        nonlocal held
        if group:
            found.append(replace(whole, bytes=held, files=tuple(group)))
        group.clear()
        held = 0

    for path in files:
        size = text_in(path)
        parts = spans(path, UNIT_BYTES) if size > UNIT_BYTES and whole.entry.format != "text" else []
        if parts:
            close()
            found += [replace(whole, bytes=size // len(parts), files=(path,), span=part) for part in parts]
            continue
        group.append(path)
        held += size
        if held >= UNIT_BYTES:
            close()
    close()
    return found


def text_in(path: Path) -> int:
    """Bytes of text in a file, about."""
    packed = path.suffix in COMPRESSED or path.suffix == ".parquet"
    return path.stat().st_size * (UNPACKED if packed else 1)


def read(unit: Unit, bad: Bad | None = None) -> Iterator[Document]:
    """The documents of one unit, empty ones left out; errors and `bad` as those of `read_documents`."""
    bad = bad or BadRows(unit.entry.max_bad_rows)
    if not unit.files and unit.span is None:
        yield from read_documents(unit.entry, split=unit.split, bad=bad)
        return
    for document in documents_in(unit_rows(unit), unit.entry, bad) if not unit.files else unit_files(unit, bad):
        if document.text.strip():
            yield document


def unit_files(unit: Unit, bad: Bad) -> Iterator[Document]:
    for path in unit.files:
        yield from file_documents(path, unit.entry, unit.span, bad)


def place_in_file(unit: Unit, where: str) -> str:
    """A place that `bad` was told of, as in the whole file."""
    return line_in_file(where, unit.files[0], unit.span) if unit.files else where


def unit_rows(unit: Unit) -> Iterator[tuple[Row, str]]:
    assert unit.span is not None
    if unit.entry.streaming:
        yield from streamed_rows(unit.entry, cached_rows(unit.entry), range(*unit.span))
        return
    split = unit.entry.split or "train"
    rows = cached_rows(unit.entry).select(range(*unit.span))
    for number, row in enumerate(rows, start=unit.span[0] + 1):
        yield dict(row), f"{unit.entry.source} {split}: row {number}"


@functools.lru_cache(maxsize=4)
def cached_rows(entry: DataEntry) -> Any:
    """A hub dataset, opened once in a process."""
    return hub_dataset(entry)
