"""Preference accuracy of a policy by its implicit reward (Rafailov et al. 2023, section 4).

    margin = [log p(chosen) - log ref(chosen)] - [log p(rejected) - log ref(rejected)]

with the baseline (the sft model) as the reference; a pair is right where the margin is positive. DPO's beta scales
every margin alike and does not count. Beside it what lengths alone would reach. The pairs of a list (`row`) are one
item of the interval, which draws lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.evals.pairs import Row, Scorer, accuracies, describe
from pipeline.evals.statistics import Estimate, PerItem
from pipeline.evals.subject import Subject, chat_request

Item = dict[str, Any]


def score(subject: Subject, rows: Sequence[Row]) -> list[Item]:
    """One item a pair: the log-likelihoods of both answers, stop tokens included. Pairs too long are left out."""
    items, requests = [], []
    for number, row in enumerate(rows):
        pair = [chat_request(subject.tokenizer, row["prompt"], row[side]) for side in SIDES]
        if max(len(request.prompt) + len(request.completion) for request in pair) <= subject.max_length:
            items.append(describe(number, row))
            requests += pair
    values = np.round(subject.log_likelihoods(requests), 5).reshape(-1, 2).tolist()
    return [item | dict(zip(SIDES, pair, strict=True)) for item, pair in zip(items, values, strict=True)]


SIDES = ("chosen", "rejected")


def figures(items: Sequence[Item], reference: Sequence[Item], length_only: Scorer, seed: int) -> dict[str, Estimate]:
    """accuracy and length_only, over all rows that both models could read and by kind of negative."""
    theirs = {item["item"]: item for item in reference}
    both = [item for item in items if item["item"] in theirs]
    margins = [_margin(item) - _margin(theirs[item["item"]]) for item in both]
    return accuracies(margins, both, length_only, seed, [item["row"] for item in both])


def per_item(items: Sequence[Item], reference: Sequence[Item]) -> PerItem:
    """Right pairs and pairs of every list; a tie is a half."""
    theirs = {item["item"]: item for item in reference}
    found: dict[int, tuple[float, float]] = {}
    for item in items:
        if item["item"] in theirs:
            margin = _margin(item) - _margin(theirs[item["item"]])
            right, pairs = found.get(item["row"], (0.0, 0.0))
            found[item["row"]] = (right + (margin > 0) + 0.5 * (margin == 0), pairs + 1.0)
    return {"accuracy": found}


def _margin(item: Item) -> float:
    return float(item["chosen"] - item["rejected"])
