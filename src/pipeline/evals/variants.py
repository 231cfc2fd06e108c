"""The variants of one stage, over their seeds and against each other.

Which models belong together is in their names, which `repeat:` and `matrix:` alone make: `dpo@beta=0.1@seed=0` is of
the variant `dpo@beta=0.1` of the stage `dpo`; `dpo@2`, its second round, is another variant.

    mean         of a variant, over its seeds
    difference   one variant minus another of the same stage, paired: the same seeds, the same items
    matched      one variant minus the variant of another stage that is nearest to it in KL from the baseline, or in
                 training FLOPs: `nearest` says in which

Two intervals, of two sources of noise: over training seeds (Student's, the items fixed), which needs two seeds or more;
and over items (percentile bootstrap, the seeds fixed and averaged). Needs no torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from pipeline.evals import statistics
from pipeline.evals.statistics import Estimate, PerItem

Measure = Literal["kl", "flops"]
KL = ("sampled", "kl")
Found = Mapping[str, Mapping[str, PerItem]]
"""Model -> task -> its figures, item by item."""


@dataclass(frozen=True)
class Variant:
    """One or more models that differ in their seeds alone."""

    name: str
    stage: str
    members: dict[str, str] = field(default_factory=dict)
    """Seed as it stands in the name, "" for none -> model."""


@dataclass(frozen=True)
class Comparison:
    """A mean over seeds, or a difference of two variants. What there is not is NaN."""

    kind: Literal["mean", "difference", "matched"]
    model: str
    against: str
    """The variant that is taken off; "" for a mean."""
    nearest: str
    """What a matched variant was chosen by: kl or flops."""
    task: str
    metric: str
    value: float
    seeds_low: float
    seeds_high: float
    items_low: float
    items_high: float
    seeds: int
    items: int


def variants(models: Sequence[str]) -> list[Variant]:
    """The models by variant, in the order in which they come."""
    found: dict[str, Variant] = {}
    for model in models:
        stage, *parts = model.split("@")
        seeds = [part.removeprefix("seed=") for part in parts if part.startswith("seed=")]
        name = "@".join([stage, *(part for part in parts if not part.startswith("seed="))])
        found.setdefault(name, Variant(name, stage)).members[seeds[0] if seeds else ""] = model
    return list(found.values())


def compare(
    models: Sequence[str], found: Found, flops: Mapping[str, float], nearest: Measure | None, seed: int
) -> list[Comparison]:
    """Means, differences within each stage and, where `nearest` is given, matched ones between stages.

    flops: model -> FLOPs of its training, of those that are known. seed: of the bootstrap.
    """
    known = variants(models)
    rows: list[Comparison] = []
    for variant in known:
        if len(variant.members) > 1:
            rows += _rows("mean", variant, None, found, "", seed)
    for earlier, later in itertools.combinations(known, 2):
        if earlier.stage == later.stage:
            rows += _rows("difference", later, earlier, found, "", seed)
    for ours, theirs in _matches(known, found, flops, nearest) if nearest else ():
        rows += _rows("matched", ours, theirs, found, str(nearest), seed)
    return rows


def _matches(
    known: Sequence[Variant], found: Found, flops: Mapping[str, float], nearest: Measure
) -> Iterator[tuple[Variant, Variant]]:
    """Each variant with the nearest one of every stage that comes before its own."""
    at = {variant.name: place_of(variant, found, flops, nearest) for variant in known}
    placed = [variant for variant in known if not math.isnan(at[variant.name])]
    stages = list(dict.fromkeys(variant.stage for variant in placed))
    for ours in placed:
        for stage in stages[: stages.index(ours.stage)]:
            others = [variant for variant in placed if variant.stage == stage]
            yield ours, min(others, key=lambda other: abs(at[other.name] - at[ours.name]))


def place_of(variant: Variant, found: Found, flops: Mapping[str, float], nearest: Measure) -> float:
    """Where the variant stands on the axis, mean over its seeds: KL in nats an answer, or the logarithm of FLOPs.

    NaN where it is not known of every member.
    """
    if nearest == "kl":
        values = [_ratio(found[model].get(KL[0], {}).get(KL[1], {})) for model in variant.members.values()]
    else:
        values = [math.log(flops[model]) if flops.get(model) else math.nan for model in variant.members.values()]
    return float(np.mean(values))


def _rows(
    kind: Literal["mean", "difference", "matched"],
    ours: Variant,
    theirs: Variant | None,
    found: Found,
    nearest: str,
    seed: int,
) -> Iterator[Comparison]:
    """A row for every metric that all members of both have."""
    paired = _paired(ours, theirs)
    first = found[paired[0][0]]
    for task in first:
        for metric in first[task]:
            sides = [[found[model].get(task, {}).get(metric, {}) for model in side] for side in paired if side]
            shared = sorted(set.intersection(*(set(each) for side in sides for each in side)))
            if not shared:
                continue
            over_seeds, over_items = _estimates(sides, shared, seed, is_paired=_is_paired(ours, theirs))
            yield Comparison(
                kind,
                ours.name,
                theirs.name if theirs else "",
                nearest,
                task,
                metric,
                over_items.value,
                over_seeds.low,
                over_seeds.high,
                over_items.low,
                over_items.high,
                over_seeds.n,
                len(shared),
            )


def _is_paired(ours: Variant, theirs: Variant | None) -> bool:
    return theirs is None or bool(ours.members.keys() & theirs.members.keys())


def _paired(ours: Variant, theirs: Variant | None) -> tuple[list[str], list[str]]:
    """The models of both sides: of the seeds that both have, in one order; all of both where they share none."""
    if theirs is None or not _is_paired(ours, theirs):
        return [*ours.members.values()], [*theirs.members.values()] if theirs else []
    seeds = [each for each in ours.members if each in theirs.members]
    return [ours.members[each] for each in seeds], [theirs.members[each] for each in seeds]


def _estimates(
    sides: Sequence[Sequence[Mapping[int, tuple[float, float]]]], shared: Sequence[int], seed: int, *, is_paired: bool
) -> tuple[Estimate, Estimate]:
    """(over seeds, over items) of one side's mean, or of the first side minus the second.

    The figure of a variant is its members' figures' mean where their denominators are alike, as they are for the same
    documents; else it is the sum over members and items of the numerators by that of the denominators.
    """
    figures, sums = [], []
    for side in sides:
        both_SN2 = np.array([[each[item] for item in shared] for each in side], dtype=np.float64)
        figures.append(both_SN2[..., 0].sum(1) / both_SN2[..., 1].sum(1))
        sums.append(both_SN2.mean(0).T)
    if len(sides) == 1:
        return statistics.over_seeds(figures[0]), statistics.ratio(sums[0][0], sums[0][1], seed)
    (a_N, v_N), (b_N, w_N) = sums
    if (v_N == 1).all() and (w_N == 1).all():  # a mean: the same numbers in a quarter of the time
        over_items = statistics.mean(a_N - b_N, seed)
    else:
        over_items = statistics.ratio_difference(a_N, v_N, b_N, w_N, seed)
    if not is_paired:  # nothing says which seed goes with which
        return Estimate(math.nan, math.nan, math.nan, 0), over_items
    return statistics.over_seeds(figures[0] - figures[1]), over_items


def _ratio(values: Mapping[int, tuple[float, float]]) -> float:
    total = sum(denominator for _, denominator in values.values())
    return sum(numerator for numerator, _ in values.values()) / total if total else math.nan
