"""The one runner: every task over every model, a unit at a time, resumable by unit.

A unit is one task of one model. What it found, item by item, is a file of its own in the checkpoints' folder, written
whole or not at all; a run that was stopped skips the units it finds there. Figures and comparisons are made from the
items at the end, in milliseconds. With several ranks the units are dealt out; no unit needs another.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifacts import Artifact, write_json
from pipeline.data.pydocs import Question
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import ConfigError
from pipeline.evals import (
    bits_per_byte,
    exact_match,
    length_only,
    multiple_choice,
    preference_accuracy,
    reward_accuracy,
    reward_bench,
    samples,
)
from pipeline.evals.results import Result
from pipeline.evals.statistics import Estimate, PerItem
from pipeline.evals.subject import Subject, is_chat, load_subject
from pipeline.evals.variants import Found
from pipeline.model.reward import Ensemble, RewardModel, load_scorer_of

if TYPE_CHECKING:
    from pipeline.runtime import Runtime

Item = dict[str, Any]
Row = dict[str, Any]

FOR_ALL = ("bits_per_byte", "multiple_choice")
FOR_CHAT = ("preference_accuracy", "exact_match", "greedy", "sampled")
FOR_REWARD = ("reward_accuracy", "reward_bench")
TASKS = (*FOR_ALL, *FOR_REWARD, *FOR_CHAT)


@dataclass(frozen=True)
class Model:
    """An artifact under the name that results give it."""

    name: str
    artifact: Artifact


@dataclass(frozen=True)
class Plan:
    """What is measured, and on what: all data read, all limits set."""

    models: tuple[Model, ...]
    baseline: Model | None
    reward: Model | None
    tasks: tuple[str, ...]
    texts: Sequence[str]
    questions: Sequence[Question]
    swapped: int
    """How many of the questions are asked with another function's name too."""
    prompts: Sequence[Row]
    match: exact_match.Match | None
    """How exact_match compares an answer with its reference."""
    ranked: Sequence[Row]
    """Held-out pairs and lists, ties too: what the reward model is measured on."""
    preferences: Sequence[Row]
    """Their pairs without ties: what the policies are."""
    reward_bench: Sequence[Row]
    """Rows of RewardBench, their subset as the kind."""
    lengths: tuple[Sequence[int], Sequence[int]]
    """Characters of the chosen and of the rejected answers of other pairs: what the length-only scorer learns from."""
    seed: int
    max_length: int
    max_new_tokens: int
    token_budget: int
    bf16: bool


@dataclass(frozen=True)
class Unit:
    """One task of one model."""

    model: Model
    task: str
    is_reported: bool
    """False for what is only measured to compare with: a baseline that is not among the models."""


def units(plan: Plan) -> list[Unit]:
    """All units, model by model."""
    found = [Unit(model, task, True) for model in plan.models for task in _tasks_of(plan, model)]
    if plan.baseline is not None and plan.baseline.name not in {model.name for model in plan.models}:
        compared = [task for task in _tasks_of(plan, plan.baseline) if task != "bits_per_byte"]
        found += [Unit(plan.baseline, task, False) for task in compared]
    if plan.reward is not None:
        found += [Unit(plan.reward, task, True) for task in FOR_REWARD if task in plan.tasks]
    return found


def _tasks_of(plan: Plan, model: Model) -> list[str]:
    """A base model answers no prompts; and implicit rewards are relative to a baseline."""
    chat = is_chat(model.artifact.model, load_tokenizer(model.artifact.model))
    possible = FOR_ALL + (FOR_CHAT if chat else ())
    return [task for task in plan.tasks if task in possible and (task != "preference_accuracy" or plan.baseline)]


def evaluate(plan: Plan, folder: Path, runtime: Runtime) -> tuple[list[Result], list[Item], Found]:
    """All figures, all items behind them, each with its model and task, and what the models' figures are item by item.
    Every rank returns the same.

    folder: where the units' files are kept and looked for.
    """
    todo = units(plan)
    if not todo:
        raise ConfigError("no task applies to these models", mend="leave `tasks` unset, or add a chat model")
    files = [folder / f"{number:03d}-{unit.task}.json" for number, unit in enumerate(todo)]
    if runtime.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    runtime.barrier()
    done = [file for file in files if file.exists()]
    runtime.checkpoints.resumed_from = len(done)
    if runtime.is_main:
        runtime.metrics.cut(0, sum(json.loads(file.read_text(encoding="utf-8"))["seconds"] for file in done))
    runtime.barrier()  # every rank has looked before any writes: they must agree on what is left
    _work(plan, [(unit, file) for unit, file in zip(todo, files, strict=True) if file not in done], len(todo), runtime)
    runtime.barrier()
    found = {
        (unit.model.name, unit.task): json.loads(file.read_text(encoding="utf-8"))["items"]
        for unit, file in zip(todo, files, strict=True)
    }
    reported = [unit for unit in todo if unit.is_reported]
    results = [result for unit in reported for result in _results(plan, unit, found)]
    items = [
        {"model": unit.model.name, "task": unit.task} | item
        for unit in reported
        for item in found[unit.model.name, unit.task]
    ]
    per_item: dict[str, dict[str, PerItem]] = {model.name: {} for model in plan.models}
    for unit in reported:
        if unit.task not in FOR_REWARD:  # the reward model's, which is one
            name, task = unit.model.name, unit.task
            per_item[name][task] = _per_item(task, found[name, task], _baselines(plan, unit, found))
    return results, items, per_item


def _work(plan: Plan, todo: Sequence[tuple[Unit, Path]], total: int, runtime: Runtime) -> None:
    """This rank's share of the units that are left."""
    with runtime.progress("evaluate", total, "units") as bar:
        bar.start_at(total - len(todo))
        scorers = Scorers(plan, runtime, total - len(todo))
        for number, (unit, file) in enumerate(todo):
            if number % runtime.world_size == runtime.rank:
                start = time.monotonic()
                items = scorers.score(unit)
                seconds = round(time.monotonic() - start, 3)
                write_json(file, {"model": unit.model.name, "task": unit.task, "seconds": seconds, "items": items})
                scorers.finished += 1
            bar.advance()


@dataclass
class Scorers:
    """The loaded models: the one at work, the baseline, the reward model."""

    plan: Plan
    runtime: Runtime
    finished: int
    loaded: dict[str, Subject] = field(default_factory=dict)
    reward: RewardModel | Ensemble | None = None

    def score(self, unit: Unit) -> list[Item]:
        """The items of one unit."""
        plan = self.plan
        if unit.task in FOR_REWARD:
            return reward_accuracy.score(
                self.reward_model(),
                load_tokenizer(unit.model.artifact.model),
                plan.ranked if unit.task == "reward_accuracy" else plan.reward_bench,
                max_length=plan.max_length,
                token_budget=plan.token_budget,
                tick=self.tick,
            )
        subject = self.subject(unit.model)
        if unit.task == "bits_per_byte":
            return bits_per_byte.score(subject, plan.texts)
        if unit.task == "multiple_choice":
            return multiple_choice.score(subject, plan.questions, plan.swapped)
        if unit.task == "preference_accuracy":
            return preference_accuracy.score(subject, plan.preferences)
        if unit.task == "exact_match":
            assert plan.match is not None
            return exact_match.score(subject, plan.prompts, match=plan.match, max_new_tokens=plan.max_new_tokens)
        assert unit.task in ("greedy", "sampled"), unit.task
        needs_kl = unit.task == "sampled" and unit.model != plan.baseline
        return samples.score(
            subject,
            plan.prompts,
            max_new_tokens=plan.max_new_tokens,
            generator=None if unit.task == "greedy" else self.runtime.generator("samples"),
            baseline=self.subject(plan.baseline) if needs_kl and self._reads(plan.baseline, unit.model) else None,
            rewards=self.rewards if self._reads(plan.reward, unit.model) else None,
        )

    def subject(self, model: Model | None) -> Subject:
        """The loaded model; of the others only the baseline is kept."""
        assert model is not None
        if model.name not in self.loaded:
            kept = self.plan.baseline.name if self.plan.baseline is not None else ""
            self.loaded = {name: subject for name, subject in self.loaded.items() if name == kept}
            self.loaded[model.name] = load_subject(
                model.name,
                model.artifact.model,
                self.runtime.device,
                max_length=self.plan.max_length,
                token_budget=self.plan.token_budget,
                bf16=self.plan.bf16,
                tick=self.tick,
            )
        return self.loaded[model.name]

    def reward_model(self) -> RewardModel | Ensemble:
        """The reward model, or the ensemble, loaded once."""
        if self.reward is None:
            assert self.plan.reward is not None
            self.reward = load_scorer_of(self.plan.reward.artifact, self.runtime)
        return self.reward

    def rewards(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Normalised reward of rows of tokens; one that was cut off is read as though it had stopped there."""
        reward = self.reward_model()
        suffix = list(reward.suffix_ids)
        ended = [list(row) if list(row[-len(suffix) :]) == suffix else [*row, *suffix] for row in rows]
        return reward_accuracy.rewards(reward, ended, token_budget=self.plan.token_budget, tick=self.tick)

    def tick(self) -> None:
        """After every batch: stop if asked to. Finished units stay."""
        if self.runtime.halt.asked is not None:
            self.runtime.stop(self.finished)

    def _reads(self, other: Model | None, model: Model) -> bool:
        """Whether the other model can score this one's answers; says so where it can't."""
        if other is None:
            return False
        theirs, ours = other.artifact, model.artifact
        same = (theirs.tokenizer_hash, theirs.template_hash) == (ours.tokenizer_hash, ours.template_hash)
        if not same:
            what = f"{model.name} has another tokenizer or chat template than {other.name}"
            self.runtime.say(f"{what}, which cannot score its answers")
        return same


def _results(plan: Plan, unit: Unit, found: dict[tuple[str, str], list[Item]]) -> Iterator[Result]:
    items = found[unit.model.name, unit.task]
    for metric, estimate in _figures(plan, unit.task, items, _baselines(plan, unit, found)).items():
        figure = (estimate.value, estimate.low, estimate.high, estimate.n)
        yield Result(unit.model.name, unit.model.artifact.fingerprint, unit.task, metric, *figure)


def _baselines(plan: Plan, unit: Unit, found: dict[tuple[str, str], list[Item]]) -> list[Item] | None:
    """The baseline's items of the unit's task; None for the baseline itself."""
    if plan.baseline is None or unit.model.name == plan.baseline.name:
        return None
    return found.get((plan.baseline.name, unit.task))


def _per_item(task: str, items: list[Item], baseline: list[Item] | None) -> PerItem:
    """The figures of one unit, item by item, of those that are a mean or a ratio of sums."""
    if task == "bits_per_byte":
        return bits_per_byte.per_item(items)
    if task == "multiple_choice":
        return multiple_choice.per_item(items)
    if task == "preference_accuracy":
        return preference_accuracy.per_item(items, baseline) if baseline is not None else {}
    if task == "exact_match":
        return exact_match.per_item(items)
    return samples.per_item(items)


def _figures(plan: Plan, task: str, items: list[Item], baseline: list[Item] | None) -> dict[str, Estimate]:
    """The figures of one unit; `baseline` is the baseline's items of the same task, None for itself."""
    if task == "bits_per_byte":
        return bits_per_byte.figures(items, plan.seed)
    if task == "multiple_choice":
        return multiple_choice.figures(items, baseline, plan.seed)
    if task == "reward_accuracy":
        return reward_accuracy.figures(items, length_only.fit(*plan.lengths), plan.seed)
    if task == "reward_bench":
        return reward_bench.figures(items, plan.seed)
    if task == "preference_accuracy":
        scorer = length_only.fit(*plan.lengths)
        return preference_accuracy.figures(items, baseline, scorer, plan.seed) if baseline is not None else {}
    if task == "exact_match":
        return exact_match.figures(items, baseline, plan.seed)
    return samples.figures(items, baseline, plan.seed)
