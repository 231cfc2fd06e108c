"""Losses of preferences: numbers worked by hand, and TRL's own functions where there are some."""

import math
from types import SimpleNamespace

import pytest
import torch
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from pipeline.model.preference_losses import (
    cpo_losses,
    dpo_losses,
    expected,
    kto_losses,
    log_one_minus_exp,
    orpo_losses,
    simpo_losses,
    smoothed,
)

SURE = torch.ones(2)
NONE = torch.zeros(2)
CHOSEN, REJECTED = torch.tensor([-3.0, -0.4]), torch.tensor([-5.0, -0.1])


def soft(x: float) -> float:
    """-log sigmoid(x)."""
    return math.log(1 + math.exp(-x))


def test_dpo_by_hand() -> None:
    delta = torch.tensor([2.0, -1.0])  # beta 0.5: logits 1 and -0.5
    found = {kind: dpo_losses(kind, delta, 0.5, SURE, NONE).tolist() for kind in ("sigmoid", "hinge", "ipo")}
    assert found["sigmoid"] == pytest.approx([soft(1), soft(-0.5)])
    assert found["hinge"] == pytest.approx([0.0, 1.5])
    assert found["ipo"] == pytest.approx([1.0, 4.0])  # (2 - 1)², (-1 - 1)²


def test_a_margin_is_asked_for_of_the_reward() -> None:
    margin = torch.tensor([1.0, 2.0])
    delta = torch.tensor([2.0, -1.0])
    assert dpo_losses("sigmoid", delta, 0.5, SURE, margin).tolist() == pytest.approx([soft(0), soft(-2.5)])
    assert dpo_losses("hinge", delta, 0.5, SURE, margin).tolist() == pytest.approx([1.0, 3.5])


def test_a_tie_and_a_probability_mix_the_pair_with_the_pair_turned_around() -> None:
    delta = torch.tensor([2.0, 2.0])
    preference = torch.tensor([0.5, 0.75])
    found = dpo_losses("sigmoid", delta, 0.5, preference, NONE).tolist()
    assert found == pytest.approx([(soft(1) + soft(-1)) / 2, 0.75 * soft(1) + 0.25 * soft(-1)])
    assert expected(lambda z: z**3, delta, preference).tolist() == pytest.approx([0.0, 4.0])
    assert smoothed(torch.tensor([1.0, 0.5, 0.75]), 0.2).tolist() == pytest.approx([0.8, 0.5, 0.65])
    at_rest = torch.zeros(1, requires_grad=True)
    dpo_losses("sigmoid", at_rest, 0.5, torch.tensor([0.5]), torch.zeros(1)).sum().backward()
    assert at_rest.grad is not None
    assert at_rest.grad.item() == 0, "a tie leaves answers alone that are equally good already"


def test_cpo_and_simpo_by_hand_and_against_trl() -> None:
    delta = CHOSEN - REJECTED  # 2, -0.3
    assert cpo_losses(delta, 0.5, SURE).tolist() == pytest.approx([soft(1), soft(-0.15)])
    assert simpo_losses(delta, 2.0, 1.0, SURE).tolist() == pytest.approx([soft(3), soft(-1.6)])
    for kind, smoothing in (("sigmoid", 0.0), ("sigmoid", 0.1), ("simpo", 0.0)):
        trl = SimpleNamespace(alpha=0.0, beta=2.0, simpo_gamma=1.0, loss_type=kind, label_smoothing=smoothing)
        trl.accelerator = SimpleNamespace(device="cpu")
        theirs, *_ = CPOTrainer.cpo_loss(trl, CHOSEN, REJECTED)
        sure = smoothed(SURE, smoothing)
        ours = cpo_losses(delta, 2.0, sure) if kind == "sigmoid" else simpo_losses(delta, 2.0, 1.0, sure)
        assert ours.tolist() == pytest.approx(theirs.tolist(), abs=1e-7)


def test_orpo_by_hand_and_against_trl() -> None:
    chosen, rejected = torch.tensor([math.log(0.8), math.log(0.2)]), torch.tensor([math.log(0.5), math.log(0.5)])
    # odds 4 against 1, and 1/4 against 1: sigmoid(log z) = z / (1 + z)
    assert orpo_losses(chosen, rejected, SURE).tolist() == pytest.approx([-math.log(4 / 5), -math.log(1 / 5)])
    trl = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    theirs, *_ = ORPOTrainer.odds_ratio_loss(trl, CHOSEN, REJECTED)  # a gain, with its weight
    assert (-0.3 * orpo_losses(CHOSEN, REJECTED, SURE)).tolist() == pytest.approx(theirs.tolist(), abs=1e-7)


def test_log_of_one_minus_exp_holds_at_both_ends_with_its_gradient() -> None:
    x = torch.tensor([-1e-6, -0.5, -0.7, -40.0], requires_grad=True)
    y = log_one_minus_exp(x)
    assert y.tolist() == pytest.approx([math.log(-math.expm1(v)) for v in x.tolist()], rel=1e-5)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == pytest.approx([-1 / math.expm1(-v) for v in x.tolist()], rel=1e-5)


def test_kto_by_hand() -> None:
    ratio = torch.tensor([3.0, 3.0, -1.0])
    is_desirable = torch.tensor([True, False, False])
    found = kto_losses(ratio, is_desirable, torch.tensor(1.0), 0.5, 2.0, 3.0).tolist()

    def loss(z: float) -> float:
        return 1 - 1 / (1 + math.exp(-z))

    assert found == pytest.approx([2 * loss(1.0), 3 * loss(-1.0), 3 * loss(1.0)])
