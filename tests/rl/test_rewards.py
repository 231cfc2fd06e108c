"""Scores to token rewards: clip, the missing-EOS rules, the price of KL, the score's place."""

from __future__ import annotations

import pytest
import torch

from pipeline.rl.masking import length_mask
from pipeline.rl.rewards import clip_scores, missing_eos, overlong_penalty, token_rewards


def test_clip():
    scores_B = torch.tensor([-30.0, -10.0, 0.5, 12.0])
    assert clip_scores(scores_B, 10.0).tolist() == [-10.0, -10.0, 0.5, 10.0]
    assert clip_scores(scores_B, None).tolist() == [-30.0, -10.0, 0.5, 12.0]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("replace", [2.0, -1.0, -3.0]), ("subtract", [2.0, 4.0, -3.0]), ("keep", [2.0, 5.0, -3.0])],
)
def test_missing_eos(rule: str, expected: list[float]):
    scores_B, is_ended_B = torch.tensor([2.0, 5.0, -3.0]), torch.tensor([True, False, True])
    assert missing_eos(scores_B, is_ended_B, penalty=1.0, rule=rule).tolist() == expected  # type: ignore[arg-type]


def test_token_rewards_by_hand():
    # kl_coef 0.5: minus half the KL on every token, the score on the last real one, nothing after it.
    kl_BT = torch.tensor([[0.25, -0.5, 8.0], [1.0, 2.0, 3.0], [4.0, 8.0, 8.0]])
    rewards_BT = token_rewards(
        torch.tensor([2.0, -1.0, 0.5]), kl_BT, length_mask(torch.tensor([2, 3, 1]), 3), kl_coef=0.5
    )
    assert rewards_BT.tolist() == [[-0.125, 2.25, 0.0], [-0.5, -1.0, -2.5], [-1.5, 0.0, 0.0]]


def test_the_sum_of_a_row_is_its_score_less_the_price_of_its_kl():
    generator = torch.Generator().manual_seed(0)
    kl_BT, lengths_B = torch.randn(6, 5, generator=generator), torch.tensor([1, 2, 3, 4, 5, 5])
    scores_B = torch.randn(6, generator=generator)
    rewards_BT = token_rewards(scores_B, kl_BT, length_mask(lengths_B, 5), kl_coef=0.05)
    for row, length in enumerate(lengths_B.tolist()):
        expected = scores_B[row] - 0.05 * kl_BT[row, :length].sum()
        assert rewards_BT[row].sum().item() == pytest.approx(expected.item(), abs=1e-6)


def test_the_score_lies_on_the_last_token_the_policy_wrote():
    mask_BT = torch.tensor([[True, False, True, False]])
    rewards_BT = token_rewards(torch.tensor([2.0]), torch.ones(1, 4), mask_BT, kl_coef=0.5)
    assert rewards_BT.tolist() == [[-0.5, 0.0, 1.5, 0.0]]


def test_overlong_penalty_by_hand():
    # Of 100 tokens the last 20 cost: 80 nothing, 90 a half, 100 one; what is cut off stays at one.
    lengths_B = torch.tensor([10, 80, 90, 95, 100])
    found = overlong_penalty(lengths_B, longest=100, buffer=0.2)
    assert found.tolist() == pytest.approx([0.0, 0.0, -0.5, -0.75, -1.0])
