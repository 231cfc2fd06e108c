"""GAE, returns and explained variance: worked by hand, and against a loop written from the definition."""

from __future__ import annotations

import pytest
import torch

from pipeline.rl.advantages import dr_grpo, explained_variance, gae, grpo, remax, rewards_to_go, rloo, varies
from pipeline.rl.masking import length_mask


def test_gae_by_hand():
    # One response of three tokens in a row of four, gamma 0.9, lambda 0.5 (gamma lambda = 0.45).
    # delta_2 = 2 - 0.25 = 1.75                          A_2 = 1.75
    # delta_1 = 0.1 + 0.9 * 0.25 - 0.5 = -0.175          A_1 = -0.175 + 0.45 * 1.75 = 0.6125
    # delta_0 = -0.2 + 0.9 * 0.5 - 1 = -0.75             A_0 = -0.75 + 0.45 * 0.6125 = -0.474375
    rewards_BT = torch.tensor([[-0.2, 0.1, 2.0, 9.0]])
    values_BT = torch.tensor([[1.0, 0.5, 0.25, 7.0]])
    mask_BT = torch.tensor([[True, True, True, False]])
    advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, gamma=0.9, lam=0.5)
    torch.testing.assert_close(advantages_BT, torch.tensor([[-0.474375, 0.6125, 1.75, 0.0]]))
    torch.testing.assert_close(returns_BT, torch.tensor([[0.525625, 1.1125, 2.0, 0.0]]))


def test_rewards_to_go_by_hand():
    # 3; 2 + 0.5 * 3 = 3.5; 1 + 0.5 * 3.5 = 2.75. What lies after the end (100) never comes in.
    rewards_BT = torch.tensor([[1.0, 2.0, 3.0, 100.0]])
    returns_BT = rewards_to_go(rewards_BT, length_mask(torch.tensor([3]), 4), 0.5)
    assert returns_BT.tolist() == [[2.75, 3.5, 3.0, 0.0]]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.97, 0.6), (1.0, 0.0), (0.9, 1.0)])
def test_gae_is_the_sum_of_its_definition(gamma: float, lam: float):
    """A_t = sum over l of (gamma lambda)^l delta_{t+l}, row by row in plain Python, on ragged lengths."""
    generator = torch.Generator().manual_seed(0)
    rewards_BT, values_BT = torch.randn(2, 5, 9, generator=generator, dtype=torch.float64)
    lengths = [1, 9, 4, 7, 2]
    mask_BT = length_mask(torch.tensor(lengths), 9)
    advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, gamma=gamma, lam=lam)
    for row, length in enumerate(lengths):
        r, v = rewards_BT[row].tolist(), [*values_BT[row, :length].tolist(), 0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length))
            assert advantages_BT[row, t].item() == pytest.approx(expected, abs=1e-12)
            assert returns_BT[row, t].item() == pytest.approx(expected + v[t], abs=1e-12)
    assert not advantages_BT[~mask_BT].any()
    assert not returns_BT[~mask_BT].any()


def test_at_lambda_one_the_returns_are_the_rewards_to_go():
    generator = torch.Generator().manual_seed(1)
    rewards_BT, values_BT = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    mask_BT = length_mask(torch.tensor([6, 3, 1, 5]), 6)
    _, returns_BT = gae(rewards_BT, values_BT, mask_BT, gamma=0.9, lam=1.0)
    torch.testing.assert_close(returns_BT, rewards_to_go(rewards_BT, mask_BT, 0.9))


def test_the_stop_token_gets_the_score_at_any_lambda():
    """With the score on the last real token its advantage is score - V there, whatever lambda is."""
    rewards_BT = torch.tensor([[0.0, 0.0, 1.5, 0.0]])
    values_BT = torch.tensor([[0.3, 0.2, 0.5, 0.9]])
    mask_BT = length_mask(torch.tensor([3]), 4)
    for lam in (0.0, 0.5, 0.95, 1.0):
        advantages_BT, _ = gae(rewards_BT, values_BT, mask_BT, gamma=1.0, lam=lam)
        assert advantages_BT[0, 2].item() == 1.0


def test_explained_variance_by_hand():
    # Returns 1, 2, 3, 6: mean 3, variance (4 + 1 + 0 + 9) / 4 = 3.5.
    # Values 0, 2, 2, 4: errors 1, 0, 1, 2, mean 1, variance (0 + 1 + 0 + 1) / 4 = 0.5: 1 - 1 / 7.
    returns_BT = torch.tensor([[1.0, 2.0], [3.0, 6.0], [50.0, 50.0]])
    values_BT = torch.tensor([[0.0, 2.0], [2.0, 4.0], [-7.0, 9.0]])
    mask_BT = torch.tensor([[True, True], [True, True], [False, False]])
    assert explained_variance(values_BT, returns_BT, mask_BT).item() == pytest.approx(6 / 7)
    assert explained_variance(returns_BT, returns_BT, mask_BT).item() == 1.0
    assert explained_variance(torch.full_like(returns_BT, 3.0), returns_BT, mask_BT).item() == 0.0
    assert explained_variance(values_BT, torch.ones_like(returns_BT), mask_BT).item() == 0.0


def test_what_others_wrote_is_stepped_over():
    """A tool's two tokens in the middle: the numbers are those of the row without them."""
    generator = torch.Generator().manual_seed(7)
    rewards_BT, values_BT = torch.randn(2, 1, 6, generator=generator, dtype=torch.float64)
    mask_BT = torch.tensor([[True, True, False, False, True, True]])
    advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, gamma=0.9, lam=0.7)
    kept = mask_BT[0]
    alone = gae(rewards_BT[:, kept], values_BT[:, kept], torch.ones(1, 4, dtype=torch.bool), gamma=0.9, lam=0.7)
    torch.testing.assert_close(advantages_BT[:, kept], alone[0])
    torch.testing.assert_close(returns_BT[:, kept], alone[1])
    assert not advantages_BT[:, ~kept].any()
    assert not returns_BT[:, ~kept].any()
    to_go_BT = rewards_to_go(rewards_BT, mask_BT, 0.9)
    torch.testing.assert_close(
        to_go_BT[:, kept], rewards_to_go(rewards_BT[:, kept], torch.ones(1, 4, dtype=torch.bool), 0.9)
    )
    assert not to_go_BT[:, ~kept].any()


RETURNS_B = torch.tensor([1.0, 0.0, 0.0, 3.0, 5.0, 5.0, 5.0, 5.0])
"""Two groups of four: mean 1, deviations 0, -1, -1, 2, variance (0 + 1 + 1 + 4) / 3 = 2; and one that is all alike."""


def test_grpo_by_hand():
    scale = 2.0**0.5 + 1e-4
    expected = [0.0, -1 / scale, -1 / scale, 2 / scale, 0.0, 0.0, 0.0, 0.0]
    assert grpo(RETURNS_B, 4).tolist() == pytest.approx(expected)


def test_dr_grpo_by_hand():
    assert dr_grpo(RETURNS_B, 4).tolist() == [0.0, -1.0, -1.0, 2.0, 0.0, 0.0, 0.0, 0.0]


def test_rloo_by_hand():
    # The others' means: (0 + 0 + 3) / 3 = 1; (1 + 0 + 3) / 3 = 4/3 twice; 1/3.
    expected = [0.0, -4 / 3, -4 / 3, 3 - 1 / 3, 0.0, 0.0, 0.0, 0.0]
    assert rloo(RETURNS_B, 4).tolist() == pytest.approx(expected)


def test_rloo_is_dr_grpo_times_g_over_g_minus_one():
    returns_B = torch.randn(12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(rloo(returns_B, 3), dr_grpo(returns_B, 3) * 3 / 2)


def test_remax_by_hand():
    greedy_B = torch.tensor([0.5, 0.5, 2.0])
    assert remax(torch.tensor([1.0, 0.0, 2.0]), greedy_B).tolist() == [0.5, -0.5, 0.0]


def test_groups_that_are_all_alike_have_nothing_to_say():
    assert varies(RETURNS_B, 4).tolist() == [True] * 4 + [False] * 4
