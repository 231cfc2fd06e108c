"""Attention of few queries to many keys as plain products, for decoding in bf16 on a CPU.

torch's fused kernel takes four to eight times as long there for one query a row; transformers' own plain products copy
the keys of every group of heads at every token. Letters: B rows, H heads, K heads of keys, R = H / K heads that share
keys, T queries, N = R T, W keys, D channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "pipeline_products"
LONGEST = 256
"""Queries and keys of a prompt up to which products are taken for it as well: their memory grows with the square."""


def products(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,  # transformers' interface hands over whatever a family has
) -> tuple[Tensor, None]:
    """softmax(scaling q k^T + mask) v, as every attention of transformers: query [B, H, T, D], key and value
    [B, K, W, D], mask [B or 1, 1, T, W], True (or 0) where seen -> [B, T, H, D]. In inference only."""
    rows, heads, queries, channels = query.shape
    groups = key.shape[1]
    is_long = queries > 1 and max(queries, key.shape[2]) > LONGEST
    has_own_terms = any(others.get(name) is not None for name in ("position_bias", "s_aux"))
    if softcap is None and (is_long or has_own_terms or (queries > 1 and attention_mask is None)):
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    scaled = query * (channels**-0.5 if scaling is None else scaling)
    scores_BKNW = scaled.reshape(rows, groups, -1, channels) @ key.transpose(2, 3)
    scores_BKRTW = scores_BKNW.reshape(rows, groups, -1, queries, key.shape[2])
    if softcap is not None:
        scores_BKRTW = softcap * torch.tanh(scores_BKRTW / softcap)
    if attention_mask is not None:
        seen_B11TW = attention_mask[:, :, None, :, : key.shape[2]]
        if attention_mask.dtype == torch.bool:  # not -inf: padding sees nothing, and its states must stay numbers
            scores_BKRTW = scores_BKRTW.masked_fill(~seen_B11TW, torch.finfo(scores_BKRTW.dtype).min)
        else:
            scores_BKRTW = scores_BKRTW + seen_B11TW
    shares_BKRTW = scores_BKRTW.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    output_BHTD = (shares_BKRTW.flatten(2, 3) @ value).reshape(rows, heads, queries, value.shape[3])
    return output_BHTD.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, products)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def fast_decoding(model: PreTrainedModel) -> Iterator[None]:
    """The model attends by `products` inside, where that is the faster: in bf16 on a CPU, under autocast or by its
    weights, and of a family whose attentions are interchangeable."""
    before = model.config._attn_implementation
    is_bf16 = model.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    if model.device.type != "cpu" or not is_bf16 or before not in ("sdpa", "eager") or not model._supports_sdpa:
        yield
        return
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
