"""Samples of several sources in given shares, each source in its own order, all of it a pure function of the position.

How many samples a run draws from a source is settled before it starts, from the shares and the most epochs a source may
have: what a source that is used up gives up goes to the others in proportion. (Up to four epochs are nearly as good as
new text: Muennighoff et al. 2023, "Scaling data-constrained language models".)
Every stretch of BLOCK samples has the shares of the whole, to the sample.

Letters of shapes: S sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.data.packing import Array, Batch, FittedRows, Positions, Windows, hash_of, permuted
from pipeline.errors import ConfigError
from pipeline.reading import meant

BLOCK = 1024

Samples = Windows | FittedRows


@dataclass(frozen=True)
class Phase:
    """A stretch of a run: how many samples it draws from each source."""

    draws_S: tuple[int, ...]

    @property
    def total(self) -> int:
        """Samples of the phase."""
        return sum(self.draws_S)

    def before(self, position: int) -> list[int]:
        """[S + 1] samples of the phase's first `position` that go to the sources before each: ⌊D_s · position / total⌋
        with D the cumulated draws. Whole numbers, so exact however long the run."""
        bounds = np.cumsum([0, *self.draws_S]).tolist()
        return [bound * position // self.total for bound in bounds]


class Mixture:
    """The samples of a run over several sources, phase after phase; a source goes on where the last phase left it."""

    def __init__(self, sources: Sequence[Samples], phases: Sequence[Phase], seed: int) -> None:
        self.sources, self.phases, self.seed = sources, phases, seed
        self.count = sum(phase.total for phase in phases)

    def take(self, positions: Positions) -> Batch:
        """The samples at these positions of the run."""
        sources, indices = self.places(positions)
        order = np.empty(len(sources), dtype=np.int64)
        parts: list[Batch] = []
        for source in np.unique(sources):
            here = np.flatnonzero(sources == source)
            order[here] = sum([len(part.rows_BT) for part in parts]) + np.arange(len(here))
            parts.append(self.sources[source].take(indices[here]))
        return joined(parts, order)

    def targets(self, positions: Positions) -> int:
        """Tokens that are predicted in the samples at these positions."""
        sources, indices = self.places(positions)
        return sum(self.sources[source].targets(indices[sources == source]) for source in np.unique(sources))

    def documents(self, positions: Positions) -> list[int]:
        """The documents that the samples at these positions reach into, rising."""
        sources, indices = self.places(positions)
        found = (self.sources[source].documents(indices[sources == source]) for source in np.unique(sources))
        return sorted({document for each in found for document in each})

    def drawn(self, position: int) -> list[int]:
        """[S] samples of each source among the run's first `position`."""
        counts = [0] * len(self.sources)
        for phase in self.phases:
            here = phase.before(min(position, phase.total))
            counts = [n + after - before for n, before, after in zip(counts, here, here[1:], strict=False)]
            position = max(0, position - phase.total)
        return counts

    def places(self, positions: Positions) -> tuple[Array, Array]:
        """(source, which of its samples) at each position, both int64 [B]."""
        wanted = np.asarray(positions, dtype=np.int64)
        assert not len(wanted) or 0 <= wanted.min() <= wanted.max() < self.count, "the run ends before"
        sources, indices = np.empty_like(wanted), np.empty_like(wanted)
        begins, past = 0, np.zeros(len(self.sources), dtype=np.int64)
        for number, phase in enumerate(self.phases):
            in_phase = (wanted >= begins) & (wanted < begins + phase.total)
            for block in np.unique((wanted[in_phase] - begins) // BLOCK):
                here = np.flatnonzero(in_phase & ((wanted - begins) // BLOCK == block))
                start = int(block) * BLOCK
                sources[here], indices[here] = self._in_block(number, start, wanted[here] - begins - start, past)
            begins, past = begins + phase.total, past + np.array(phase.draws_S)
        return sources, indices

    def _in_block(self, number: int, start: int, offsets: Array, past: Array) -> tuple[Array, Array]:
        """`places` inside one block: its slots lie in the sources' order and are shuffled."""
        phase = self.phases[number]
        low = np.diff(phase.before(start))
        high = np.diff(phase.before(min(start + BLOCK, phase.total)))
        last = np.cumsum(high - low)
        slots = permuted(offsets, int(last[-1]), hash_of(self.seed, number, start))
        sources = np.searchsorted(last, slots, side="right")
        return sources, (past + low)[sources] + slots - (last - (high - low))[sources]


def joined(parts: Sequence[Batch], order: Array) -> Batch:
    """The batches' rows, one after the other, in the order `order` [B]."""

    def column(values: list[Array | None]) -> Array | None:
        there = [value for value in values if value is not None]
        return np.concatenate(there)[order] if there else None

    rows_BT = np.concatenate([part.rows_BT for part in parts])[order]
    return Batch(rows_BT, column([p.is_target_BT for p in parts]), column([p.positions_BT for p in parts]))


def allot(shares: Sequence[float], most: Sequence[float], total: int, labels: Sequence[str]) -> tuple[int, ...]:
    """How many of `total` samples each source gives: by its share, but no more than `most`; the rest to the others.

    Raises ConfigError where all of them together have too few.
    """
    given = [0.0] * len(shares)
    open_sources = [i for i, share in enumerate(shares) if share > 0]
    left = float(total)
    while open_sources and left > 0:
        whole = sum(shares[i] for i in open_sources)
        full = [i for i in open_sources if left * shares[i] / whole > most[i]]
        for i in full or open_sources:
            given[i] = float(most[i]) if full else left * shares[i] / whole
        left -= sum(given[i] for i in full or open_sources)
        open_sources = [i for i in open_sources if i not in full] if full else []
    if left > 0.5:
        has = ", ".join(f"{label} {int(n):,}" for label, n in zip(labels, given, strict=True) if n)
        raise ConfigError(
            f"the run takes {total:,} samples and the sources have {int(sum(given)):,} of them ({has or 'none'})",
            where="pretrain.max_epochs",
            mend="raise max_epochs or leave it out, lower max_steps, or take more text",
        )
    return rounded(given, most, total)


def rounded(given: Sequence[float], most: Sequence[float], total: int) -> tuple[int, ...]:
    """Whole numbers that sum to `total`: the largest remainders are rounded up, none above `most`."""
    down = [int(n) for n in given]
    rest = sorted(
        (i for i, n in enumerate(given) if n > 0 and down[i] + 1 <= most[i]), key=lambda i: down[i] - given[i]
    )
    for i in rest[: total - sum(down)]:
        down[i] += 1
    if sum(down) < total:  # caps that are no whole numbers leave less than a sample of each
        down[int(np.argmax(given))] += total - sum(down)
    return tuple(down)


def shares_by_label(mixture: Mapping[str, float], labels: Sequence[str], where: str) -> list[float]:
    """[S] shares in the sources' order; what the mixture does not name has none. ConfigError for an unknown label, and
    where no share is above 0."""
    for label in mixture:
        if label not in labels:
            raise ConfigError(
                f"the shards have no source `{label}`{meant(label, labels)}",
                where=where,
                mend=f"one of {', '.join(labels)}",
            )
    shares = [float(mixture.get(label, 0.0)) for label in labels]
    if sum(shares) <= 0:
        raise ConfigError("no source has a share above 0", where=where, mend=f"{labels[0]}: 1")
    return shares
