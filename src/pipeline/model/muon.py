"""Muon: momentum whose matrices are made orthogonal (Jordan 2024), scaled to AdamW's size (Liu et al. 2025).

torch.optim.Muon iterates in bf16 whatever the hardware. A processor without bf16 products takes four times as long for
that as in float32, a quarter of a step of the demo; here the iteration follows the hardware, and is torch's otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pipeline.runtime import bf16_pays

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Jordan's a, b, c: the slope at zero is as steep as it can be, and singular values end between 0.7 and 1.2."""
ITERATIONS = 5
EPSILON = 1e-7


def orthogonal(matrix_MN: Tensor, dtype: torch.dtype) -> Tensor:
    """About U Vᵀ of `matrix_MN` = U S Vᵀ, by Newton-Schulz in `dtype`: singular values near 1 in place of S.

    X ← a X + (b A + c A²) X,   A = X Xᵀ,   from X = matrix / ‖matrix‖; over the shorter side.
    """
    a, b, c = QUINTIC
    is_tall = matrix_MN.size(0) > matrix_MN.size(1)
    x = matrix_MN.to(dtype)
    x = x.T if is_tall else x
    x = x / x.norm().clamp(min=EPSILON)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


class Muon(torch.optim.Optimizer):
    """B ← μ B + (1 − μ) G;   W ← (1 − η λ) W − η · 0.2 √max(M, N) · orthogonal((1 − μ) G + μ B), of matrices alone.

    η `lr`, λ `weight_decay`, μ `momentum` (Nesterov's). The factor gives the update the root mean square of AdamW's, so
    that one learning rate serves both. Equal to torch.optim.Muon (`adjust_lr_fn="match_rms_adamw"`) in bf16, bit for
    bit, its state too.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        assert all(each.dim() == 2 for group in self.param_groups for each in group["params"])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for weight_MN in group["params"]:
                if weight_MN.grad is not None:
                    self._update(weight_MN, weight_MN.grad, group)

    def _update(self, weight_MN: Tensor, grad_MN: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight_MN]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad_MN)
        mean_MN = state["momentum_buffer"].lerp_(grad_MN, 1 - group["momentum"])
        dtype = torch.bfloat16 if bf16_pays(weight_MN.device) else torch.float32
        update_MN = orthogonal(grad_MN.lerp(mean_MN, group["momentum"]), dtype)
        weight_MN.mul_(1 - group["lr"] * group["weight_decay"])
        weight_MN.add_(update_MN, alpha=-group["lr"] * 0.2 * math.sqrt(max(weight_MN.shape)))
