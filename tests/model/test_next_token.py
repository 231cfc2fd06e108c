"""The next-token loss against transformers' own, head plain or not, experts or none."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from pipeline.model.losses import IGNORED
from pipeline.model.next_token import NextToken, routing_of

VOCAB = 48
LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES: dict[str, tuple[dict[str, Any], bool]] = {
    "llama": (LLAMA, True),
    "llama untied": ({**LLAMA, "tie_word_embeddings": False}, True),
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}, True),
    "qwen3": (LLAMA, True),
    "gemma3_text": ({**LLAMA, "query_pre_attn_scalar": 16}, True),
    "bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 2}, True),
    "gemma2": ({**LLAMA, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 16}, False),
    "cohere": ({**LLAMA, "logit_scale": 0.25}, False),
    "phi": ({**LLAMA, "partial_rotary_factor": 0.5}, False),
    "recurrent_gemma": (
        {**LLAMA, "lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "attention"]},
        False,
    ),
    "qwen3_moe": ({**LLAMA, **EXPERTS}, True),
}
"""Model type -> fields, and whether its head is a plain product: capped, scaled and with a bias it is not."""


def build(family: str) -> Any:
    torch.manual_seed(0)
    kind, fields = family.split()[0], FAMILIES[family][0]
    config = AutoConfig.for_model(kind, **{"vocab_size": VOCAB, "initializer_range": 0.3, **fields})
    model = AutoModelForCausalLM.from_config(config, dtype="float32")
    if model.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, VOCAB, (3, 11), generator=torch.Generator().manual_seed(2))
    targets = ids[:, 1:].clone()
    targets[0, 3:] = IGNORED
    return ids[:, :-1], targets


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_whole_logits(family: str) -> None:
    """fp32, to 1e-5 of the loss and 1e-4 of the largest gradient of a parameter."""
    inputs, targets = batch()
    model, theirs = build(family), build(family)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # whatever the caller computes in
        losses = NextToken(model)
    assert losses.is_chunked is FAMILIES[family][1]
    nats, _ = losses.loss_sum(inputs, targets)
    nats.backward()
    expected = F.cross_entropy(theirs(inputs).logits.flatten(0, 1), targets.flatten(), reduction="sum")
    expected.backward()
    torch.testing.assert_close(nats, expected, rtol=1e-5, atol=1e-4)
    for (name, ours), other in zip(model.named_parameters(), theirs.parameters(), strict=True):
        if other.grad is None:
            assert ours.grad is None or not ours.grad.any(), name
            continue
        largest = other.grad.abs().max().item()
        torch.testing.assert_close(ours.grad, other.grad, rtol=0, atol=1e-4 * max(largest, 1e-3), msg=name)
    each = losses.nats(inputs, targets)
    assert each.shape == (30,)
    assert not each[3:10].any(), "what is ignored counts nothing"
    torch.testing.assert_close(each.sum(), expected.detach(), rtol=1e-5, atol=1e-4)


def test_what_a_head_adds_is_found_in_a_new_model_too() -> None:
    """Its bias is zero as yet, and its logits so small that a cap of 30 moves them by less than 1e-5."""
    config = AutoConfig.for_model("phi", vocab_size=VOCAB, **LLAMA)
    losses = NextToken(AutoModelForCausalLM.from_config(config, dtype="float32"))
    assert losses.is_chunked is False
    losses.loss_sum(*batch())[0].backward()
    assert losses.model.lm_head.bias.grad.abs().max() > 0.1

    capped = build("recurrent_gemma")
    with torch.no_grad():
        capped.get_output_embeddings().weight.mul_(0.01)
        logits = capped(batch()[0], use_cache=False).logits
    torch.testing.assert_close(30 * (logits / 30).atanh(), logits, rtol=1e-5, atol=1e-6)
    assert NextToken(capped).is_chunked is False


def test_the_balance_loss_is_transformers_layer_by_layer() -> None:
    model = build("qwen3_moe")
    inputs, targets = batch()
    _, routing = NextToken(model).loss_sum(inputs, targets)
    found = model(inputs, output_router_logits=True).router_logits
    is_text = (targets != IGNORED).long()
    expected = [load_balancing_loss_func((layer,), 4, 2, attention_mask=is_text) for layer in found]
    assert routing is not None
    torch.testing.assert_close(routing.balance_loss, torch.stack(expected).mean())
    assert routing.balance_loss.requires_grad


def test_the_busiest_expert_by_hand() -> None:
    """All tokens to the experts 0 and 1: each has half of the choices, twice an even quarter."""
    logits = torch.tensor([5.0, 4.0, 0.0, 0.0]).repeat(6, 1)
    counted = torch.ones(6, dtype=torch.bool)
    routing = routing_of((logits,), 2, counted)
    assert routing.busiest.item() == pytest.approx(2.0)
    probabilities = logits[0].softmax(dim=0)
    assert routing.balance_loss.item() == pytest.approx(4 * (probabilities[0] + probabilities[1]).item())
    turns = torch.eye(4).repeat(3, 1) * 9 + torch.eye(4).roll(1, 1).repeat(3, 1) * 8
    even = routing_of((turns,), 2, torch.ones(12, dtype=torch.bool))
    assert even.busiest.item() == pytest.approx(1.0)
    assert even.balance_loss.item() == pytest.approx(2.0)


def test_experts_that_no_layer_has_are_not_balanced() -> None:
    """Doge's config has a router's settings though it is dense unless told otherwise."""
    config = AutoConfig.for_model("doge", vocab_size=VOCAB, **LLAMA)
    losses = NextToken(AutoModelForCausalLM.from_config(config, dtype="float32"))
    assert config.router_aux_loss_coef
    assert losses.loss_sum(*batch())[1] is None


def test_padding_is_not_balanced() -> None:
    """Rows as long as their text and the same rows padded are one load; padding goes to whichever experts it likes."""
    model = build("qwen3_moe")
    inputs = batch()[0][:, :6]
    targets = inputs.roll(-1, 1)
    _, alone = NextToken(model).loss_sum(inputs, targets)
    padded = torch.nn.functional.pad(inputs, (0, 20), value=7)
    _, beside = NextToken(model).loss_sum(padded, torch.nn.functional.pad(targets, (0, 20), value=IGNORED))
    assert alone is not None
    assert beside is not None
    torch.testing.assert_close(beside.balance_loss, alone.balance_loss)
    torch.testing.assert_close(beside.busiest, alone.busiest)


def test_a_dense_model_has_norouting_of() -> None:
    losses = NextToken(build("llama"))
    assert losses.has_experts is False
    assert losses.loss_sum(*batch())[1] is None
