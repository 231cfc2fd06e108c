"""Whether the best figure of several models is better than the next by more than noise.

Where the items behind two figures are in samples.jsonl, both models' answers to an item are drawn together (paired
bootstrap, as the evaluation's own comparisons); else the two intervals are taken as independent, which finds fewer
differences. What an item is worth is worked out here again, and used only where it gives back the reported figure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pipeline.evals import statistics
from pipeline.evals.statistics import Estimate

Item = Mapping[str, Any]
Values = dict[Any, tuple[float, float]]
"""Item -> (numerator, denominator)."""

LOWER = ("bits_per_byte", "perplexity", "ece", "nll", "loss")
NEITHER = (
    *("length", "kl", "n", "length_only", "pmi_swapped", "length_spearman", "length_pearson"),
    *("difference", "pmi_difference", "gold_difference"),
)
"""Better is neither more nor less; a difference says what the figure that it is of says."""


def direction(metric: str) -> Literal[-1, 0, 1]:
    """1 where more is better, -1 where less is, 0 where neither is."""
    name = metric.partition("/")[0]
    if name in LOWER:
        return -1
    return 0 if name in NEITHER else 1


def values_of(items: Sequence[Item], task: str, metric: str) -> Values:
    """What each item is worth for the metric; empty where the items do not tell."""
    if not items:
        return {}
    if metric in ("acc", "acc_norm", "pmi") and {"named", "nameless", "bytes", "answer"} <= items[0].keys():
        return {i: (float(_chosen(item, metric) == item["answer"]), 1.0) for i, item in enumerate(items)}
    if metric == "bits_per_byte" and {"nats", "bytes"} <= items[0].keys():
        return {item["item"]: (item["nats"] / math.log(2), float(item["bytes"])) for item in items}
    for key in (metric, "correct") if metric == "accuracy" else (metric,):
        if all(isinstance(item.get(key), int | float) for item in items):
            return {item["item"]: (float(item[key]), 1.0) for item in items}
    return {}


def _chosen(item: Item, metric: str) -> int:
    """The candidate that is taken, as docs/eval.md defines the metric."""
    scores = {
        "acc": item["named"],
        "acc_norm": [a / b for a, b in zip(item["named"], item["bytes"], strict=True)],
        "pmi": [a - b for a, b in zip(item["named"], item["nameless"], strict=True)],
    }[metric]
    return max(range(len(scores)), key=scores.__getitem__)


def gives(values: Values, figure: float) -> bool:
    """Whether the items' values make the reported figure."""
    total = sum(denominator for _, denominator in values.values())
    return bool(total) and math.isclose(sum(a for a, _ in values.values()) / total, figure, rel_tol=1e-4, abs_tol=1e-6)


def paired(ours: Values, theirs: Values) -> Estimate | None:
    """Ours minus theirs over the items of both, with its 95 % interval; None with fewer than two."""
    shared = [key for key in ours if key in theirs]
    if len(shared) < 2:
        return None
    (a, v), (b, w) = (tuple(zip(*(side[key] for key in shared))) for side in (ours, theirs))
    if {*v, *w} == {1.0}:  # of means the same numbers in a quarter of the time
        return statistics.paired_difference(a, b, seed=0)
    return statistics.ratio_difference(a, v, b, w, seed=0)


def unpaired(ours: Item, theirs: Item) -> Estimate:
    """Ours minus theirs, the half widths of their intervals added as independent: √(h₁² + h₂²)."""
    difference = float(ours["value"] - theirs["value"])
    half = math.hypot(ours["high"] - ours["low"], theirs["high"] - theirs["low"]) / 2
    return Estimate(difference, difference - half, difference + half, min(ours["n"], theirs["n"]))


def is_clear(difference: Estimate) -> bool:
    """Whether the interval leaves out 0."""
    return difference.low > 0 or difference.high < 0
