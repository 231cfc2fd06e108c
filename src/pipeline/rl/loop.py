"""The loop of an RL run: a batch of answers, what they are worth, the update; evaluations, checkpoints, the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.model.build import count_parameters
from pipeline.rl.answers import own_rows
from pipeline.rl.appraisal import Appraisal, appraise
from pipeline.rl.batches import Batches
from pipeline.rl.examiner import Examiner
from pipeline.rl.forwards import Cut
from pipeline.rl.kl import adaptive_kl_coef
from pipeline.rl.learners import Average, averaged, restore, saved
from pipeline.rl.phases import Clock
from pipeline.rl.ptx import PretrainingText
from pipeline.rl.rollouts import Experience
from pipeline.rl.state import Progress
from pipeline.rl.updates import Objective, Setting, check_finite, update
from pipeline.runtime import Runtime

HEALTHY_GAP = 0.01
"""Mean |p(rollout) - p(training)| a token above which the two forwards don't agree."""


@dataclass(frozen=True)
class Updates:
    """The optimiser steps of a step."""

    epochs: int
    mini_batches: int
    cut: Cut
    """Of their forwards."""
    rates: tuple[float, float]
    """Learning rates of policy and critic at the start."""
    falls: bool
    """Whether the rates fall to 0 over the run, in a line."""


@dataclass(frozen=True)
class Steering:
    """The adaptive price of KL, as in `adaptive_kl_coef`."""

    target: float
    horizon: float


class Loop:
    """A run's parts and how far it is. `peak` is the FLOP/s of all its devices together."""

    def __init__(
        self,
        batches: Batches,
        appraisal: Appraisal,
        objective: Objective,
        updates: Updates,
        steering: Steering | None,
        text: PretrainingText | None,
        average: Average | None,
        examiner: Examiner | None,
        runtime: Runtime,
        *,
        patience: int | None,
        peak: float,
    ) -> None:
        self.batches, self.appraisal, self.objective, self.updates = batches, appraisal, objective, updates
        self.steering, self.text, self.average, self.examiner = steering, text, average, examiner
        self.runtime, self.patience, self.peak = runtime, patience, peak
        self.models, self.place = batches.models, batches.place
        self.progress = Progress(objective.kl_coef)

    def step(self, step: int, done: float) -> dict[str, float]:
        """One step, `done` being the share of the run before it. Returns its figures, means over all ranks."""
        clock = Clock(self.place.device)
        answers, figures, asked = self.batches.gather(step, self.progress.asked, clock)
        price = self.progress.kl_coef
        experience, of_experience = appraise(answers, self.models, self.appraisal, self.place, price)
        figures |= of_experience
        check_finite(figures)
        clock.lap("reference")
        figures |= self._update(step, experience, answers.places_B, done)
        clock.lap("train")

        if self.steering is not None:
            self.progress.kl_coef = adaptive_kl_coef(
                price,
                figures["kl"],
                episodes=self.batches.size,
                target=self.steering.target,
                horizon=self.steering.horizon,
            )
        before = self.progress.history[-1]["rollout_gap"] if self.progress.history else 0.0
        if figures["rollout_gap"] > HEALTHY_GAP >= before:
            self.runtime.say(
                f"rollout and training differ by {figures['rollout_gap']:.3f} a token: one of them is wrong"
            )
        figures |= clock.seconds | {
            "samples_per_second": figures["episodes"] / clock.total,
            "tokens_per_second": figures["length"] * figures["episodes"] / clock.total,
            "mfu": self._flops(figures["row_length"] * figures["episodes"]) / clock.total / self.peak,
        }
        self.progress.add(figures, asked)
        return figures

    def _update(self, step: int, experience: Experience, places_B: Tensor, done: float) -> dict[str, float]:
        """The optimiser steps of this step. Minibatches are cut from the whole batch, whatever ranks share it."""
        updates, text = self.updates, self.text
        orders = [
            torch.randperm(self.batches.size, generator=self.place.generator("minibatches", step, epoch))
            for epoch in range(updates.epochs)
        ]
        share = 1.0 - done if updates.falls else 1.0
        rates = (share * updates.rates[0], share * updates.rates[1])
        before = step * updates.epochs * updates.mini_batches
        also = None if text is None else lambda number: text.add_gradient(before + number)
        figures = update(
            self.models.policy,
            self.models.critic,
            experience,
            dataclasses.replace(self.objective, kl_coef=self.progress.kl_coef),
            own_rows(orders, updates.mini_batches, places_B),
            Setting(updates.cut, self.place.bf16, self.place.reduce, rates, also=also, average=self.average),
        )
        return figures | {"learning_rate": rates[0]}

    def evaluate(self, step: int) -> dict[str, float]:
        """Figures of the policy, as it would be written, on the held-out prompts, beside its start's."""
        assert self.examiner is not None
        with averaged(self.average):
            figures, warning = self.examiner.evaluate(step)
        if warning:
            self.runtime.say(f"step {step:,}: {warning}")
        return figures

    @property
    def is_exhausted(self) -> bool:
        """Whether the policy has been no better for so long that the run is to end."""
        return self.examiner is not None and self.examiner.is_exhausted(self.patience)

    def resume(self) -> int:
        """Put back the newest checkpoint; the step it was made at, 0 without one."""
        checkpoint = self.runtime.checkpoints.latest()
        if checkpoint is None:
            return 0
        state, tensors = checkpoint.state, checkpoint.tensors()
        restore(self.models.learners, tensors, state["optimizers"])
        if self.average is not None:
            self.average.restore(tensors)
        self.progress = Progress(**state["progress"])
        if self.examiner is not None:
            self.examiner.restore(tensors, state["best"])
        self.runtime.say(f"resumed at step {checkpoint.step:,}")
        return checkpoint.step

    def save(self, step: int) -> None:
        """A checkpoint of `step`: policy, critic, both optimizers, the KL controller, how far the prompts are."""
        tensors, optimizers = saved(self.models.learners)
        if self.average is not None:
            tensors |= self.average.saved()
        of_best, best = ({}, None) if self.examiner is None else self.examiner.saved()
        tensors |= of_best
        state = {"progress": dataclasses.asdict(self.progress), "best": best, "optimizers": optimizers}
        self.runtime.checkpoints.save(step, tensors, state)

    def summary(self, names: Sequence[str]) -> dict[str, float]:
        """The first step's reward, the last ones' means of the figures of these names, and the FLOPs of all."""
        first = self.progress.history[0]["reward"]
        return {"reward_first": first, **self.progress.recent(names), "flops": self._flops(self.progress.read)}

    def finish(self) -> PreTrainedModel:
        """The policy as it is to be written: the best, or averaged, or as it is."""
        if self.examiner is not None and self.examiner.keeps_best:
            self.examiner.put_best()
        elif self.average is not None:
            self.average.put()
        return self.models.policy.model

    def _flops(self, tokens: float) -> float:
        """FLOPs of steps in which so many tokens of prompts and answers were read: forwards (decode, reward, policy,
        reference, critic) of 2 and updates of 6 (of adapters 4) a token and parameter, every model taken for alike."""
        policy, critics = self.models.policy, int(self.models.critic is not None)
        update = 6 if policy.adapters is None else 4
        passes = (4 + critics) * 2 + (1 + critics) * update * self.updates.epochs
        return float(passes * count_parameters(policy.model)[1] * tokens)
