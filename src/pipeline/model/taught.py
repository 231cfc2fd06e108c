"""A teacher beside the labels in TRL's SFTTrainer: its per-token loss, mixed with the divergence from the teacher.

TRL's loss is minus the sum of the `log_probs` that the model's fused head gives, over the trained tokens of the whole
step. `teach` puts a forward before that head which gives, in their place, minus the mixed loss of each token; entropy
and accuracy stay the student's. So accumulation, packing, adapters and several processes work as they do without.

Letters of shapes: B rows, T tokens, S = T - 1 predicted ones, N trained ones of the batch (n of a chunk), V vocabulary.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from pipeline.errors import ConfigError
from pipeline.model.distillation import Teacher
from pipeline.model.losses import IGNORED, distilled_nats
from pipeline.model.next_token import has_plain_head

CHUNK = 1024
"""Trained positions whose logits are held at once; they are computed again in the backward pass."""


def teach(model: PreTrainedModel | PeftModel, teacher: Teacher, where: str) -> None:
    """Replace the forward that a TRL trainer has just given `model` by one that learns from `teacher` too.

    ConfigError where one of the two scales or caps its logits, or reports a router of experts.
    """
    student = model.get_base_model() if isinstance(model, PeftModel) else model
    has_router = getattr(student.config.get_text_config(), "output_router_logits", False)
    if has_router or not (has_plain_head(student) and has_plain_head(teacher.model)):
        problem = "distillation takes logits that are the head's plain product, and no router of experts to balance"
        raise ConfigError(problem, where=where, mend="another architecture, or no teacher")
    trls = student.forward

    @functools.wraps(type(student).forward)  # `generate` and others read the signature
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        labels_BT = kwargs.get("labels")
        if not kwargs.get("fused_lm_head") or labels_BT is None:
            return trls(*args, **kwargs)
        inner = {name: value for name, value in kwargs.items() if name not in ("fused_lm_head", "labels")}
        hidden_BTD = self.base_model(*args, **inner).last_hidden_state
        with torch.no_grad():
            taught_BTE = teacher.model.base_model(*args, **inner).last_hidden_state
        return _mixed(self, teacher, hidden_BTD[:, :-1], taught_BTE[:, :-1], labels_BT[:, 1:])

    student.forward = types.MethodType(forward, student)


def _mixed(
    student: PreTrainedModel, teacher: Teacher, hidden_BSD: Tensor, taught_BSE: Tensor, labels_BS: Tensor
) -> FusedCausalLMOutput:
    """TRL's output; zero where nothing is trained. Counts the parts of the loss in the teacher's tally."""
    is_trained_BS = labels_BS != IGNORED
    hidden_ND, taught_NE, target_N = hidden_BSD[is_trained_BS], taught_BSE[is_trained_BS], labels_BS[is_trained_BS]
    found = [
        checkpoint(
            _of_chunk, student, teacher, hidden_ND[at : at + CHUNK], taught_NE[at : at + CHUNK],
            target_N[at : at + CHUNK], use_reentrant=False, preserve_rng_state=False,
        )
        for at in range(0, max(1, len(target_N)), CHUNK)
    ]  # fmt: skip
    loss_N, hard_N, soft_N, entropy_N, is_top1_N = (torch.cat(parts) for parts in zip(*found, strict=True))
    teacher.add(hard_N.sum().detach(), soft_N.sum().detach(), is_trained_BS.sum())

    def spread(values_N: Tensor) -> Tensor:
        return values_N.new_zeros(is_trained_BS.shape).masked_scatter(is_trained_BS, values_N)

    loss_BS = spread(loss_N)
    return FusedCausalLMOutput(
        loss=loss_BS.sum() / is_trained_BS.sum().clamp(min=1),
        log_probs=-loss_BS,
        entropy=spread(entropy_N),
        is_top1=spread(is_top1_N),
        label_mask=is_trained_BS,
    )


def _of_chunk(
    student: PreTrainedModel, teacher: Teacher, hidden_nD: Tensor, taught_nE: Tensor, target_n: Tensor
) -> tuple[Tensor, ...]:
    """(loss, cross entropy, divergence, the student's entropy, whether it is right), each [n]; the first has
    gradients."""
    logits_nV = student.get_output_embeddings()(hidden_nD).float()
    with torch.no_grad():
        taught_nV = teacher.model.get_output_embeddings()(taught_nE).float()
    shared = min(logits_nV.shape[-1], taught_nV.shape[-1])  # a padded vocabulary has more rows than there are tokens
    logits_nV = logits_nV[:, :shared]
    loss_n, hard_n, soft_n = distilled_nats(
        logits_nV, taught_nV[:, :shared], target_n, teacher.alpha, teacher.temperature
    )
    with torch.no_grad():
        log_p_nV = logits_nV.log_softmax(dim=-1)
        entropy_n = -(log_p_nV.exp() * log_p_nV).sum(dim=-1)
        is_top1_n = log_p_nV.argmax(dim=-1) == target_n
    return loss_n, hard_n.detach(), soft_n.detach(), entropy_n, is_top1_n
