"""Samples for pretraining: the documents end to end, cut into windows, or fitted into rows whole; in an order that is a
pure function.

Concat-and-chunk (`Windows`): an epoch of a stream of N tokens has (N − 1) // T samples of T + 1 tokens; sample k is T
inputs and, one place on, T targets. Neighbouring windows share one token, so every token but the first is a
target once an epoch (up to the last, unfilled window). From the second epoch on the windows begin at another
place of the stream, taken as a circle, so that no two epochs cut the text alike.

Which sample stands at position p of a run depends on (seed, p) and the stream's length alone: resuming needs
only the number of samples seen, and neither batch size nor world size changes the order.

Best fit (`FittedRows`): a document stands in one row, beside others where they fit, and is cut only where it is longer
than a row; what is left of a row is padding (Ding et al. 2024, "Fewer truncations improve language modeling").

Letters of shapes: B samples, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import ConfigError

Array = npt.NDArray[Any]

Positions = Sequence[int] | range | Array
ROUNDS = 6

GROUP = 1 << 17
"""Pieces that are fitted together: enough that rows come out full, few enough that it takes no memory to speak of."""


@dataclass(frozen=True)
class Batch:
    """Samples as they are trained on. Row b predicts rows_BT[b, t + 1] from what stands up to t."""

    rows_BT: Array
    """[B, T + 1] int64."""
    is_target_BT: Array | None = None
    """[B, T] bool, False where nothing is learnt from predicting the next token; None: everywhere."""
    positions_BT: Array | None = None
    """[B, T] int64, beginning at 0 again with every document, where documents are kept apart."""


def mix(values: Array, key: int) -> Array:
    """splitmix64's finaliser (Steele, Lea, Flood 2014) of `values` + a key: 64 well-mixed bits each,
    uint64.
    """
    with np.errstate(over="ignore"):
        z = values.astype(np.uint64) + np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)))


def hash_of(*numbers: int) -> int:
    """64 bits that depend on all `numbers` and their order."""
    state = np.zeros(1, dtype=np.uint64)
    for number in numbers:
        state = mix(state ^ np.uint64(number & (1 << 64) - 1), 1)
    return int(state[0])


def permuted(indices: Array, count: int, key: int) -> Array:
    """Where each of `indices` (in [0, count)) goes under the permutation of [0, count) that `key` names.

    A Feistel network on the smallest even number of bits that holds `count`, walked on until the result lies
    in range (Black and Rogaway 2002): constant memory, no state, the same numbers on every machine and in
    every version.
    """
    half = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    low = np.uint64((1 << half) - 1)
    values = np.asarray(indices, dtype=np.uint64).copy()
    todo = np.ones(len(values), dtype=bool)
    while todo.any():
        left, right = values[todo] >> np.uint64(half), values[todo] & low
        for turn in range(ROUNDS):
            left, right = right, left ^ (mix(right, key + turn) & low)
        values[todo] = (left << np.uint64(half)) | right
        todo &= values >= np.uint64(count)
    return values.astype(np.int64)


class Windows:
    """The samples of a run over a stream of tokens.

    tokens: [N], such as a memory map; length: T; seed: of the order. `ends` is where each document ends, the first of
    which is called `first_document`. With `separator`, documents are kept apart: a separator begins what follows it.
    `count` is the number of samples in an epoch. Raises ConfigError where the stream is shorter than one sample.
    """

    def __init__(
        self,
        tokens: Array,
        length: int,
        seed: int,
        *,
        ends: Array | None = None,
        first_document: int = 0,
        separator: int | None = None,
    ) -> None:
        if len(tokens) < length + 1:
            raise ConfigError(
                f"the corpus has {len(tokens):,} tokens, fewer than one sample of {length + 1:,}",
                where="pretrain",
                mend="take more text, or a shorter context",
            )
        self.tokens, self.length, self.seed = tokens, length, seed
        self.ends, self.first_document, self.separator = ends, first_document, separator
        self.count = (len(tokens) - 1) // length

    def take(self, positions: Positions) -> Batch:
        """The samples at these positions of the run (0 is its first)."""
        rows_BT = self.batch(positions)
        if self.separator is None:
            return Batch(rows_BT)
        return Batch(rows_BT, positions_BT=places_after(rows_BT[:, :-1] == self.separator))

    def targets(self, positions: Positions) -> int:
        """Tokens that are predicted in the samples at these positions."""
        return len(positions) * self.length

    def batch(self, positions: Positions) -> Array:
        """The tokens of the samples at these positions, int64 [B, T + 1]."""
        places = np.asarray(positions, dtype=np.int64)
        epochs, indices = places // self.count, places % self.count
        rows = np.empty((len(places), self.length + 1), dtype=np.int64)
        for epoch in np.unique(epochs):
            here = np.flatnonzero(epochs == epoch)
            order = permuted(indices[here], self.count, hash_of(self.seed, int(epoch)))
            for row, index in zip(here, order, strict=True):
                rows[row] = self.window(self.start(int(epoch)) + int(index) * self.length)
        return rows

    def documents(self, positions: Positions) -> list[int]:
        """The documents that the samples at these positions reach into, rising."""
        assert self.ends is not None
        found: set[int] = set()
        for position in positions:
            epoch, index = divmod(int(position), self.count)
            place = int(permuted(np.array([index]), self.count, hash_of(self.seed, epoch))[0])
            tokens = (self.start(epoch) + place * self.length + np.arange(self.length + 1)) % len(self.tokens)
            found.update(np.unique(np.searchsorted(self.ends, tokens, side="right")).tolist())
        return [self.first_document + document for document in sorted(found)]

    def start(self, epoch: int) -> int:
        """Where an epoch's first window begins: at the stream's start in the first, anywhere in later ones."""
        return 0 if epoch == 0 else hash_of(self.seed, epoch, 1) % len(self.tokens)

    def window(self, begin: int) -> Array:
        """T + 1 tokens from `begin`, the stream's end joined to its beginning."""
        begin %= len(self.tokens)
        piece = self.tokens[begin : begin + self.length + 1]
        missing = self.length + 1 - len(piece)
        return piece if missing == 0 else np.concatenate([piece, self.tokens[:missing]])


def places_after(begins_BT: Array) -> Array:
    """Each position's distance from the last place where something begins, or from the row's start, int64 [B, T]."""
    places_T = np.arange(begins_BT.shape[1])
    return places_T - np.maximum.accumulate(np.where(begins_BT, places_T, 0), axis=1)


class FittedRows:
    """The samples of a run in which documents stay whole.

    tokens: [N]; ends: [documents], where each ends, its separator included; length: T. A document longer than T is cut
    into pieces of T. Every piece stands behind the token before it in the stream (a document's first one behind a
    separator), so that a row of T + 1 holds pieces of at most T, their leading tokens, and padding. Nothing is dropped
    and every token is a target once an epoch.

    `alone`: one piece a row. `apart`: documents of a row do not see each other. An index of 16 bytes a piece and 8 a
    row is held in memory.
    """

    def __init__(
        self,
        tokens: Array,
        ends: Array,
        length: int,
        seed: int,
        *,
        separator: int,
        first_document: int = 0,
        alone: bool = False,
        apart: bool = False,
    ) -> None:
        if len(tokens) == 0:
            raise ConfigError("the corpus has no tokens", where="pretrain", mend="take more text")
        self.tokens, self.ends, self.length, self.seed = tokens, ends, length, seed
        self.separator, self.first_document, self.apart = separator, first_document, apart
        starts, lengths = cut(np.asarray(ends, dtype=np.int64), length)
        rows = np.arange(len(starts)) if alone else fitted(lengths + 1, length + 1)
        by_row = np.argsort(rows, kind="stable")
        self.starts, self.lengths = starts[by_row], lengths[by_row]
        self.firsts = np.searchsorted(rows[by_row], np.arange(int(rows.max()) + 2))
        self.count = len(self.firsts) - 1
        self.filled = np.add.reduceat(self.lengths, self.firsts[:-1])

    def take(self, positions: Positions) -> Batch:
        """The samples at these positions of the run (0 is its first)."""
        places = self.places(positions)
        rows_BT = np.full((len(places), self.length + 1), self.separator, dtype=np.int64)
        is_target_BT = np.zeros((len(places), self.length), dtype=bool)
        begins_BT = np.zeros((len(places), self.length), dtype=bool)
        for row, place in enumerate(places):
            slot = 0
            for start, length in self.pieces(place):
                rows_BT[row, slot] = self.tokens[start - 1] if start else self.separator
                rows_BT[row, slot + 1 : slot + 1 + length] = self.tokens[start : start + length]
                is_target_BT[row, slot : slot + length] = True
                begins_BT[row, slot] = True
                slot += length + 1
            if slot < self.length:
                begins_BT[row, slot] = True  # the padding
        return Batch(rows_BT, is_target_BT, places_after(begins_BT) if self.apart else None)

    def targets(self, positions: Positions) -> int:
        """Tokens that are predicted in the samples at these positions."""
        return int(self.filled[self.places(positions)].sum())

    def documents(self, positions: Positions) -> list[int]:
        """The documents in the samples at these positions, rising."""
        starts = [start for place in self.places(positions) for start, _ in self.pieces(place)]
        found = np.unique(np.searchsorted(self.ends, starts, side="right"))
        return [self.first_document + int(document) for document in found]

    def places(self, positions: Positions) -> Array:
        """Which row stands at each position of the run."""
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), self.count)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            places[here] = permuted(places[here], self.count, hash_of(self.seed, int(epoch)))
        return places

    def pieces(self, place: int) -> list[tuple[int, int]]:
        """(start, length) of the pieces in a row."""
        here = slice(int(self.firsts[place]), int(self.firsts[place + 1]))
        return list(zip(self.starts[here].tolist(), self.lengths[here].tolist(), strict=True))


def cut(ends: Array, length: int) -> tuple[Array, Array]:
    """(starts, lengths) of the pieces of all documents, in order: at most `length` tokens each, and the last of a
    document what is left of it."""
    sizes = np.diff(ends, prepend=0)
    pieces = -(-sizes // length)
    nth = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = np.repeat(ends - sizes, pieces) + nth * length
    return starts, np.minimum(np.repeat(ends, pieces) - starts, length)


def fitted(sizes: Array, capacity: int) -> Array:
    """The row of each item, so that no row holds more than `capacity`: best-fit decreasing, group by group."""
    rows = np.empty(len(sizes), dtype=np.int64)
    count = 0
    for start in range(0, len(sizes), GROUP):
        here, count = best_fit(sizes[start : start + GROUP].tolist(), capacity, count)
        rows[start : start + GROUP] = here
    return rows


def best_fit(sizes: list[int], capacity: int, first: int) -> tuple[list[int], int]:
    """(row of each item, rows so far): the largest first, each into the fullest row that has room for it.

    Rows are numbered from `first`. Rooms that some row has are the bits of a number, so that the smallest one that is
    enough is found at once.
    """
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms, found = 0, [0] * len(sizes)
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        enough = rooms >> sizes[item]
        if enough:
            room = sizes[item] + (enough & -enough).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms ^= 1 << room
        else:
            room, row, first = capacity, first, first + 1
        found[item] = row
        open_rows[room - sizes[item]].append(row)
        rooms |= 1 << (room - sizes[item])
    return found, first
