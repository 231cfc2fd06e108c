"""Attention: what is chosen, that it runs, that it gives the same, and that documents stay apart."""

import pytest
import torch
from transformers import AttentionInterface, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pipeline.errors import ConfigError
from pipeline.model import build
from pipeline.model.attention import (
    APART,
    choose_attention,
    drawn,
    first_that_runs,
    keeps_documents_apart,
    try_attention,
    use_plain_products,
)
from pipeline.model.presets import Shape, build_config, build_model

VOCAB = 512
SHAPE = Shape(2, 32, 2, 2, None, 64, VOCAB, tied=True)


def llama() -> LlamaForCausalLM:
    shape = Shape(depth=2, width=32, heads=4, kv_heads=2, mlp_width=64, context=64, vocab=VOCAB, tied=True)
    model = LlamaForCausalLM(build_config("llama", shape, {}))
    build.initialise(model, torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize(
    ("bf16", "longest", "chosen"), [(True, 256, "eager"), (True, 257, "sdpa"), (False, 8, "sdpa")], ids=str
)
def test_plain_attention_is_for_short_rows_in_bf16(bf16: bool, longest: int, chosen: str):
    model = llama()
    use_plain_products(model, bf16, longest)
    assert model.config._attn_implementation == chosen


def without_zeros() -> LlamaForCausalLM:
    """No projection is zero, so that attention tells."""
    model = llama()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


@pytest.mark.parametrize("is_packed", [False, True], ids=["padded", "packed"])
def test_plain_attention_gives_the_loss_and_gradients_of_the_fused(is_packed: bool):
    """fp32, to 1e-5: two rows with padding, or the two laid end to end and kept apart by their positions."""
    ids = torch.randint(0, VOCAB, (1 if is_packed else 2, 16), generator=torch.Generator().manual_seed(3))
    places = {"position_ids": torch.tensor([[*range(9), *range(7)]])} if is_packed else {}
    mask = {} if is_packed else {"attention_mask": torch.tensor([[1] * 16, [1] * 9 + [0] * 7])}
    labels = ids if is_packed else ids.masked_fill(mask["attention_mask"] == 0, -100)
    found = []
    for implementation in ("sdpa", "eager"):
        model = without_zeros()
        model.set_attn_implementation(implementation)
        loss = model(input_ids=ids, labels=labels, **places, **mask).loss
        loss.backward()
        found.append((loss.detach(), [parameter.grad for parameter in model.parameters()]))
    (fused, fused_grads), (plain, plain_grads) = found
    torch.testing.assert_close(plain, fused, rtol=0, atol=1e-5)
    for ours, theirs in zip(plain_grads, fused_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    if is_packed:  # and the second row does not see the first
        apart = model(input_ids=ids[:, 9:], use_cache=False).logits
        together = model(input_ids=ids, **places, use_cache=False).logits[:, 9:]
        torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)


def blind(module, query, key, value, attention_mask, **kwargs):
    """Sees nothing but itself: wrong."""
    return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2).contiguous(), None


AttentionInterface.register("blind", blind)
AttentionInterface.register("by_another_name", sdpa_attention_forward)


@pytest.mark.parametrize("apart", [False, True])
def test_what_gives_other_outputs_is_refused_and_undone(apart: bool):
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert "its outputs differ by" in try_attention(model, "blind", bf16=False, apart=apart)
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("bf16", [False, True])
def test_what_runs_and_gives_the_same_is_taken(bf16: bool):
    model = llama()
    assert choose_attention(model, bf16, 64, asked="eager", apart=False) == "attention: eager"
    assert model.config._attn_implementation == "eager"
    assert first_that_runs(model, ["blind", "eager"], bf16, apart=True) == "attention: eager"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        pytest.param("flex_attention", "does not support backward on CPU", marks=pytest.mark.slow),
        ("flash_attention_2", "installed"),
    ],
)
def test_what_does_not_run_says_why(name: str, reason: str):
    model = llama()
    with pytest.raises(ConfigError, match=reason):
        choose_attention(model, False, 64, asked=name, apart=False)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.slow
def test_where_nothing_faster_runs_the_attention_stays_and_is_told():
    model = llama()
    told = first_that_runs(model, APART, False, apart=True)
    assert told.startswith("attention: sdpa (flex_attention: ")


def test_dropout_does_not_pass_for_another_attention():
    fields = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64, "dropout": 0.3,
              "max_position_embeddings": 64}  # fmt: skip
    model = build_model("opt", SHAPE, fields)
    model.train()
    assert try_attention(model, "eager", bf16=False, apart=False) == ""
    assert model.training


ANY = {
    "llama": ({}, True),
    "gemma3": ({}, True),
    "gpt2": ({}, True),
    "qwen3_moe": ({}, True),
    "bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 2}, False),
    "mamba2": ({"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 16, "num_heads": 4, "state_size": 8,
                "n_groups": 1, "chunk_size": 16}, False),
}  # fmt: skip


@pytest.mark.parametrize("family", ANY)
def test_which_families_keep_documents_apart(family: str):
    """A new preset's blocks do nothing yet, which must not pass for not seeing."""
    fields, expected = ANY[family]
    model = build_model(family, SHAPE, fields)
    build.initialise(model, torch.Generator().manual_seed(0))
    assert keeps_documents_apart(model) is expected
    with drawn(model):
        assert not any(weight.dim() > 1 and not weight.any() for weight in model.parameters())
