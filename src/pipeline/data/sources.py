"""Where documents and rows come from: files, folders, globs, what is built in, the hub.

A folder stands for every file below it that `pipeline.data.files` reads, in the order of their names;
`hub:org/name[@revision]` is a dataset of the Hugging Face hub, taken from the local cache where it is there.
Documents and rows come one at a time. Nothing here needs torch.
"""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.data.files import ROWS, TEXT, Bad, BadRows, Row, Span, file_rows, kind, lines_before, read_text
from pipeline.data.hub_rows import HUB, hub_name, hub_rows
from pipeline.errors import ConfigError, DataError, MissingInputError
from pipeline.recipe import DataEntry

PYDOCS = "pydocs"
ARITHMETIC = "arithmetic"
BUILT_IN = (PYDOCS, ARITHMETIC)
"""Sources that are no files; they come divided into what is trained on and what is held out."""

Split = Literal["train", "held_out", "all"]


@dataclass(frozen=True)
class Document:
    """A text to learn from. `where` names it for a message: a file, a file and line, or a row of the hub."""

    text: str
    where: str


def read_documents(entry: DataEntry, *, split: Split = "train", bad: Bad | None = None) -> Iterator[Document]:
    """The documents of one source, in a fixed order, `entry.limit` of them at most; empty texts are left out.

    `split` is for what is built in, which comes divided; everything else is divided by the caller. `bad` as in
    `file_rows`; without it `entry.max_bad_rows` of them are left out. Raises MissingInputError for what is not there,
    DataError (file and line) for what can't be read, ConfigError for options that documents have no use for.
    """
    check_documents_entry(entry)
    count = 0
    for document in _documents(entry, split, bad or BadRows(entry.max_bad_rows)):
        if document.text.strip():
            yield document
            count += 1
            if count == entry.limit:
                return


def labels(entries: Sequence[DataEntry]) -> list[str]:
    """What each source is called in shards, mixtures and tables: its `label`, else the last part of its name without
    suffixes (`texts/web.jsonl.gz` is "web", `hub:org/name` "name"), numbered where two are the same.
    """
    found: list[str] = []
    for entry in entries:
        bare = entry.label or short_name(entry.source)
        label, number = bare, 2
        while label in found:
            label, number = f"{bare}-{number}", number + 1
        found.append(label)
    return found


def short_name(source: str) -> str:
    """The last part of a source's name that is more than a wildcard, without suffixes."""
    parts = [
        part for part in re.split(r"[/\\]", source.removeprefix(HUB).partition("@")[0]) if part not in ("", ".", "..")
    ]
    plain = [part for part in parts if not glob.has_magic(part.partition(".")[0])]
    name = (plain or parts or [source])[-1]
    return name.partition(".")[0] or name


def check_entry(entry: DataEntry) -> None:
    """ConfigError where an entry says what its kind of source has no use for."""
    for name in ("split", "name", "revision", "data_files", "streaming"):
        if getattr(entry, name) not in (None, False) and not entry.source.startswith(HUB):
            built_in = entry.source in BUILT_IN
            own = f"{entry.source} is divided by llmpipe itself" if built_in else "this is a local source"
            raise ConfigError(
                f"`{name}` is for datasets of the hub; {own}", where=entry.source, mend=f"take `{name}` out"
            )
    if entry.streaming and entry.split and "[" in entry.split:
        raise ConfigError(
            f"{entry.split!r} is a part of a split, which can't be streamed",
            where=entry.source,
            mend="name the files with `data_files`, or the first rows with `limit`; or take `streaming` out",
        )


def check_documents_entry(entry: DataEntry) -> None:
    """ConfigError where an entry of documents says what only rows have a use for."""
    check_entry(entry)
    if entry.deduplicate:
        what = "`deduplicate` is for rows, and these are documents"
        raise ConfigError(what, where=entry.source, mend="take it out")
    if entry.max_bad_rows and (entry.source in BUILT_IN or is_text(Path(entry.source), entry)):
        what = "`max_bad_rows` is for rows, and this source has none that can be bad by itself"
        raise ConfigError(what, where=entry.source, mend="take it out")


def check_rows_entry(entry: DataEntry, without: Sequence[str] = (), why: str = "") -> None:
    """ConfigError where an entry of rows says what only documents have a use for, or one of the fields `without`,
    which do nothing here; `why` says so."""
    check_entry(entry)
    for_documents = "`{}` is for documents (`tokenize`), and these are rows"
    for name in ("label", "text_field", *without):
        if getattr(entry, name) != DataEntry.model_fields[name].default:
            what = f"`{name}` {why}" if name in without else for_documents.format(name)
            raise ConfigError(what, where=entry.source, mend=f"take `{name}` out")


def _documents(entry: DataEntry, split: Split, bad: Bad) -> Iterator[Document]:
    if entry.source == PYDOCS:
        from pipeline.data import pydocs

        for index, text in enumerate(pydocs.corpus(split)):
            yield Document(text, f"pydocs {split} document {index + 1}")
    elif entry.source == ARITHMETIC:
        from pipeline.data import arithmetic

        for index, text in enumerate(arithmetic.corpus(split)):
            yield Document(text, f"arithmetic {split} document {index + 1}")
    elif entry.source.startswith(HUB):
        yield from documents_in(hub_rows(entry), entry, bad)
    else:
        for path in local_files(entry):
            yield from file_documents(path, entry, bad=bad)


def file_documents(
    path: Path, entry: DataEntry, span: Span | None = None, bad: Bad | None = None
) -> Iterator[Document]:
    """The documents of one file, or of a part of it (see `files.spans`); empty ones too.

    `bad` as in `file_rows`, and told of rows without a text as well: of a part by `file:line` of the part
    (`line_in_file`).
    """
    if is_text(path, entry):
        yield Document(read_text(path), str(path))
        return
    bad = bad or BadRows()
    try:
        yield from documents_in(file_rows(path, bad, span), entry, bad)
    except DataError as error:
        where = line_in_file(error.where, path, span)
        raise DataError(error.what, where=where, mend=error.mend) from error


def documents_in(rows: Iterable[tuple[Row, str]], entry: DataEntry, bad: Bad) -> Iterator[Document]:
    """The document of each row; `bad` is told of one without."""
    for row, where in rows:
        try:
            text = text_of(row, entry.text_field, where)
        except DataError as error:
            bad(error)
            continue
        yield Document(text, where)


def line_in_file(where: str, path: Path, span: Span | None) -> str:
    """A place in a part of a file as a place in the whole file, all before it read once more to count its lines."""
    if span is None or kind(path) == ".parquet":
        return where
    name, _, number = where.rpartition(":")
    return f"{name}:{int(number) + lines_before(path, span[0])}"


def read_source_rows(entry: DataEntry, bad: Bad | None = None) -> Iterator[tuple[Row, str]]:
    """All rows of a file, folder, glob or hub dataset (whatever its limit), with where each stands; `bad` as in
    `file_rows`."""
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
        yield from file_rows(path, bad)


def is_few_documents(entry: DataEntry, few: int) -> bool:
    """Whether local files hold fewer than `few` documents; text files are counted without reading them."""
    if entry.source.startswith(HUB) or entry.source in BUILT_IN:
        return False
    if entry.limit is not None and entry.limit < few:
        return True
    count, bad = 0, BadRows(entry.max_bad_rows)
    for path in local_files(entry):
        for _ in [None] if is_text(path, entry) else file_documents(path, entry, bad=bad):
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


def is_text(path: Path, entry: DataEntry) -> bool:
    """Whether a file is read as one document."""
    return kind(path) in TEXT or entry.format == "text"


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


def read_options(entry: DataEntry) -> dict[str, Any]:
    """What of an entry beside its source says which rows are read, and how; not how they come here."""
    return entry.model_dump(exclude={"source", "streaming"}, exclude_defaults=True)


def source_fingerprint(entry: DataEntry, hash_file: Callable[[Path], str]) -> dict[str, Any]:
    """What a source holds, wherever it lies; how it is read (format, limit, …) is the caller's to add.

    `hash_file` gives a file's sha256. A hub dataset counts by name and revision. Needs no torch.
    """
    check_entry(entry)
    if entry.source == PYDOCS:
        from pipeline.data import pydocs

        return {"pydocs": pydocs.fingerprint()}
    if entry.source == ARITHMETIC:
        from pipeline.data import arithmetic

        return {"arithmetic": arithmetic.VERSION}
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
