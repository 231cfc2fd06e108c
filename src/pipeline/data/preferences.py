"""Rows that say which answers are better: pairs of answers, and lone answers with a label."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from pipeline.data.files import Row
from pipeline.data.messages import (
    SHAREGPT_ROLES,
    Message,
    behind_system,
    check_conversation,
    checked_prompt,
    joined,
    messages_of,
    side,
    systems_of,
    whole,
    words,
)
from pipeline.errors import DataError

TIE = 0.5
"""The `preference` of a row whose answers are equally good."""


def preference(row: Row, chosen: str, where: str) -> Row:
    """A preference row: what is common to both sides is the prompt, each side is one assistant's message.

    Its own `kind` (a text, by which accuracies are told apart), `margin` (by how much chosen is better, in units of
    whoever labelled it, at least 0) and `preference` (the probability that chosen is the better one, 0.5 for a tie to
    1) are taken along; "", 0 and 1 without them.
    """
    if chosen == "sharegpt_preference":
        prompt = messages_of(row["conversations"], "conversations", SHAREGPT_ROLES, where)
        good, bad = (answer_of(row[key], key, where) for key in ("chosen", "rejected"))
    else:
        prompt = side(row, "prompt", "user", where) if row.get("prompt") is not None else []
        good, bad = (side(row, key, "assistant", where) for key in ("chosen", "rejected"))
    prompt, good, bad = common_prompt(prompt, good, bad, where)
    prompt = behind_system(row, prompt, where)
    for key, messages in (("chosen", good), ("rejected", bad)):
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            roles = " ".join(message["role"] for message in messages)
            if len(good) == len(bad) and len(messages) > 1 and messages[-1]["role"] == "assistant":
                raise DataError(
                    f"the prompts of chosen and rejected differ ({roles} where the two sides part)",
                    where=where,
                    mend="let both sides have the same prompt, or take the row out",
                )
            raise DataError(
                f"`{key}` is {roles or 'nothing'} where the two sides part, not one assistant's answer",
                where=where,
                mend="let both sides have the same prompt and one answer each",
            )
        check_conversation([*prompt, *messages], where)
    return {
        "prompt": checked_prompt(prompt, where),
        "chosen": good,
        "rejected": bad,
        "kind": kind_of(row),
        "margin": number_in(row, "margin", 0.0, (0.0, math.inf), where),
        "preference": number_in(row, "preference", 1.0, (0.5, 1.0), where),
    }


def unpaired(row: Row, where: str) -> Row:
    """A lone answer and whether it is a good one: {"prompt", "completion": [message], "label": bool, "kind": str}."""
    prompt = behind_system(row, side(row, "prompt", "user", where), where)
    answer = side(row, "completion", "assistant", where)
    if len(answer) != 1 or answer[0]["role"] != "assistant":
        roles = " ".join(message["role"] for message in answer)
        raise DataError(
            f"`completion` is {roles}, not one assistant's answer",
            where=where,
            mend="put what comes before in `prompt`",
        )
    if not isinstance(row["label"], bool):
        raise DataError(
            f"`label` is {row['label']!r}, not true or false",
            where=where,
            mend="true for a desirable answer; or, where labels mean something else, `format: prompt_completion`",
        )
    check_conversation([*prompt, *answer], where)
    return {
        "prompt": checked_prompt(prompt, where),
        "completion": answer,
        "label": row["label"],
        "kind": kind_of(row),
    }


def as_unpaired(pair: Row) -> list[Row]:
    """A canonical preference row as a desirable and an undesirable answer; a tie says neither."""
    if pair["preference"] == TIE:
        return []
    return [
        {"prompt": pair["prompt"], "completion": pair[key], "label": key == "chosen", "kind": pair["kind"]}
        for key in ("chosen", "rejected")
    ]


def pairs_of(rows: Sequence[Row]) -> list[Row]:
    """Preference rows from canonical unpaired ones: the n-th desirable answer to a prompt with its n-th undesirable
    one. What was taken apart by `as_unpaired` comes together again; an answer without a partner is left out.
    """
    waiting: dict[tuple[str, bool], list[Row]] = {}
    found = []
    for row in rows:
        prompt = json.dumps(row["prompt"])
        partners = waiting.get((prompt, not row["label"]), [])
        if not partners:
            waiting.setdefault((prompt, row["label"]), []).append(row)
            continue
        other = partners.pop(0)
        chosen, rejected = (row, other) if row["label"] else (other, row)
        sides = {"chosen": chosen["completion"], "rejected": rejected["completion"]}
        if sides["chosen"] != sides["rejected"]:
            found.append({"prompt": row["prompt"], **sides, "kind": rejected["kind"], "margin": 0.0, "preference": 1.0})
    return found


def kind_of(row: Row) -> str:
    """The row's own kind, or its `subset` (RewardBench's), empty without either."""
    given = row.get("kind") or row.get("subset")
    return given if isinstance(given, str) else ""


def number_in(row: Row, key: str, default: float, bounds: tuple[float, float], where: str) -> float:
    """An optional number of a row within its bounds; DataError for anything else."""
    value = row.get(key)
    if value is None:
        return default
    low, high = bounds[0], min(bounds[1], sys.float_info.max)  # of a whole number that no float holds, nor infinity
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        between = f"of at least {low:g}" if math.isinf(bounds[1]) else f"between {low:g} and {high:g}"
        mend = "swap the sides of a row whose chosen answer is the worse one" if key == "preference" else ""
        raise DataError(f"`{key}` is {value!r:.40}, not a number {between}", where=where, mend=mend)
    return float(value)


def common_prompt(
    prompt: list[Message], good: list[Message], bad: list[Message], where: str
) -> tuple[list[Message], list[Message], list[Message]]:
    """(prompt, chosen, rejected), the messages that both sides begin with moved into the prompt.

    Where the sides repeat the prompt that is given (UltraFeedback's habit), it is taken once, as the sides have it.
    """
    if good == bad:
        raise DataError("chosen and rejected are the same", where=where, mend="take the row out")
    shared = 0
    while good[shared : shared + 1] == bad[shared : shared + 1]:
        shared += 1
    begun = good[:shared]
    if begun[: len(prompt)] == prompt:
        return begun, good[shared:], bad[shared:]
    if repeats(prompt, begun):
        return joined(systems_of(prompt), begun, where), good[shared:], bad[shared:]
    if any(message["role"] == "system" for message in begun):
        raise DataError(
            "a system message of both sides comes after `prompt`",
            where=where,
            mend="put it first in `prompt`, or let both sides begin with the whole conversation",
        )
    return prompt + begun, good[shared:], bad[shared:]


def repeats(prompt: list[Message], begun: list[Message]) -> bool:
    """Whether what a side begins with holds the prompt's words, white space around them aside.

    A beginning that an assistant opens goes on from the prompt instead, whatever is said in it.
    """
    asked, said = spoken(prompt), spoken(begun)
    if not asked or not said or said[0][0] == "assistant":
        return False
    return any(said[end - len(asked) : end] == asked for end in range(len(asked), len(said) + 1))


def spoken(messages: list[Message]) -> list[tuple[str, str]]:
    """Who says what, white space around it and the system aside."""
    return [(each["role"], words(each).strip()) for each in messages if each["role"] != "system"]


def answer_of(value: Any, key: str, where: str) -> list[Message]:
    """One side of a sharegpt preference: a message, a list of messages, or its text."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": whole(value, f"field `{key}`", where)}]
    return messages_of(value if isinstance(value, list) else [value], key, SHAREGPT_ROLES, where)
