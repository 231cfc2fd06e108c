"""Correlation of two figures of the same answers, with an interval over the rows that the answers belong to.

Shapes: N answers, G rows.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from pipeline.evals import statistics
from pipeline.evals.statistics import Estimate, Floats


def pearson(x_N: npt.ArrayLike, y_N: npt.ArrayLike, rows_N: npt.ArrayLike, seed: int) -> Estimate:
    """Pearson's r = cov(x, y) / (sd(x) sd(y)); NaN where one of them does not vary.

    rows_N: which row an answer belongs to; rows are drawn whole. Six sums of a row are all that r needs of it.
    """
    x, y = (_standardised(np.asarray(each, dtype=np.float64)) for each in (x_N, y_N))
    _, row_N = np.unique(np.asarray(rows_N), return_inverse=True)
    sums_G = [np.bincount(row_N, weights=each) for each in (np.ones_like(x), x, y, x * x, y * y, x * y)]
    return replace(statistics.bootstrap(_pearson_of, *sums_G, seed=seed), n=len(x))


def spearman(x_N: npt.ArrayLike, y_N: npt.ArrayLike, rows_N: npt.ArrayLike, seed: int) -> Estimate:
    """Spearman's ρ: Pearson's r of the ranks, equal values sharing the mean of theirs. The ranks are those among all
    answers in every resample too."""
    return pearson(_ranks(np.asarray(x_N)), _ranks(np.asarray(y_N)), rows_N, seed)


def _pearson_of(n: Floats, x: Floats, y: Floats, xx: Floats, yy: Floats, xy: Floats) -> Floats:
    n, x, y, xx, yy, xy = (each.sum(-1) for each in (n, x, y, xx, yy, xy))
    spread = (xx - x * x / n) * (yy - y * y / n)
    return np.asarray((xy - x * y / n) / np.sqrt(np.where(spread > 1e-12, spread, np.nan)))


def _standardised(values_N: Floats) -> Floats:
    """Mean 0 and deviation 1, so that the sums lose no digits; r does not change."""
    spread = values_N.std() if len(values_N) else 0.0
    return np.asarray((values_N - values_N.mean()) / spread) if spread > 0 else np.zeros_like(values_N)


def _ranks(values_N: npt.NDArray[np.generic]) -> Floats:
    _, place_N, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[place_N], dtype=np.float64)
