"""Whether the best figure of several models is better than the next by more than noise.

Where the items behind two figures are in samples.jsonl, both models' answers to an item are drawn together (paired
bootstrap, as the evaluation's own comparisons); else the two intervals are taken as independent, which finds fewer
differences. What an item is worth is worked out here again, against the baseline's item where the figure is, and used
only where it gives back the reported figure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pipeline.evals import statistics
from pipeline.evals.statistics import Estimate, Floats
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


PAIRS = ("preference_accuracy", "reward_accuracy")
"""Tasks whose items are pairs: right where `chosen` is above `rejected`, of a policy by more than the baseline's."""
OF_ACCURACY = "difference"
"""A difference's name that does not say of what it is."""


@dataclass(frozen=True)
class Side:
    """One model's figure: the line of results.jsonl, the items behind it, and the baseline's of the same task."""

    row: Item
    items: Sequence[Item]
    baseline: Sequence[Item] = ()


def direction(metric: str) -> Literal[-1, 0, 1]:
    """1 where more is better, -1 where less is, 0 where neither is."""
    name = metric.partition("/")[0]
    if name in LOWER or name.endswith("perplexity"):
        return -1
    return 0 if name in NEITHER or name.endswith("_difference") else 1


def compared(task: str, metric: str, ours: Side, theirs: Side) -> tuple[Estimate | None, str]:
    """(ours minus theirs, None where nothing tells its noise; `paired` or `unpaired`)."""
    if found := _paired_of(task, metric, ours, theirs):
        return found, "paired"
    sides = (ours.row, theirs.row)
    if any(row[end] is None for row in sides for end in ("low", "high")) or min(row["n"] for row in sides) < 2:
        return None, "unpaired"
    return unpaired(*sides), "unpaired"


def _paired_of(task: str, metric: str, ours: Side, theirs: Side) -> Estimate | None:
    if metric == "reward_sd":
        return _standardised(ours, theirs)
    values = [values_of(side.items, task, metric, side.baseline) for side in (ours, theirs)]
    if not all(gives(v, side.row["value"]) for v, side in zip(values, (ours, theirs), strict=True)):
        return None
    return paired(*values)


def _standardised(ours: Side, theirs: Side) -> Estimate | None:
    """Of rewards above the baseline's in its standard deviations, which is drawn with the items."""
    rewards = [
        {item["item"]: item["reward"] for item in items if item.get("reward") is not None}
        for items in (ours.items, ours.baseline, theirs.items, theirs.baseline)
    ]
    sides = ((rewards[:2], ours.row["value"]), (rewards[2:], theirs.row["value"]))
    if not all(_is_standardised(both, figure) for both, figure in sides):
        return None
    shared = [key for key in rewards[0] if all(key in each for each in rewards)]
    if len(shared) < 2:
        return None

    def statistic(a: Floats, b: Floats, c: Floats, d: Floats) -> Floats:
        return _in_deviations(a, b) - _in_deviations(c, d)

    return statistics.bootstrap(statistic, *([each[key] for key in shared] for each in rewards), seed=0)


def _in_deviations(values: Floats, others: Floats) -> Floats:
    """Mean of values - others over the others' standard deviation, NaN where that is 0. [R, N] -> [R]."""
    spread = others.std(-1, ddof=1)
    return np.asarray((values - others).mean(-1) / np.where(spread > 0, spread, np.nan))


def _is_standardised(rewards: Sequence[Mapping[Any, float]], figure: float) -> bool:
    shared = [key for key in rewards[0] if key in rewards[1]]
    if len(shared) < 2:
        return False
    a, b = (np.array([[each[key] for key in shared]]) for each in rewards)
    return math.isclose(float(_in_deviations(a, b)[0]), figure, rel_tol=1e-3, abs_tol=1e-4)


def values_of(items: Sequence[Item], task: str, metric: str, baseline: Sequence[Item] = ()) -> Values:
    """What each item is worth for the metric; empty where the items do not tell."""
    if task in PAIRS:
        return _right(items, metric, baseline if task == "preference_accuracy" else None)
    if metric == "gold_win_rate" or metric == OF_ACCURACY or metric.endswith("_difference"):
        return _against(items, task, metric, baseline)
    if metric in ("acc", "acc_norm", "pmi") and all("named" in item for item in items):
        return {item["item"]: (float(_chosen(item, metric) == item["answer"]), 1.0) for item in items}
    if metric == "bits_per_byte" and all({"nats", "bytes"} <= item.keys() for item in items):
        return {item["item"]: (item["nats"] / math.log(2), float(item["bytes"])) for item in items}
    found = {item["item"]: _value(item, metric) for item in items}
    return {key: (value, 1.0) for key, value in found.items() if value is not None}


def _right(items: Sequence[Item], metric: str, baseline: Sequence[Item] | None) -> Values:
    """Right pairs and pairs of every row, all or those of one kind; a tie is a half."""
    name, _, kind = metric.partition("/")
    if name != "accuracy":
        return {}
    theirs = None if baseline is None else {item["item"]: _margin(item) for item in baseline}
    found: Values = {}
    for item in items:
        margin, above = _margin(item), 0.0 if theirs is None else theirs.get(item["item"])
        if margin is not None and above is not None and kind in ("", item.get("kind")):
            key = item.get("row", item["item"])
            right, pairs = found.get(key, (0.0, 0.0))
            found[key] = (right + (margin > above) + 0.5 * (margin == above), pairs + 1.0)
    return found


def _margin(item: Item) -> float | None:
    chosen, rejected = item.get("chosen"), item.get("rejected")
    return None if chosen is None or rejected is None else float(chosen - rejected)


def _against(items: Sequence[Item], task: str, metric: str, baseline: Sequence[Item]) -> Values:
    """Items beside the baseline's: 1, a half or 0 of a win rate, the difference of a difference."""
    of = {"gold_win_rate": "gold", OF_ACCURACY: "accuracy"}.get(metric) or metric.removesuffix("_difference")
    ours, theirs = (values_of(each, task, of) for each in (items, baseline))
    found = {key: value - theirs[key][0] for key, (value, _) in ours.items() if key in theirs}
    if metric == "gold_win_rate":
        return {key: ((difference > 0) + 0.5 * (difference == 0), 1.0) for key, difference in found.items()}
    return {key: (difference, 1.0) for key, difference in found.items()}


def _value(item: Item, metric: str) -> float | None:
    """The item's number by the metric's name, or among what lm-eval says of it; of several samples their mean."""
    if metric == "kl" and item.get("baseline_logprob") is not None:
        return float(item["logprob"] - item["baseline_logprob"])
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
