"""Optimiser steps: the gradient of a whole batch clipped, judged and taken; and what a checkpoint keeps of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from pipeline.artifacts import need_disk
from pipeline.checkpoint import load_optimizer, optimizer_tensors
from pipeline.model.build import load_buffers, load_parameters, persistent_buffers, unique_parameters
from pipeline.model.loss_watch import Verdicts
from pipeline.model.micro_steps import MicroSteps
from pipeline.model.muon import Muon
from pipeline.model.optim import set_learning_rate
from pipeline.model.sharding import clip_gradients, sum_gradients
from pipeline.runtime import Runtime, derive_seed


class OptimizerSteps:
    """A model in training: `micro_steps` make its gradients, `optimizers` take the steps, `verdicts` judge them.

    `rate_share` gives a step's (0-based) share of the peak learning rates; `seed` is the run's.
    """

    def __init__(
        self,
        micro_steps: MicroSteps,
        optimizers: list[torch.optim.Optimizer],
        verdicts: Verdicts,
        rate_share: Callable[[int], float],
        *,
        max_grad_norm: float,
        seed: int,
        runtime: Runtime,
    ) -> None:
        self.losses, self.model = micro_steps.losses, micro_steps.losses.model
        self.micro_steps, self.optimizers, self.verdicts = micro_steps, optimizers, verdicts
        self.rate_share, self.max_grad_norm, self.seed, self.runtime = rate_share, max_grad_norm, seed, runtime

    def resume(self) -> int:
        """Put back the newest checkpoint; the step it was made at, 0 without one."""
        checkpoint = self.runtime.checkpoints.latest()
        if checkpoint is None:
            return 0
        tensors = checkpoint.tensors()
        load_parameters(self.model, tensors, "model")
        for index, optimizer in enumerate(self.optimizers):
            load_optimizer(optimizer, f"optimizer{index}", tensors, checkpoint.state["optimizers"][index])
        load_buffers(self.model, tensors, "buffer")
        is_main = self.runtime.is_main
        self.verdicts.restore(checkpoint.state["verdicts"], checkpoint.step, self.runtime.device, is_main)
        self.micro_steps.restore(checkpoint.state["micro_steps"], is_main)
        self.runtime.say(f"resumed at step {checkpoint.step:,}")
        return checkpoint.step

    def save(self, step: int) -> None:
        """A checkpoint of `step`: weights, buffers and moments, never lost ones, and what the next line of metrics is
        made of; the data's position is the step itself. TrainingError, and no checkpoint, after a step that was not
        finite."""
        losses = self.verdicts.check()
        tensors = {f"model.{name}": tensor for name, tensor in unique_parameters(self.model).items()}
        tensors |= {f"buffer.{name}": tensor for name, tensor in persistent_buffers(self.model).items()}
        states = []
        for index, optimizer in enumerate(self.optimizers):
            moments, state = optimizer_tensors(optimizer, f"optimizer{index}")
            tensors |= moments
            states.append(state)
        counted = {"verdicts": self.verdicts.state(losses), "micro_steps": self.micro_steps.pending()}
        self.runtime.checkpoints.save(step, tensors, {"optimizers": states, **counted})
        self.verdicts.saved_at = step

    def need_disk(self, out: Path, saves: int) -> None:
        """MachineError where the disk will not hold the model and the checkpoints to come, of `saves` in the run."""
        moments = {torch.optim.AdamW: 2, Muon: 1}
        one = sum(
            4 * (1 + moments[type(optimizer)]) * parameter.numel()
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        )
        checkpoints = self.runtime.checkpoints
        there = sum(file.stat().st_size for file in checkpoints.folder.rglob("*") if file.is_file())
        whole = 4 * sum(parameter.numel() for parameter in self.model.parameters())
        need_disk(out, whole + max(0, min(saves, checkpoints.keep + 1) * one - there), "saving and checkpoints")

    def step(self, step: int) -> None:
        """One optimiser step on this rank's share of the global batch."""
        torch.manual_seed(derive_seed(self.seed, "step", step, self.runtime.rank))  # of dropout, where there is any
        set_learning_rate(self.optimizers, self.rate_share(step))
        loss = self.micro_steps.gradients(step)
        parameters = list(self.model.parameters())
        if self.runtime.world_size > 1 and not self.runtime.shards:
            sum_gradients(parameters)
        norm = clip_gradients(parameters, self.max_grad_norm)
        steps_over = self.verdicts.steps_over(step, loss, norm)
        for optimizer in self.optimizers:
            if not steps_over:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def figures(self) -> dict[str, float]:
        """Of the steps since the last call: mean loss in nats a token, rate, gradient's norm, and what goes with them.
        TrainingError for a loss that is not finite, with its step and documents."""
        figures, steps = self.verdicts.figures()
        rate = self.optimizers[0].param_groups[-1]["lr"]
        parts = self.losses.teacher.look(self.runtime.world_size) if self.losses.teacher else {}
        return {**figures, "learning_rate": rate, **parts, **self.micro_steps.look(steps)}
