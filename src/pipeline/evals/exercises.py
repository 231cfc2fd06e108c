"""Answers in the model's own words to rows of one's own, right or wrong by the reference.

    accuracy   share of right answers: by the text, or by the last number (GSM8K, Cobbe et al. 2021)
    majority   of several samples a question: share whose most frequent answer is right (self-consistency,
               Wang et al. 2022); of answers as frequent the one that came first
    length, ended, difference   as of exact_match

Examples may show how the answer is come to (chain of thought, Wei et al. 2022). An answer that was cut off is wrong and
has no vote.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from pipeline.data.chat import stop_token_id
from pipeline.evals import statistics
from pipeline.evals.fewshot import Asker, Shown
from pipeline.evals.layouts import Exercise, final_answer
from pipeline.evals.statistics import Estimate, PerItem
from pipeline.evals.subject import Subject
from pipeline.model.generation import GREEDY, Sampling, generate
from pipeline.model.stop_strings import before_stop
from pipeline.rl import verifiable

Item = dict[str, Any]
UNTIL = ("\n\n", "Question:")
"""What ends an answer of a model that has no turns, unless it is told otherwise."""


@dataclass(frozen=True)
class Rules:
    """How answers are made and compared."""

    match: Literal["exact", "number"]
    samples: int
    temperature: float
    max_new_tokens: int
    until: tuple[str, ...] | None


def asked(exercise: Exercise) -> str:
    """The question as lm-eval words GSM8K's."""
    return f"Question: {exercise.text}\nAnswer:"


def example(exercise: Exercise, chain_of_thought: bool) -> tuple[str, str, str]:
    """(subject, question, answer) as an example shows it."""
    answer = exercise.reference if chain_of_thought else final_answer(exercise.reference)
    return exercise.subject, asked(exercise), f" {answer}"


def write(
    asker: Asker, prompts: Sequence[Sequence[int]], shared: int, rules: Rules, uniforms_BT: Tensor | None
) -> list[tuple[str, int, bool]]:
    """(text, tokens, whether it came to its end) of an answer to each prompt; greedy without `uniforms_BT`.

    `prompts` hold each one `rules.samples` times in a row, and all of them begin with the same `shared` tokens.
    """
    subject = asker.subject
    stop = stop_token_id(subject.tokenizer) if asker.in_template else subject.start_token
    until = rules.until if rules.until is not None else (() if asker.in_template else UNTIL)
    pad = subject.tokenizer.pad_token_id
    longest = max(map(len, prompts)) + rules.max_new_tokens
    eos = subject.tokenizer.eos_token_id
    written = generate(
        subject.model,
        prompts,
        max_new_tokens=rules.max_new_tokens,
        stop_ids=list(dict.fromkeys([stop] if asker.in_template or eos is None else [stop, eos])),
        pad_id=stop if pad is None else pad,
        sampling=GREEDY if uniforms_BT is None else Sampling(temperature=rules.temperature),
        uniforms_BT=uniforms_BT,
        batch_size=max(rules.samples, 4 * subject.token_budget // longest // rules.samples * rules.samples),
        samples_per_prompt=rules.samples,
        stop_strings=until,
        decode=subject.tokenizer.decode,
        shared=shared,
    )
    found = []
    for ids, is_ended in zip(written.responses(), written.is_ended_B.tolist(), strict=True):
        text = str(subject.tokenizer.decode(ids, skip_special_tokens=True))
        found.append((before_stop(text, until).strip(), len(ids), is_ended))
    return found


def score(
    asker: Asker,
    exercises: Sequence[Exercise],
    shown: Callable[[str], Shown],
    rules: Rules,
    uniforms_NST: Tensor | None,
) -> list[Item]:
    """One item an exercise that leaves room for an answer; `uniforms_NST` [exercises, samples, tokens]."""
    encoded = [asker.prompt(shown(each.subject), asked(each)) for each in exercises]
    room = asker.subject.max_length - rules.max_new_tokens
    kept = [place for place, (prompt, _) in enumerate(encoded) if len(prompt) <= room]
    said: dict[int, list[tuple[str, int, bool]]] = {}
    for begin, places in _by_beginning(encoded, kept).items():
        uniforms_BT = None if uniforms_NST is None else uniforms_NST[places].flatten(0, 1)
        prompts = [encoded[place][0] for place in places for _ in range(rules.samples)]
        written = iter(write(asker, prompts, len(begin), rules, uniforms_BT))
        said |= {place: [next(written) for _ in range(rules.samples)] for place in places}
    items = []
    for place in kept:
        own, exercise = said[place], exercises[place]
        right = verifiable.number if rules.match == "number" else verifiable.exact
        reference = exercise.reference if rules.match == "number" else final_answer(exercise.reference)
        item: Item = {"item": exercise.item, "question": exercise.text, "reference": exercise.reference}
        item |= {"answers": [text for text, _, _ in own], "lengths": [length for _, length, _ in own]}
        item["ended"] = [is_ended for _, _, is_ended in own]
        item["correct"] = [right(text, reference) if is_ended else 0.0 for text, _, is_ended in own]
        items.append(item | ({"majority": _majority(item, rules.match)} if rules.samples > 1 else {}))
    return items


def _by_beginning(
    encoded: Sequence[tuple[tuple[int, ...], int]], places: Sequence[int]
) -> dict[tuple[int, ...], list[int]]:
    """The places of prompts by the tokens they share with others; a token of its own is left to each."""
    found: dict[tuple[int, ...], list[int]] = {}
    for place in places:
        prompt, shared = encoded[place]
        found.setdefault(prompt[: min(shared, len(prompt) - 1)], []).append(place)
    return found


def _majority(item: Item, match: str) -> float:
    """Whether the most frequent answer is right."""
    votes: Counter[Any] = Counter()
    right: dict[Any, float] = {}
    for text, is_ended, correct in zip(item["answers"], item["ended"], item["correct"], strict=True):
        vote = verifiable.answer_number(text) if match == "number" else " ".join(text.split())
        if is_ended and vote is not None:
            votes[vote] += 1
            right[vote] = correct
    return right[votes.most_common(1)[0][0]] if votes else 0.0


def figures(items: Sequence[Item], baseline: Sequence[Item] | None, seed: int) -> dict[str, Estimate]:
    """Means over exercises, a figure of several samples being their mean; `baseline` is None for the baseline."""
    columns = per_item(items)
    found = {name: statistics.mean([value for value, _ in each.values()], seed) for name, each in columns.items()}
    if baseline is not None:
        for name, shown in (("accuracy", "difference"), ("majority", "majority_difference")):
            ours, theirs = columns.get(name, {}), per_item(baseline).get(name, {})
            both = [item for item in ours if item in theirs]
            if name in columns:
                pair = ([ours[item][0] for item in both], [theirs[item][0] for item in both])
                found[shown] = statistics.paired_difference(*pair, seed)
    return found


def per_item(items: Sequence[Item]) -> PerItem:
    """Each exercise's share of right answers, their mean length and the share that ended; whether the vote is right."""
    found = {
        name: {item["item"]: (sum(map(float, item[key])) / len(item[key]), 1.0) for item in items}
        for name, key in (("accuracy", "correct"), ("length", "lengths"), ("ended", "ended"))
    }
    if items and "majority" in items[0]:
        found["majority"] = {item["item"]: (item["majority"], 1.0) for item in items}
    return found


def in_template(subject: Subject, wanted: bool | None) -> bool:
    """Whether the model is asked in its chat template: as it is told, else where it is a chat model."""
    return subject.is_chat if wanted is None else wanted
