"""Masks, means and whitening on numbers worked by hand, on one rank and on two."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from pipeline.rl.masking import length_mask, masked_mean, masked_sum, whiten

VALUES = torch.tensor([[1.0, 3.0, 99.0], [5.0, 7.0, 11.0]])
MASK = torch.tensor([[True, True, False], [True, True, True]])
# 1, 3, 5, 7, 11: mean 27 / 5 = 5.4, squares 1 + 9 + 25 + 49 + 121 = 205, variance 205 / 5 - 5.4^2 = 11.84


def test_length_mask():
    assert length_mask(torch.tensor([0, 2, 3]), 3).tolist() == [[False] * 3, [True, True, False], [True] * 3]


def test_sum_and_mean_see_nothing_outside():
    values = VALUES.clone()
    values[0, 2] = float("nan")
    assert masked_sum(values, MASK).item() == 27.0
    assert masked_mean(values, MASK).item() == pytest.approx(5.4)


def test_whiten_by_hand():
    expected = (VALUES - 5.4) / 11.84**0.5
    torch.testing.assert_close(whiten(VALUES, MASK)[MASK], expected[MASK])
    torch.testing.assert_close(whiten(VALUES, MASK, shift_mean=False)[MASK], expected[MASK] + 5.4)
    assert whiten(VALUES, MASK)[0, 2].item() == 0.0
    assert whiten(VALUES, MASK, shift_mean=False)[0, 2].item() == 0.0


def test_shift_mean_is_the_right_way_round():
    """shift_mean=True: mean 0. False: the mean stays. (torchtune has it swapped, and a test that agrees.)"""
    assert masked_mean(whiten(VALUES, MASK), MASK).item() == pytest.approx(0.0, abs=1e-6)
    assert masked_mean(whiten(VALUES, MASK, shift_mean=False), MASK).item() == pytest.approx(5.4, rel=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.7, -1234.567])
def test_equal_values_whiten_to_zeros(value: float):
    """Rounding of the mean must not be blown up by 1 / sqrt(1e-8)."""
    whitened = whiten(torch.full((64, 31), value), length_mask(torch.arange(1, 65) % 31 + 1, 31))
    assert whitened.abs().max().item() < 1e-9


class TwoRanks:
    """Two threads that stand for two ranks: `reduce` waits for both and sums."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2)
        self.given: dict[int, Tensor] = {}

    def reduce(self, rank: int, tensor: Tensor) -> Tensor:
        self.given[rank] = tensor
        self.barrier.wait()
        total = self.given[0] + self.given[1]
        self.barrier.wait()
        return total


@pytest.mark.parametrize("shift_mean", [True, False])
def test_two_ranks_whiten_as_one(shift_mean: bool):
    """Each rank holds one row, of two and of three tokens."""
    ranks = TwoRanks()

    def half(rank: int) -> Tensor:
        rows = slice(rank, rank + 1)
        return whiten(VALUES[rows], MASK[rows], shift_mean=shift_mean, reduce=lambda tensor: ranks.reduce(rank, tensor))

    with ThreadPoolExecutor(2) as pool:
        halves = list(pool.map(half, (0, 1)))
    torch.testing.assert_close(torch.cat(halves), whiten(VALUES, MASK, shift_mean=shift_mean))
