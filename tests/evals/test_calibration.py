"""Calibration by hand, and the figure's numbers."""

import re

import numpy as np
import pytest

from pipeline.evals import calibration


def test_claims_are_of_the_side_that_is_chosen() -> None:
    claimed, right = calibration.claims([0.9, 0.2, 0.5, 0.7, 0.1], [1.0, 1.0, 1.0, 0.5, 0.8])
    assert claimed.tolist() == pytest.approx([0.9, 0.8, 0.5, 0.7, 0.9])
    assert right.tolist() == pytest.approx([1.0, 0.0, 0.5, 0.5, 0.2])


def test_the_error_by_hand() -> None:
    """Bins of 0.05 from 0.5: two pairs claim 0.52 and 0.54 and one is right (gap 0.03), four claim 0.98 and all are
    right (gap 0.02), one claims 1 and is wrong, in the last bin with them: (0.06 + |5 × … |) / 7."""
    claimed, right = np.array([0.52, 0.54, 0.98, 0.98, 0.98, 0.98, 1.0]), np.array([1.0, 0, 1, 1, 1, 1, 0])
    found = calibration.calibration_error(claimed, right, np.arange(7), 0)
    assert found.value == pytest.approx((abs(1 - 1.06) + abs(4 - 4.92)) / 7)
    assert found.low <= found.value <= found.high
    bins = calibration.bins(claimed, right)
    assert [(round(each.low, 2), each.n) for each in bins if each.n] == [(0.5, 2), (0.95, 5)]
    assert (bins[9].claimed, bins[9].right) == (pytest.approx(4.92 / 5), pytest.approx(0.8))
    assert calibration.bin_of([0.5, 0.5499, 0.95, 1.0]).tolist() == [0, 0, 9, 9]


def test_its_interval_draws_a_list_with_all_of_its_pairs() -> None:
    """A list of three claims 0.9 and is right three times, a pair claims 0.6 and is wrong: ECE (3 × 0.1 + 0.6) / 4. Of
    two rows a resample is the list twice (0.1), the pair twice (0.6) or both, each at least a quarter of the time."""
    claimed, right = np.array([0.9, 0.9, 0.9, 0.6]), np.array([1.0, 1.0, 1.0, 0.0])
    found = calibration.calibration_error(claimed, right, [7, 7, 7, 3], 0)
    assert (found.value, found.low, found.high) == pytest.approx((0.225, 0.1, 0.6))
    assert found.n == 4


@pytest.mark.slow
def test_a_model_that_means_what_it_says_has_a_small_error_and_one_that_boasts_a_large_one() -> None:
    rng = np.random.default_rng(0)
    truth = rng.uniform(0.5, 1.0, 20000)
    right = (rng.uniform(size=20000) < truth) * 1.0
    honest = calibration.calibration_error(truth, right, np.arange(20000), 0).value
    boasting = calibration.calibration_error(np.full(20000, 0.99), right, np.arange(20000), 0).value
    assert honest < 0.015
    assert boasting == pytest.approx(0.99 - right.mean())


def test_the_figure_holds_a_dot_a_bin_where_it_belongs() -> None:
    """Claimed 0.75 and right 0.5: the middle of the plot, both ways; counts below; names are escaped."""
    bins = calibration.bins(np.array([0.75, 0.75, 0.96]), np.array([0.0, 1.0, 1.0]))
    svg = calibration.figure(bins, "a < b")
    dots = re.findall(r'<circle cx="([0-9.]+)" cy="([0-9.]+)"', svg)
    middle = calibration.LEFT + calibration.SIDE / 2, calibration.TOP + calibration.SIDE / 2
    assert (float(dots[0][0]), float(dots[0][1])) == pytest.approx(middle, abs=0.1)
    assert len(dots) == 2
    assert "2 pairs: claimed 0.750, right 0.500" in svg
    assert "a &lt; b" in svg
    assert svg == calibration.figure(bins, "a < b")
