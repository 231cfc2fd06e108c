"""Learning-rate schedules by hand, and which parameter gets which rate and decay."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.model.optim import (
    SCHEDULES,
    build_optimizers,
    default_rate,
    learning_rate_share,
    peak_rates,
    set_learning_rate,
    warmup_steps,
)
from pipeline.model.presets import Shape, build_model


@pytest.mark.parametrize(
    ("schedule", "floor", "expected"),
    [
        # 10 steps, 2 of warmup, wsd falls over the last 4
        ("constant", 0.0, [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", 0.0, [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("linear", 0.2, [0.5, 1, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]),
        ("wsd", 0.0, [0.5, 1, 1, 1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("wsd", 0.2, [0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4]),
    ],
)
def test_schedules_by_hand(schedule: str, floor: float, expected: list[float]):
    found = [learning_rate_share(step, 10, 2, schedule, 0.4, floor) for step in range(10)]
    assert found == pytest.approx(expected)


def test_the_cosine_by_hand():
    found = [learning_rate_share(step, 8, 0, "cosine", 0.3, 0.1) for step in (0, 2, 4, 6)]
    half = math.sqrt(0.5)
    assert found == pytest.approx([1.0, 0.1 + 0.9 * (1 + half) / 2, 0.55, 0.1 + 0.9 * (1 - half) / 2])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_schedule_leaves_its_bounds(schedule: str):
    for total, warmup in ((1, 0), (1, 1), (7, 7), (100, 13), (3, 50)):
        shares = [learning_rate_share(step, total, warmup, schedule, 0.3, 0.05) for step in range(total)]
        assert all(0.02 - 1e-9 <= share <= 1 for share in shares)
        assert shares[:warmup] == sorted(shares[:warmup])
        assert shares[warmup:] == sorted(shares[warmup:], reverse=True)


def test_warmup_is_a_number_of_steps_or_a_share():
    assert [warmup_steps(value, 200) for value in (0, 0.02, 0.5, 1, 10, 1000.0)] == [0, 4, 100, 1, 10, 1000]


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(5, 4)
        self.q_proj = nn.Linear(4, 4, bias=True)
        self.norm = nn.RMSNorm(4)
        self.lm_head = nn.Linear(4, 5, bias=False)


def groups(model: nn.Module, kind: str) -> dict[str, tuple[str, float, float]]:
    """Parameter -> (optimizer, rate, decay)."""
    optimizers = build_optimizers(
        model, kind=kind, learning_rate=0.01, embedding_rate=0.03, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (type(optimizer).__name__, group["lr"], group["weight_decay"])
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize(("kind", "matrices"), [("adamw", "AdamW"), ("muon", "Muon")])
def test_decay_falls_on_matrices_alone(kind: str, matrices: str):
    assert groups(Toy(), kind) == {
        "embed_tokens.weight": ("AdamW", 0.03, 0.0),
        "lm_head.weight": ("AdamW", 0.03, 0.0),
        "q_proj.weight": (matrices, 0.01, 0.1),
        "q_proj.bias": ("AdamW", 0.01, 0.0),
        "norm.weight": ("AdamW", 0.01, 0.0),
    }


FAMILIES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "qwen3_moe": (
        {
            "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
            "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        },
        {
            "q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "gate.weight", "gate_up_proj",
            "down_proj",
        },
    ),
    "gpt_oss": (
        {
            "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
            "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16,
        },
        {
            "q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "router.weight", "gate_up_proj",
            "down_proj",
        },
    ),
    "mamba": (
        {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 8},
        {"conv1d.weight", "in_proj.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight"},
    ),
    "rwkv": (
        {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
        {"key.weight", "receptance.weight", "value.weight", "output.weight"},
    ),
    "biogpt": (
        {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
        {"q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight"},
    ),
}  # fmt: skip
"""Model type -> fields, and the ends of the names of what decays."""


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_stored_in_two_axes_need_not_be_a_matrix(family: str, tied: bool):
    """Biases of experts, decays of state spaces, mixes of RWKV and heads by any name do not decay, and Muon leaves
    them alone."""
    fields, decayed = FAMILIES[family]
    config = AutoConfig.for_model(family, vocab_size=48, tie_word_embeddings=tied, **fields)
    model = AutoModelForCausalLM.from_config(config, dtype="float32")
    names = {name: groups(model, kind)[name] for kind in ("adamw", "muon") for name, _ in model.named_parameters()}
    found = {name for name, (_, _, decay) in names.items() if decay}
    assert {next((end for end in decayed if name.endswith(f".{end}")), name) for name in found} == decayed
    assert all(name in found and model.get_parameter(name).dim() == 2 for name, of in names.items() if of[0] == "Muon")


@pytest.mark.parametrize(("kind", "rate"), [("adamw", 0.01), ("muon", 0.01 * 1.6 / 5.4)])
def test_stacked_experts_have_adamws_rate(kind: str, rate: float):
    config = AutoConfig.for_model("qwen3_moe", vocab_size=48, **FAMILIES["qwen3_moe"][0])
    found = groups(AutoModelForCausalLM.from_config(config, dtype="float32"), kind)
    for name in ("gate_up_proj", "down_proj"):
        assert found[f"model.layers.0.mlp.experts.{name}"] == ("AdamW", pytest.approx(rate), 0.1)
    assert found["model.layers.0.mlp.gate.weight"][1] == 0.01


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_rates_follow_the_share_and_every_parameter_moves(kind: str):
    model = Toy()
    optimizers = build_optimizers(
        model, kind=kind, learning_rate=0.01, embedding_rate=0.03, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0
    )
    set_learning_rate(optimizers, 0.5)
    set_learning_rate(optimizers, 0.25)  # of the peak, not of what it was
    rates = {group["lr"] for optimizer in optimizers for group in optimizer.param_groups}
    assert rates == {0.0025, 0.0075}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    for name, parameter in model.named_parameters():
        moved = (parameter - before[name]).abs()
        assert moved.max() > 0, name
        if kind == "adamw":  # the first step of Adam is the rate, whatever the gradient
            rate = 0.0075 if name in ("embed_tokens.weight", "lm_head.weight") else 0.0025
            torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=1e-3, atol=1e-6)


def test_the_rule_of_rates_by_hand():
    """256 wide and 2,048 tokens a step is the base; half the width twice the rate; eight times the batch twice it."""
    assert default_rate("adamw", 256, 2048) == pytest.approx(1.6e-3)
    assert default_rate("muon", 256, 2048) == pytest.approx(5.4e-3)
    assert default_rate("adamw", 128, 2048) == pytest.approx(3.2e-3)
    assert default_rate("adamw", 256, 8 * 2048) == pytest.approx(3.2e-3)


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        ("adamw", {}, (3.2e-3, 3.2e-3)),
        ("muon", {}, (1.08e-2, 1.08e-1)),
        ("adamw", {"has_base": True}, (3.2e-4, 3.2e-4)),
        ("adamw", {"has_base": True, "is_adapted": True}, (3.2e-3, 3.2e-4)),
        ("muon", {"rate": 0.02, "has_base": True}, (0.02, 0.2)),
        ("adamw", {"rate": 0.02, "embedding_rate": 0.5}, (0.02, 0.5)),
    ],
)
def test_peak_rates_by_hand(kind: str, given: dict[str, Any], expected: tuple[float, float]):
    """128 wide at 2,048 tokens a step."""
    shape = Shape(depth=1, width=128, heads=2, kv_heads=2, mlp_width=32, context=8, vocab=16, tied=True)
    rates = {"rate": None, "embedding_rate": None, "has_base": False, "is_adapted": False, **given}
    assert peak_rates(build_model("llama", shape, {}), kind, 2048, **rates) == pytest.approx(expected)


@pytest.mark.parametrize(("parameters", "width", "tokens"), [(85e6, 768, 10e9), (1e9, 2048, 26e9)])
def test_the_rule_stays_near_the_step_law(parameters: float, width: int, tokens: float):
    """Li et al. 2025: rate 1.79 N^-0.713 D^0.307 at a batch of 0.58 D^0.571 tokens."""
    law = 1.79 * parameters**-0.713 * tokens**0.307
    ours = default_rate("adamw", width, int(0.58 * tokens**0.571))
    assert 1 / 2 < ours / law < 2
