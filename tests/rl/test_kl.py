"""KL estimators and the adaptive controller: by hand, in expectation, and by their gradients."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.rl.kl import adaptive_kl_coef, k1, k2, k3, sequence_kl

LOGITS = torch.tensor([0.3, -1.2, 0.8, 0.1], dtype=torch.float64)
REFERENCE = torch.tensor([-0.4, 0.2, 0.5, 0.0], dtype=torch.float64).log_softmax(0)


def test_by_hand():
    logprobs, reference = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    assert k1(logprobs, reference).tolist() == [0.5, -1.0]
    assert k2(logprobs, reference).tolist() == [0.125, 0.5]
    expected = [math.exp(-0.5) - 1 + 0.5, math.e - 1 - 1]
    assert k3(logprobs, reference).tolist() == pytest.approx(expected)


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    logprobs = LOGITS.log_softmax(0)
    probs = logprobs.exp()
    exact = sum(p * (math.log(p) - r) for p, r in zip(probs.tolist(), REFERENCE.tolist(), strict=True))
    assert (probs * k1(logprobs, REFERENCE)).sum().item() == pytest.approx(exact)
    assert (probs * k3(logprobs, REFERENCE)).sum().item() == pytest.approx(exact)
    assert (probs * k2(logprobs, REFERENCE)).sum().item() != pytest.approx(exact, rel=1e-2)


def test_the_gradient_of_k2_in_the_loss_is_that_of_the_kl():
    """E over samples of grad k2(log pi) = grad KL, while k1 in the loss has a mean gradient of zero."""
    logits = LOGITS.clone().requires_grad_()
    logprobs = logits.log_softmax(0)
    exact = torch.autograd.grad((logprobs.exp() * (logprobs - REFERENCE)).sum(), logits, retain_graph=True)[0]
    weights = logprobs.detach().exp()
    by_k2 = torch.autograd.grad((weights * k2(logprobs, REFERENCE)).sum(), logits, retain_graph=True)[0]
    by_k1 = torch.autograd.grad((weights * k1(logprobs, REFERENCE)).sum(), logits)[0]
    torch.testing.assert_close(by_k2, exact)
    assert by_k1.abs().max().item() < 1e-12 < exact.abs().max().item()


def test_sequence_kl_sums_the_response_only():
    kl_BT = torch.tensor([[0.5, -0.25, 9.0], [1.0, 2.0, 3.0]])
    mask_BT = torch.tensor([[True, True, False], [True, True, True]])
    assert sequence_kl(kl_BT, mask_BT).tolist() == [0.25, 6.0]


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.15),  # on target
        (6.6, 0.15 * (1 + 0.1 * 64 / 10_000)),  # 10 % over
        (60.0, 0.15 * (1 + 0.2 * 64 / 10_000)),  # error held at 20 %
        (0.0, 0.15 * (1 - 0.2 * 64 / 10_000)),
        (-3.0, 0.15 * (1 - 0.2 * 64 / 10_000)),  # k1 can be negative
    ],
)
def test_adaptive_coefficient_by_hand(kl: float, expected: float):
    assert adaptive_kl_coef(0.15, kl, target=6.0, horizon=10_000, episodes=64) == pytest.approx(expected, rel=1e-12)


def test_a_token_far_from_the_reference_stays_finite():
    """A difference of 500 nats counts as 20: k2 is 200, k3 exp(20) - 21 where pi is the less likely."""
    logprobs, reference = torch.tensor([-500.0]), torch.tensor([0.0])
    assert k2(logprobs, reference).item() == 200.0
    assert k3(logprobs, reference).item() == pytest.approx(math.exp(20.0) - 21, rel=1e-5)
