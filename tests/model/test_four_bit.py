"""Four bits: refused where they cannot be, adapters merged into plain weights. With bitsandbytes at hand, on a CPU and
with its packed form (which has no backward) kept out, the numbers too."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pipeline.errors import MachineError
from pipeline.model.adapters import adapt, lora
from pipeline.model.build import load_causal_lm
from pipeline.model.four_bit import check_four_bit, load_four_bit, merged_onto
from pipeline.recipe import PeftConfig

IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def with_adapters(model: PreTrainedModel) -> None:
    settings = lora(PeftConfig(r=4), "CAUSAL_LM")
    assert settings is not None
    adapt(model, settings, 0, train_rows=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1, generator=generator)


def test_without_a_gpu_or_the_package_it_is_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(MachineError, match="need a CUDA device, and this one is cpu") as caught:
        check_four_bit(torch.device("cpu"), "ppo.load_in_4bit")
    assert caught.value.where == "ppo.load_in_4bit"
    monkeypatch.setattr("pipeline.model.four_bit.find_spec", lambda name: None)
    with pytest.raises(MachineError, match="bitsandbytes is not installed") as caught:
        check_four_bit(torch.device("cuda"), "ppo.load_in_4bit")
    assert caught.value.mend == 'pip install "llmpipe[gpu]"'
    monkeypatch.setattr("pipeline.model.four_bit.find_spec", lambda name: name)
    check_four_bit(torch.device("cuda"), "ppo.load_in_4bit")


def test_adapters_are_added_to_the_plain_weights(folder: Path):
    """As peft merges them; the adapted model stays as it is."""
    adapted = load_causal_lm(folder).eval()
    with_adapters(adapted)
    said = adapted(input_ids=IDS).logits
    merged = merged_onto(load_causal_lm(folder).eval(), adapted)
    torch.testing.assert_close(merged(input_ids=IDS).logits, said, atol=1e-5, rtol=1e-5)
    assert (said - load_causal_lm(folder).eval()(input_ids=IDS).logits).abs().max() > 0.1
    assert adapted(input_ids=IDS).logits.equal(said)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs the package bitsandbytes")
def test_a_model_in_four_bits_is_near_its_own_and_its_adapters_learn(folder: Path):
    plain, quantised = load_causal_lm(folder).eval(), load_four_bit(folder, torch.device("cpu"), bf16=False).eval()
    for module in quantised.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
    assert quantised.model.layers[0].self_attn.q_proj.weight.dtype == torch.uint8
    functional = importlib.import_module("bitsandbytes").functional
    for name, module in quantised.named_modules():
        if type(module).__name__ == "Linear4bit":  # normal weights lose about 9 % of their norm in NF4
            weight, back = plain.get_submodule(name).weight, functional.dequantize_4bit(
                module.weight.data, module.weight.quant_state
            )  # fmt: skip
            assert 0.05 < (back - weight).norm() / weight.norm() < 0.13
    with_adapters(quantised)
    quantised(input_ids=IDS).logits.square().mean().backward()
    trained = [parameter for parameter in quantised.parameters() if parameter.requires_grad]
    assert len(trained) == 28
    # A gradient by finite differences: of all adapters at once, along themselves.
    slope = sum((parameter.grad * parameter).sum().item() for parameter in trained if parameter.grad is not None)
    values = []
    with torch.no_grad():
        for factor in (1.001, 0.999 / 1.001):  # one thousandth above, one below
            for parameter in trained:
                parameter.mul_(factor)
            values.append(quantised(input_ids=IDS).logits.square().mean().item())
    assert slope == pytest.approx((values[0] - values[1]) / 0.002, rel=2e-2)
    assert "quantization_config" not in quantised.config.to_dict()
