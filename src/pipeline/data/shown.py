"""Rows as `llmpipe preview` shows them: tokens, and which of them are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ShownRow:
    """One row of a stage: its ids, and True where a token is a target of the loss (for a reward model: is scored)."""

    title: str
    ids: Sequence[int]
    is_trained: Sequence[bool]

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.is_trained)
