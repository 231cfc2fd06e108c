"""Multiple choice by log-likelihood on rows of one's own (MMLU, ARC and HellaSwag layouts).

    acc         argmax over choices of log p(choice | question)
    acc_norm    the same, divided by the choice's characters, as lm-eval does
    pmi         log p(choice | question) - log p(choice | no question) (Holtzman et al. 2021)
    acc_centred (acc - chance) / (1 - chance): 0 is guessing, 1 is perfect (DataComp-LM, Li et al. 2024)

Where the choices are listed and answered by letter (MMLU), the four have one token each and acc_norm is acc. Every
figure is over the questions that fit the model's length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.evals import statistics
from pipeline.evals.fewshot import Asker, Shown
from pipeline.evals.layouts import LETTERS, Question
from pipeline.evals.likelihood import Request
from pipeline.evals.statistics import Estimate, PerItem

Item = dict[str, Any]
NOTHING = "Answer:"
"""What stands in the place of a question, for pmi; nothing does where the choices go on with a text."""


def asked(question: Question, letters: bool) -> str:
    """The question as lm-eval words it: MMLU's by letters, ARC's without, HellaSwag's text as it is."""
    if letters:
        listed = "\n".join(f"{LETTERS[place]}. {choice}" for place, choice in enumerate(question.choices))
        return f"{question.text}\n{listed}\nAnswer:"
    return question.text if question.is_continued else f"Question: {question.text}\nAnswer:"


def answers(question: Question, letters: bool) -> list[str]:
    """The choices as they are scored, each with the space before it."""
    return [f" {LETTERS[place] if letters else choice}" for place, choice in enumerate(question.choices)]


def example(question: Question, letters: bool) -> tuple[str, str, str]:
    """(subject, question, right answer) as an example shows it."""
    return question.subject, asked(question, letters), answers(question, letters)[question.answer]


def score(asker: Asker, questions: Sequence[Question], shown: Callable[[str], Shown], letters: bool) -> list[Item]:
    """One item a question that fits: the choices' log-likelihoods with the question and without."""
    nothing = Shown("", ())
    requests: list[Request] = []
    kept: list[Question] = []
    for question in questions:
        said, before = answers(question, letters), "" if question.is_continued else NOTHING
        with_question = [asker.request(shown(question.subject), asked(question, letters), each) for each in said]
        if max(len(each.prompt) + len(each.completion) for each in with_question) <= asker.subject.max_length + 1:
            kept.append(question)
            requests += with_question + [asker.request(nothing, before, each) for each in said]
    values = iter(np.round(asker.subject.log_likelihoods(requests), 5).tolist())
    items = []
    for question in kept:
        item: Item = {"item": question.item, "answer": question.answer, "subject": question.subject}
        item["characters"] = [1 if letters else len(choice) for choice in question.choices]
        item["named"] = [next(values) for _ in question.choices]
        item["nameless"] = [next(values) for _ in question.choices]
        items.append(item)
    return items


def _hits(items: Sequence[Item]) -> dict[str, list[float]]:
    """Metric -> whether each item is right."""
    found: dict[str, list[float]] = {"acc": [], "acc_norm": [], "pmi": []}
    for item in items:
        named_K, nameless_K = np.array(item["named"]), np.array(item["nameless"])
        for name, values_K in (
            ("acc", named_K),
            ("acc_norm", named_K / np.array(item["characters"])),
            ("pmi", named_K - nameless_K),
        ):
            found[name].append(float(int(values_K.argmax()) == item["answer"]))
    return found


def figures(items: Sequence[Item], baseline: Sequence[Item] | None, seed: int) -> dict[str, Estimate]:
    """Accuracies over questions, `acc/SUBJECT` where there are several, and differences from the baseline's."""
    hits = _hits(items)
    found = {name: statistics.mean(values, seed) for name, values in hits.items()}
    chance = float(np.mean([1 / len(item["named"]) for item in items])) if items else 0.0
    found["acc_centred"] = statistics.mean([(hit - chance) / (1 - chance) for hit in hits["acc"]], seed)
    subjects = sorted({item["subject"] for item in items} - {""})
    for subject in subjects if len(subjects) > 1 else ():
        own = [hit for hit, item in zip(hits["acc"], items, strict=True) if item["subject"] == subject]
        found[f"acc/{subject}"] = statistics.mean(own, seed)
    if baseline is not None:
        theirs = _hits(baseline)
        for name in hits:
            found[f"{name}_difference"] = _difference(items, hits[name], baseline, theirs[name], seed)
    return found


def _difference(
    items: Sequence[Item], hits: Sequence[float], baseline: Sequence[Item], theirs: Sequence[float], seed: int
) -> Estimate:
    """Ours minus theirs over the questions that both could be asked."""
    known: Mapping[int, float] = {item["item"]: hit for item, hit in zip(baseline, theirs, strict=True)}
    pairs = [(hit, known[item["item"]]) for item, hit in zip(items, hits, strict=True) if item["item"] in known]
    ours, others = zip(*pairs, strict=True) if pairs else ((), ())
    return statistics.paired_difference(ours, others, seed)


def per_item(items: Sequence[Item]) -> PerItem:
    """Whether each question is right."""
    return {
        name: {item["item"]: (hit, 1.0) for item, hit in zip(items, values, strict=True)}
        for name, values in _hits(items).items()
    }
