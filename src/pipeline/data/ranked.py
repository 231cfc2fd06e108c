"""Rows with a list of answers to one prompt, best first: what a reward model can learn from more than two at a time."""

from __future__ import annotations

from itertools import combinations
from typing import Any

from pipeline.data.files import Row
from pipeline.data.messages import (
    ROLES,
    Message,
    behind_system,
    check_conversation,
    checked_prompt,
    messages_of,
    side,
    whole,
)
from pipeline.data.preferences import TIE, kind_of
from pipeline.errors import DataError


def ranked(row: Row, where: str) -> Row:
    """A ranked row: {"prompt", "answers": [[message], …], "ranks": [int, …], "kind", "margin": 0, "preference": 1,
    "reference"}.

    Answers stand best first; `ranks` of the row (whole numbers, one an answer, equal for a tie) may say which are
    equally good, and are counted from 0 without gaps here. A margin is of two answers: a row with one is refused.
    """
    prompt = checked_prompt(behind_system(row, side(row, "prompt", "user", where), where), where)
    answers = [_answer(value, place, where) for place, value in enumerate(_listed(row, where), start=1)]
    for messages in answers:
        check_conversation([*prompt, *messages], where)
    for first, second in combinations(range(len(answers)), 2):
        if answers[first] == answers[second]:
            what = f"answers {first + 1} and {second + 1} are the same"
            raise DataError(what, where=where, mend="let each answer stand once")
    if row.get("margin") is not None or row.get("preference") is not None:
        raise DataError(
            "`margin` and `preference` are of two answers, and this row has a list",
            where=where,
            mend="`ranks` with equal numbers for a tie; rows with chosen and rejected for margins",
        )
    ranks = _ranks(row, len(answers), where)
    return {
        "prompt": prompt,
        "answers": answers,
        "ranks": ranks,
        "kind": kind_of(row),
        "margin": 0.0,
        "preference": 1.0,
        "reference": reference_of(row),
    }


def as_ranked(pair: Row, row: Row) -> Row:
    """A canonical preference row as a list of two; `row` is what it was made of."""
    kept = {key: pair[key] for key in ("prompt", "kind", "margin", "preference")}
    return {**kept, "answers": [pair["chosen"], pair["rejected"]], "ranks": [0, 1], "reference": reference_of(row)}


def as_pairs(row: Row) -> list[Row]:
    """The pairs of a canonical ranked row, the better answer chosen, as canonical preference rows; ties make none, be
    they of `ranks` or of `preference`."""
    return [
        {
            "prompt": row["prompt"],
            "chosen": row["answers"][first],
            "rejected": row["answers"][second],
            **{key: row[key] for key in ("kind", "margin", "preference")},
        }
        for first, second in combinations(range(len(row["answers"])), 2)
        if row["ranks"][first] < row["ranks"][second] and row["preference"] > TIE
    ]


def reference_of(row: Row) -> str:
    """The right answer that a row brings along for a gold function; empty without one."""
    return row["reference"] if isinstance(row.get("reference"), str) else ""


def _listed(row: Row, where: str) -> list[Any]:
    value = row["answers"]
    if not isinstance(value, list) or len(value) < 2:
        found = f"{len(value)} of them" if isinstance(value, list) else type(value).__name__
        raise DataError(
            f"`answers` is {found}, not a list of two or more", where=where, mend='["the best", "the next", …]'
        )
    return value


def _answer(value: Any, place: int, where: str) -> list[Message]:
    """One answer: a text, a message or a list of one."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": whole(value, f"answer {place}", where)}]
    messages = messages_of(value if isinstance(value, list) else [value], f"answers[{place - 1}]", ROLES, where)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        roles = " ".join(message["role"] for message in messages)
        raise DataError(
            f"answer {place} is {roles}, not one assistant's", where=where, mend="put what comes before in `prompt`"
        )
    return messages


def _ranks(row: Row, count: int, where: str) -> list[int]:
    """0-based ranks without gaps, never falling; by place where the row has none."""
    given = row.get("ranks")
    if given is None:
        return list(range(count))
    whole = isinstance(given, list) and all(isinstance(rank, int) and not isinstance(rank, bool) for rank in given)
    if not whole or len(given) != count:
        raise DataError(f"`ranks` is {given!r}, not {count} whole numbers", where=where, mend="one an answer")
    if given != sorted(given):
        raise DataError(f"`ranks` {given} fall: answers stand best first", where=where, mend="sort both by rank")
    if given[0] == given[-1]:
        raise DataError("all answers have one rank: nothing is preferred", where=where, mend="take the row out")
    return [sorted(set(given)).index(rank) for rank in given]
