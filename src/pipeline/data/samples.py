"""The samples of a pretraining run from its shards: packed as asked, one stream or a mixture of sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.data.mixture import Mixture, Phase, Samples, allot, shares_by_label
from pipeline.data.packing import Array, FittedRows, Windows, hash_of
from pipeline.data.shards import TokenFile
from pipeline.errors import ConfigError
from pipeline.reading import meant

Packing = Literal["chunk", "best_fit", "document"]


@dataclass(frozen=True)
class Packed:
    """How samples are made of documents."""

    length: int
    """Tokens that a sample predicts, at most."""
    packing: Packing = "chunk"
    apart: bool = False
    """Whether documents of a sample do not see each other."""


@dataclass(frozen=True)
class Shares:
    """What a run draws from which source."""

    mixture: Mapping[str, float] | None = None
    """Label -> share of the samples; None: by size and the weights of the data."""
    max_epochs: float | Mapping[str, float] | None = None
    """How often a source is read at most, or label -> that."""
    anneal_share: float = 0.0
    """The last share of the steps, which draw by `anneal_mixture`."""
    anneal_mixture: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Drawn:
    """What a run has drawn from one source."""

    label: str
    tokens: int
    """That are predicted."""
    epochs: float


@dataclass(frozen=True)
class RunSamples:
    """The samples of a run in order, and the sources they are drawn from."""

    order: Samples | Mixture
    streams: Sequence[Samples]
    labels: Sequence[str]
    """Of the streams; several where a lone stream holds them all."""

    def drawn(self, position: int) -> list[Drawn]:
        """What the run's first `position` samples take from each stream."""
        counts = self.order.drawn(position) if isinstance(self.order, Mixture) else [position]
        labels = self.labels if len(self.labels) == len(counts) else [" + ".join(self.labels)]
        return [
            Drawn(label, predicted(samples, count), count / samples.count)
            for label, samples, count in zip(labels, self.streams, counts, strict=True)
        ]

    def epochs(self, position: int) -> float:
        """Passes over all that the streams hold."""
        whole = sum(predicted(samples, samples.count) for samples in self.streams)
        return sum(source.tokens for source in self.drawn(position)) / whole

    def figures(self, position: int) -> dict[str, float]:
        """`epochs` of the first `position` samples; of several sources `drawn_tokens/<label>` and `epochs/<label>`."""
        found, drawn = {"epochs": self.epochs(position)}, self.drawn(position)
        if len(drawn) > 1:
            found |= {f"drawn_tokens/{source.label}": float(source.tokens) for source in drawn}
            found |= {f"epochs/{source.label}": source.epochs for source in drawn}
        return found

    def described(self, position: int) -> list[str]:
        """Lines on what the first `position` samples take from each stream, and on how full fitted rows are."""
        drawn = self.drawn(position)
        total = sum(source.tokens for source in drawn)
        lines = [
            f"{source.label}: {source.tokens / total:.1%} of the tokens, {source.tokens:,} ({source.epochs:.2f} epochs)"
            for source in drawn
            if len(drawn) > 1
        ]
        fitted = [samples for samples in self.streams if isinstance(samples, FittedRows)]
        if fitted:
            rows = sum(samples.count for samples in fitted)
            slots = sum(samples.count * samples.length for samples in fitted)
            share = sum(int(samples.filled.sum()) for samples in fitted) / slots
            lines.append(f"documents fitted into {rows:,} samples, {share:.1%} full")
        return lines


def predicted(samples: Samples, count: int) -> int:
    """Tokens that the first `count` samples predict."""
    if isinstance(samples, Windows):
        return samples.targets(range(count))
    epochs, rest = divmod(count, samples.count)
    return epochs * int(samples.filled.sum()) + samples.targets(np.arange(rest))


def run_samples(file: TokenFile, packed: Packed, shares: Shares, steps: int, batch: int, seed: int) -> RunSamples:
    """The samples of a run of `steps` × `batch` of them. ConfigError where the sources have too few.

    One stream over all sources where nothing tells them apart, so that nothing of the text is left at a source's end.
    """
    sources = file.metadata.sources
    labels = [source.label for source in sources]
    has_one_weight = len({source.weight for source in sources}) == 1
    is_plain = shares.mixture is None and shares.anneal_mixture is None and has_one_weight
    if is_plain and (len(sources) == 1 or shares.max_epochs is None):
        whole = stream(file, None, packed, seed)
        allot([1.0], most_samples([whole], [0], labels, shares.max_epochs), steps * batch, labels)
        return RunSamples(whole, [whole], labels)

    phases = phases_of(shares, steps, labels)
    by_size = [
        source.tokens * source.weight if has_a_sample(file, s, packed) else 0.0 for s, source in enumerate(sources)
    ]
    wanted = [by_size if given is None else given for _, given in phases]
    used = [s for s in range(len(sources)) if any(phase[s] > 0 for phase in wanted)]
    for s in used:
        if not has_a_sample(file, s, packed):
            mend = "leave it out of the mixture, take more text, or a shorter context"
            raise ConfigError(f"`{labels[s]}` has not one sample", where="pretrain.mixture", mend=mend)
    streams = [stream(file, s, packed, seed) for s in used]
    most = most_samples(streams, used, labels, shares.max_epochs)
    tokens_a_sample = [predicted(each, each.count) / each.count for each in streams]
    made = []
    for (phase_steps, _), phase in zip(phases, wanted, strict=True):
        in_samples = [phase[s] / tokens for s, tokens in zip(used, tokens_a_sample, strict=True)]
        draws = allot(in_samples, most, phase_steps * batch, [labels[s] for s in used])
        most = [limit - drawn for limit, drawn in zip(most, draws, strict=True)]
        made.append(Phase(draws))
    return RunSamples(Mixture(streams, made, seed), streams, [labels[s] for s in used])


def phases_of(shares: Shares, steps: int, labels: Sequence[str]) -> list[tuple[int, list[float] | None]]:
    """(steps, each source's share of the tokens; None: by size) of the run's phases. ConfigError for an unknown label,
    and where the last phase would be no step or all."""
    first = None if shares.mixture is None else shares_by_label(shares.mixture, labels, "pretrain.mixture")
    if shares.anneal_mixture is None:
        return [(steps, first)]
    late = round(shares.anneal_share * steps)
    if not 0 < late < steps:
        problem = f"the last {shares.anneal_share:.0%} of {steps:,} steps is {'none' if late == 0 else 'all'} of them"
        raise ConfigError(problem, where="pretrain.anneal.share", mend="another share, or more steps")
    return [(steps - late, first), (late, shares_by_label(shares.anneal_mixture, labels, "pretrain.anneal.mixture"))]


def has_a_sample(file: TokenFile, source: int, packed: Packed) -> bool:
    """Whether a source fills one sample."""
    return file.metadata.sources[source].tokens > (packed.length if packed.packing == "chunk" else 0)


def most_samples(
    streams: Sequence[Samples],
    used: Sequence[int],
    labels: Sequence[str],
    max_epochs: float | Mapping[str, float] | None,
) -> list[float]:
    """Samples that may be drawn of each stream, the sources `used`. ConfigError for a label that there is not."""
    if isinstance(max_epochs, Mapping):
        for label in max_epochs:
            if label not in labels:
                problem = f"the shards have no source `{label}`{meant(label, labels)}"
                raise ConfigError(problem, where="pretrain.max_epochs")
        limits = [max_epochs.get(labels[s], float("inf")) for s in used]
    else:
        limits = [float("inf") if max_epochs is None else max_epochs] * len(streams)
    return [limit * each.count for limit, each in zip(limits, streams, strict=True)]


def stream(file: TokenFile, source: int | None, packed: Packed, seed: int) -> Samples:
    """The samples of one source, or of the whole file where None."""
    begin, end = (0, len(file)) if source is None else file.tokens_of(source)
    documents = range(file.metadata.documents) if source is None else file.documents_of(source)
    ends: Array = file.ends[documents.start : documents.stop].astype(np.int64) - begin
    seed = seed if source is None else hash_of(seed, source)
    tokens, separator = file.tokens[begin:end], file.metadata.separator_id
    if packed.packing == "chunk":
        return Windows(
            tokens,
            packed.length,
            seed,
            ends=ends,
            first_document=documents.start,
            separator=separator if packed.apart else None,
        )
    return FittedRows(
        tokens,
        ends,
        packed.length,
        seed,
        separator=separator,
        first_document=documents.start,
        alone=packed.packing == "document",
        apart=packed.apart,
    )
