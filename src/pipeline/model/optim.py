"""Optimizers and learning-rate schedules for training from scratch."""

from __future__ import annotations

import math

import torch
from torch import nn

SCHEDULES = ("cosine", "linear", "wsd", "constant")


def learning_rate_share(step: int, total: int, warmup: int, schedule: str, decay: float, floor: float) -> float:
    """The share of the peak learning rate at `step` (0-based) of `total`.

    Linear warmup over `warmup` steps, then `cosine` or `linear` down to `floor`, or `wsd` (constant, and linear to
    `floor` over the last share `decay` of the steps; Hu et al. 2024), or `constant`.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    if schedule == "wsd":
        left = (total - step) / max(1.0, decay * total)
        return floor + (1 - floor) * min(1.0, left)
    done = (step - warmup) / max(1, total - warmup)
    shape = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return floor + (1 - floor) * shape


def warmup_steps(value: float, total: int) -> int:
    """Steps of warmup: a number of steps, or a share of all steps when below 1 (transformers' convention)."""
    return round(value * total) if value < 1 else int(value)


def build_optimizers(
    model: nn.Module,
    *,
    kind: str,
    learning_rate: float,
    embedding_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> list[torch.optim.Optimizer]:
    """AdamW over all, or Muon over the blocks' matrices and AdamW over the rest.

    Weight decay falls on matrices only, never on embeddings, norms and biases. Every group keeps its peak rate under
    `peak_lr`, which the schedule scales. Muon's update is scaled to AdamW's size (Liu et al. 2025, "Muon is scalable"),
    so that one learning rate serves both.
    """
    matrices, embeddings, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if "embed" in name or "lm_head" in name:
            embeddings.append(parameter)
        elif parameter.dim() == 2:
            matrices.append(parameter)
        else:
            vectors.append(parameter)
    rest = [
        {"params": embeddings, "lr": embedding_rate, "weight_decay": 0.0},
        {"params": vectors, "lr": learning_rate, "weight_decay": 0.0},
    ]
    if kind == "adamw":
        rest.insert(0, {"params": matrices, "lr": learning_rate, "weight_decay": weight_decay})
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, betas=betas, eps=eps, fused=True)]
    if kind == "muon":
        optimizers.append(
            torch.optim.Muon(matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_learning_rate(optimizers: list[torch.optim.Optimizer], share: float) -> None:
    """Every group to `share` of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share
