"""The scaling law: its constants, the best split, and what a fit predicts."""

import math

import pytest

from pipeline.model.scaling import ALPHA, BETA, CHINCHILLA, Law, Run, fit, predict

SIZES = [(1e6, 2e6), (2e6, 2e6), (1e6, 8e6), (4e6, 4e6)]


def runs(law: Law, noise: float = 0.0) -> list[Run]:
    """Runs that lie on the law, the second `noise` above it."""
    return [Run(str(i), n, d, law.loss(n, d) * (1 + noise * (i == 1))) for i, (n, d) in enumerate(SIZES)]


def test_the_law_by_hand() -> None:
    expected = 1.8172 + 482.01 / 70e9**0.3478 + 2085.43 / 1.4e12**0.3658  # Chinchilla itself
    assert CHINCHILLA.loss(70e9, 1.4e12) == pytest.approx(expected)
    assert 1.9 < expected < 2.0


@pytest.mark.parametrize(("flops", "tokens_a_parameter"), [(1e18, 26), (1e19, 24), (1e21, 22)])
def test_the_best_split_is_the_lowest_loss_for_its_flops(flops: float, tokens_a_parameter: int) -> None:
    parameters, tokens = CHINCHILLA.best_split(flops)
    assert 6 * parameters * tokens == pytest.approx(flops)
    assert round(tokens / parameters) == tokens_a_parameter
    here = CHINCHILLA.loss(parameters, tokens)
    for share in (0.8, 1.25):
        assert CHINCHILLA.loss(parameters * share, tokens / share) > here


def test_a_fit_finds_the_law_its_runs_lie_on() -> None:
    law = Law(1.1, 250.0, 900.0)
    found = fit(runs(law))
    assert (found.floor, found.of_parameters, found.of_tokens) == pytest.approx((1.1, 250.0, 900.0), rel=1e-6)
    value, low, high = predict(runs(law), 1e7, 1e7)
    assert value == pytest.approx(law.loss(1e7, 1e7), rel=1e-6)
    assert high - low < 1e-6


def test_the_interval_widens_with_the_disagreement_of_the_runs_and_holds_the_truth() -> None:
    law = Law(1.1, 250.0, 900.0)
    widths = []
    for noise in (0.005, 0.02):
        value, low, high = predict(runs(law, noise), 1e7, 1e7)
        assert low < law.loss(1e7, 1e7) < high
        assert low < value < high
        widths.append(high - low)
    assert 2 < widths[1] / widths[0] < 6


def test_no_term_of_a_fit_is_negative() -> None:
    """Runs whose loss rises with size: the plain least squares would make its term negative."""
    found = fit([Run(str(n), n, d, 2 + n / 1e7) for n, d in SIZES])
    assert found.of_parameters == 0
    assert min(found.floor, found.of_tokens) >= 0
    with pytest.raises(ValueError, match="no best split"):
        found.best_split(1e18)
    with pytest.raises(ValueError, match="2 runs do not fix three numbers"):
        fit(runs(CHINCHILLA)[:2])


def test_the_exponents_are_those_of_the_replication() -> None:
    assert (ALPHA, BETA) == (0.3478, 0.3658)
    assert math.isclose(CHINCHILLA.floor, 1.8172)
