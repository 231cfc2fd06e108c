"""Multiple choice by likelihood: which of these sentences describes the function that the question names?

    acc        argmax over candidates of log p(sentence | question)
    acc_norm   the same, divided by the sentence's UTF-8 bytes
    pmi        log p(sentence | question) - log p(sentence | the question without the name): pointwise mutual
               information (Holtzman et al. 2021, "domain conditional PMI"), the headline
    pmi_swapped  pmi with another function's name in the question: what it exceeds chance by, the model gets
               without the name

A chat model is asked in its chat template, the sentence and its stop token being the answer. A base model, which has
never seen a question, is given the corpus' own layout: the name, a colon, the sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pipeline.data.pydocs import Question
from pipeline.data.tokenizers import encode_text
from pipeline.evals import statistics
from pipeline.evals.likelihood import Request
from pipeline.evals.statistics import Estimate, Floats, PerItem
from pipeline.evals.subject import Subject, chat_request

Item = dict[str, Any]


def score(subject: Subject, questions: Sequence[Question], swapped: int) -> list[Item]:
    """One item a question: the candidates' log-likelihoods under the question, without the name, and, for the first
    `swapped` questions, under the swapped name."""
    ask = _chat(subject) if subject.is_chat else _plain(subject)
    requests: list[Request] = []
    for number, question in enumerate(questions):
        asked = [question.question, question.nameless] + [question.swapped] * (number < swapped)
        requests += [ask(text, choice) for text in asked for choice in question.choices]
    values = iter(np.round(subject.log_likelihoods(requests), 5).tolist())
    items = []
    for number, question in enumerate(questions):
        item: Item = {"item": question.name, "answer": question.answer}
        item["bytes"] = [len(choice.encode()) for choice in question.choices]
        for key in ["named", "nameless"] + ["swapped"] * (number < swapped):
            item[key] = [next(values) for _ in question.choices]
        items.append(item)
    return items


def _chat(subject: Subject) -> Callable[[str, str], Request]:
    """The question as a user's turn, the sentence as the answer; each is encoded once."""
    prompts: dict[str, tuple[int, ...]] = {}
    completions: dict[str, tuple[int, ...]] = {}

    def ask(question: str, choice: str) -> Request:
        if question not in prompts or choice not in completions:
            asked, said = {"role": "user", "content": question}, {"role": "assistant", "content": choice}
            request = chat_request(subject.tokenizer, [asked], [said])
            prompts[question], completions[choice] = request.prompt, request.completion
        return Request(prompts[question], completions[choice])

    return ask


def _plain(subject: Subject) -> Callable[[str, str], Request]:
    """`name`: sentence, behind a bos; the question without a name is about `function`."""
    start = subject.start_token

    def ask(question: str, choice: str) -> Request:
        name = question.split("`")[1] if "`" in question else "function"
        prompt = encode_text(subject.tokenizer, f"`{name}`:")
        return Request((start, *prompt), tuple(encode_text(subject.tokenizer, f" {choice}")))

    return ask


def figures(items: Sequence[Item], baseline: Sequence[Item] | None, seed: int) -> dict[str, Estimate]:
    """Accuracies over questions; `pmi_difference` is paired with the baseline's answers to the same questions."""
    answer_N = np.array([item["answer"] for item in items])
    named_NK, bytes_NK = _matrix(items, "named"), _matrix(items, "bytes")
    correct = (_pmi(items, "named") == answer_N).astype(float)
    found = {
        "acc": statistics.mean(named_NK.argmax(1) == answer_N, seed),
        "acc_norm": statistics.mean((named_NK / bytes_NK).argmax(1) == answer_N, seed),
        "pmi": statistics.mean(correct, seed),
    }
    swapped = [item for item in items if "swapped" in item]
    if swapped:
        hit = _pmi(swapped, "swapped") == answer_N[: len(swapped)]
        found["pmi_swapped"] = statistics.mean(hit, seed)
    if baseline is not None:
        theirs = (_pmi(baseline, "named") == answer_N).astype(float)
        found["pmi_difference"] = statistics.paired_difference(correct, theirs, seed)
    return found


def per_item(items: Sequence[Item]) -> PerItem:
    """Whether each question is right, by its place: the same questions are put to every model."""
    answer_N = np.array([item["answer"] for item in items])
    named_NK = _matrix(items, "named")
    taken = {
        "pmi": _pmi(items, "named"),
        "acc": named_NK.argmax(1),
        "acc_norm": (named_NK / _matrix(items, "bytes")).argmax(1),
    }
    return {name: {i: (float(hit), 1.0) for i, hit in enumerate(taken[name] == answer_N)} for name in taken}


def _matrix(items: Sequence[Item], key: str) -> Floats:
    return np.array([item[key] for item in items], dtype=np.float64)


def _pmi(items: Sequence[Item], key: str) -> Floats:
    """The candidate of the largest pointwise mutual information. [N]"""
    return np.asarray((_matrix(items, key) - _matrix(items, "nameless")).argmax(1))
