"""A model with its optimizer: gradients over all ranks, one step, and what a checkpoint keeps of both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.checkpoint import load_optimizer, optimizer_tensors
from pipeline.model.build import copy_tokenizer, load_parameters, unique_parameters
from pipeline.rl.masking import Reduce, alone


class Learner:
    """A model with its optimizer."""

    def __init__(self, model: PreTrainedModel, eps: float, weight_decay: float, max_grad_norm: float) -> None:
        self.model, self.max_grad_norm = model, max_grad_norm
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, eps=eps, weight_decay=weight_decay, fused=True)

    def gather(self, reduce: Reduce) -> Tensor:
        """Sum the gradients over the ranks; their norm, scalar. A rank without rows counts as zeros."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if reduce is not alone:
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            flat = reduce(torch.cat([gradient.flatten() for gradient in gradients]))
            for parameter, part in zip(parameters, torch.split(flat, [p.numel() for p in parameters]), strict=True):
                parameter.grad = part.view_as(parameter)
        return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def step(self, norm: Tensor, learning_rate: float) -> None:
        """Clip the gradients of this norm, take the step."""
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.max_grad_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.forget()

    def forget(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)


def saved(learners: Mapping[str, Learner]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and moments as tensors, and the optimizers' settings as plain JSON; undone by `restore`."""
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for name, learner in learners.items():
        tensors |= {f"{name}.{key}": tensor for key, tensor in unique_parameters(learner.model).items()}
        moments, settings[name] = optimizer_tensors(learner.optimizer, f"{name}_optimizer")
        tensors |= moments
    return tensors, settings


def restore(learners: Mapping[str, Learner], tensors: dict[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Put back what `saved` gave."""
    for name, learner in learners.items():
        load_parameters(learner.model, tensors, name)
        load_optimizer(learner.optimizer, f"{name}_optimizer", tensors, settings[name])


def write_policy(policy: PreTrainedModel, folder: Path, init: Path, stop_id: int, *, weights: bool = True) -> None:
    """The policy's folder, with the tokenizer, chat template and generation settings of `init`, ending at the stop;
    all but the `weights` for a policy in training, which its checkpoints hold."""
    settings = policy.generation_config
    assert settings is not None
    stops = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    if stop_id not in stops:
        settings.eos_token_id = [stop_id, *(stop for stop in stops if stop is not None)]
    if weights:
        policy.save_pretrained(folder)
    else:
        policy.config.save_pretrained(folder)
        settings.save_pretrained(folder)
    copy_tokenizer(init, folder)
