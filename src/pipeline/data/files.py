"""One file as a text or as rows, whatever it is packed in. Every fault is named by file and line.

    .txt .text .md .rst     a file is a text
    .jsonl .ndjson          a row a line
    .json                   a list of rows, or a row a line
    .parquet                a row a row
    any of them + .gz .zst  the same, compressed

Rows come one at a time; a `.json` list, a compressed parquet file and a text are read whole.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from pipeline.errors import DataError

TEXT = (".txt", ".text", ".md", ".rst")
LINES = (".jsonl", ".ndjson")
ROWS = (*LINES, ".json", ".parquet")
COMPRESSED = (".gz", ".zst")

Row = dict[str, Any]
Span = tuple[int, int]
"""A part of a file: of its bytes the lines that begin there, or of a parquet file the row groups."""
Bad = Callable[[DataError], None]
"""What is told of a bad row: it raises, or the row is left out."""


class BadRows:
    """Counts the bad rows of a source: up to `most` are left out, one more is the error. `count`: those in the parts
    before what is read."""

    def __init__(self, most: int = 0, count: int = 0) -> None:
        self.most, self.count = most, count
        self.first: tuple[str, str] | None = None
        """Where the first that it was told of stands, and what is wrong with it."""

    def __call__(self, error: DataError) -> None:
        self.count += 1
        self.first = self.first or (error.where, error.what)
        if self.count > self.most:
            beyond = f" (bad row {self.count:,}; max_bad_rows is {self.most:,})" if self.most else ""
            raise DataError(error.what + beyond, where=error.where, mend=error.mend) from error


def left_out(source: str, count: int, first: Iterable[str]) -> str:
    """What is said of bad rows that are left out; `first`: where the first stands, and what is wrong with it."""
    return f"{source}: {count:,} bad rows are left out, the first at {': '.join(first)}"


def kind(path: Path) -> str:
    """The suffix that says how to read a file, without the compression's."""
    bare = path.with_suffix("") if path.suffix in COMPRESSED else path
    return bare.suffix.lower()


class ZstFile(io.RawIOBase):
    """The content of a `.zst` file, frame after frame; EOFError where the last one is cut off.

    zstandard's own reader takes a file that was cut off for a shorter one.
    """

    def __init__(self, path: Path) -> None:
        import zstandard

        self.file = path.open("rb")
        self.new_frame = zstandard.ZstdDecompressor().decompressobj
        self.frame: Any = None
        self.packed, self.ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            self.packed = self.packed or self.file.read(1 << 17)
            if not self.packed:
                if self.frame is not None:
                    raise EOFError("the file ends in the middle")
                return 0
            self.frame = self.frame or self.new_frame()
            self.ready = memoryview(self.frame.decompress(self.packed))
            self.packed = self.frame.unused_data
            self.frame = None if self.frame.eof else self.frame
        count = min(len(buffer), len(self.ready))
        buffer[:count], self.ready = self.ready[:count], self.ready[count:]
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed as its suffix says; DataError where that can't be done."""
    broken: tuple[type[Exception], ...] = (gzip.BadGzipFile, zlib.error, EOFError)
    if path.suffix == ".zst":
        import zstandard

        broken = (zstandard.ZstdError, EOFError)
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rb") as packed:
                yield cast(IO[bytes], packed)
        elif path.suffix == ".zst":
            with io.BufferedReader(ZstFile(path), 1 << 20) as unpacked:
                yield unpacked
        else:
            with path.open("rb") as plain:
                yield plain
    except broken as error:
        raise DataError(f"cannot be decompressed: {error}", where=str(path), mend="fetch or pack it again") from error


def read_text(path: Path) -> str:
    """A whole file as text, newlines as they stand, no byte order mark; DataError where it is not UTF-8."""
    with open_bytes(path) as file:
        return decoded(file.read(), str(path)).removeprefix("\ufeff")


def decoded(data: bytes, where: str) -> str:
    """UTF-8, or DataError with the place of the first byte that is not."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"not UTF-8 in line {line} (byte {error.start})",
            where=where,
            mend="convert it: iconv -f latin1 -t utf-8",
        ) from error


def file_rows(path: Path, bad: Bad | None = None, span: Span | None = None) -> Iterator[tuple[Row, str]]:
    """The rows of one file, each with where it stands: `file:line`, or `file: row n` without lines.

    `bad` is told of each row that can't be read by itself; without it the first one is the error. `span` is for what
    `spans` cuts: a part of the rows, whose lines are counted from the part's first (`lines_before` counts the others).
    """
    bad = bad or BadRows()
    if kind(path) == ".parquet":
        yield from parquet_rows(path, span)
    elif kind(path) in LINES:
        yield from line_rows(path, bad, span)
    else:
        with open_bytes(path) as file:
            start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        yield from list_rows(path, bad) if start == b"[" else line_rows(path, bad)


def spans(path: Path, size: int) -> list[Span]:
    """A file in parts of about `size` bytes that can be read by themselves; [] where it can't be cut."""
    if kind(path) in LINES and path.suffix not in COMPRESSED:
        end = path.stat().st_size
        return [(start, min(start + size, end)) for start in range(0, end, size)]
    if path.suffix != ".parquet":
        return []
    with open_parquet(path) as file:
        groups = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
    found, start, held = [], 0, 0
    for end, bytes_of_group in enumerate(groups, start=1):
        held += bytes_of_group
        if held >= size or end == len(groups):
            found.append((start, end))
            start, held = end, 0
    return found


def to_first_line(file: IO[bytes], start: int) -> int:
    """Goes to the first line that begins at byte `start` or behind it; returns where that is."""
    if start:
        file.seek(start - 1)
        file.readline()
    return file.tell()


def lines_before(path: Path, start: int) -> int:
    """How many lines end before the first one that begins at byte `start` or behind it."""
    with path.open("rb") as file:
        left, count = to_first_line(file, start), 0
        file.seek(0)
        while left:
            chunk = file.read(min(left, 1 << 20))
            count, left = count + chunk.count(b"\n"), left - len(chunk)
    return count


def line_rows(path: Path, bad: Bad, span: Span | None = None) -> Iterator[tuple[Row, str]]:
    """A JSON object a line; empty lines are skipped."""
    with open_bytes(path) as file:
        place = to_first_line(file, span[0]) if span else 0
        for number, line in enumerate(file, start=1):
            if span and place >= span[1]:
                return
            place += len(line)
            where = f"{path}:{number}"
            if place == len(line):
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                row = row_in(line, where)
            except DataError as error:
                bad(error)
                continue
            yield row, where


def row_in(line: bytes, where: str) -> Row:
    """The JSON object that a line holds."""
    try:
        return as_row(json.loads(decoded(line, where)), where)
    except json.JSONDecodeError as error:
        raise DataError(
            f"not JSON: {error.msg} at column {error.colno}",
            where=where,
            mend="a row is one JSON object a line",
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists without end
        raise DataError(f"not JSON that can be read: {error}", where=where, mend="mend the row") from error


def list_rows(path: Path, bad: Bad) -> Iterator[tuple[Row, str]]:
    """A JSON file that is one list of objects."""
    try:
        rows = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(
            f"not JSON: {error.msg} at column {error.colno}",
            where=f"{path}:{error.lineno}",
            mend="mend the file",
        ) from error
    for number, value in enumerate(rows, start=1):
        where = f"{path}: row {number}"
        try:
            row = as_row(value, where)
        except DataError as error:
            bad(error)
            continue
        yield row, where


@contextmanager
def open_parquet(path: Path) -> Iterator[Any]:
    """A pyarrow ParquetFile; DataError where it is none."""
    import pyarrow
    import pyarrow.parquet

    try:
        with open_bytes(path) as file:
            source = pyarrow.BufferReader(file.read()) if path.suffix in COMPRESSED else file
            yield pyarrow.parquet.ParquetFile(source)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"not a parquet file: {error}", where=str(path), mend="write it again") from error


def parquet_rows(path: Path, span: Span | None = None) -> Iterator[tuple[Row, str]]:
    """The rows of a parquet file, a batch in memory."""
    with open_parquet(path) as file:
        first, last = span or (0, file.num_row_groups)
        number = sum(file.metadata.row_group(i).num_rows for i in range(first))
        for batch in file.iter_batches(1024, row_groups=list(range(first, last))):
            for row in batch.to_pylist():
                number += 1
                yield row, f"{path}: row {number}"


def as_row(value: Any, where: str) -> Row:
    """`value` if it is an object; DataError if it is a list or a lone value."""
    if not isinstance(value, dict):
        raise DataError(f"a row is an object with named fields, not {type(value).__name__}", where=where)
    return value
