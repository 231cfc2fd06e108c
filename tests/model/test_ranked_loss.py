"""The loss of ranked answers: by hand, against pairs one by one, and two answers against Bradley and Terry's."""

import math

import pytest
import torch
import torch.nn.functional as F

from pipeline.model.ranked_loss import ranked_loss


def nats(delta: float) -> float:
    """-log sigmoid(delta)."""
    return math.log(1 + math.exp(-delta))


def ones(count: int) -> torch.Tensor:
    return torch.ones(count)


def test_a_list_of_three_by_hand_is_the_mean_of_its_three_pairs() -> None:
    """Scores 2, 0, 1: gaps 2, 1 and -1; the centring of 0.1 takes 0.1 (2² + 3² + 1²) / 3."""
    found = ranked_loss(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0, 1, 2]]), ones(1), torch.zeros(1), 0.1)
    assert found.tolist() == pytest.approx([(nats(2) + nats(1) + nats(-1)) / 3 + 0.1 * 14 / 3])


def test_a_tie_a_doubt_and_a_margin_by_hand() -> None:
    """A tie in a list is ½ ℓ(Δ) + ½ ℓ(−Δ); of pairs with Δ = 1: μ = 0.7, m = 3, and both sides equally good."""
    tied = ranked_loss(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0, 1, 1]]), ones(1), torch.zeros(1))
    assert tied.tolist() == pytest.approx([(nats(2) + nats(1) + (nats(-1) + nats(1)) / 2) / 3])
    scores, ranks = torch.tensor([[1.5, 0.5]]).repeat(3, 1), torch.tensor([[0, 1]]).repeat(3, 1)
    found = ranked_loss(scores, ranks, torch.tensor([0.7, 1.0, 0.5]), torch.tensor([0.0, 3.0, 0.0]))
    assert found.tolist() == pytest.approx([0.7 * nats(1) + 0.3 * nats(-1), nats(-2), (nats(1) + nats(-1)) / 2])


def test_lists_of_different_lengths_weigh_one_each_and_padding_nothing() -> None:
    """Against a loop over pairs, with the gradient."""
    generator = torch.Generator().manual_seed(0)
    lengths = [4, 2, 3]
    scores = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    ranks = torch.tensor([[0, 1, 1, 2], [0, 1, -1, -1], [0, 1, 2, -1]])
    loss = ranked_loss(scores, ranks, ones(3).double(), torch.zeros(3).double(), 0.01).mean()
    (gradient,) = torch.autograd.grad(loss, scores)
    naive = torch.zeros((), dtype=torch.float64)
    for row, length in enumerate(lengths):
        pairs = [(i, j) for i in range(length) for j in range(i + 1, length)]
        for i, j in pairs:
            delta = scores[row, i] - scores[row, j]
            hard = -F.logsigmoid(delta)
            if ranks[row, i] == ranks[row, j]:
                hard = -0.5 * F.logsigmoid(delta) - 0.5 * F.logsigmoid(-delta)
            naive = naive + (hard + 0.01 * (scores[row, i] + scores[row, j]) ** 2) / len(pairs) / 3
    (expected,) = torch.autograd.grad(naive, scores)
    torch.testing.assert_close(loss, naive)
    torch.testing.assert_close(gradient, expected)
    assert gradient[1, 2:].tolist() == [0.0, 0.0]


def test_two_answers_are_bradley_and_terrys() -> None:
    chosen, rejected = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))
    margin = torch.rand(16, generator=torch.Generator().manual_seed(2))
    scores, ranks = torch.stack([chosen, rejected], dim=1), torch.tensor([[0, 1]]).repeat(16, 1)
    found = ranked_loss(scores, ranks, ones(16), margin, 0.01)
    expected = -F.logsigmoid(chosen - rejected - margin) + 0.01 * (chosen + rejected) ** 2
    torch.testing.assert_close(found, expected)
