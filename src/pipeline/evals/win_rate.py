"""Which of two answers to a prompt is the better one: the model's or the baseline's, said by a reward model or a judge.

    win_rate   mean chance that the model's answer is the better one; of a reward model 1, 0, or a half for a tie
    swayed     share of prompts on which a judge gave two verdicts in the two orders (Zheng et al. 2023)
    unread     share of prompts on which a reply of a judge behind an address could not be read: a tie

Both write greedily. A judge reads each pair in both orders, and what a place adds falls out (`rl/comparing.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from pipeline.evals import statistics
from pipeline.evals.statistics import Estimate, PerItem
from pipeline.rl.comparing import Compared

Item = dict[str, Any]
Message = dict[str, str]
Score = Callable[[Sequence[Sequence[Message]], Sequence[str]], list[float]]
"""Conversations and answers -> a number for each, the larger the better."""


class Comparer(Protocol):
    """What says which of two answers is better: `rl.comparing`'s two."""

    def compare(self, prompts: Sequence[Sequence[Message]], pairs: Sequence[tuple[str, str]]) -> list[Compared]:
        """A verdict on each pair."""


def compared(ours: Sequence[Item], theirs: Sequence[Item], judge: Comparer | None, score: Score | None) -> list[Item]:
    """One item a prompt that both answered. `ours`, `theirs`: item, prompt (messages) and answer of each."""
    known = {item["item"]: item for item in theirs}
    pairs = [(item, known[item["item"]]) for item in ours if item["item"] in known]
    prompts = [item["prompt"] for item, _ in pairs]
    texts = [(item["answer"], other["answer"]) for item, other in pairs]
    if not pairs:
        return []
    if judge is not None:
        found = judge.compare(prompts, texts)
        said = [
            {"win": round(each.chance, 5), "swayed": float(each.is_swayed), "unread": float(each.unread > 0)}
            for each in found
        ]
    else:
        assert score is not None
        values = [score(prompts, [pair[side] for pair in texts]) for side in (0, 1)]
        wins = statistics.wins(*values).tolist()
        said = [{"win": win, "score": a, "score_against": b} for win, a, b in zip(wins, *values, strict=True)]
    return [
        {
            "item": item["item"],
            "prompt": item["prompt"],
            "answer": item["answer"],
            "against": other["answer"],
            **verdict,
        }
        for (item, other), verdict in zip(pairs, said, strict=True)
    ]


def figures(items: Sequence[Item], seed: int) -> dict[str, Estimate]:
    """Means over prompts."""
    columns = per_item(items)
    return {name: statistics.mean([value for value, _ in each.values()], seed) for name, each in columns.items()}


def per_item(items: Sequence[Item]) -> PerItem:
    """What each prompt's verdict was."""
    keys = {"win_rate": "win", "swayed": "swayed", "unread": "unread"}
    return {
        name: {item["item"]: (item[key], 1.0) for item in items}
        for name, key in keys.items()
        if not items or key in items[0]
    }
