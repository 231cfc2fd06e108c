"""Token files in datatrove's `.ds` layout: write once, memory-map ever after.

    NAME.ds            the tokens, raw little-endian uint16 (uint32 above 65,536 ids), document after document, each
                       closed by the separator; the documents of a source stand together
    NAME.ds.index      little-endian uint64: where each document ends, its separator included
    NAME.ds.bytes      little-endian uint64: the UTF-8 bytes of each document's text
    NAME.ds.metadata   JSON: version, dtype, tokens, documents, text_bytes, separator_id, vocab_size, tokenizer_hash,
                       sources (label, weight, tokens, documents, text_bytes of each)

nanotron and datatrove read `.ds` and its index as they are. The bytes are what turns a loss into bits per
byte.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from pipeline.errors import ArtifactError

VERSION = 2
Tokens = npt.NDArray[Any]


@dataclass
class Source:
    """What one source has in a token file, and the weight it was given in the recipe."""

    label: str
    weight: float = 1.0
    tokens: int = 0
    documents: int = 0
    text_bytes: int = 0


@dataclass(frozen=True)
class Metadata:
    """What a token file says of itself. `text_bytes` counts UTF-8 bytes of all documents, separators not."""

    version: int
    dtype: str
    tokens: int
    documents: int
    text_bytes: int
    separator_id: int
    vocab_size: int
    tokenizer_hash: str
    sources: tuple[Source, ...]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest type that holds every id: two bytes up to 65,536 ids, four above."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class ShardWriter:
    """Writes a token file, a document at a time; the metadata comes last, when `with` ends well.

    with ShardWriter(out / "train.ds", len(tokenizer), separator_id, tokenizer_hash, [Source("books")]) as shard:
        shard.append(ids, text_bytes)
    """

    def __init__(
        self,
        path: Path,
        vocab_size: int,
        separator_id: int,
        tokenizer_hash: str,
        sources: Sequence[Source] = (Source("text"),),
        begun: Sequence[Source] | None = None,
    ) -> None:
        """`begun` is what `sync` returned once: the file goes on behind that; ArtifactError where it is shorter."""
        self.path = path
        self.sources = [replace(source) for source in begun] if begun else [Source(s.label, s.weight) for s in sources]
        self.last = max([place for place, source in enumerate(self.sources) if source.documents], default=0)
        self.dtype = token_dtype(vocab_size)
        self.vocab_size, self.separator_id, self.tokenizer_hash = vocab_size, separator_id, tokenizer_hash
        self.tokens = sum(source.tokens for source in self.sources)
        self.documents = sum(source.documents for source in self.sources)
        self.text_bytes = sum(source.text_bytes for source in self.sources)
        sizes = self.tokens * self.dtype.itemsize, self.documents * 8, self.documents * 8
        self.files = [
            opened_at(beside(path, suffix), size) for suffix, size in zip(("", ".index", ".bytes"), sizes, strict=True)
        ]

    def append(self, ids: list[int] | Tokens, text_bytes: int, source: int = 0) -> None:
        """Adds one document, without its separator: that is written here. Sources come one after the other."""
        assert source >= self.last, "the documents of a source stand together"
        self.last = source
        part = self.sources[source]
        part.tokens, part.documents = part.tokens + len(ids) + 1, part.documents + 1
        part.text_bytes += text_bytes
        document = np.empty(len(ids) + 1, dtype=self.dtype)
        document[:-1] = ids
        document[-1] = self.separator_id
        self.tokens += len(document)
        self.documents += 1
        self.text_bytes += text_bytes
        for file, value in zip(self.files, (document, np.uint64(self.tokens), np.uint64(text_bytes)), strict=True):
            file.write(value.tobytes())

    def take(self, shard: TokenFile, source: int = 0) -> None:
        """Adds all documents of another token file of these tokens, as documents of one source."""
        assert source >= self.last, "the documents of a source stand together"
        assert (shard.metadata.tokenizer_hash, shard.tokens.dtype) == (self.tokenizer_hash, self.dtype)
        self.last = source
        part, more = self.sources[source], shard.metadata
        part.tokens, part.documents = part.tokens + more.tokens, part.documents + more.documents
        part.text_bytes += more.text_bytes
        for file, values in zip(
            self.files, (shard.tokens, shard.ends + self.tokens, shard.document_bytes), strict=True
        ):
            file.write(values.data)
        self.tokens += more.tokens
        self.documents += more.documents
        self.text_bytes += more.text_bytes

    def sync(self) -> list[Source]:
        """What is written so far, on disk when it returns: `begun` of a writer that goes on from here."""
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())
        return [replace(source) for source in self.sources]

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self.files:
            file.close()
        if kind is None:
            metadata = Metadata(
                VERSION,
                "uint16" if self.dtype.itemsize == 2 else "uint32",
                self.tokens,
                self.documents,
                self.text_bytes,
                self.separator_id,
                self.vocab_size,
                self.tokenizer_hash,
                tuple(self.sources),
            )
            beside(self.path, ".metadata").write_text(json.dumps(asdict(metadata), indent=1) + "\n")


def opened_at(path: Path, size: int) -> BinaryIO:
    """The file to write on from `size` bytes: anew from 0, else what it has more is dropped."""
    if not size:
        return path.open("wb", buffering=1 << 20)
    found = path.stat().st_size if path.exists() else -1
    if found < size:
        what = f"has {found:,} bytes" if found >= 0 else "is missing"
        raise ArtifactError(f"the file {what}, and {size:,} were written", where=str(path), mend="begin it anew")
    file = path.open("r+b", buffering=1 << 20)
    file.truncate(size)
    file.seek(size)
    return file


class TokenFile:
    """A token file, memory-mapped.

    tokens: [all tokens], separators included;  ends: [documents], where each ends;  document_bytes:
    [documents]. Raises ArtifactError where a part is missing or their sizes don't belong together.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            found = json.loads(beside(path, ".metadata").read_text())
            found["sources"] = tuple(Source(**source) for source in found["sources"])
            self.metadata = Metadata(**found)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ArtifactError(
                f"no readable metadata of a token file: {error}",
                where=str(path),
                mend="run tokenize again with --force",
            ) from error
        dtype = np.dtype("<u2") if self.metadata.dtype == "uint16" else np.dtype("<u4")
        self.tokens = mapped(path, dtype, self.metadata.tokens)
        self.ends = mapped(beside(path, ".index"), np.dtype("<u8"), self.metadata.documents)
        self.document_bytes = mapped(beside(path, ".bytes"), np.dtype("<u8"), self.metadata.documents)

    def __len__(self) -> int:
        return self.metadata.tokens

    def documents_of(self, source: int) -> range:
        """The documents of one source, by their place in the file."""
        start = sum(each.documents for each in self.metadata.sources[:source])
        return range(start, start + self.metadata.sources[source].documents)

    def tokens_of(self, source: int) -> tuple[int, int]:
        """Where the tokens of one source begin and end."""
        start = sum(each.tokens for each in self.metadata.sources[:source])
        return start, start + self.metadata.sources[source].tokens

    def document(self, index: int) -> Tokens:
        """The tokens of document `index`, its separator last."""
        start = int(self.ends[index - 1]) if index else 0
        return self.tokens[start : int(self.ends[index])]


def beside(path: Path, suffix: str) -> Path:
    """The file that goes with a token file: `train.ds` and ".index" give `train.ds.index`."""
    return path.with_name(path.name + suffix)


def mapped(path: Path, dtype: np.dtype[Any], count: int) -> Tokens:
    """`count` values of a raw file, memory-mapped; ArtifactError where the file has another size."""
    size = path.stat().st_size if path.exists() else -1
    if size != count * dtype.itemsize:
        found = "is missing" if size < 0 else f"has {size:,} bytes"
        raise ArtifactError(
            f"the file {found}, and {count * dtype.itemsize:,} bytes are meant to be there",
            where=str(path),
            mend="run tokenize again with --force",
        )
    return np.memmap(path, dtype=dtype, mode="r", shape=(count,)) if count else np.empty(0, dtype=dtype)
