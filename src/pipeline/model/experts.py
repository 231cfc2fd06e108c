"""Experts of a mixture (MoE) in the dtype that autocast multiplies in: transformers' grouped products, which autocast
does not know, else take the weights as they are, fp32, and torch then loops over the experts, waiting for the device.

Letters of shapes: N tokens, k experts a token, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

NAME = "pipeline_autocast"


def in_autocast(module: torch.nn.Module, hidden_ND: Tensor, chosen_Nk: Tensor, weights_Nk: Tensor) -> Tensor:
    """A layer's experts as transformers' `grouped_mm` computes them, weights and tokens in autocast's dtype where it is
    on; [N, D] in the dtype of `hidden_ND`."""
    kind = hidden_ND.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_ND.dtype
    held = dict(module.named_parameters(recurse=False))
    if all(weight.dtype == dtype for weight in held.values()):
        found: Tensor = grouped_mm_experts_forward(module, hidden_ND, chosen_Nk, weights_Nk)
        return found
    low = {name: weight.to(dtype) for name, weight in held.items()}
    found = torch.func.functional_call(module, low, (hidden_ND.to(dtype), chosen_Nk, weights_Nk))  # back here
    return found.to(hidden_ND.dtype)


ALL_EXPERTS_FUNCTIONS.register(NAME, in_autocast)


def use_autocast(model: PreTrainedModel, device: torch.device) -> None:
    """For training on a GPU: experts computed by grouped products are by `in_autocast` from here on. (On a CPU fp32
    stays: its bits are those of earlier runs.)"""
    if device.type == "cuda" and model.config.get_text_config()._experts_implementation == "grouped_mm":
        model.set_experts_implementation(NAME)
