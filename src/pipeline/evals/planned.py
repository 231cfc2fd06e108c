"""What an evaluation measures: the models, the tasks with all their rows read, and the units of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifacts import Artifact
from pipeline.data.pydocs import Question
from pipeline.data.tokenizers import load_tokenizer
from pipeline.evals import exact_match
from pipeline.evals.own_tasks import OwnTask
from pipeline.evals.subject import is_chat

Row = dict[str, Any]

FOR_ALL = ("bits_per_byte", "multiple_choice")
FOR_CHAT = ("preference_accuracy", "exact_match", "greedy", "sampled", "win_rate")
FOR_REWARD = ("reward_accuracy", "reward_bench")
TASKS = (*FOR_ALL, *FOR_REWARD, *FOR_CHAT)
WITHOUT_BASELINE = ("bits_per_byte", "win_rate", "perplexity", "lm_eval")
"""Tasks and kinds whose figures are never set against the baseline's own."""


@dataclass(frozen=True)
class Model:
    """An artifact under the name that results give it."""

    name: str
    artifact: Artifact


@dataclass(frozen=True)
class JudgeSpec:
    """Who compares two answers: a language model, or one behind an address; neither where the reward model does."""

    artifact: Artifact | None
    url: str | None
    model: str | None
    constitution: Path | None


@dataclass(frozen=True)
class Plan:
    """What is measured, and on what: all data read, all limits set."""

    models: tuple[Model, ...]
    baseline: Model | None
    reward: Model | None
    judge: JudgeSpec | None
    tasks: tuple[str, ...]
    """Built-in tasks."""
    own: Mapping[str, OwnTask]
    """Tasks on files of the user's, and of lm-eval, by name."""
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
    """Their pairs without ties, `row` saying which list each is of: what the policies are."""
    reward_bench: Sequence[Row]
    """Rows of RewardBench, their subset as the kind."""
    lengths: tuple[Sequence[int], Sequence[int]]
    """Characters of the chosen and of the rejected answers of other pairs: what the length-only scorer learns from."""
    seed: int
    max_length: int
    max_new_tokens: int
    token_budget: int
    bf16: bool

    def kind(self, task: str) -> str:
        """A built-in task's own name; the kind of one of the user's."""
        return self.own[task].kind if task in self.own else task


@dataclass(frozen=True)
class Unit:
    """One task of one model."""

    model: Model
    task: str
    is_reported: bool
    """False for what is only measured to compare with: a baseline that is not among the models."""


def units(plan: Plan, say: Callable[[str], None] = lambda text: None) -> list[Unit]:
    """All units, model by model."""
    found = [Unit(model, task, True) for model in plan.models for task in _tasks_of(plan, model, say)]
    if plan.baseline is not None and plan.baseline.name not in {model.name for model in plan.models}:
        compared = [task for task in _tasks_of(plan, plan.baseline, say) if plan.kind(task) not in WITHOUT_BASELINE]
        found += [Unit(plan.baseline, task, False) for task in compared]
    if plan.reward is not None:
        found += [Unit(plan.reward, task, True) for task in FOR_REWARD if task in plan.tasks]
    return found


def _tasks_of(plan: Plan, model: Model, say: Callable[[str], None]) -> list[str]:
    """A base model answers no prompts; and implicit rewards and win rates are relative to a baseline."""
    chat = is_chat(model.artifact.model, load_tokenizer(model.artifact.model))
    possible = FOR_ALL + (FOR_CHAT if chat else ())
    found = []
    for task in (*plan.tasks, *plan.own):
        kind = plan.kind(task)
        applies = task in possible if task in plan.tasks else chat or kind != "win_rate"
        if kind in ("preference_accuracy", "win_rate"):
            applies = applies and plan.baseline is not None
        if kind == "win_rate" and plan.baseline is not None and model.name == plan.baseline.name:
            applies = False  # against itself
        if applies:
            found.append(task)
        elif task in plan.own and not chat:
            say(f"{task}: {model.name} is a base model and answers no prompts")
    return found
