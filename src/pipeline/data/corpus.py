"""A corpus divided into what is trained on and what is held out, and a sample of it to train a tokenizer on.

Which side a document falls on depends on a hash of its text: adding files moves none, and a document that
stands twice stands on one side. A source of few documents (three books) is divided inside each: the last
tenth is held out. pydocs brings its own division, made by functions and shared with its questions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.data.files import Bad
from pipeline.data.sources import BUILT_IN, copies, share
from pipeline.data.units import Unit, read

SLICE = 1 << 20


@dataclass(frozen=True)
class Piece:
    """A document, or the first or last part of one, on one side of the division."""

    text: str
    is_held_out: bool
    source: int = 0
    """Which of the entries it came from."""

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return text_bytes(self.text)


@dataclass
class Sample:
    """A sample of about `limit` bytes, drawn by hash: the same whatever the order, in memory of that size.

    Every text whose hash falls below a threshold is kept; where the kept ones grow past the limit, it is
    halved.
    """

    limit: int
    threshold: float = 1.0
    size: int = 0
    texts: list[str] = field(default_factory=list)
    """What was kept, in the order it came."""

    def add(self, text: str) -> None:
        """Keeps `text` or not."""
        if self.threshold == 1.0 or sample_share(text) < self.threshold:
            self.texts.append(text)
            self.size += text_bytes(text)
            while self.size > self.limit and len(self.texts) > 1:
                self.lower(self.threshold / 2)

    def lower(self, threshold: float) -> None:
        """Drops what is not below a lower threshold."""
        self.threshold = threshold
        self.texts = [text for text in self.texts if sample_share(text) < threshold]
        self.size = sum(map(text_bytes, self.texts))

    def spread(self, characters: int) -> list[str]:
        """About so many characters of the sample, at least one text, from its beginning to its end."""
        step = max(1, self.size // characters)
        return [text[:characters] for text in self.texts[::step]]


Counts = tuple[int, int, int, int]
"""Documents and UTF-8 bytes of what is trained on, then of what is held out."""


class LeftOut(NamedTuple):
    """Bad rows of a source that are left out."""

    rows: int
    where: str
    """The first of them stands here,"""
    what: str
    """and this is wrong with it."""


@dataclass
class Survey:
    """What a first pass over the corpus found: documents and UTF-8 bytes on each side, and the sample.

    `pieces` are all of them, where they are no larger than the sample may be: then no second pass is needed.
    """

    sample: Sample
    train_documents: int = 0
    train_bytes: int = 0
    held_out_documents: int = 0
    held_out_bytes: int = 0
    pieces: list[Piece] | None = field(default_factory=list, kw_only=True)
    units: list[Counts] = field(default_factory=list)
    """What had been counted at the end of each unit."""
    left_out: dict[int, LeftOut] = field(default_factory=dict)
    """By source, where it has bad rows."""

    @property
    def counts(self) -> Counts:
        """Documents and bytes of both sides."""
        return self.train_documents, self.train_bytes, self.held_out_documents, self.held_out_bytes

    @property
    def bytes(self) -> int:
        """Of both sides."""
        return self.train_bytes + self.held_out_bytes

    def bad_rows(self, source: int) -> int:
        """How many rows of a source are left out."""
        return self.left_out[source].rows if source in self.left_out else 0

    def add(self, piece: Piece, weight: float = 1.0) -> None:
        """Counts a piece; the sample is of what is trained on alone, and has it as often as its source's weight."""
        size = piece.bytes
        if self.pieces is not None:
            self.pieces.append(piece)
            if self.train_bytes + self.held_out_bytes + size > self.sample.limit:
                self.pieces = None
        if piece.is_held_out:
            self.held_out_documents += 1
            self.held_out_bytes += size
            return
        self.train_documents += 1
        self.train_bytes += size
        for _ in range(copies(piece.text, weight)):
            for start in range(0, len(piece.text), SLICE):
                self.sample.add(piece.text[start : start + SLICE])

    def add_unit(self, unit: Survey) -> None:
        """What a unit was found to hold, perhaps by another process."""
        if self.pieces is None or unit.pieces is None or self.bytes + unit.bytes > self.sample.limit:
            self.pieces = None
        else:
            self.pieces += unit.pieces
        self.train_documents += unit.train_documents
        self.train_bytes += unit.train_bytes
        self.held_out_documents += unit.held_out_documents
        self.held_out_bytes += unit.held_out_bytes
        if unit.sample.threshold < self.sample.threshold:
            self.sample.lower(unit.sample.threshold)
        for text in unit.sample.texts:
            self.sample.add(text)
        for source, found in unit.left_out.items():
            first = self.left_out.get(source, found)
            self.left_out[source] = first._replace(rows=self.bad_rows(source) + found.rows)
        self.units.append(self.counts)


def sample_share(text: str) -> float:
    """A number in [0, 1) that decides whether a sample keeps `text`."""
    return share(f"sample {text}")


def text_bytes(text: str) -> int:
    """UTF-8 bytes of a text."""
    return len(text.encode("utf-8", "surrogatepass"))


def pieces(unit: Unit, bad: Bad | None = None) -> Iterator[Piece]:
    """The documents of one unit, each on its side; `bad` as in `units.read`."""
    tail = unit.division.tail
    for document in read(unit, bad):
        text = document.text
        if unit.entry.source in BUILT_IN:
            yield Piece(text, unit.split == "held_out", unit.source)
        elif tail is None:
            yield Piece(text, share(text) < unit.division.held_out, unit.source)
        else:
            cut = tail_start(text, tail)
            for part, is_held_out in ((text[:cut], False), (text[cut:], True)):
                if part:
                    yield Piece(part, is_held_out, unit.source)


def tail_start(text: str, tail: float) -> int:
    """Where the last share `tail` of a text begins: at a line's start, else a word's, else just there.

    The place is looked for before the exact one, at most a tenth of the tail away.
    """
    exact = len(text) - int(len(text) * tail)
    floor = exact - max(1, int(len(text) * tail) // 10)
    for mark in ("\n", " "):
        found = text.rfind(mark, max(floor, 0), exact)
        if found > 0:
            return found + 1
    return exact
