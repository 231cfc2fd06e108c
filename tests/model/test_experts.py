"""Experts under autocast: the same numbers in fp32, the same up to bf16 under it, and products in bf16."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from pipeline.model.experts import NAME, use_autocast
from pipeline.model.presets import build_model, shape_of

CUDA = torch.device("cuda", 0)


@pytest.fixture
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    return build_model("qwen3_moe", shape_of({"depth": 2, "hidden_size": 32, "num_attention_heads": 2}, 16, 64), {})


def passed(model: PreTrainedModel, bf16: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradients of the experts."""
    model.zero_grad()
    ids = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        logits = model(ids, use_cache=False).logits.float()
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if ".experts." in name}


def test_fp32_stays_as_it_is_bit_for_bit(model: PreTrainedModel) -> None:
    logits, gradients = passed(model, bf16=False)
    use_autocast(model, CUDA)
    assert model.config._experts_implementation == NAME
    ours, own_gradients = passed(model, bf16=False)
    assert torch.equal(ours, logits)
    assert len(gradients) == 4
    assert all(torch.equal(own_gradients[name], gradients[name]) for name in gradients)


def test_in_autocast_products_are_in_bf16_and_gradients_near_fp32s(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One layer's, whose tokens are sent to the same experts either way."""
    plain, dtypes = torch.nn.functional.grouped_mm, list[set[torch.dtype]]()

    def grouped_mm(left: torch.Tensor, right: torch.Tensor, **others: Any) -> torch.Tensor:
        dtypes[-1].update((left.dtype, right.dtype))
        return plain(left, right, **others)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", grouped_mm)
    use_autocast(model, CUDA)
    layer = model.model.layers[1].mlp.experts
    numbers = torch.Generator().manual_seed(2)
    hidden_ND = torch.randn(40, 32, generator=numbers)
    chosen_Nk = torch.rand(40, 8, generator=numbers).topk(2).indices
    found = []
    for bf16 in (False, True):
        dtypes.append(set())
        tokens_ND = hidden_ND.clone().requires_grad_()
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            out_ND = layer(tokens_ND, chosen_Nk, torch.full((40, 2), 0.5))
        out_ND.square().sum().backward()
        assert out_ND.dtype == torch.float32
        found.append([out_ND.detach(), tokens_ND.grad, *(p.grad for p in layer.parameters())])
    assert dtypes == [{torch.float32}, {torch.bfloat16}]
    assert len(found[0]) == 4
    for exact, low in zip(*found, strict=True):
        assert low.dtype == torch.float32
        assert float((low - exact).norm() / exact.norm()) < 0.02


def test_a_cpu_keeps_its_bits_and_the_name_is_not_saved(model: PreTrainedModel) -> None:
    use_autocast(model, torch.device("cpu"))
    assert model.config._experts_implementation == "grouped_mm"
    use_autocast(model, CUDA)
    assert NAME not in model.config.to_json_string()
    dense = build_model("llama", shape_of({"depth": 2, "hidden_size": 32, "num_attention_heads": 2}, 16, 64), {})
    use_autocast(dense, CUDA)
    assert dense.config._experts_implementation == "eager"
