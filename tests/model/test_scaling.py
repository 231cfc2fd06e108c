"""The scaling law: its constants, the best split, and what a fit predicts."""

import math
import random

import pytest

from pipeline.model.scaling import ALPHA, BETA, CHINCHILLA, Law, Run, batch_tokens, fit, large_batch, predict

SIZES = [(1e6, 2e6), (2e6, 2e6), (1e6, 8e6), (4e6, 4e6)]


def runs(law: Law, noise: float = 0.0) -> list[Run]:
    """Runs that lie on the law, the second `noise` above it."""
    return [Run(str(i), n, d, law.loss(n, d) * (1 + noise * (i == 1))) for i, (n, d) in enumerate(SIZES)]


def test_the_law_by_hand() -> None:
    expected = 1.8172 + 482.01 / 70e9**0.3478 + 2085.43 / 1.4e12**0.3658  # Chinchilla itself
    assert CHINCHILLA.loss(70e9, 1.4e12) == pytest.approx(expected)
    assert 1.9 < expected < 2.0


def test_the_batch_by_hand() -> None:
    """10^0.571 = 3.724: ten times the text, 3.7 times the batch, and the rest of it in steps."""
    assert batch_tokens(1.0) == 0.58
    assert batch_tokens(1e10) == pytest.approx(0.58 * 10**5.71)
    assert batch_tokens(4.1e5) == pytest.approx(929, rel=0.01)  # benchmarks/learning_rates.py's runs
    assert batch_tokens(1e7) / batch_tokens(1e6) == pytest.approx(3.724, rel=1e-3)


def test_a_batch_far_above_the_law_is_said() -> None:
    assert large_batch(2048, 409_600) == ""
    assert large_batch(8192, 409_600) == (
        "8,192 tokens a step are many for a run of 409,600: the step law takes 929, and more steps"
    )


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
    assert high - value == pytest.approx(value - low)
    assert high - value >= 2 * 0.003 * value, "what another seed would say"


def test_the_interval_widens_with_the_disagreement_of_the_runs_and_holds_the_truth() -> None:
    law = Law(1.1, 250.0, 900.0)
    widths = []
    for noise in (0.005, 0.02):
        value, low, high = predict(runs(law, noise), 1e7, 1e7)
        assert low < law.loss(1e7, 1e7) < high
        assert low < value < high
        widths.append(high - low)
    assert 1.5 < widths[1] / widths[0] < 6


@pytest.mark.slow
@pytest.mark.parametrize(("alpha", "beta", "least"), [(ALPHA, BETA, 0.9), (0.28, 0.30, 0.75)])
def test_the_interval_holds_the_truth_in_most_draws(alpha: float, beta: float, least: float) -> None:
    """Six runs up to 8 M parameters on a law with noise, a hundred times; a run of ten times the largest's FLOPs."""
    law = Law(0.9, 60.0 if alpha == ALPHA else 20.0, 200.0 if alpha == ALPHA else 60.0, alpha, beta)
    sizes = [(1e6, 1e7), (1e6, 4e7), (2e6, 2e7), (4e6, 1e7), (4e6, 4e7), (8e6, 2e7)]
    draw, held = random.Random(0), 0
    for _ in range(100):
        drawn = [Run("", n, d, law.loss(n, d) * math.exp(draw.gauss(0, 0.005))) for n, d in sizes]
        _, low, high = predict(drawn, 2e7, 2e8)
        held += low <= law.loss(2e7, 2e8) <= high
    assert held >= 100 * least


REACHED = [(2114880, 580, 1.645), (2114880, 540, 1.666), (4262144, 460, 1.687), (2557632, 424, 1.733)]
REACHED += [(4262144, 300, 1.824)]
"""Parameters, steps of 8 x 256 tokens, bits per byte: the five runs of docs/plan.md."""


def test_each_of_five_runs_is_foretold_by_the_others() -> None:
    five = [Run(str(n), n, 2048.0 * steps, loss) for n, steps, loss in REACHED]
    for left, run in enumerate(five):
        value, low, high = predict([*five[:left], *five[left + 1 :]], run.parameters, run.tokens)
        assert abs(value / run.loss - 1) < 0.03
        assert low < run.loss < high


def test_what_the_runs_cannot_say_is_not_said() -> None:
    """Three runs are met by any three numbers; runs of one size, or of one length, say nothing of it."""
    value, low, high = predict(runs(CHINCHILLA)[:3], 1e7, 1e7)
    assert value == pytest.approx(CHINCHILLA.loss(1e7, 1e7), rel=1e-6)
    assert math.isnan(low)
    assert math.isnan(high)
    for sizes, message in (
        ([(1e6, 2e6), (1e6, 4e6), (1e6, 8e6)], "as many parameters"),
        ([(1e6, 2e6), (2e6, 2e6), (4e6, 2e6)], "as many tokens"),
        ([(1e6, 2e6), (2e6, 4e6), (1e6, 2e6)], "fewer than three differ"),
    ):
        with pytest.raises(ValueError, match=message):
            fit([Run("", n, d, CHINCHILLA.loss(n, d)) for n, d in sizes])


def test_no_term_of_a_fit_is_negative() -> None:
    """Runs whose loss rises with size: the plain least squares would make its term negative."""
    found = fit([Run(str(n), n, d, 2 + n / 1e7) for n, d in SIZES])
    assert found.of_parameters == 0
    assert min(found.floor, found.of_tokens) >= 0
    with pytest.raises(ValueError, match="no best split"):
        found.best_split(1e18)
    with pytest.raises(ValueError, match="2 runs, of which fewer than three differ"):
        fit(runs(CHINCHILLA)[:2])


def test_the_exponents_are_those_of_the_replication() -> None:
    assert (ALPHA, BETA) == (0.3478, 0.3658)
    assert math.isclose(CHINCHILLA.floor, 1.8172)
