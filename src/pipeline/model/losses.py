"""Next-token losses that never hold all logits.

Letters of shapes: N positions, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
CHUNK = 2048
"""Positions whose logits exist at one time."""
CPU_CHUNK = 512
"""The same on a CPU: the logits of a vocabulary of some thousand then stay in its cache (62 ms against 76 for 2,048
positions of 4,096 tokens)."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum over positions of −log softmax(h Wᵀ)[target], with the gradients worked out chunk by chunk on the way.

    d loss / d logits = softmax − onehot, so that both gradients are known as soon as a chunk's logits are; only they
    are kept. Positions whose target is IGNORED count nothing.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, chunk: int) -> Tensor:
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        low_VD = weight_VD.to(hidden_ND.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        some_ignored = hidden_ND.device.type != "cpu" or bool((target_N == IGNORED).any())  # no sync with a GPU
        for start in range(0, len(hidden_ND), chunk):
            here = slice(start, start + chunk)
            h_nD, target_n = hidden_ND[here], target_N[here]
            counted_n = target_n != IGNORED
            safe_n1 = target_n.clamp(min=0)[:, None]
            log_p_nV = F.log_softmax(h_nD @ low_VD.T, dim=-1, dtype=torch.float32)
            total -= (log_p_nV.gather(1, safe_n1)[:, 0] * counted_n).sum()
            grad_nV = log_p_nV.exp_()
            grad_nV.scatter_add_(1, safe_n1, grad_nV.new_full(safe_n1.shape, -1.0))
            low_nV = grad_nV.to(hidden_ND.dtype)
            if some_ignored:
                low_nV.mul_(counted_n[:, None])
            grad_hidden_ND[here] = low_nV @ low_VD
            grad_weight_VD += low_nV.T @ h_nD
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD.to(weight_VD.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden_ND, grad_weight_VD = ctx.saved_tensors
        return grad_hidden_ND * grads[0].to(grad_hidden_ND.dtype), grad_weight_VD * grads[0], None, None


def cross_entropy_sum(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, chunk: int | None = None) -> Tensor:
    """Sum of −ln p(target) over the positions whose target is not IGNORED, in nats, float32.

    hidden_ND: the trunk's output; weight_VD: the head's; target_N: ids. Equal to
    `F.cross_entropy(hidden @ weight.T, target, reduction="sum")` up to float order, without [N, V] logits.
    """
    chunk = chunk or (CPU_CHUNK if hidden_ND.device.type == "cpu" else CHUNK)
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden_ND, weight_VD, target_N, chunk)  # type: ignore[no-untyped-call]
    return loss


@torch.no_grad()
def token_nats(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, chunk: int = CHUNK) -> Tensor:
    """−ln p(target) of every position, float32 [N], 0 where the target is IGNORED; no gradients."""
    found = []
    for start in range(0, len(hidden_ND), chunk):
        here = slice(start, start + chunk)
        logits_nV = (hidden_ND[here] @ weight_VD.to(hidden_ND.dtype).T).float()
        found.append(F.cross_entropy(logits_nV, target_N[here], reduction="none", ignore_index=IGNORED))
    return torch.cat(found)
