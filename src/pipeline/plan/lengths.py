"""Lengths of rows before any tokenizer is there, and sizes in words."""

from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.data.messages import letters

BYTES_A_TOKEN = 3.5
"""Of text, under a vocabulary of some thousand, until a tokenize stage stands and says better."""
SIDES = ("chosen", "rejected", "completion")
"""Fields of a row with an answer."""


def mean_length(rows: Iterable[Mapping[str, Any]], bytes_a_token: float) -> float:
    """Tokens of a row by its UTF-8 bytes, eight more a message for the template; of answers to one prompt the mean."""
    lengths = []
    for row in rows:
        sides = row.get("answers") or [row.get(name) for name in ("messages", *SIDES)]
        for side in [each for each in sides if each is not None] or [[]]:
            messages = [*row.get("prompt", []), *side]
            lengths.append(sum(len(letters(each).encode()) / bytes_a_token + 8 for each in messages))
    return sum(lengths) / len(lengths)


def answer_share(rows: Iterable[Mapping[str, Any]]) -> float:
    """Of all that rows say, by UTF-8 bytes, what their answers do: the share of the positions that are trained."""
    whole = answers = 0
    for row in rows:
        spoken = [(each, each["role"] == "assistant") for each in row.get("messages") or row.get("prompt", [])]
        sides = row.get("answers") or [row[name] for name in SIDES if row.get(name) is not None]
        for side in sides or [[]]:
            for message, is_answer in [*spoken, *((each, True) for each in side)]:
                size = len(letters(message).encode())
                whole, answers = whole + size, answers + (size if is_answer else 0)
    return answers / max(1, whole)


def si(value: float) -> str:
    """`1.24 B`, `942 k`: three digits and the power's letter."""
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"
