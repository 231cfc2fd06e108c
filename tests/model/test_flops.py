"""The FLOPs formula beside torch's own count of a forward and backward."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.model.build import flops_per_token
from pipeline.model.presets import PRESETS, build_model, shape_of


@pytest.mark.parametrize("architecture", PRESETS)
def test_the_formula_is_what_torch_counts(architecture: str) -> None:
    """With attention as plain products (fused kernels are not counted on a CPU), of experts those that a token is sent
    to, of windows all products. The formula has norms and biases beside, and GPT-2's table of positions."""
    shape = shape_of({"depth": 4, "hidden_size": 128, "num_attention_heads": 2}, 64, 512)
    model = build_model(architecture, shape, {})
    model.set_attn_implementation("eager")
    if architecture == "qwen3_moe":
        model.set_experts_implementation("eager")
    ids_BT = torch.arange(128).reshape(2, 64)
    with FlopCounterMode(display=False) as counter:
        model(ids_BT, use_cache=False).logits.float().square().mean().backward()
    beside = 0.02 if architecture == "gpt2" else 0.003
    counted = counter.get_total_flops() / ids_BT.numel()
    assert counted <= flops_per_token(model, 64) <= (1 + beside) * counted
