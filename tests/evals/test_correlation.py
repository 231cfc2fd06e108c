"""Correlations against numpy's, and by hand."""

import math

import numpy as np
import pytest

from pipeline.evals.correlation import pearson, spearman


def test_pearson_is_numpys_whatever_the_scale() -> None:
    rng = np.random.default_rng(0)
    x = 1e4 + rng.normal(size=200)
    y = 3 * x + 2 * rng.normal(size=200)
    found = pearson(x, y, np.arange(200) // 2, 0)
    assert found.value == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert found.low < found.value < found.high
    assert found.n == 200


def test_spearman_by_hand_with_a_tie() -> None:
    """Ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: covariance 4.5 over sqrt(4.5 × 5); any growing function is the same."""
    x, y = [1.0, 2.0, 2.0, 9.0], [0.1, 0.3, 0.2, 0.4]
    assert spearman(x, y, range(4), 0).value == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert spearman(np.exp(x), y, range(4), 0).value == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_what_does_not_vary_has_none() -> None:
    assert math.isnan(pearson([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], range(3), 0).value)


def test_rows_are_drawn_whole() -> None:
    """Two answers a row that cancel each other: every resample has the same correlation of 0."""
    x, y = np.tile([1.0, -1.0, 1.0, -1.0], 10), np.tile([1.0, 1.0, -1.0, -1.0], 10)
    found = pearson(x, y, np.arange(40) // 4, 0)
    assert (found.value, found.low, found.high) == pytest.approx((0, 0, 0))
