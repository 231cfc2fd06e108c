"""The loaded models of an evaluation, and what each unit asks of them, a few samples at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from pipeline.data.chat import encode_messages
from pipeline.data.messages import letters
from pipeline.data.tokenizers import load_tokenizer
from pipeline.evals import (
    bits_per_byte,
    choices,
    exact_match,
    exercises,
    lm_eval_tasks,
    multiple_choice,
    preference_accuracy,
    reward_accuracy,
    samples,
    win_rate,
)
from pipeline.evals.fewshot import Asker
from pipeline.evals.own_tasks import OwnTask
from pipeline.evals.planned import FOR_REWARD, Model, Plan, Unit
from pipeline.evals.subject import Subject, load_subject
from pipeline.model.reward import Ensemble, RewardModel, load_scorer_of
from pipeline.model.sampling import draw_uniforms
from pipeline.rl.comparing import Comparer, RemoteComparer, load_comparer
from pipeline.rl.judge_api import RemoteJudge
from pipeline.rl.parts import said_of
from pipeline.rl.scoring import text_in
from pipeline.runtime import Runtime

Item = dict[str, Any]
Row = dict[str, Any]
Placed = tuple[int, Item]
"""(the sample's place, its item)."""
LETTERS_A_TOKEN = 4
JUDGED_AT_ONCE = 16


@dataclass(frozen=True)
class Job:
    """A unit cut open: what each sample costs, and how some of them are scored."""

    costs: Sequence[int]
    """Tokens, roughly; those of a model's own tokenizer are not known yet."""
    score: Callable[[Sequence[int]], list[Placed]]
    """Places (ascending) -> the items that come of them; a sample too long gives none, a list several."""
    groups: Sequence[str] = ()
    """What is scored together for its own sake (the same examples before it); "" everywhere without it."""


@dataclass
class Scorers:
    """The loaded models: the one at work, the baseline, the reward model, the judge."""

    plan: Plan
    runtime: Runtime
    tick: Callable[[], None]
    """After every batch: the place to stop at."""
    loaded: dict[str, Subject] = field(default_factory=dict)
    reward: RewardModel | Ensemble | None = None
    judge: Comparer | RemoteComparer | None = None
    theirs: dict[tuple[str, tuple[int, ...]], list[Item]] = field(default_factory=dict)
    """The baseline's answers of win rates, by task and places."""

    def job(self, unit: Unit) -> Job:
        """What the unit's samples cost and how they are scored. No model is loaded before one is."""
        plan = self.plan
        if unit.task in plan.own:
            return self._own_job(unit, plan.own[unit.task])
        if unit.task in FOR_REWARD:
            rows = plan.ranked if unit.task == "reward_accuracy" else plan.reward_bench
            return Job([_letters(row) for row in rows], partial(self._rewarded, unit, rows))
        if unit.task == "bits_per_byte":
            return Job([len(text) // LETTERS_A_TOKEN for text in plan.texts], partial(self._texts, unit, plan.texts))
        if unit.task == "multiple_choice":
            asked = plan.questions
            return Job([3 * sum(map(len, q.choices)) // LETTERS_A_TOKEN for q in asked], partial(self._choices, unit))
        if unit.task == "preference_accuracy":
            return Job([_letters(row) for row in plan.preferences], partial(self._preferred, unit))
        costs = [_letters(row) + plan.max_new_tokens for row in plan.prompts]
        if unit.task == "win_rate":
            return Job(costs, partial(self._compared, unit, plan.prompts, plan.max_new_tokens))
        assert unit.task in ("exact_match", "greedy", "sampled"), unit.task
        return Job(costs, partial(self._exact if unit.task == "exact_match" else self._answered, unit))

    def _own_job(self, unit: Unit, own: OwnTask) -> Job:
        """Of a task of the user's own."""
        if own.kind == "lm_eval":
            return Job([1], partial(self._harness, unit, own))
        if own.kind == "perplexity":
            return Job([len(text) // LETTERS_A_TOKEN for text in own.texts], partial(self._texts, unit, own.texts))
        if own.kind == "multiple_choice":
            costs = [(len(q.text) + 2 * sum(map(len, q.choices))) // LETTERS_A_TOKEN for q in own.questions]
            return Job(costs, partial(self._own_choices, unit, own), [q.subject for q in own.questions])
        longest = own.rules(self.plan.max_new_tokens).max_new_tokens
        costs = [own.task.samples * (len(each.text) // LETTERS_A_TOKEN + longest) for each in own.exercises]
        if own.kind == "generate":
            return Job(costs, partial(self._exercises, unit, own), [each.subject for each in own.exercises])
        rows = [{"prompt": [{"role": "user", "content": each.text}], "reference": ""} for each in own.exercises]
        return Job(costs, partial(self._compared, unit, rows, longest))

    def _rewarded(self, unit: Unit, rows: Sequence[Row], places: Sequence[int]) -> list[Placed]:
        found = reward_accuracy.score(
            self.reward_model(),
            load_tokenizer(unit.model.artifact.model),
            [rows[place] for place in places],
            max_length=self.plan.max_length,
            token_budget=self.plan.token_budget,
            tick=self.tick,
        )
        return _numbered(found, places)

    def _texts(self, unit: Unit, texts: Sequence[str], places: Sequence[int]) -> list[Placed]:
        return _numbered(bits_per_byte.score(self.subject(unit.model), [texts[place] for place in places]), places)

    def _choices(self, unit: Unit, places: Sequence[int]) -> list[Placed]:
        swapped = sum(place < self.plan.swapped for place in places)  # they are the first ones
        asked = [self.plan.questions[place] for place in places]
        return list(zip(places, multiple_choice.score(self.subject(unit.model), asked, swapped), strict=True))

    def _preferred(self, unit: Unit, places: Sequence[int]) -> list[Placed]:
        rows = [self.plan.preferences[place] for place in places]
        return _numbered(preference_accuracy.score(self.subject(unit.model), rows), places)

    def _exact(self, unit: Unit, places: Sequence[int]) -> list[Placed]:
        assert self.plan.match is not None
        rows, longest = [self.plan.prompts[place] for place in places], self.plan.max_new_tokens
        found = exact_match.score(self.subject(unit.model), rows, match=self.plan.match, max_new_tokens=longest)
        return _numbered(found, places)

    def _answered(self, unit: Unit, places: Sequence[int]) -> list[Placed]:
        plan = self.plan
        needs_kl = unit.task == "sampled" and unit.model != plan.baseline
        uniforms_NT = None
        if unit.task == "sampled":
            uniforms_NT = draw_uniforms(len(plan.prompts), plan.max_new_tokens, self.runtime.generator("samples"))
        found = samples.score(
            self.subject(unit.model),
            [plan.prompts[place] for place in places],
            max_new_tokens=plan.max_new_tokens,
            uniforms_NT=None if uniforms_NT is None else uniforms_NT[list(places)],
            baseline=self.subject(plan.baseline) if needs_kl and self._reads(plan.baseline, unit.model) else None,
            rewards=self.rewards if self._reads(plan.reward, unit.model) else None,
        )
        return _numbered(found, places)

    def _own_choices(self, unit: Unit, own: OwnTask, places: Sequence[int]) -> list[Placed]:
        asked = [own.questions[place] for place in places]
        place_of = {question.item: place for question, place in zip(asked, places, strict=True)}
        found = choices.score(self._asker(unit, own), asked, own.shown, own.letters)
        return [(place_of[item["item"]], item) for item in found]

    def _exercises(self, unit: Unit, own: OwnTask, places: Sequence[int]) -> list[Placed]:
        asked, rules = [own.exercises[place] for place in places], own.rules(self.plan.max_new_tokens)
        place_of = {exercise.item: place for exercise, place in zip(asked, places, strict=True)}
        uniforms_NST: torch.Tensor | None = None
        if rules.samples > 1:
            drawn = draw_uniforms(
                len(own.exercises) * rules.samples, rules.max_new_tokens, self.runtime.generator("own", own.name)
            )
            uniforms_NST = drawn.view(len(own.exercises), rules.samples, -1)[list(places)]
        found = exercises.score(self._asker(unit, own), asked, own.shown, rules, uniforms_NST)
        return [(place_of[item["item"]], item) for item in found]

    def _compared(self, unit: Unit, rows: Sequence[Row], longest: int, places: Sequence[int]) -> list[Placed]:
        plan = self.plan
        assert plan.baseline is not None
        asked, key = [rows[place] for place in places], (unit.task, tuple(places))
        if key not in self.theirs:
            self.theirs[key] = _said(self.subject(plan.baseline), asked, longest)
        ours = _said(self.subject(unit.model), asked, longest)
        judge = self.comparer() if plan.judge is not None else None
        with said_of("eval"):
            found = win_rate.compared(ours, self.theirs[key], judge, None if judge else self.scores)
        self.tick()
        return _numbered(found, places)

    def _harness(self, unit: Unit, own: OwnTask, places: Sequence[int]) -> list[Placed]:
        subject = self.subject(unit.model)
        found = lm_eval_tasks.score(subject, own.task, self.plan.seed)
        return [(0, item) for item in found]

    def _asker(self, unit: Unit, own: OwnTask) -> Asker:
        subject = self.subject(unit.model)
        return Asker(subject, exercises.in_template(subject, own.task.apply_chat_template))

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

    def comparer(self) -> Comparer | RemoteComparer:
        """The judge, loaded once."""
        if self.judge is None:
            asked = self.plan.judge
            assert asked is not None
            assert asked.constitution is not None
            rules = text_in(asked.constitution)
            if asked.url is not None:
                assert asked.model is not None
                self.judge = RemoteComparer(RemoteJudge(asked.url, asked.model, rules))
            else:
                assert asked.artifact is not None
                self.judge = load_comparer(
                    asked.artifact, rules, batch_size=JUDGED_AT_ONCE, bf16=self.plan.bf16, runtime=self.runtime
                )
        return self.judge

    def rewards(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Normalised reward of rows of tokens; one that was cut off is read as though it had stopped there."""
        reward = self.reward_model()
        suffix = list(reward.suffix_ids)
        ended = [list(row) if list(row[-len(suffix) :]) == suffix else [*row, *suffix] for row in rows]
        return reward_accuracy.rewards(reward, ended, token_budget=self.plan.token_budget, tick=self.tick)

    def scores(self, prompts: Sequence[Sequence[dict[str, str]]], texts: Sequence[str]) -> list[float]:
        """Normalised reward of answers to conversations, in the reward model's own tokens."""
        assert self.plan.reward is not None
        tokenizer = load_tokenizer(self.plan.reward.artifact.model)
        said = zip(prompts, texts, strict=True)
        return self.rewards(
            [
                encode_messages(tokenizer, [*prompt, {"role": "assistant", "content": text}]).input_ids
                for prompt, text in said
            ]
        )

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


def _said(subject: Subject, rows: Sequence[Row], longest: int) -> list[Item]:
    """Greedy answers to the rows that leave room for one."""
    return samples.score(subject, rows, max_new_tokens=longest, uniforms_NT=None, baseline=None, rewards=None)


def _numbered(items: Sequence[Item], places: Sequence[int]) -> list[Placed]:
    """Items whose `item` counts the places as they were handed over, by the places themselves."""
    return [(places[item["item"]], item | {"item": places[item["item"]]}) for item in items]


def _letters(row: Row) -> int:
    """Tokens of all that a row says, roughly."""
    sides = [*(row[key] for key in ("prompt", "chosen", "rejected") if key in row), *row.get("answers", ())]
    return sum(len(letters(message)) for side in sides for message in side) // LETTERS_A_TOKEN + 1
