"""What the models answer to the same prompts, side by side."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.report.records import Row
from pipeline.report.results import Items

LONGEST = 700
"""Characters of a text that are shown."""
FIRST, LAST = ("greedy", "exact_match"), ("sampled",)
"""Tasks whose answers are shown where there are any; a user's own come between."""
OTHERS = ("win_rate",)
"""Its items hold answers of another task again."""
FIGURES = ("correct", "gold", "reward", "length")


@dataclass(frozen=True)
class Answer:
    """One model's, with what it is worth: (name, value)."""

    model: str
    text: str
    is_ended: bool
    figures: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Exchange:
    """A prompt (turns: role and text), its reference answer, and the models' answers."""

    turns: tuple[tuple[str, str], ...]
    reference: str
    answers: tuple[Answer, ...]


def exchanges(items: Items, count: int, sides: Sequence[Collection[str]] = ()) -> tuple[str, list[Exchange]]:
    """(the task they are of, so many prompts spread evenly over its items); greedy answers where there are any.

    sides: of two runs the models of each; then only the prompts that some model of each has answered.
    """
    tasks = dict.fromkeys(task for _, task in items if task not in (*FIRST, *LAST, *OTHERS))
    for task in (*FIRST, *tasks, *LAST):
        by_model = {
            model: _by_prompt([row for row in map(plain, rows) if "answer" in row and "prompt" in row])
            for (model, kind), rows in items.items()
            if kind == task
        }
        by_model = {model: rows for model, rows in by_model.items() if rows}
        keys = list(dict.fromkeys(key for rows in by_model.values() for key in rows))
        for side in sides:
            answered = {key for model, rows in by_model.items() if model in side for key in rows}
            keys = [key for key in keys if key in answered]
        if keys:
            shown = [keys[i * len(keys) // count] for i in range(count)] if len(keys) > count else keys
            return task, [_exchange(key, by_model) for key in shown]
    return "", []


def _by_prompt(rows: Sequence[Row]) -> dict[Any, Row]:
    """(prompt, how often it came before) -> item: two runs number other prompts alike, or the same ones differently."""
    found: dict[Any, Row] = {}
    for row in rows:
        prompt, before = json.dumps(row["prompt"], sort_keys=True), 0
        while (prompt, before) in found:
            before += 1
        found[prompt, before] = row
    return found


def plain(row: Row) -> Row:
    """An item of a user's own task as the built-in tasks write theirs: the prompt, and of several answers the first."""
    if "question" not in row or not row.get("answers"):
        return row
    firsts = {"correct": "correct", "length": "lengths", "ended": "ended", "answer": "answers"}
    return {**row, "prompt": row["question"], **{name: row[key][0] for name, key in firsts.items() if row.get(key)}}


def _exchange(key: Any, by_model: Mapping[str, Mapping[Any, Row]]) -> Exchange:
    rows = {model: found[key] for model, found in by_model.items() if key in found}
    first = next(iter(rows.values()))
    answers = tuple(
        Answer(model, cut(str(row["answer"])), bool(row.get("ended", True)), _figures(row))
        for model, row in rows.items()
    )
    return Exchange(turns_of(first["prompt"]), cut(str(first.get("reference") or "")), answers)


def _figures(row: Row) -> tuple[tuple[str, float], ...]:
    return tuple((name, float(row[name])) for name in FIGURES if isinstance(row.get(name), int | float))


def turns_of(prompt: Any) -> tuple[tuple[str, str], ...]:
    """(role, text) of each turn; a prompt that is a text is one turn."""
    if isinstance(prompt, Sequence) and not isinstance(prompt, str):
        return tuple((str(turn.get("role", "")), cut(str(turn.get("content", "")))) for turn in prompt)
    return (("", cut(str(prompt))),)


def cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text) - LONGEST:,} more characters)"


def written_while_training(rows: Sequence[Row]) -> list[tuple[int, str, str]]:
    """(step, name, text) of the texts among the metrics: of the first and the last line that hold any."""
    with_text = [row for row in rows if any(isinstance(value, str) for value in row.values())]
    shown = with_text[:1] + with_text[-1:] if len(with_text) > 1 else with_text
    return [
        (int(row.get("step", 0)), key, cut(value))
        for row in shown
        for key, value in row.items()
        if isinstance(value, str)
    ]
