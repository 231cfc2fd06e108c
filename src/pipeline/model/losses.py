"""Next-token losses that never hold all logits.

Letters of shapes: N positions (n of a chunk), D width, E a teacher's width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
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
SMALL = 2**26
"""Logits (256 MB in float32) of trained positions up to which sft and dpo hold them at once on a CPU; a larger batch is
left to TRL."""


class _Known(torch.autograd.Function):
    """A sum whose gradients to hidden_ND and weight_VD are known with it."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, total: Tensor, grad_hidden_ND: Tensor, grad_weight_VD: Tensor
    ) -> Tensor:
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD)
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden_ND, grad_weight_VD = ctx.saved_tensors
        return grad_hidden_ND * grads[0].to(grad_hidden_ND.dtype), grad_weight_VD * grads[0], None, None, None


OfChunk = Callable[[slice, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(positions, their hidden_nD and the head's weight, in the dtype of the products) -> (sums over them [k], d loss / d
logits [n, V])."""


def dtype_of_products(hidden_ND: Tensor) -> torch.dtype | None:
    """Autocast's, where casting to it once is to take the place of autocast's own casts: not on a CPU, whose bits are
    those of earlier runs. (Autocast would cast the head's weight for every chunk and every chunk of gradients twice: a
    sixth of the bytes that the loss moves, counted by its operations, at a vocabulary of 50,304.)"""
    kind = hidden_ND.device.type
    return torch.get_autocast_dtype(kind) if kind != "cpu" and torch.is_autocast_enabled(kind) else None


@torch.no_grad()
def _in_chunks(
    hidden_ND: Tensor, weight_VD: Tensor, chunk: int | None, sums: int, of_chunk: OfChunk
) -> tuple[Tensor, Tensor, Tensor]:
    """(the sums over all positions [k], the loss's gradients to hidden_ND and weight_VD), chunk by chunk.

    Both gradients are known as soon as a chunk's are to its logits; only they are kept.
    """
    chunk = chunk or (CPU_CHUNK if hidden_ND.device.type == "cpu" else CHUNK)
    grad_hidden_ND = torch.empty_like(hidden_ND)
    grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
    dtype = dtype_of_products(hidden_ND)
    low_ND = hidden_ND.to(dtype or hidden_ND.dtype)
    low_VD = weight_VD.to(low_ND.dtype)
    total_k = torch.zeros(sums, dtype=torch.float32, device=hidden_ND.device)
    kind = hidden_ND.device.type
    with torch.autocast(kind, enabled=torch.is_autocast_enabled(kind) and dtype is None):
        for start in range(0, len(hidden_ND), chunk):
            here = slice(start, start + chunk)
            sums_k, grad_nV = of_chunk(here, low_ND[here], low_VD)
            total_k += sums_k
            low_nV = grad_nV.to(low_ND.dtype)
            grad_hidden_ND[here] = low_nV @ low_VD
            grad_weight_VD += low_nV.T @ low_ND[here]
    return total_k, grad_hidden_ND, grad_weight_VD.to(weight_VD.dtype)


Terms = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""What `terms_of` is, compiled or not."""


def terms_of(logits_nV: Tensor, target_n: Tensor) -> tuple[Tensor, Tensor]:
    """(the sum of −ln p(target) over the positions that count [1], d sum / d logits in the logits' dtype), as one
    expression for a compiler: logits are read and gradients written, and nothing of [n, V] is between them."""
    counted_n = target_n != IGNORED
    safe_n1 = target_n.clamp(min=0)[:, None]
    log_p_nV = F.log_softmax(logits_nV.float(), dim=-1)
    is_target_nV = torch.arange(logits_nV.shape[1], device=logits_nV.device) == safe_n1
    sum_1 = -(log_p_nV.gather(1, safe_n1)[:, 0] * counted_n).sum()[None]
    grad_nV = (log_p_nV.exp() - is_target_nV.float()) * counted_n[:, None]
    return sum_1, grad_nV.to(logits_nV.dtype)


def cross_entropy_sum(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, chunk: int | None = None, terms: Terms | None = None
) -> Tensor:
    """Sum of −ln p(target) over the positions whose target is not IGNORED, in nats, float32.

    hidden_ND: the trunk's output; weight_VD: the head's; target_N: ids. Equal to
    `F.cross_entropy(hidden @ weight.T, target, reduction="sum")` up to float order, without [N, V] logits.

        d loss / d logits = softmax − onehot

    `terms`: `terms_of`, compiled, in place of the operations one by one.
    """
    some_ignored = hidden_ND.device.type != "cpu" or bool((target_N == IGNORED).any())  # no sync with a GPU

    def of_chunk(here: slice, hidden_nD: Tensor, low_VD: Tensor) -> tuple[Tensor, Tensor]:
        if terms is not None:
            return terms(hidden_nD @ low_VD.T, target_N[here])
        counted_n = target_N[here] != IGNORED
        safe_n1 = target_N[here].clamp(min=0)[:, None]
        log_p_nV = F.log_softmax(hidden_nD @ low_VD.T, dim=-1, dtype=torch.float32)
        sum_1 = -(log_p_nV.gather(1, safe_n1)[:, 0] * counted_n).sum()[None]
        grad_nV = log_p_nV.exp_()
        grad_nV.scatter_add_(1, safe_n1, grad_nV.new_full(safe_n1.shape, -1.0))
        low_nV = grad_nV.to(hidden_nD.dtype)
        return sum_1, low_nV.mul_(counted_n[:, None]) if some_ignored else low_nV

    (total,), *gradients = _in_chunks(hidden_ND, weight_VD, chunk, 1, of_chunk)
    loss: Tensor = _Known.apply(hidden_ND, weight_VD, total, *gradients)  # type: ignore[no-untyped-call]
    return loss


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
    is the share of the teacher's part, `temperature` τ of both sides in it. With p the student's probabilities, q the
    teacher's, and _τ at temperature τ:

        loss = (1 − α) · −log p[target] + α τ² · KL(q_τ ‖ p_τ)
        d loss / d logits = (1 − α)(p − onehot) + α τ (p_τ − q_τ)
    """

    def of_chunk(here: slice, hidden_nD: Tensor, low_VD: Tensor) -> tuple[Tensor, Tensor]:
        counted_n1 = (target_N[here] != IGNORED)[:, None]
        safe_n1 = target_N[here].clamp(min=0)[:, None]
        logits_nV = (hidden_nD @ low_VD.T).float()
        log_p_nV = logits_nV.log_softmax(dim=-1)
        soft_log_p_nV = (logits_nV / temperature).log_softmax(dim=-1)
        teacher_nV = (teacher_NE[here] @ teacher_VE.T).float()
        soft_log_q_nV = (teacher_nV / temperature).log_softmax(dim=-1)
        q_nV = soft_log_q_nV.exp()
        hard = -(log_p_nV.gather(1, safe_n1) * counted_n1).sum()
        soft = temperature**2 * ((q_nV * (soft_log_q_nV - soft_log_p_nV)).sum(-1, True) * counted_n1).sum()
        hard_nV = log_p_nV.exp().scatter_add(1, safe_n1, -torch.ones_like(safe_n1, dtype=torch.float32))
        grad_nV = (1 - alpha) * hard_nV + alpha * temperature * (soft_log_p_nV.exp() - q_nV)
        return torch.stack([hard, soft]), grad_nV * counted_n1

    (cross_entropy, divergence), *gradients = _in_chunks(hidden_ND, weight_VD, chunk, 2, of_chunk)
    total = (1 - alpha) * cross_entropy + alpha * divergence
    loss: Tensor = _Known.apply(hidden_ND, weight_VD, total, *gradients)  # type: ignore[no-untyped-call]
    return loss, cross_entropy, divergence


def distilled_nats(
    logits_NV: Tensor, teacher_NV: Tensor, target_N: Tensor, alpha: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(the loss to minimise, −log p[target], τ² · KL(q_τ ‖ p_τ)) of every position in nats, float32 [N], with
    gradients: what `distillation_sum` sums, from whole logits (float32) of student p and teacher q.

        loss = (1 − α) · −log p[target] + α τ² · KL(q_τ ‖ p_τ)
    """
    hard_N = F.cross_entropy(logits_NV, target_N, reduction="none")
    log_p_NV = (logits_NV / temperature).log_softmax(dim=-1)
    log_q_NV = (teacher_NV / temperature).log_softmax(dim=-1)
    soft_N = temperature**2 * (log_q_NV.exp() * (log_q_NV - log_p_NV)).sum(dim=-1)
    return (1 - alpha) * hard_N + alpha * soft_N, hard_N, soft_N


@torch.no_grad()
def token_nats(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, chunk: int = CHUNK) -> Tensor:
    """−ln p(target) of every position, float32 [N], 0 where the target is IGNORED; no gradients."""
    found = []
    for start in range(0, len(hidden_ND), chunk):
        here = slice(start, start + chunk)
        logits_nV = (hidden_ND[here] @ weight_VD.to(hidden_ND.dtype).T).float()
        found.append(F.cross_entropy(logits_nV, target_N[here], reduction="none", ignore_index=IGNORED))
    return torch.cat(found)
