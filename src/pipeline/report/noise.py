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
from pipeline.evals.table import is_beyond

Item = Mapping[str, Any]
Values = dict[Any, tuple[float, float]]
"""Item -> (numerator, denominator)."""

LOWER = ("bits_per_byte", "ece", "nll", "loss")
NEITHER = (
    *("length", "kl", "n", "length_only", "pmi_swapped", "length_spearman", "length_pearson"),
    *("difference", "swayed", "unread"),
)
"""Better is neither more nor less; a difference says what the figure that it is of says."""
KEYS = {"accuracy": "correct", "win_rate": "win", "length": "lengths"}
"""Metric -> how items call it where they don't by its own name."""


def direction(metric: str) -> Literal[-1, 0, 1]:
    """1 where more is better, -1 where less is, 0 where neither is."""
    name = metric.partition("/")[0]
    if name in LOWER or name.endswith("perplexity"):
        return -1
    return 0 if name in NEITHER or name.endswith("_difference") else 1


def values_of(items: Sequence[Item], task: str, metric: str) -> Values:
    """What each item is worth for the metric; empty where the items do not tell."""
    if metric in ("acc", "acc_norm", "pmi") and all("named" in item for item in items):
        return {item["item"]: (float(_chosen(item, metric) == item["answer"]), 1.0) for item in items}
    if metric == "bits_per_byte" and all({"nats", "bytes"} <= item.keys() for item in items):
        return {item["item"]: (item["nats"] / math.log(2), float(item["bytes"])) for item in items}
    found = {item["item"]: _value(item, metric) for item in items}
    return {key: (value, 1.0) for key, value in found.items() if value is not None}


def _value(item: Item, metric: str) -> float | None:
    """The item's number by the metric's name, or among what lm-eval says of it; of several samples their mean."""
    figures = item.get("figures", {})
    said = [holder.get(key) for key in (metric, KEYS.get(metric, metric)) for holder in (item, figures)]
    for value in said:
        if isinstance(value, list) and value and all(isinstance(each, int | float) for each in value):
            return sum(value) / len(value)
        if isinstance(value, int | float):
            return float(value)
    return None


def _chosen(item: Item, metric: str) -> int:
    """The candidate that is taken, as docs/eval.md defines the metric; of a user's own task lengths are characters."""
    lengths = item.get("bytes") or item.get("characters") or [1] * len(item["named"])
    scores = {
        "acc": item["named"],
        "acc_norm": [a / b for a, b in zip(item["named"], lengths, strict=True)],
        "pmi": [a - b for a, b in zip(item["named"], item.get("nameless", item["named"]), strict=True)],
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
    """Whether the interval leaves out 0, as the evaluation's own comparisons ask it."""
    return is_beyond(difference.low, difference.high, difference.n)
