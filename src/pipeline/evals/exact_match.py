"""Right or wrong: greedy answers to held-out prompts, each compared with its reference.

    accuracy       share of the prompts that are answered as the reference is
    difference     accuracy minus the baseline's, over the prompts that both answered
    length, ended  tokens of an answer, its stop token included; share of answers that came to it

"exact" compares texts, "number" the last number of each, as GSM8K does. An answer that was cut off is wrong, whatever
stands in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pipeline.evals import samples, statistics
from pipeline.evals.statistics import Estimate, PerItem
from pipeline.evals.subject import Subject
from pipeline.rl import verifiable

Item = dict[str, Any]
Row = dict[str, Any]
Match = Literal["exact", "number"]


def score(subject: Subject, rows: Sequence[Row], *, match: Match, max_new_tokens: int) -> list[Item]:
    """One item a prompt that leaves room for an answer: the answer, and whether it is right (1.0 or 0.0)."""
    is_right = verifiable.exact if match == "exact" else verifiable.number
    items = samples.score(subject, rows, max_new_tokens=max_new_tokens, uniforms_NT=None, baseline=None, rewards=None)
    for item in items:
        del item["gold"]
        item["correct"] = is_right(item["answer"], item["reference"]) if item["ended"] else 0.0
    return items


def figures(items: Sequence[Item], baseline: Sequence[Item] | None, seed: int) -> dict[str, Estimate]:
    """Means over prompts; `baseline` is None for the baseline itself."""
    found = {
        "accuracy": statistics.mean([item["correct"] for item in items], seed),
        "length": statistics.mean([item["length"] for item in items], seed),
        "ended": statistics.mean([item["ended"] for item in items], seed),
    }
    if baseline is not None:
        theirs = {item["item"]: item["correct"] for item in baseline}
        pairs = [(item["correct"], theirs[item["item"]]) for item in items if item["item"] in theirs]
        ours, others = zip(*pairs, strict=True) if pairs else ((), ())
        found["difference"] = statistics.paired_difference(ours, others, seed)
    return found


def per_item(items: Sequence[Item]) -> PerItem:
    """Whether each prompt is answered right, and the answer's length and end."""
    columns = {"accuracy": "correct", "length": "length", "ended": "ended"}
    return {name: {item["item"]: (float(item[key]), 1.0) for item in items} for name, key in columns.items()}
