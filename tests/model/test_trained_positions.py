"""The trimmed head gives what TRL's head gives: every output, every gradient."""

import inspect

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from pipeline.model import trained_positions
from pipeline.model.trained_positions import trim_head

OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Three rows of 9, 5 and 7 tokens, padded right; the middle row trains nothing."""
    torch.manual_seed(1)
    ids_BT = torch.randint(0, 50, (3, 9))
    is_real_BT = torch.arange(9) < torch.tensor([9, 5, 7])[:, None]
    is_trained_BT = is_real_BT & (torch.arange(9) >= torch.tensor([3, 9, 2])[:, None])
    return {
        "input_ids": ids_BT,
        "attention_mask": is_real_BT.long(),
        "labels": torch.where(is_trained_BT, ids_BT, -100),
    }


def test_outputs_and_gradients_are_trls(batch: dict[str, torch.Tensor]) -> None:
    found = []
    for is_trimmed in (False, True):
        built = model()
        add_fused_lm_head(built, outputs=OUTPUTS)
        if is_trimmed:
            trim_head(built)
        output = built(**batch, fused_lm_head=True)
        torch.manual_seed(2)
        (output.log_probs * torch.randn_like(output.log_probs)).sum().backward()
        found.append((output, [parameter.grad for parameter in built.parameters()]))
    (trls, gradients), (ours, own) = found
    for name in (*OUTPUTS, "label_mask"):
        torch.testing.assert_close(getattr(ours, name), getattr(trls, name), rtol=0, atol=2e-6, msg=name)
    assert float(ours.loss.detach()) == pytest.approx(float(trls.loss.detach()), abs=1e-6)
    for one, other in zip(own, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=5e-6)


def test_nothing_trained_is_a_zero_that_can_be_differentiated(batch: dict[str, torch.Tensor]) -> None:
    built = model()
    add_fused_lm_head(built, outputs=OUTPUTS)
    trim_head(built)
    output = built(**batch | {"labels": torch.full_like(batch["labels"], -100)}, fused_lm_head=True)
    output.log_probs.sum().backward()
    assert float(output.loss) == 0
    assert all(float(p.grad.abs().sum()) == 0 for p in built.parameters() if p.grad is not None)


def test_the_plain_forward_and_its_signature_stay(batch: dict[str, torch.Tensor]) -> None:
    built, bare = model(), model()
    add_fused_lm_head(built, outputs=OUTPUTS)
    trim_head(built)
    assert torch.equal(built(batch["input_ids"]).logits, bare(batch["input_ids"]).logits)
    assert inspect.signature(built.forward) == inspect.signature(bare.forward)


def test_a_large_batch_and_a_capped_head_are_left_to_trl(
    batch: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    capped = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, head_dim=8, final_logit_softcapping=30.0,
        )
    )  # fmt: skip
    add_fused_lm_head(capped, outputs=OUTPUTS)
    trls = capped.forward
    trim_head(capped)
    assert capped.forward == trls
    built = model()
    add_fused_lm_head(built, outputs=OUTPUTS)
    trim_head(built)
    monkeypatch.setattr(trained_positions, "SMALL", 10)
    monkeypatch.setattr(trained_positions, "_fused_output", lambda *_: pytest.fail("not left to TRL"))
    assert built(**batch, fused_lm_head=True).log_probs is not None


def test_adapters_are_trained_through_it(batch: dict[str, torch.Tensor]) -> None:
    adapted = get_peft_model(model(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    add_fused_lm_head(adapted.get_base_model(), outputs=OUTPUTS)
    trim_head(adapted)
    adapted(**batch, fused_lm_head=True).loss.backward()
    grads = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert grads
    assert all(float(g.abs().sum()) > 0 for name, g in grads.items() if "lora_B" in name)
