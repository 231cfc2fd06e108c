"""Marks, standard errors and the warning: by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pipeline.rl.evaluation import Marks, Standing, report
from pipeline.rl.masking import alone


def marks(reward: list[float], gold: list[float] | None = None) -> Marks:
    ones_B = torch.ones(len(reward))
    gold_B = None if gold is None else torch.tensor(gold)
    return Marks(torch.tensor(reward), gold_B, 4 * ones_B, 10 * ones_B, ones_B > 0, 0.5 * ones_B)


def test_the_report_by_hand():
    # Rewards 1, 3: mean 2, variance 1, so that of the mean over n - 1 = 1: 1. Gold 0, 1 against 0, 0: a tie and a win.
    figures = report(marks([1.0, 3.0], [0.0, 1.0]), marks([0.0, 9.0], [0.0, 0.0]), alone)
    assert figures["eval_reward"] == 2.0
    assert figures["eval_reward_se"] == 1.0
    assert (figures["eval_gold"], figures["eval_gold_se"]) == (0.5, 0.5)
    assert (figures["eval_win_rate"], figures["eval_win_rate_se"]) == (0.75, 0.25)
    assert (figures["eval_kl"], figures["eval_sqrt_kl"], figures["eval_length"]) == (4.0, 2.0, 10.0)
    assert (figures["eval_ended"], figures["eval_entropy"]) == (1.0, 0.5)


def test_without_gold_the_win_rate_is_of_the_reward():
    figures = report(marks([1.0, 3.0, 5.0]), marks([0.0, 3.0, 9.0]), alone)
    assert "eval_gold" not in figures
    assert figures["eval_win_rate"] == 0.5


def test_a_gain_that_length_accounts_for_is_none_at_the_same_length():
    # Gains 1, 2, 3 at 10, 20, 30 tokens more: all of it is length. With 1 more each, 1 is not: the intercept.
    start, ones_B = marks([0.0, 0.0, 0.0]), torch.ones(3)
    for more in (0.0, 1.0):
        longer = Marks(
            torch.tensor([1.0, 2.0, 3.0]) + more, None, ones_B, torch.tensor([20.0, 30.0, 40.0]), ones_B, ones_B
        )
        figures = report(longer, start, alone)
        assert figures["eval_gain"] == pytest.approx(2.0 + more)
        assert figures["eval_gain_same_length"] == pytest.approx(more, abs=1e-6)


def test_the_gain_at_the_same_length_is_the_intercept_of_least_squares():
    generator = torch.Generator().manual_seed(0)
    lengths_B = torch.randint(5, 40, (50,), generator=generator).float()
    gains_B = 0.05 * lengths_B + torch.randn(50, generator=generator)
    zeros_B = torch.zeros(50)
    start = Marks(zeros_B, None, zeros_B, torch.full((50,), 12.0), zeros_B, zeros_B)
    figures = report(Marks(gains_B, None, zeros_B, lengths_B, zeros_B, zeros_B), start, alone)
    design = torch.stack([torch.ones(50), lengths_B - 12], dim=1)
    intercept = torch.linalg.lstsq(design, gains_B[:, None]).solution[0].item()
    assert figures["eval_gain_same_length"] == pytest.approx(intercept, abs=1e-4)
    assert not {"longer", "both"} & set(figures)


def test_the_error_of_a_mean_is_that_of_textbooks():
    values = [0.3, -1.2, 2.2, 0.9, 0.1]
    figures = report(marks(values), marks(values), alone)
    assert figures["eval_reward_se"] == pytest.approx((torch.tensor(values).std() / math.sqrt(5)).item(), rel=1e-6)


def test_ranks_are_summed():
    """Two ranks of one row each: the sums of both, as an all-reduce gives them, are those of one with two rows."""
    parts = [(marks([1.0], [0.0]), marks([0.0], [0.0])), (marks([3.0], [1.0]), marks([9.0], [0.0]))]
    sent: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        sent.append(tensor)
        return tensor

    for own, start in parts:
        report(own, start, keep)
    together = report(*parts[0], lambda tensor: sent[0] + sent[1])
    assert together == report(marks([1.0, 3.0], [0.0, 1.0]), marks([0.0, 9.0], [0.0, 0.0]), alone)


def figures(reward: float, gold: float | None, se: float = 0.1) -> dict[str, float]:
    found = {"eval_reward": reward, "eval_reward_se": se}
    return found if gold is None else found | {"eval_gold": gold, "eval_gold_se": se}


def test_the_best_is_the_one_with_most_gold():
    best = Standing.of(0, figures(0.0, 1.0))
    best = best.after(5, figures(1.0, 2.0))
    assert (best.step, best.since) == (5, 0)
    best = best.after(10, figures(2.0, 1.5)).after(15, figures(3.0, 2.0))
    assert (best.step, best.since, best.measure) == (5, 2, 2.0)
    assert Standing(**best.saved()) == best
    assert best.after(20, figures(3.0, 2.1)).step == 20


def test_without_gold_the_best_is_the_one_with_most_reward():
    assert Standing.of(0, figures(0.0, None)).after(5, figures(1.0, None)).step == 5


@pytest.mark.parametrize(
    ("reward", "gold", "warned"),
    [
        (1.0, 0.0, True),  # 1 up and 1 down, where 2 sqrt(0.1^2 + 0.1^2) = 0.283 is noise
        (1.0, 0.8, False),  # gold has fallen by less than noise
        (0.2, 0.0, False),  # the reward has not risen by more
        (1.0, 1.5, False),
        (-1.0, 0.0, False),
        (1.0, None, False),
    ],
)
def test_the_warning_is_of_a_reward_that_rises_as_gold_falls(reward: float, gold: float | None, warned: bool):
    best = Standing.of(3, figures(0.0, None if gold is None else 1.0))
    found = best.warning(figures(reward, gold))
    assert bool(found) == warned
    if warned:
        assert "since step 3 the reward has risen by 1 and gold fallen by 1" in found
