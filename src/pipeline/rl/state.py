"""What an RL run carries from step to step beside weights and moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

RECENT = 10
"""Steps that the closing figures are the mean of."""


@dataclass
class Progress:
    """Plain numbers, kept in a checkpoint as they are."""

    kl_coef: float
    """The price of KL in force."""
    tokens: int = 0
    """Written by the policy."""
    read: int = 0
    """The same with their prompts."""
    asked: int = 0
    """Prompts taken from the order."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Figures of the first step and of the last ones."""

    def add(self, figures: dict[str, float], prompts: int) -> None:
        """A step is done; `prompts` is how many have been asked by now."""
        self.tokens += round(figures["length"] * figures["episodes"])
        self.read += round(figures["row_length"] * figures["episodes"])
        self.asked = prompts
        self.history = [*self.history[:1], *self.history[1:][1 - RECENT :], figures]

    def recent(self, names: Sequence[str]) -> dict[str, float]:
        """Means over the last steps of the figures that they have."""
        last = self.history[-RECENT:]
        known = [name for name in names if name in last[-1]]
        return {name: sum(figures[name] for figures in last) / len(last) for name in known}
