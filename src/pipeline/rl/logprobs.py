"""Log-probs and entropies of tokens from the trunk's output, without ever holding all logits.

Letters: N tokens (n of a chunk), D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_LOGITS = 2**24
"""Logits that exist at one time: 64 MB in float32, and with its gradient and its products some four times that."""
CPU_CHUNK_LOGITS = 2**20
"""The same on a CPU without gradients: 4 MB stay in its cache. (With gradients, to work them out twice costs more than
that saves.)"""


def chunk_of(vocabulary: int, *, is_cached: bool = False) -> int:
    """Tokens whose logits are taken together; `is_cached`: on a CPU, without gradients."""
    return max(1, (min(CPU_CHUNK_LOGITS, CHUNK_LOGITS) if is_cached else CHUNK_LOGITS) // vocabulary)


def _log_softmax(hidden_nD: Tensor, weight_VD: Tensor, temperature: float) -> Tensor:
    """log softmax(h W^T / tau), float32 [n, V]."""
    logits_nV = hidden_nD @ weight_VD.T
    return F.log_softmax(logits_nV if temperature == 1 else logits_nV.float() / temperature, -1, dtype=torch.float32)


class _ChunkedLogprobs(torch.autograd.Function):
    """log p(target) and H of softmax(h W^T / tau), a chunk of tokens at a time.

        d log p(target) / d logits = (onehot - p) / tau        d H / d logits = -p (log p + H) / tau

    Only what goes in is kept for the backward, which works the logits out again: one more product with the head.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        target_N: Tensor,
        temperature: float,
        chunk: int,
        has_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        logprobs_N, entropies_N = hidden_ND.new_zeros(2, len(hidden_ND), dtype=torch.float32)
        for start in range(0, len(hidden_ND), chunk):
            here = slice(start, start + chunk)
            log_p_nV = _log_softmax(hidden_ND[here], weight_VD, temperature)
            logprobs_N[here] = log_p_nV.gather(1, target_N[here, None])[:, 0]
            if has_entropy:
                entropies_N[here] = -(log_p_nV.exp() * log_p_nV).sum(dim=-1)
        ctx.save_for_backward(hidden_ND, weight_VD, target_N)
        ctx.temperature, ctx.chunk, ctx.has_entropy = temperature, chunk, has_entropy
        return logprobs_N, entropies_N

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None, None, None, None]:
        hidden_ND, weight_VD, target_N = ctx.saved_tensors
        of_logprob_N, of_entropy_N = grads
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        for start in range(0, len(hidden_ND), ctx.chunk):
            here = slice(start, start + ctx.chunk)
            log_p_nV = _log_softmax(hidden_ND[here], weight_VD, ctx.temperature)
            p_nV = log_p_nV.exp()
            price_nV = of_logprob_N[here, None]
            if ctx.has_entropy:
                entropy_n1 = -(p_nV * log_p_nV).sum(dim=-1, keepdim=True)
                price_nV = price_nV + of_entropy_N[here, None] * (log_p_nV + entropy_n1)
            grad_nV = -p_nV * price_nV
            grad_nV.scatter_add_(1, target_N[here, None], of_logprob_N[here, None])
            low_nV = (grad_nV / ctx.temperature).to(hidden_ND.dtype)
            grad_hidden_ND[here] = low_nV @ weight_VD
            grad_weight_VD += low_nV.T @ hidden_ND[here]
        return grad_hidden_ND, grad_weight_VD.to(weight_VD.dtype), None, None, None, None


def logprobs_of_hidden(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    temperature: float,
    chunk: int | None = None,
    *,
    has_entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """(log p(target), entropy in nats) of softmax(hidden @ weight^T / temperature), each float32 [N], with gradients.

    Without `has_entropy` the entropies are zeros and are not worked out. Products are in the dtype of the caller's
    autocast.
    """
    kind = hidden_ND.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_ND.dtype
    tokens = chunk or chunk_of(len(weight_VD), is_cached=kind == "cpu" and not torch.is_grad_enabled())
    with torch.autocast(kind, enabled=False):
        found: tuple[Tensor, Tensor] = _ChunkedLogprobs.apply(  # type: ignore[no-untyped-call]
            hidden_ND.to(dtype), weight_VD.to(dtype), target_N, temperature, tokens, has_entropy
        )
    return found
