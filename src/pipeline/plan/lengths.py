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


def si(value: float) -> str:
    """`1.24 B`, `942 k`: three digits and the power's letter."""
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"
