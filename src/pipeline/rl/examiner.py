"""The evaluations of a run: the policy and its start on the same held-out prompts, and the best policy so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from pipeline.model.build import load_parameters, unique_parameters
from pipeline.model.generation import draw_uniforms
from pipeline.rl import kl
from pipeline.rl.asking import Asking, Pricing
from pipeline.rl.evaluation import Marks, Standing, report
from pipeline.rl.forwards import Cut, logprobs_and_entropies, precision, sweep, token_logprobs
from pipeline.rl.models import Models
from pipeline.rl.place import Place
from pipeline.rl.prompts import Prompts
from pipeline.rl.scoring import Scorer


@dataclass(frozen=True)
class Exam:
    """What is asked, and how."""

    prompts: Prompts
    asking: Asking
    pricing: Pricing
    gold: Scorer | None
    """What the answers are really worth."""
    cut: Cut
    place: Place


class Examiner:
    """Evaluates a run's policy. With `keeps_best` the weights of the best one are kept, the start's to begin with."""

    def __init__(self, exam: Exam, models: Models, *, keeps_best: bool) -> None:
        self.exam, self.models, self.keeps_best = exam, models, keeps_best
        self.start: Marks | None = None  # taken when first needed; the same whenever that is
        self.best: Standing | None = None
        self.best_weights: dict[str, Tensor] = {}
        if keeps_best:
            self._keep()

    def evaluate(self, step: int) -> tuple[dict[str, float], str]:
        """(figures of the policy as it is, beside the start's; what is to be said, if anything)."""
        if self.start is None:
            with self.models.reference() as reference:
                self.start = self.marks(reference)
        figures = report(self.marks(self.models.policy.model), self.start, self.exam.place.reduce)
        best = self.best or Standing.of(0, report(self.start, self.start, self.exam.place.reduce))
        warning, self.best = best.warning(figures), best.after(step, figures)
        if self.keeps_best and self.best.step == step:
            self._keep()
        return figures | {"best_step": float(self.best.step)}, warning

    def marks(self, model: PreTrainedModel) -> Marks:
        """The marks of a model on this rank's share of the prompts."""
        exam, models, place = self.exam, self.models, self.exam.place
        order, longest = exam.prompts.order, exam.asking.longest
        own = list(range(place.rank, len(order), place.world_size))
        uniforms_BT = draw_uniforms(len(order), longest, place.generator("evaluation"))[own]  # the same every time
        ids, rows = [exam.prompts.ids[order[each]] for each in own], [exam.prompts.rows[order[each]] for each in own]
        rollout, rows = exam.asking.answers(model, ids, uniforms_BT, rows)
        _, rewards_B, _ = exam.pricing.rewards(models, rollout, rows)
        with precision(place.device, place.bf16):
            logprobs_BT, entropies_BT = sweep(
                rollout, exam.cut, 2, lambda part: logprobs_and_entropies(model, part, models.reading)
            )
            with models.reference() as start:
                (reference_BT,) = sweep(
                    rollout, exam.cut, 1, lambda part: (token_logprobs(start, part, models.reading),)
                )
        gold_B, mask_BT = None, rollout.response_mask_BT
        if exam.gold is not None:
            with models.offload.brought(exam.gold.models):
                gold_B = exam.gold.score(rollout, rows)[0]
        return Marks(
            reward_B=rewards_B,
            gold_B=gold_B,
            kl_B=kl.sequence_kl(kl.k1(logprobs_BT, reference_BT), mask_BT),
            length_B=rollout.lengths_B,
            ended_B=rollout.is_ended_B,
            entropy_B=entropies_BT.sum(dim=1) / mask_BT.sum(dim=1),
        )

    def is_exhausted(self, patience: int | None) -> bool:
        """Whether the last `patience` evaluations were no better than the best before them; alike on every rank."""
        return patience is not None and self.best is not None and self.best.since >= patience

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        """What a checkpoint keeps: tensors, and plain JSON; undone by `restore`."""
        tensors = {f"best.{name}": tensor for name, tensor in self.best_weights.items()}
        return tensors, None if self.best is None else self.best.saved()

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any] | None) -> None:
        """Put back what `saved` gave."""
        self.best = None if state is None else Standing(**state)
        self.best_weights = {name: tensors[f"best.{name}"].clone() for name in self.best_weights}

    def put_best(self) -> None:
        """The best policy's weights as the policy's, for good."""
        load_parameters(self.models.policy.model, self.saved()[0], "best")

    def _keep(self) -> None:
        trained = unique_parameters(self.models.policy.model)
        self.best_weights = {name: value.clone() for name, value in trained.items()}
