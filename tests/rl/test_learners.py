"""A model with its optimizer: how gradients are summed over ranks."""

from functools import partial

import pytest
import torch
from transformers import LlamaForCausalLM

from pipeline.model.presets import Shape, build_config
from pipeline.rl.learners import Learner, buckets


def parameters(*sizes: int) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.zeros(size)) for size in sizes]


def test_buckets_hold_every_parameter_once_in_order_and_no_more_than_they_may():
    given = parameters(3, 4, 9, 1, 8, 2, 25, 1)
    found = buckets(given, 10)
    assert [[p.numel() for p in bucket] for bucket in found] == [[3, 4], [9, 1], [8, 2], [25], [1]]
    assert [id(p) for bucket in found for p in bucket] == [id(p) for p in given]
    assert buckets([], 10) == []


def test_gathering_sums_in_buckets_as_at_once(monkeypatch):
    """Two ranks of equal gradients: each one's is doubled, one without rows counts as zeros, however it is cut."""
    config = build_config(
        "llama", Shape(depth=1, width=16, heads=2, kv_heads=2, mlp_width=32, context=16, vocab=40, tied=True), {}
    )
    torch.manual_seed(0)
    for size in (1, 700, 10**9):
        monkeypatch.setattr("pipeline.rl.learners.buckets", partial(buckets, size=size))
        model = LlamaForCausalLM(config)
        learner = Learner(model, 1e-5, 0.0, 1.0)
        for number, parameter in enumerate(learner.parameters[1:], start=1):
            parameter.grad = torch.full_like(parameter, float(number))
        norm = learner.gather(lambda flat: 2 * flat).item()
        assert not learner.parameters[0].grad.any()
        for number, parameter in enumerate(learner.parameters[1:], start=1):
            assert parameter.grad.equal(torch.full_like(parameter, 2.0 * number))
        by_hand = sum(4.0 * n * n * p.numel() for n, p in enumerate(learner.parameters))
        assert norm == pytest.approx(by_hand**0.5, rel=1e-6)
