"""Ensembles, length, repetition and the sum, on numbers worked by hand."""

from __future__ import annotations

import pytest
import torch

from pipeline.rl.terms import length_over, mean_minus_std, repeated, weighted_sum, worst_case

# Three members, three responses: agreed on; 1, 2, 6 (mean 3, variance (4 + 1 + 9) / 3); one dissenter.
SCORES_MB = torch.tensor([[2.0, 1.0, 5.0], [2.0, 2.0, 5.0], [2.0, 6.0, -1.0]])


def test_mean_minus_std_takes_the_populations_deviation():
    spread = (14 / 3) ** 0.5
    dissent = (2 * 2**2 + 4**2) / 3  # around the mean 3
    assert mean_minus_std(SCORES_MB, 1.0).tolist() == pytest.approx([2.0, 3.0 - spread, 3.0 - dissent**0.5])
    assert mean_minus_std(SCORES_MB, 0.5).tolist() == pytest.approx([2.0, 3.0 - spread / 2, 3.0 - dissent**0.5 / 2])
    assert mean_minus_std(SCORES_MB, 0.0).tolist() == pytest.approx([2.0, 3.0, 3.0])


def test_the_worst_case_is_the_lowest_member():
    assert worst_case(SCORES_MB).tolist() == [2.0, 1.0, -1.0]


def test_length_costs_a_token_over_the_target():
    assert length_over(torch.tensor([1, 9, 10, 11, 25]), 10).tolist() == [0.0, 0.0, 0.0, -1.0, -15.0]


@pytest.mark.parametrize(
    ("ids", "n", "score"),
    [
        ([], 2, 0.0),
        ([1], 2, 0.0),
        ([1, 2], 2, 0.0),
        ([1, 2, 3, 4], 2, 0.0),
        ([1, 1, 1, 1, 1], 2, -0.75),  # 11 four times, one of them new
        ([1, 2, 1, 2, 1], 2, -0.5),  # 12 21 12 21
        ([1, 2, 3, 1, 2, 3], 3, -0.25),  # 123 231 312 123
        ([7, 7, 8], 1, pytest.approx(-1 / 3)),
    ],
)
def test_repetition_is_the_share_of_ngrams_that_stood_before(ids: list[int], n: int, score: float):
    assert repeated(ids, n) == score


def test_the_sum_weighs_each_term():
    scores = [torch.tensor([1.0, 2.0]), torch.tensor([10.0, -1.0]), torch.tensor([0.0, 4.0])]
    assert weighted_sum(scores, [1.0, 0.5, -2.0]).tolist() == [6.0, -6.5]
    odd = torch.rand(100)
    assert weighted_sum([odd], [1.0]).equal(odd)  # one term of weight 1 is itself, to the bit
