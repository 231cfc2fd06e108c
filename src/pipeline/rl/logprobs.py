"""Log-probs and entropies of tokens from the trunk's output, without ever holding all logits.

Letters: N tokens (n of a chunk), D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_LOGITS = 2**24
"""Logits that exist at one time: 64 MB in float32, and with its gradient and its products some four times that."""


def chunk_of(vocabulary: int) -> int:
    """Tokens whose logits are taken together."""
    return max(1, CHUNK_LOGITS // vocabulary)


class _ChunkedLogprobs(torch.autograd.Function):
    """log p(target) and H of softmax(h W^T / tau), a chunk of tokens at a time.

        d log p(target) / d logits = (onehot - p) / tau        d H / d logits = -p (log p + H) / tau

    Only what goes in is kept for the backward, which works the logits out again: one more product with the head.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        logprobs_N, entropies_N = hidden_ND.new_empty(2, len(hidden_ND), dtype=torch.float32)
        for start in range(0, len(hidden_ND), chunk):
            here = slice(start, start + chunk)
            log_p_nV = ((hidden_ND[here] @ weight_VD.T).float() / temperature).log_softmax(dim=-1)
            logprobs_N[here] = log_p_nV.gather(1, target_N[here, None])[:, 0]
            entropies_N[here] = -(log_p_nV.exp() * log_p_nV).sum(dim=-1)
        ctx.save_for_backward(hidden_ND, weight_VD, target_N)
        ctx.temperature, ctx.chunk = temperature, chunk
        return logprobs_N, entropies_N

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None, None, None]:
        hidden_ND, weight_VD, target_N = ctx.saved_tensors
        of_logprob_N, of_entropy_N = grads
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        for start in range(0, len(hidden_ND), ctx.chunk):
            here = slice(start, start + ctx.chunk)
            log_p_nV = ((hidden_ND[here] @ weight_VD.T).float() / ctx.temperature).log_softmax(dim=-1)
            p_nV = log_p_nV.exp()
            entropy_n1 = -(p_nV * log_p_nV).sum(dim=-1, keepdim=True)
            grad_nV = -p_nV * (of_logprob_N[here, None] + of_entropy_N[here, None] * (log_p_nV + entropy_n1))
            grad_nV.scatter_add_(1, target_N[here, None], of_logprob_N[here, None])
            low_nV = (grad_nV / ctx.temperature).to(hidden_ND.dtype)
            grad_hidden_ND[here] = low_nV @ weight_VD
            grad_weight_VD += low_nV.T @ hidden_ND[here]
        return grad_hidden_ND, grad_weight_VD.to(weight_VD.dtype), None, None, None


def logprobs_of_hidden(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, temperature: float, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """(log p(target), entropy in nats) of softmax(hidden @ weight^T / temperature), each float32 [N], with gradients.

    Products are in the dtype of the caller's autocast.
    """
    kind = hidden_ND.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_ND.dtype
    with torch.autocast(kind, enabled=False):
        found: tuple[Tensor, Tensor] = _ChunkedLogprobs.apply(  # type: ignore[no-untyped-call]
            hidden_ND.to(dtype), weight_VD.to(dtype), target_N, temperature, chunk or chunk_of(len(weight_VD))
        )
    return found
