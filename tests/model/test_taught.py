"""The loss beside a teacher: against the equation written out, and TRL's own where the teacher has no share."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from pipeline.errors import ConfigError
from pipeline.model import taught
from pipeline.model.distillation import Teacher
from pipeline.model.losses import distillation_sum, distilled_nats
from pipeline.model.taught import teach

OUTPUTS = ("log_probs", "entropy", "is_top1")


def model(seed: int, *, width: int = 16, vocabulary: int = 50) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def teacher(alpha: float, temperature: float = 2.0) -> Teacher:
    return Teacher(model(7, width=32).eval().requires_grad_(False), alpha, temperature)


@pytest.fixture
def batch() -> dict[str, Tensor]:
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


def naive(student: LlamaForCausalLM, its_teacher: Teacher, batch: dict[str, Tensor]) -> Tensor:
    """α·KL(teacher ‖ student)·T² + (1 − α)·CE, mean over the trained tokens, one token at a time, in torch's words."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits, taught_logits = (each(**inputs).logits for each in (student, its_teacher.model))
    alpha, t = its_teacher.alpha, its_teacher.temperature
    losses = []
    for row, at in (batch["labels"] != -100).nonzero().tolist():
        before, label = (row, at - 1), batch["labels"][row, at]
        kl = F.kl_div((logits[before] / t).log_softmax(-1), (taught_logits[before] / t).softmax(-1), reduction="sum")
        losses.append(alpha * t**2 * kl + (1 - alpha) * F.cross_entropy(logits[before][None], label[None]))
    return torch.stack(losses).mean()


@pytest.mark.parametrize(("alpha", "chunk"), [(0.3, 1024), (0.3, 4), (1.0, 1024)], ids=str)
def test_loss_and_gradients_are_the_equations(
    batch: dict[str, Tensor], alpha: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of four trained positions (there are eleven) as well as in one."""
    monkeypatch.setattr(taught, "CHUNK", chunk)
    ours, plain = model(0), model(0)
    its_teacher = teacher(alpha)
    add_fused_lm_head(ours, outputs=OUTPUTS)
    teach(ours, its_teacher, "sft.teacher")
    output = ours(**batch, fused_lm_head=True)
    (-output.log_probs.sum() / output.label_mask.sum()).backward()
    expected = naive(plain, its_teacher, batch)
    expected.backward()
    assert int(output.label_mask.sum()) == 11
    assert float(output.loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    for (name, one), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=2e-6, msg=name)
    look = its_teacher.look(1)
    assert (1 - alpha) * look["cross_entropy"] + alpha * look["teacher_kl"] == pytest.approx(
        float(expected.detach()), abs=1e-6
    )
    assert all(parameter.grad is None for parameter in its_teacher.model.parameters())


def test_entropy_and_accuracy_are_the_students_as_trl_has_them(batch: dict[str, Tensor]) -> None:
    found = []
    for its_teacher in (None, teacher(0.5)):
        built = model(0)
        add_fused_lm_head(built, outputs=OUTPUTS)
        if its_teacher is not None:
            teach(built, its_teacher, "sft.teacher")
        found.append(built(**batch, fused_lm_head=True))
    for name in ("entropy", "is_top1", "label_mask"):
        torch.testing.assert_close(getattr(found[1], name), getattr(found[0], name), rtol=0, atol=2e-6, msg=name)


def test_a_teacher_that_is_the_student_leaves_the_share_of_the_text(batch: dict[str, Tensor]) -> None:
    """KL = 0: the loss is (1 − α) of TRL's."""
    built, plain = model(0), model(0)
    add_fused_lm_head(plain, outputs=OUTPUTS)
    add_fused_lm_head(built, outputs=OUTPUTS)
    teach(built, Teacher(model(0).eval(), 0.25, 2.0), "sft.teacher")
    with torch.no_grad():
        expected = 0.75 * float(plain(**batch, fused_lm_head=True).loss)
        assert float(built(**batch, fused_lm_head=True).loss) == pytest.approx(expected, abs=1e-6)


def test_documents_of_a_packed_row_stay_apart_for_the_teacher_too() -> None:
    ids = torch.randint(0, 50, (1, 12), generator=torch.Generator().manual_seed(3))
    positions = torch.tensor([[*range(5), *range(7)]])
    labels = ids.clone()
    labels[positions == 0] = -100
    built = model(0)
    add_fused_lm_head(built, outputs=OUTPUTS)
    its_teacher = teacher(0.5)
    teach(built, its_teacher, "sft.teacher")
    with torch.no_grad():
        packed = built(
            input_ids=ids, position_ids=positions, labels=labels, fused_lm_head=True, use_cache=False
        ).log_probs.sum()
        alone = sum(
            built(input_ids=part, labels=part.clone(), fused_lm_head=True, use_cache=False).log_probs.sum()
            for part in (ids[:, :5], ids[:, 5:])
        )
    assert float(packed) == pytest.approx(float(alone), abs=1e-5)


def test_adapters_learn_and_what_they_stand_on_does_not(batch: dict[str, Tensor]) -> None:
    adapted = get_peft_model(model(0), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    add_fused_lm_head(adapted.get_base_model(), outputs=OUTPUTS)
    teach(adapted, teacher(0.5), "sft.teacher")
    adapted(**batch, fused_lm_head=True).loss.backward()
    for name, parameter in adapted.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        if "lora_B" in name:
            assert float(parameter.grad.abs().sum()) > 0


def test_a_head_that_caps_its_logits_is_refused() -> None:
    capped = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, head_dim=8, final_logit_softcapping=30.0,
        )
    )  # fmt: skip
    with pytest.raises(ConfigError, match="the head's plain product") as caught:
        teach(model(1), Teacher(capped, 0.5, 1.0), "sft.teacher")
    assert caught.value.where == "sft.teacher"


def test_whole_logits_and_chunks_agree() -> None:
    """`distilled_nats` is what `distillation_sum` (pretrain's) sums."""
    torch.manual_seed(0)
    hidden, weight, target = torch.randn(6, 8), torch.randn(20, 8), torch.randint(0, 20, (6,))
    other, other_weight = torch.randn(6, 5), torch.randn(20, 5)
    each = distilled_nats(hidden @ weight.T, other @ other_weight.T, target, 0.4, 1.5)
    summed = distillation_sum(hidden, weight, target, other, other_weight, 0.4, 1.5, chunk=4)
    for one, whole in zip(each, summed, strict=True):
        assert float(one.sum()) == pytest.approx(float(whole), rel=1e-5)
