"""The clipped losses and the entropy: by hand, by a naive loop, by finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipeline.rl.losses import entropy, policy_loss, rollout_correction, token_weights, value_loss
from pipeline.rl.masking import length_mask


def finite_differences(function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-6) -> Tensor:
    gradient = torch.zeros_like(at)
    for index in range(at.numel()):
        up, down = at.clone(), at.clone()
        up.view(-1)[index] += step
        down.view(-1)[index] -= step
        gradient.view(-1)[index] = (function(up) - function(down)) / (2 * step)
    return gradient


def test_policy_loss_by_hand():
    # Ratios 1.5, 0.5, 1.5, 0.5, 1.1 with advantages 1, 1, -1, -1, 2 and clip 0.2:
    #   1.5 with A=1   min(1.5, 1.2)   = 1.2   clipped      0.5 with A=1   min(0.5, 0.8)   = 0.5
    #   1.5 with A=-1  min(-1.5, -1.2) = -1.5               0.5 with A=-1  min(-0.5, -0.8) = -0.8  clipped
    #   1.1 with A=2   2.2                                  loss = -(1.2 + 0.5 - 1.5 - 0.8 + 2.2) / 5 = -0.32
    logprobs_BT = torch.tensor([[1.5, 0.5, 1.5], [0.5, 1.1, 77.0]]).log()
    advantages_BT = torch.tensor([[1.0, 1.0, -1.0], [-1.0, 2.0, 55.0]])
    mask_BT = length_mask(torch.tensor([3, 2]), 3)
    result = policy_loss(logprobs_BT, torch.zeros(2, 3), advantages_BT, mask_BT / 5, cliprange=0.2)
    assert result.loss.item() == pytest.approx(-0.32)
    assert result.clip_fraction.item() == pytest.approx(2 / 5)
    expected = sum(r - 1 - math.log(r) for r in (1.5, 0.5, 1.5, 0.5, 1.1)) / 5
    assert result.approx_kl.item() == pytest.approx(expected, rel=1e-5)
    assert result.max_ratio_error.item() == pytest.approx(0.5)


def test_clip_higher_moves_the_upper_bound_only():
    # A = 1, ratio 1.5 is held at 1.28 instead of 1.2; A = -1, ratio 0.5 still at 0.8. -(1.28 - 0.8) / 2
    logprobs_BT = torch.tensor([[1.5, 0.5]]).log()
    advantages_BT, mask_BT = torch.tensor([[1.0, -1.0]]), torch.ones(1, 2, dtype=torch.bool)
    result = policy_loss(logprobs_BT, torch.zeros(1, 2), advantages_BT, mask_BT / 2, cliprange=0.2, clip_higher=0.28)
    assert result.loss.item() == pytest.approx(-(1.28 - 0.8) / 2)


def test_dual_clip_bounds_the_loss_of_a_bad_token():
    # A = -1, ratio 5: unbounded 5, with c = 3 no more than 3. A = +1, ratio 5 is untouched: -1.2.
    logprobs_BT = torch.tensor([[5.0, 5.0]]).log().requires_grad_()
    advantages_BT, mask_BT = torch.tensor([[-1.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool)
    plain = policy_loss(logprobs_BT, torch.zeros(1, 2), advantages_BT, mask_BT / 1, cliprange=0.2)
    dual = policy_loss(logprobs_BT, torch.zeros(1, 2), advantages_BT, mask_BT / 1, cliprange=0.2, dual_clip=3.0)
    assert plain.loss.item() == pytest.approx(5 - 1.2)
    assert dual.loss.item() == pytest.approx(3 - 1.2)
    assert dual.clip_fraction.item() == 2.0
    dual.loss.backward()
    assert logprobs_BT.grad is not None
    assert logprobs_BT.grad.tolist() == [[0.0, 0.0]]


def test_a_huge_log_ratio_stays_finite():
    logprobs_BT = torch.tensor([[0.0, 0.0]], requires_grad=True)
    old_BT = torch.tensor([[-500.0, 500.0]])
    result = policy_loss(logprobs_BT, old_BT, torch.tensor([[-1.0, 1.0]]), (old_BT != 0) / 1, cliprange=0.2)
    # Unclipped on the side of A < 0: exp(20); nothing is left of the other, exp(-20).
    assert result.loss.item() == pytest.approx(math.exp(20.0), rel=1e-5)
    assert all(math.isfinite(value.item()) for value in result)


@pytest.mark.parametrize("dual_clip", [None, 2.0])
def test_policy_loss_is_the_naive_loop_and_its_gradient_the_finite_difference(dual_clip: float | None):
    generator = torch.Generator().manual_seed(3)
    old_BT, noise_BT, advantages_BT = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64)
    logprobs_BT = (old_BT + 0.7 * noise_BT).requires_grad_()
    lengths = [6, 1, 3, 5]
    mask_BT = length_mask(torch.tensor(lengths), 6)

    def loss(logprobs_BT: Tensor) -> Tensor:
        return policy_loss(logprobs_BT, old_BT, advantages_BT, mask_BT / 15, cliprange=0.2, dual_clip=dual_clip).loss

    total = 0.0
    for row, length in enumerate(lengths):
        for t in range(length):
            ratio = math.exp(logprobs_BT[row, t].item() - old_BT[row, t].item())
            a = advantages_BT[row, t].item()
            objective = min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
            if dual_clip is not None and a < 0:
                objective = max(objective, dual_clip * a)
            total -= objective
    result = loss(logprobs_BT)
    assert result.item() == pytest.approx(total / 15)
    result.backward()
    assert logprobs_BT.grad is not None
    torch.testing.assert_close(logprobs_BT.grad, finite_differences(loss, logprobs_BT.detach()), atol=1e-8, rtol=1e-6)


def test_at_ratio_one_the_gradient_is_the_policy_gradient():
    """d loss / d log pi_t = -A_t / N where pi = pi_old: the first minibatch is plain policy gradient."""
    logprobs_BT = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    advantages_BT, mask_BT = torch.tensor([[0.5, -2.0, 4.0]]), torch.tensor([[True, True, False]])
    result = policy_loss(logprobs_BT, logprobs_BT, advantages_BT, mask_BT / 2, cliprange=0.2)
    result.loss.backward()
    assert logprobs_BT.grad is not None
    assert logprobs_BT.grad.tolist() == [[-0.25, 1.0, 0.0]]
    assert result.clip_fraction.item() == 0.0
    assert result.max_ratio_error.item() == 0.0


def test_parts_add_up_to_the_whole():
    generator = torch.Generator().manual_seed(4)
    logprobs_BT, old_BT, advantages_BT, values_BT, returns_BT = torch.randn(5, 6, 4, generator=generator)
    mask_BT = length_mask(torch.tensor([4, 1, 2, 3, 4, 1]), 4)

    def losses(rows: slice) -> Tensor:
        policy = policy_loss(logprobs_BT[rows], old_BT[rows], advantages_BT[rows], mask_BT[rows] / 15, cliprange=0.2)
        value = value_loss(values_BT[rows], old_BT[rows], returns_BT[rows], mask_BT[rows] / 15, cliprange_value=0.2)
        return torch.stack([*policy[:3], *value])

    whole = losses(slice(0, 6))
    torch.testing.assert_close(losses(slice(0, 1)) + losses(slice(1, 4)) + losses(slice(4, 6)), whole)


def test_value_loss_by_hand():
    # V 1.0, V_old 0.5, eps 0.2: held at 0.7. R = 2: max(1, 1.69) = 1.69. R = 0: max(1, 0.49) = 1.
    # V 0.6, V_old 0.5, R = 1: 0.16 both ways.     1/2 (1.69 + 1 + 0.16) / 3 = 0.475
    values_BT, old_BT = torch.tensor([[1.0, 1.0, 0.6, 50.0]]), torch.tensor([[0.5, 0.5, 0.5, 0.0]])
    returns_BT, mask_BT = torch.tensor([[2.0, 0.0, 1.0, 0.0]]), length_mask(torch.tensor([3]), 4)
    result = value_loss(values_BT, old_BT, returns_BT, mask_BT / 3, cliprange_value=0.2)
    assert result.loss.item() == pytest.approx(0.475)
    assert result.clip_fraction.item() == pytest.approx(1 / 3)
    plain = value_loss(values_BT, old_BT, returns_BT, mask_BT / 3, cliprange_value=None)
    assert plain.loss.item() == pytest.approx(0.5 * (1 + 1 + 0.16) / 3)
    assert plain.clip_fraction.item() == 0.0


def test_value_loss_gradient_is_the_finite_difference():
    generator = torch.Generator().manual_seed(5)
    values_BT, old_BT, returns_BT = torch.randn(3, 3, 5, generator=generator, dtype=torch.float64)
    values_BT.requires_grad_()
    mask_BT = length_mask(torch.tensor([5, 2, 4]), 5)

    def loss(values_BT: Tensor) -> Tensor:
        return value_loss(values_BT, old_BT, returns_BT, mask_BT / 11, cliprange_value=0.3).loss

    loss(values_BT).backward()
    assert values_BT.grad is not None
    torch.testing.assert_close(values_BT.grad, finite_differences(loss, values_BT.detach()), atol=1e-8, rtol=1e-6)


def test_entropy():
    # Uniform over four: log 4. A certain token: 0. (1/2, 1/4, 1/4) and an excluded fourth: 1.5 log 2.
    logits_NV = torch.tensor(
        [[3.0] * 4, [80.0, 0.0, 0.0, 0.0], [math.log(2), 0.0, 0.0, -math.inf]], dtype=torch.float64
    )
    assert entropy(logits_NV.log_softmax(dim=-1)).tolist() == pytest.approx(
        [math.log(4), 0.0, 1.5 * math.log(2)], abs=1e-12
    )


MASK_BT = length_mask(torch.tensor([3, 1]), 4)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("token", [[0.25, 0.25, 0.25, 0.0], [0.25, 0.0, 0.0, 0.0]]),
        ("sequence", [[1 / 6, 1 / 6, 1 / 6, 0.0], [0.5, 0.0, 0.0, 0.0]]),
        ("constant", [[0.05, 0.05, 0.05, 0.0], [0.05, 0.0, 0.0, 0.0]]),
    ],
)
def test_token_weights_by_hand(how: str, expected: list[list[float]]):
    """Four tokens in two responses of at most ten."""
    weights_BT = token_weights(MASK_BT, how, tokens=4, rows=2, longest=10)  # type: ignore[arg-type]
    torch.testing.assert_close(weights_BT, torch.tensor(expected))


def test_a_response_that_is_left_out_weighs_nothing():
    weights_BT = token_weights(MASK_BT & torch.tensor([[True], [False]]), "sequence", tokens=3, rows=1, longest=10)
    torch.testing.assert_close(weights_BT, torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0.0], [0.0] * 4]))


def test_the_ratio_of_a_sequence_by_hand():
    """GSPO: log-ratios 0.3, 0, 0.3 have the mean 0.2; exp(0.2) = 1.2214 is held at 1.1 for A = 2 and not for A = -2."""
    log_ratio_BT = torch.tensor([[0.3, 0.0, 0.3, 9.0], [0.3, 0.0, 0.3, 9.0]])
    advantages_BT = torch.tensor([[2.0], [-2.0]]).expand(2, 4)
    weights_BT = token_weights(length_mask(torch.tensor([3, 3]), 4), "sequence", tokens=6, rows=2, longest=4)
    result = policy_loss(log_ratio_BT, torch.zeros(2, 4), advantages_BT, weights_BT, cliprange=0.1, level="sequence")
    assert result.loss.item() == pytest.approx((-2 * 1.1 + 2 * math.exp(0.2)) / 2)
    assert result.clip_fraction.item() == pytest.approx(0.5)


def test_the_gradient_of_a_sequences_ratio_is_the_finite_difference():
    generator = torch.Generator().manual_seed(8)
    old_BT, noise_BT, advantages_BT = torch.randn(3, 3, 5, generator=generator, dtype=torch.float64)
    logprobs_BT = (old_BT + 0.3 * noise_BT).requires_grad_()
    mask_BT = length_mask(torch.tensor([5, 2, 4]), 5)
    weights_BT = token_weights(mask_BT, "sequence", tokens=11, rows=3, longest=5).double()

    def loss(logprobs_BT: Tensor) -> Tensor:
        return policy_loss(logprobs_BT, old_BT, advantages_BT, weights_BT, cliprange=0.05, level="sequence").loss

    loss(logprobs_BT).backward()
    assert logprobs_BT.grad is not None
    torch.testing.assert_close(logprobs_BT.grad, finite_differences(loss, logprobs_BT.detach()), atol=1e-8, rtol=1e-6)


def test_the_correction_of_another_engine_by_hand():
    # pi_old / pi_rollout: 0.5 / 0.25 = 2 stays, 0.9 / 0.1 = 9 is cut to 2, 0.2 / 0.4 = 0.5 stays. Losses -A times it.
    old_BT, sampled_BT = torch.tensor([[0.5, 0.9, 0.2]]).log(), torch.tensor([[0.25, 0.1, 0.4]]).log()
    correction_BT = rollout_correction(old_BT, sampled_BT, 2.0)
    torch.testing.assert_close(correction_BT, torch.tensor([[2.0, 2.0, 0.5]]))
    advantages_BT = torch.tensor([[1.0, -1.0, 4.0]])
    result = policy_loss(
        old_BT, old_BT, advantages_BT, torch.ones(1, 3) / 3, cliprange=0.2, correction_BT=correction_BT
    )
    assert result.loss.item() == pytest.approx(-(2.0 - 2.0 + 2.0) / 3)
