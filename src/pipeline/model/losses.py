"""Next-token losses that never hold all logits.

Letters of shapes: N positions (n of a chunk), D width, E a teacher's width, V vocabulary.
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


class _ChunkedDistillation(torch.autograd.Function):
    """Sum over positions of (1 − α) · −log p[target] + α τ² · KL(q_τ ‖ p_τ), with p the student's probabilities, q the
    teacher's, and _τ at temperature τ; the gradients worked out chunk by chunk on the way.

    d loss / d logits = (1 − α)(p − onehot) + α τ (p_τ − q_τ). Also returns the two sums, without gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        target_N: Tensor,
        teacher_NE: Tensor,
        teacher_VE: Tensor,
        alpha: float,
        temperature: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        low_VD = weight_VD.to(hidden_ND.dtype)
        cross_entropy, divergence = hidden_ND.new_zeros(2, dtype=torch.float32)
        for start in range(0, len(hidden_ND), chunk):
            here = slice(start, start + chunk)
            h_nD, target_n = hidden_ND[here], target_N[here]
            counted_n1 = (target_n != IGNORED)[:, None]
            safe_n1 = target_n.clamp(min=0)[:, None]
            logits_nV = (h_nD @ low_VD.T).float()
            log_p_nV = logits_nV.log_softmax(dim=-1)
            soft_log_p_nV = (logits_nV / temperature).log_softmax(dim=-1)
            teacher_nV = (teacher_NE[here] @ teacher_VE.T).float()
            soft_log_q_nV = (teacher_nV / temperature).log_softmax(dim=-1)
            q_nV = soft_log_q_nV.exp()
            cross_entropy -= (log_p_nV.gather(1, safe_n1) * counted_n1).sum()
            divergence += temperature**2 * ((q_nV * (soft_log_q_nV - soft_log_p_nV)).sum(-1, True) * counted_n1).sum()
            hard_nV = log_p_nV.exp().scatter_add(1, safe_n1, -torch.ones_like(safe_n1, dtype=torch.float32))
            grad_nV = (1 - alpha) * hard_nV + alpha * temperature * (soft_log_p_nV.exp() - q_nV)
            low_nV = (grad_nV * counted_n1).to(hidden_ND.dtype)
            grad_hidden_ND[here] = low_nV @ low_VD
            grad_weight_VD += low_nV.T @ h_nD
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD.to(weight_VD.dtype))
        ctx.mark_non_differentiable(cross_entropy, divergence)
        return (1 - alpha) * cross_entropy + alpha * divergence, cross_entropy, divergence

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad_hidden_ND, grad_weight_VD = ctx.saved_tensors
        given = (grad_hidden_ND * grads[0].to(grad_hidden_ND.dtype), grad_weight_VD * grads[0])
        return (*given, None, None, None, None, None, None)


def distillation_sum(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    teacher_NE: Tensor,
    teacher_VE: Tensor,
    alpha: float,
    temperature: float,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(the loss to minimise, its cross entropy, its τ² · KL(teacher ‖ student)): sums in nats over the positions whose
    target is not IGNORED, float32; only the first has gradients, to hidden_ND and weight_VD (Hinton et al. 2015).

    hidden_ND and teacher_NE: the trunks' outputs; weight_VD and teacher_VE: the heads', over the same tokens. `alpha`
    is the share of the teacher's part, `temperature` τ of both sides in it.
    """
    chunk = chunk or (CPU_CHUNK if hidden_ND.device.type == "cpu" else CHUNK)
    found: tuple[Tensor, Tensor, Tensor] = _ChunkedDistillation.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, target_N, teacher_NE, teacher_VE, alpha, temperature, chunk
    )
    return found


@torch.no_grad()
def token_nats(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, chunk: int = CHUNK) -> Tensor:
    """−ln p(target) of every position, float32 [N], 0 where the target is IGNORED; no gradients."""
    found = []
    for start in range(0, len(hidden_ND), chunk):
        here = slice(start, start + chunk)
        logits_nV = (hidden_ND[here] @ weight_VD.to(hidden_ND.dtype).T).float()
        found.append(F.cross_entropy(logits_nV, target_N[here], reduction="none", ignore_index=IGNORED))
    return torch.cat(found)
