"""Frozen models in the CPU's memory, on the device while they are read. The device here is `meta`: a second one that
every machine has."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.rl.offload import Offload

META, CPU = torch.device("meta"), torch.device("cpu")


def tiny() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def tensors(model: LlamaForCausalLM) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def test_models_are_on_the_device_for_a_while_only():
    model = tiny()
    ids = torch.tensor([[1, 2, 3]])
    before, places = model(input_ids=ids).logits, [tensor.data_ptr() for tensor in tensors(model)]
    assert len(list(model.buffers())) > 0  # the rotary frequencies, which a state dict lacks
    offload = Offload.of(META, True)
    with offload.brought([model]):
        assert model.device == META
        assert all(tensor.device == META for tensor in tensors(model))
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model(input_ids=ids.to(META)).logits.device == META
    assert model.device == CPU
    assert [tensor.data_ptr() for tensor in tensors(model)] == places  # never copied back
    assert model(input_ids=ids).logits.equal(before)


def test_an_error_while_it_is_read_leaves_it_away():
    model = tiny()
    with pytest.raises(ValueError, match="in between"), Offload.of(META, True).brought([model]):
        raise ValueError("in between")
    assert model.device == CPU


def test_put_away_is_off_the_device():
    """From the CPU to the CPU: what the tests have. The copy to the device and back is the other test's."""
    model = tiny()
    Offload(META, True).put_away([model])
    assert all(tensor.device == CPU for tensor in tensors(model))


@pytest.mark.parametrize("offload", [Offload.of(CPU, True), Offload.of(META, False)])
def test_on_a_cpu_and_unasked_nothing_moves(offload: Offload):
    model = tiny()
    places = [tensor.data_ptr() for tensor in tensors(model)]
    offload.put_away([model])
    with offload.brought([model]):
        assert [tensor.data_ptr() for tensor in tensors(model)] == places
