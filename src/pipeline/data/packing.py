"""Samples for pretraining: the documents end to end, cut into windows, in an order that is a pure function.

Concat-and-chunk: an epoch of a stream of N tokens has (N − 1) // T samples of T + 1 tokens; sample k is T
inputs and, one place on, T targets. Neighbouring windows share one token, so every token but the first is a
target once an epoch (up to the last, unfilled window). From the second epoch on the windows begin at another
place of the stream, taken as a circle, so that no two epochs cut the text alike.

Which sample stands at position p of a run depends on (seed, p) and the stream's length alone: resuming needs
only the number of samples seen, and neither batch size nor world size changes the order.

Letters of shapes: B samples, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import ConfigError

Array = npt.NDArray[Any]

ROUNDS = 6


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

    tokens: [N], such as a memory map; length: T; seed: of the order. `count` is the number of samples in an
    epoch. Raises ConfigError where the stream is shorter than one sample.
    """

    def __init__(self, tokens: Array, length: int, seed: int) -> None:
        if len(tokens) < length + 1:
            raise ConfigError(
                f"the corpus has {len(tokens):,} tokens, fewer than one sample of {length + 1:,}",
                where="pretrain",
                mend="take more text, or a shorter context",
            )
        self.tokens, self.length, self.seed = tokens, length, seed
        self.count = (len(tokens) - 1) // length

    def batch(self, positions: Sequence[int] | range) -> Array:
        """The samples at these positions of the run (0 is its first), int64 [B, T + 1]."""
        places = np.asarray(positions, dtype=np.int64)
        epochs, indices = places // self.count, places % self.count
        rows = np.empty((len(places), self.length + 1), dtype=np.int64)
        for epoch in np.unique(epochs):
            here = np.flatnonzero(epochs == epoch)
            order = permuted(indices[here], self.count, hash_of(self.seed, int(epoch)))
            for row, index in zip(here, order, strict=True):
                rows[row] = self.window(self.start(int(epoch)) + int(index) * self.length)
        return rows

    def documents(self, positions: Sequence[int] | range, ends: Array) -> list[int]:
        """The documents that the samples at these positions reach into, rising; `ends` is where each one ends."""
        found: set[int] = set()
        for position in positions:
            epoch, index = divmod(int(position), self.count)
            place = int(permuted(np.array([index]), self.count, hash_of(self.seed, epoch))[0])
            tokens = (self.start(epoch) + place * self.length + np.arange(self.length + 1)) % len(self.tokens)
            found.update(np.unique(np.searchsorted(ends, tokens, side="right")).tolist())
        return sorted(found)

    def start(self, epoch: int) -> int:
        """Where an epoch's first window begins: at the stream's start in the first, anywhere in later ones."""
        return 0 if epoch == 0 else hash_of(self.seed, epoch, 1) % len(self.tokens)

    def window(self, begin: int) -> Array:
        """T + 1 tokens from `begin`, the stream's end joined to its beginning."""
        begin %= len(self.tokens)
        piece = self.tokens[begin : begin + self.length + 1]
        missing = self.length + 1 - len(piece)
        return piece if missing == 0 else np.concatenate([piece, self.tokens[:missing]])
