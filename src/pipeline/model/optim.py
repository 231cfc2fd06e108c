"""Optimizers and learning-rate schedules for training from scratch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.model.build import embedding_parameters
from pipeline.model.muon import Muon

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


BASE_RATE = {"adamw": 1.6e-3, "muon": 5.4e-3}
"""The best peak rate of a model 256 wide at 2,048 tokens a step."""
EMBEDDING_RATE = {"adamw": 1.0, "muon": 10.0}
"""The embedding's, as a multiple of the matrices'."""
STACK_RATE = {"adamw": 1.0, "muon": BASE_RATE["adamw"] / BASE_RATE["muon"]}
"""That of stacked experts and convolutions, which AdamW trains beside Muon too: its own rate, not Muon's."""


def default_rate(kind: str, width: int, batch_tokens: int) -> float:
    """Peak rate of a new model's matrices and norms: base · 256 / width · (tokens a step / 2048)^⅓.

    The bases and the width's part are measured on three depths, the batch's at one, up to 2,048 tokens a step
    (benchmarks/learning_rates.py, docs/pretrain.md). So the rule stays within a factor of two of the step law (Li et
    al. 2025) at 124 M and at 1 B.
    """
    return float(BASE_RATE[kind] * 256 / width * (batch_tokens / 2048) ** (1 / 3))


def peak_rates(
    model: PreTrainedModel,
    kind: str,
    batch_tokens: int,
    *,
    rate: float | None,
    embedding_rate: float | None,
    has_base: bool,
    is_adapted: bool,
) -> tuple[float, float]:
    """(peak rate of matrices and norms, of embeddings): as given, else by `default_rate` for `batch_tokens` a step.

    What goes on from a base takes a tenth of a new model's, but adapters take it whole, as they bear some ten times the
    rate of the weights they stand for; the embedding beside them is trained as it is, and takes the tenth.
    """
    share = 0.1 if has_base and not is_adapted else 1.0
    peak = rate or share * default_rate(kind, model.get_input_embeddings().weight.shape[1], batch_tokens)
    whole = 0.1 * peak if is_adapted else peak
    return peak, embedding_rate or EMBEDDING_RATE[kind] * whole


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
    """AdamW over all, or Muon over the blocks' matrices and AdamW over the rest (embeddings, heads, norms, and what has
    three axes: stacked experts, convolutions).

    Weight decay falls on matrices only (`is_matrix`), never on embeddings, norms and biases. Every group keeps its peak
    rate under `peak_lr`, which the schedule scales. Muon's update is scaled to AdamW's size (Liu et al. 2025, "Muon is
    scalable"), so that one learning rate serves both but for `STACK_RATE`.
    """
    matrices: list[nn.Parameter] = []
    stacks: list[nn.Parameter] = []
    embeddings: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    is_embedding = {id(parameter) for parameter in embedding_parameters(model)}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in is_embedding:
            embeddings.append(parameter)
        elif not is_matrix(name, parameter):
            vectors.append(parameter)
        else:
            (matrices if parameter.dim() == 2 else stacks).append(parameter)
    rest = [
        {"params": embeddings, "lr": embedding_rate, "weight_decay": 0.0},
        {"params": vectors, "lr": learning_rate, "weight_decay": 0.0},
    ]
    decayed = stacks if kind == "muon" else matrices + stacks
    if decayed:
        rest.insert(0, {"params": decayed, "lr": learning_rate * STACK_RATE[kind], "weight_decay": weight_decay})
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, betas=betas, eps=eps, fused=True)]
    if kind == "muon":
        optimizers.append(Muon(matrices, lr=learning_rate, weight_decay=weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def is_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether a parameter multiplies what passes through it: neither a row of numbers, however many axes of one it is
    stored in (RWKV's mixes), nor a table of biases (an expert a row) or of a state space's decays (Mamba: no weight
    decay on A_log and D, Gu and Dao 2023)."""
    own = name.rpartition(".")[2]
    return sum(size > 1 for size in parameter.shape) > 1 and own not in ("A_log", "D") and not own.endswith("bias")


class Together(torch.optim.Optimizer):
    """Several optimizers, each over its own parameters, where one is wanted (the Hugging Face Trainer)."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        super().__init__(groups, {})
        self.optimizers = optimizers
        self._share_groups()

    def _share_groups(self) -> None:
        """The very groups of the optimizers: a rate that a schedule sets here is theirs."""
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step each."""
        assert closure is None
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Each one's state, in order."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self._share_groups()


def muon(model: nn.Module, learning_rate: float, embedding_rate: float, weight_decay: float) -> Together:
    """Muon over the blocks' matrices and AdamW over the rest, as one optimizer."""
    return Together(
        build_optimizers(
            model,
            kind="muon",
            learning_rate=learning_rate,
            embedding_rate=embedding_rate,
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=weight_decay,
        )
    )


def set_learning_rate(optimizers: list[torch.optim.Optimizer], share: float) -> None:
    """Every group to `share` of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share
