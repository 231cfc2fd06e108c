"""A model with its optimizer: gradients over all ranks, one step, and what a checkpoint keeps of both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.checkpoint import load_optimizer, optimizer_tensors
from pipeline.model.adapters import worn
from pipeline.model.build import copy_tokenizer, load_parameters, unique_parameters
from pipeline.rl.masking import Reduce, alone

BUCKET = 2**24
"""Numbers that are summed over the ranks at once: few collectives, and little is held twice."""


class Learner:
    """A model with its optimizer. What is trained is what requires gradients: all of it, or its `adapters`."""

    def __init__(
        self,
        model: PreTrainedModel,
        eps: float,
        weight_decay: float,
        max_grad_norm: float,
        adapters: PeftModel | None = None,
        adapter: str | None = None,
    ) -> None:
        self.model, self.max_grad_norm, self.adapters, self.adapter = model, max_grad_norm, adapters, adapter
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, eps=eps, weight_decay=weight_decay, fused=True)

    def gather(self, reduce: Reduce) -> Tensor:
        """Sum the gradients over the ranks; their norm, scalar. A rank without rows counts as zeros."""
        for bucket in [] if reduce is alone else buckets(self.parameters):
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = reduce(torch.cat([gradient.flatten() for gradient in gradients]))
            for parameter, part in zip(bucket, torch.split(flat, [p.numel() for p in bucket]), strict=True):
                parameter.grad = part.view_as(parameter)
        return torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def step(self, norm: Tensor, learning_rate: float) -> None:
        """Clip the gradients of this norm, take the step."""
        torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.forget()

    def forget(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        """The model, for a while. Where its trunk is another's, with its own `adapter` in place of that one's: only
        then is it read or saved, and then its adapter alone requires gradients: a backward after it leaves none."""
        if self.adapter is None:
            yield self.model
            return
        assert self.adapters is not None
        with worn(self.adapters, self.adapter):
            yield self.model

    @contextmanager
    def without_adapters(self) -> Iterator[PreTrainedModel]:
        """The model as it was before its adapters: the reference of a policy, the reward model of a critic."""
        assert self.adapters is not None
        with self.adapters.disable_adapter():
            yield self.model

    def merge(self) -> None:
        """Add the adapters in for good; training is over."""
        if self.adapters is not None:
            self.adapters.merge_and_unload()


def buckets(parameters: Sequence[torch.nn.Parameter], size: int = BUCKET) -> list[list[torch.nn.Parameter]]:
    """The parameters in their order, in groups of at most `size` numbers; a larger one is a group of its own."""
    found: list[list[torch.nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        if not found or parameter.numel() > room:
            found.append([])
            room = size
        found[-1].append(parameter)
        room -= parameter.numel()
    return found


class Average:
    """An exponential moving average of what a model is trained in (InstructGPT: decay 0.992).

    m <- decay m + (1 - decay) w    after every optimiser step
    """

    def __init__(self, learner: Learner, decay: float) -> None:
        self.decay, self.learner = decay, learner
        self.tensors = {name: value.clone() for name, value in unique_parameters(learner.model).items()}

    @torch.no_grad()
    def follow(self) -> None:
        """Take one step towards the weights as they are."""
        for name, value in unique_parameters(self.learner.model).items():
            self.tensors[name].lerp_(value, 1.0 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The average as the model's weights for a while."""
        own = {f"own.{name}": value.clone() for name, value in unique_parameters(self.learner.model).items()}
        self.put()
        try:
            yield
        finally:
            load_parameters(self.learner.model, own, "own")

    def put(self) -> None:
        """The average as the model's weights, for good."""
        load_parameters(self.learner.model, self.saved(), "average")

    def saved(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {f"average.{name}": value for name, value in self.tensors.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `saved` gave."""
        for name, value in self.tensors.items():
            value.copy_(tensors[f"average.{name}"])


def averaged(average: Average | None) -> Any:
    """The context in which the model has its averaged weights; its own where there is no average."""
    return nullcontext() if average is None else average.in_place()


def saved(learners: Mapping[str, Learner]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and moments as tensors, and the optimizers' settings as plain JSON; undone by `restore`."""
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for name, learner in learners.items():
        with learner.active() as model:
            tensors |= {f"{name}.{key}": tensor for key, tensor in unique_parameters(model).items()}
        moments, settings[name] = optimizer_tensors(learner.optimizer, f"{name}_optimizer")
        tensors |= moments
    return tensors, settings


def restore(learners: Mapping[str, Learner], tensors: dict[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Put back what `saved` gave."""
    for name, learner in learners.items():
        with learner.active() as model:
            load_parameters(model, tensors, name)
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
