"""Answers to prompts with their scores, criticised and revised where that is asked for: what a part of sample holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pipeline.model.build import count_parameters
from pipeline.model.generation import draw_uniforms
from pipeline.rl.asking import Asking
from pipeline.rl.keeping import Answer, Group
from pipeline.rl.parts import Item
from pipeline.rl.prompts import Prompts
from pipeline.rl.revising import Reviser
from pipeline.rl.scoring import Responses, Scorer


@dataclass(frozen=True)
class Speaker:
    """A model that answers, and what scores or revises its answers."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    asking: Asking
    prompts: Prompts
    samples: int
    """Answers to each prompt."""
    keeps_unfinished: bool
    scorer: Scorer | None = None
    reviser: Reviser | None = None

    def answer(self, places: Sequence[int]) -> list[Item]:
        """The answers to the prompts at these places of the order, an item a prompt. A prompt's random numbers are its
        own, whatever part it is in."""
        prompts, asking, samples = self.prompts, self.asking, self.samples
        asked = [prompts.order[place] for place in places for _ in range(samples)]
        uniforms_BT = None
        if asking.temperature > 0:
            draws = [asking.place.generator("sampling", place) for place in places]
            uniforms_BT = torch.cat([draw_uniforms(samples, asking.longest, draw) for draw in draws])
        rows = [prompts.rows[row] for row in asked]
        rollout, rows = asking.answers(self.model, [prompts.ids[row] for row in asked], uniforms_BT, rows, samples)
        columns: dict[str, list[Any]] = {
            "text": Responses(rollout, rows, self.tokenizer, asking.stop_strings).texts,
            "length": rollout.lengths_B.tolist(),
            "ended": rollout.is_ended_B.tolist(),
        }
        if self.scorer is not None:
            scores_B, terms = self.scorer.score(rollout, rows)
            columns |= {"score": scores_B.tolist()} | {name: term_B.tolist() for name, term_B in terms.items()}
        answers = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        if self.reviser is not None:
            self._revise(self.reviser, places, answers)
        return [
            {
                "prompt": prompts.rows[prompts.order[place]]["prompt"],
                "reference": prompts.rows[prompts.order[place]]["reference"],
                "answers": answers[number * samples : (number + 1) * samples],
            }
            for number, place in enumerate(places)
        ]

    def _revise(self, reviser: Reviser, places: Sequence[int], answers: list[Item]) -> None:
        """What could be kept of the answers, criticised and revised in place; each by random numbers of its own."""
        asked, revised = [], []
        for number, answer in enumerate(answers):
            place = places[number // self.samples]
            answer |= {"revised": answer["text"], "rounds": [], "tokens": 0}
            if answer["text"].strip() and (answer["ended"] or self.keeps_unfinished):
                prompt = self.prompts.rows[self.prompts.order[place]]["prompt"]
                asked.append(((place, number % self.samples), prompt, answer["text"]))
                revised.append(answer)
        for answer, found in zip(revised, reviser.revise(asked), strict=True):
            answer |= {"revised": found.text, "rounds": found.rounds, "tokens": found.tokens}

    def spent(self, items: Sequence[Item]) -> tuple[int, float]:
        """(tokens of prompts and answers, FLOPs of all models) that the items took."""
        answers = [each for item in items for each in item["answers"]]
        read = sum(len(self.prompts.ids[row]) for row in self.prompts.order)
        written = sum(each["length"] for each in answers)
        scoring = len(self.scorer.models) * (read * self.samples + written) if self.scorer else 0
        flops = 2.0 * count_parameters(self.model)[1] * (read + written + scoring)
        if self.reviser:
            flops += 2.0 * self.reviser.writer.parameters * sum(each["tokens"] for each in answers)
        return read + written, flops


def group_of(item: Item) -> Group:
    """A prompt with its answers, as what is kept of them is decided on."""
    names = ("score", "revised", "rounds")
    answers = [
        Answer(each["text"], each["ended"], **{name: each[name] for name in names if name in each})
        for each in item["answers"]
    ]
    return Group(item["prompt"], item["reference"], answers)


def term_means(items: Sequence[Item]) -> dict[str, float]:
    """The mean of each term of the reward over all answers; {} where its terms are not told apart."""
    answers = [each for item in items for each in item["answers"]]
    names = [name for name in answers[0] if name.startswith("reward_")]
    return {name: sum(each[name] for each in answers) / len(answers) for name in names}
