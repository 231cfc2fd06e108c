"""TRL's output head where there is no Triton, on the trained positions only.

TRL's `add_fused_lm_head` projects every position there, prompt and padding included, and computes the logits again in
the backward pass; on a tiny model that is half of a step. `trim_head` puts a forward before it that gives the same
outputs (tests/model/test_trained_positions.py compares them) from one matrix of trained positions by vocabulary.

Letters of shapes: B rows, T tokens, S = T - 1 predicted ones, N trained ones of the batch, D width, V vocabulary.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from pipeline.model.losses import SMALL
from pipeline.model.next_token import has_plain_head


def trim_head(model: PreTrainedModel | PeftModel) -> None:
    """Replace the forward that a TRL trainer has just given `model`; no change on devices with Triton, for a model of
    experts that reports its router, and where the logits are more than the head's product."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    has_router = getattr(base.config.get_text_config(), "output_router_logits", False)
    if base.device.type != "cpu" or has_router or not has_plain_head(base):
        return
    trls = base.forward

    @functools.wraps(type(base).forward)  # `generate` and others read the signature
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        labels_BT = kwargs.get("labels")
        if not kwargs.get("fused_lm_head") or labels_BT is None:
            return trls(*args, **kwargs)
        is_trained_BS = labels_BT[:, 1:] != -100
        if int(is_trained_BS.sum()) * self.get_output_embeddings().weight.shape[0] > SMALL:
            return trls(*args, **kwargs)
        inner = {name: value for name, value in kwargs.items() if name not in ("fused_lm_head", "labels")}
        hidden_BSD = self.base_model(*args, **inner).last_hidden_state[:, :-1]
        logits_NV = self.get_output_embeddings()(hidden_BSD[is_trained_BS]).float()
        return _fused_output(logits_NV, labels_BT[:, 1:], is_trained_BS)

    base.forward = types.MethodType(forward, base)


def _fused_output(logits_NV: Tensor, labels_BS: Tensor, is_trained_BS: Tensor) -> FusedCausalLMOutput:
    """TRL's output from the logits of the N trained positions; zero at the others."""
    targets_N1 = labels_BS[is_trained_BS][:, None]
    log_p_NV = logits_NV.log_softmax(dim=-1)
    log_p_N = log_p_NV.gather(1, targets_N1)[:, 0]
    with torch.no_grad():
        found = {
            "entropy": -(log_p_NV.exp() * log_p_NV).sum(dim=-1),
            "mean_logits": logits_NV.mean(dim=-1),
            "is_top1": log_p_NV.argmax(dim=-1) == targets_N1[:, 0],
        }

    def spread(values_N: Tensor) -> Tensor:
        return values_N.new_zeros(is_trained_BS.shape).masked_scatter(is_trained_BS, values_N)

    log_p_BS = spread(log_p_N)
    return FusedCausalLMOutput(
        loss=-log_p_BS.sum() / is_trained_BS.sum().clamp(min=1),
        log_probs=log_p_BS,
        label_mask=is_trained_BS,
        **{name: spread(values_N) for name, values_N in found.items()},
    )
