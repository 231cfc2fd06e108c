"""A scorer that knows nothing but an answer's length: what a preference figure must beat to mean anything.

Learnt from pairs that it is not measured on: the log-odds of being the chosen one for each length, so that it knows
the best length and not only a direction. Lengths are in characters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from pipeline.evals.statistics import Floats

_BINS = 24


def fit(chosen_N: Sequence[int], rejected_N: Sequence[int]) -> Callable[[npt.ArrayLike], Floats]:
    """lengths -> log p(length | chosen) - log p(length | rejected), by quantile bins with one added to each count."""
    both = np.concatenate([np.asarray(chosen_N, dtype=np.float64), np.asarray(rejected_N, dtype=np.float64)])
    edges = np.unique(np.quantile(both, np.linspace(0, 1, _BINS + 1)[1:-1])) if len(both) else np.zeros(0)

    def counts(lengths: Sequence[int]) -> Floats:
        bins = np.searchsorted(edges, np.asarray(lengths, dtype=np.float64))
        return np.bincount(bins, minlength=len(edges) + 1).astype(np.float64) + 1.0

    chosen, rejected = counts(chosen_N), counts(rejected_N)
    odds = np.log(chosen / chosen.sum()) - np.log(rejected / rejected.sum())
    return lambda lengths: np.asarray(odds[np.searchsorted(edges, np.asarray(lengths, dtype=np.float64))])
