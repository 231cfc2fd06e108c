"""Bootstrap confidence intervals: percentile method (Efron and Tibshirani 1993, chapter 13).

The items (questions, rows, documents) are drawn with replacement, the figure is computed on every draw, and the
interval runs between the percentiles of what came out. Where two models answer the same items they are drawn
together (paired), so that what is hard for both cancels. Everything is seeded: the same items give the same
interval.

Over a few seeds a bootstrap would be too narrow: there the interval is Student's, with the seeds' own spread.

Shapes: N items, R resamples, S seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
PerItem = Mapping[str, Mapping[int, tuple[float, float]]]
"""Metric -> item -> (numerator, denominator): the metric is the sum over items of the one by that of the other."""

RESAMPLES = 2000
LEVEL = 0.95
_DRAWN_AT_ONCE = 2**22
"""Indices held in memory at a time (32 MB); more items are drawn in more rounds."""


@dataclass(frozen=True)
class Estimate:
    """A figure, its confidence interval, and the number of items behind it."""

    value: float
    low: float
    high: float
    n: int


def bootstrap(
    statistic: Callable[..., Floats],
    *items_N: npt.ArrayLike,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Estimate:
    """`statistic` of the items, with its percentile interval.

    statistic: takes as many arrays [R, N] as there are `items_N`, gives [R]; items at one index are drawn together.
    With no items every number is NaN and n is 0; one item tells no noise, and both ends are NaN.
    """
    arrays = [np.asarray(item, dtype=np.float64) for item in items_N]
    n = len(arrays[0])
    assert all(array.shape == (n,) for array in arrays), "paired items differ in number"
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    value = statistic(*(array[None, :] for array in arrays))[0]
    if n == 1:  # every resample is the item itself: a width of 0 would read as certainty
        return Estimate(float(value), math.nan, math.nan, 1)
    rng = np.random.default_rng(seed)
    rounds = []
    left = resamples
    while left:
        rows = min(left, max(1, _DRAWN_AT_ONCE // n))
        index_RN = rng.integers(0, n, size=(rows, n))
        rounds.append(statistic(*(array[index_RN] for array in arrays)))
        left -= rows
    tail = 100 * (1 - level) / 2
    drawn_R = np.concatenate(rounds)
    drawn_R = drawn_R[~np.isnan(drawn_R)]
    low, high = np.percentile(drawn_R, [tail, 100 - tail]) if len(drawn_R) else (math.nan, math.nan)
    return Estimate(float(value), float(low), float(high), n)


def mean(values_N: npt.ArrayLike, seed: int = 0) -> Estimate:
    """Mean over items."""
    return bootstrap(lambda x: x.mean(-1), values_N, seed=seed)


def ratio(numerators_N: npt.ArrayLike, denominators_N: npt.ArrayLike, seed: int = 0) -> Estimate:
    """Sum over sum: a rate over items of unequal size, such as bits per byte over documents."""
    return bootstrap(lambda a, b: a.sum(-1) / b.sum(-1), numerators_N, denominators_N, seed=seed)


def paired_difference(values_N: npt.ArrayLike, others_N: npt.ArrayLike, seed: int = 0) -> Estimate:
    """Mean of values - others over the same items."""
    return bootstrap(lambda a, b: (a - b).mean(-1), values_N, others_N, seed=seed)


def standardised_difference(values_N: npt.ArrayLike, others_N: npt.ArrayLike, seed: int = 0) -> Estimate:
    """Mean of values - others in units of the others' standard deviation (Glass's delta, n - 1 in the variance).

    NaN where the others do not vary.
    """

    def statistic(a: Floats, b: Floats) -> Floats:
        spread = b.std(-1, ddof=1) if b.shape[-1] > 1 else np.zeros(len(b))
        return np.asarray((a - b).mean(-1) / np.where(spread > 0, spread, np.nan))

    return bootstrap(statistic, values_N, others_N, seed=seed)


def ratio_difference(
    values_N: npt.ArrayLike,
    weights_N: npt.ArrayLike,
    others_N: npt.ArrayLike,
    their_weights_N: npt.ArrayLike,
    seed: int,
) -> Estimate:
    """Sum of values over sum of weights, minus the same of the others, over the same items."""
    arrays = (values_N, weights_N, others_N, their_weights_N)
    return bootstrap(lambda a, v, b, w: a.sum(-1) / v.sum(-1) - b.sum(-1) / w.sum(-1), *arrays, seed=seed)


def over_seeds(values_S: npt.ArrayLike) -> Estimate:
    """Mean over training seeds with Student's interval: mean ± t(0.975, S - 1) sd / sqrt(S); n is S.

    The ends are NaN for fewer than two seeds, where nothing tells their spread.
    """
    values = np.asarray(values_S, dtype=np.float64)
    n = len(values)
    if n < 2:
        return Estimate(float(values[0]) if n else math.nan, math.nan, math.nan, n)
    half = student_t(n - 1) * float(values.std(ddof=1)) / math.sqrt(n)
    middle = float(values.mean())
    return Estimate(middle, middle - half, middle + half, n)


_STUDENT = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


def student_t(freedom: int) -> float:
    """The 97.5 % quantile of Student's distribution; from 11 degrees of freedom on by Fisher's expansion (to 2e-4)."""
    assert freedom >= 1
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    z = 1.959964
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum((term / freedom**power for power, term in enumerate(terms, 1)), 0.0)


def wins(values_N: npt.ArrayLike, others_N: npt.ArrayLike) -> Floats:
    """1 where the value is larger, 0 where it is smaller, one half for a tie. Float [N]."""
    difference = np.asarray(values_N, dtype=np.float64) - np.asarray(others_N, dtype=np.float64)
    return np.asarray((np.sign(difference) + 1) / 2, dtype=np.float64)
