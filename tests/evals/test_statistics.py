"""Bootstrap intervals against closed form and numbers worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.evals import statistics


def test_mean_interval_is_the_normal_approximation_of_the_standard_error() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=1000)
    found = statistics.mean(values)
    error = values.std(ddof=0) / math.sqrt(len(values))
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)
    assert found.n == 1000


def test_proportion_interval_is_the_binomial_one() -> None:
    """Resampled sums of 0 and 1 are binomial(n, p) exactly: 30 of 100 gives quantiles 21 and 39."""
    found = statistics.mean([1.0] * 30 + [0.0] * 70)
    assert found.value == pytest.approx(0.3)
    assert found.low == pytest.approx(0.21, abs=0.011)
    assert found.high == pytest.approx(0.39, abs=0.011)


def test_two_items_by_hand() -> None:
    """Means of two draws from {0, 1} are 0, 0.5, 0.5, 1: the 2.5 and 97.5 percentiles are the ends."""
    found = statistics.mean([0.0, 1.0])
    assert (found.value, found.low, found.high, found.n) == (0.5, 0.0, 1.0, 2)


def test_equal_items_leave_no_interval() -> None:
    found = statistics.mean([2.5] * 7)
    assert (found.value, found.low, found.high) == (2.5, 2.5, 2.5)


def test_one_item_has_no_interval() -> None:
    for found in (statistics.mean([2.5]), statistics.ratio([5.0], [2.0])):
        assert (found.value, found.n) == (2.5, 1)
        assert math.isnan(found.low)
        assert math.isnan(found.high)


def test_ratio_is_sum_over_sum_not_mean_of_ratios() -> None:
    found = statistics.ratio([1.0, 9.0], [1.0, 3.0])
    assert found.value == pytest.approx(10 / 4)
    assert (found.low, found.high) == (1.0, 3.0)


def test_pairing_cancels_what_is_common() -> None:
    hard = np.random.default_rng(2).normal(0.0, 10.0, size=200)
    found = statistics.paired_difference(hard + 1.0, hard)
    assert (found.low, found.high) == (pytest.approx(1.0), pytest.approx(1.0))


def test_paired_difference_against_its_standard_error() -> None:
    rng = np.random.default_rng(3)
    ours, theirs = rng.normal(1.0, 1.0, size=800), rng.normal(0.5, 1.0, size=800)
    error = (ours - theirs).std(ddof=0) / math.sqrt(800)
    found = statistics.paired_difference(ours, theirs)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.06)


def test_standardised_difference_by_hand() -> None:
    """Others 0, 2, 4: standard deviation 2; differences 1, 3, 2: mean 2."""
    assert statistics.standardised_difference([1.0, 5.0, 6.0], [0.0, 2.0, 4.0]).value == pytest.approx(1.0)


def test_standardised_difference_of_constant_others_is_not_a_number() -> None:
    found = statistics.standardised_difference([1.0, 2.0], [3.0, 3.0])
    assert math.isnan(found.value)
    assert math.isnan(found.low)


def test_no_items() -> None:
    found = statistics.mean([])
    assert math.isnan(found.value)
    assert found.n == 0


def test_seeded_and_the_same_however_many_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(4).normal(size=50)
    whole = statistics.mean(values, seed=5)
    assert statistics.mean(values, seed=5) == whole
    assert statistics.mean(values, seed=6) != whole
    monkeypatch.setattr(statistics, "_DRAWN_AT_ONCE", 500)
    assert statistics.mean(values, seed=5) == whole


def test_wins_count_ties_half() -> None:
    assert statistics.wins([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]).tolist() == [0.0, 0.5, 1.0]


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(200):
        found = statistics.mean(rng.exponential(1.0, size=60))
        covered += found.low <= 1.0 <= found.high
    assert 175 <= covered <= 199  # 95 % nominal; the percentile method is a little narrow on skewed small samples
