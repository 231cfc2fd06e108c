"""Where documents and rows come from: files, folders, globs, the embedded pydocs, the hub.

    .txt .text .md .rst     a file is a document
    .jsonl .ndjson          a row a line
    .json                   a list of rows, or a row a line
    .parquet                a row a row
    any of them + .gz .zst  the same, compressed
    a folder                every such file below it, in the order of their names
    hub:org/name[@revision] a dataset of the Hugging Face hub, from the local cache where it is there

Files are read as they come, one document or row in memory (a `.json` list and a text file are read whole).
Nothing here needs torch, and `datasets` is imported only for a hub name.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

from pipeline.errors import ConfigError, DataError, MissingInputError
from pipeline.recipe import DataEntry

TEXT = (".txt", ".text", ".md", ".rst")
LINES = (".jsonl", ".ndjson")
ROWS = (*LINES, ".json", ".parquet")
COMPRESSED = (".gz", ".zst")
PYDOCS = "pydocs"
HUB = "hub:"

Row = dict[str, Any]
Split = Literal["train", "held_out", "all"]


@dataclass(frozen=True)
class Document:
    """A text to learn from. `where` names it for a message: a file, a file and line, or a row of the hub."""

    text: str
    where: str


def read_documents(entry: DataEntry, *, split: Split = "train") -> Iterator[Document]:
    """The documents of one source, in a fixed order, `entry.limit` of them at most; empty texts are left out.

    `split` is for pydocs, which comes divided; everything else is divided by the caller. Raises
    MissingInputError for what is not there and DataError (file and line) for what can't be read.
    """
    check_entry(entry)
    count = 0
    for document in _documents(entry, split):
        if document.text.strip():
            yield document
            count += 1
            if count == entry.limit:
                return


def check_entry(entry: DataEntry) -> None:
    """ConfigError where an entry says what its kind of source has no use for."""
    for name in ("split", "name", "revision"):
        if getattr(entry, name) is not None and not entry.source.startswith(HUB):
            own = "pydocs is divided by llmpipe itself" if entry.source == PYDOCS else "this is a local source"
            raise ConfigError(
                f"`{name}` is for datasets of the hub; {own}", where=entry.source, mend=f"take `{name}` out"
            )


def _documents(entry: DataEntry, split: Split) -> Iterator[Document]:
    if entry.source == PYDOCS:
        from pipeline.data import pydocs

        for index, text in enumerate(pydocs.corpus(split)):
            yield Document(text, f"pydocs {split} document {index + 1}")
    elif entry.source.startswith(HUB):
        for row, where in hub_rows(entry):
            yield Document(text_of(row, entry.text_field, where), where)
    else:
        for path in local_files(entry):
            if is_text(path, entry):
                yield Document(read_text(path), str(path))
            else:
                for row, where in file_rows(path):
                    yield Document(text_of(row, entry.text_field, where), where)


def read_source_rows(entry: DataEntry) -> Iterator[tuple[Row, str]]:
    """All rows of a file, folder, glob or hub dataset (whatever its limit), with where each stands."""
    if entry.source.startswith(HUB):
        yield from hub_rows(entry)
        return
    for path in local_files(entry):
        if kind(path) in TEXT:
            raise DataError(
                "a text file holds documents, not rows",
                where=str(path),
                mend="name jsonl, json or parquet files here; text files are for `tokenize`",
            )
        yield from file_rows(path)


def is_few_documents(entry: DataEntry, few: int) -> bool:
    """Whether local files hold fewer than `few` documents; text files are counted without reading them."""
    if entry.source.startswith(HUB) or entry.source == PYDOCS:
        return False
    count = 0
    for path in local_files(entry):
        for _ in [None] if is_text(path, entry) else file_rows(path):
            count += 1
            if count >= few:
                return False
    return True


def local_files(entry: DataEntry) -> list[Path]:
    """The files that a path, folder or glob stands for, sorted; MissingInputError where there are none."""
    path = Path(entry.source)
    if path.is_file():
        found = [path]
        if kind(path) not in (*TEXT, *ROWS) and entry.format != "text":
            raise ConfigError(
                f"a {path.suffix or 'nameless'} file is none that llmpipe reads",
                where=str(path),
                mend=f"one of {' '.join((*TEXT, *ROWS))} (+ .gz, .zst), or `format: text` for any file",
            )
        return found
    inside = path.rglob("*") if path.is_dir() else map(Path, glob.glob(entry.source, recursive=True))
    found = sorted(p for p in inside if p.is_file() and (kind(p) in (*TEXT, *ROWS) or entry.format == "text"))
    if not found:
        is_there = path.is_dir() or glob.has_magic(entry.source)
        raise MissingInputError(
            "no file in it that llmpipe reads" if is_there else "no such file or folder",
            where=entry.source,
            mend=f"name a file, folder or glob of {' '.join((*TEXT, *ROWS))} (+ .gz, .zst)",
        )
    return found


def kind(path: Path) -> str:
    """The suffix that says how to read a file, without the compression's."""
    bare = path.with_suffix("") if path.suffix in COMPRESSED else path
    return bare.suffix.lower()


def is_text(path: Path, entry: DataEntry) -> bool:
    """Whether a file is read as one document."""
    return kind(path) in TEXT or entry.format == "text"


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


def file_rows(path: Path) -> Iterator[tuple[Row, str]]:
    """The rows of one file, each with where it stands: `file:line`, or `file: row n` without lines."""
    if kind(path) == ".parquet":
        yield from parquet_rows(path)
    elif kind(path) in LINES:
        yield from line_rows(path)
    else:
        with open_bytes(path) as file:
            start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        yield from list_rows(path) if start == b"[" else line_rows(path)


def line_rows(path: Path) -> Iterator[tuple[Row, str]]:
    """A JSON object a line; empty lines are skipped."""
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                row = json.loads(decoded(line, where))
            except json.JSONDecodeError as error:
                raise DataError(
                    f"not JSON: {error.msg} at column {error.colno}",
                    where=where,
                    mend="a row is one JSON object a line",
                ) from error
            yield as_row(row, where), where


def list_rows(path: Path) -> Iterator[tuple[Row, str]]:
    """A JSON file that is one list of objects."""
    try:
        rows = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(
            f"not JSON: {error.msg} at column {error.colno}",
            where=f"{path}:{error.lineno}",
            mend="mend the file",
        ) from error
    for number, row in enumerate(rows, start=1):
        where = f"{path}: row {number}"
        yield as_row(row, where), where


def parquet_rows(path: Path) -> Iterator[tuple[Row, str]]:
    """The rows of a parquet file, a batch in memory."""
    import pyarrow
    import pyarrow.parquet

    try:
        with open_bytes(path) as file:
            source = pyarrow.BufferReader(file.read()) if path.suffix in COMPRESSED else file
            number = 0
            for batch in pyarrow.parquet.ParquetFile(source).iter_batches(1024):
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"{path}: row {number}"
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"not a parquet file: {error}", where=str(path), mend="write it again") from error


def as_row(value: Any, where: str) -> Row:
    """`value` if it is an object; DataError if it is a list or a lone value."""
    if not isinstance(value, dict):
        raise DataError(f"a row is an object with named fields, not {type(value).__name__}", where=where)
    return value


def text_of(row: Row, text_field: str, where: str) -> str:
    """The document in a row. Raises DataError where the field is missing or holds no text."""
    if not isinstance(row.get(text_field), str):
        problem = "holds no text" if text_field in row else "is missing"
        raise DataError(
            f"field `{text_field}` {problem} (the row has {', '.join(row) or 'no fields'})",
            where=where,
            mend="set the entry's text_field to the field with the text",
        )
    text: str = row[text_field]
    return text


def hub_rows(entry: DataEntry) -> Iterator[tuple[Row, str]]:
    """The rows of a dataset of the hub (split `train` unless the entry names one)."""
    import datasets

    name, revision = hub_name(entry)
    split = entry.split or "train"
    try:
        rows = datasets.load_dataset(name, entry.name, split=split, revision=revision)
    except (
        OSError,
        ValueError,
    ) as error:  # what `datasets` raises for a name, a split or a hub that is not there
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MissingInputError(
            f"the dataset cannot be had: {reason}",
            where=entry.source,
            mend="check the name, `name:` and `split:`; without a hub, name local jsonl or parquet files",
        ) from error
    for number, row in enumerate(rows, start=1):
        yield dict(row), f"{entry.source} {split}: row {number}"


def hub_name(entry: DataEntry) -> tuple[str, str | None]:
    """(org/name, revision) of a hub source."""
    name, _, revision = entry.source.removeprefix(HUB).partition("@")
    return name, entry.revision or revision or None


def source_fingerprint(entry: DataEntry, hash_file: Callable[[Path], str]) -> dict[str, Any]:
    """What a source holds, wherever it lies; how it is read (format, limit, …) is the caller's to add.

    `hash_file` gives a file's sha256. A hub dataset counts by name and revision. Needs no torch.
    """
    check_entry(entry)
    if entry.source == PYDOCS:
        from pipeline.data import pydocs

        return {"pydocs": pydocs.fingerprint()}
    if entry.source.startswith(HUB):
        name, revision = hub_name(entry)
        return {"hub": name, "revision": revision or "main"}
    return {"files": [[kind(path), hash_file(path)] for path in local_files(entry)]}


def share(text: str) -> float:
    """A number in [0, 1) that depends on `text` alone; what is below the held-out share is held out.

    The first 53 bits of blake2b, so that 1.0 itself is never reached.
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2.0**53


def copies(text: str, weight: float) -> int:
    """How often a text of a source of this weight is taken: 2.5 is twice, and a third time for half of them."""
    whole = int(weight)
    return whole + (weight > whole and share(f"copy {text}") < weight - whole)
