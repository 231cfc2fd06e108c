"""Whether the reward model is as often right as it claims, from the pairs that an evaluation scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.report.results import Items


@dataclass(frozen=True)
class Reliability:
    """Of one model: its bins (claimed, right, n, half of the 95 % interval), pairs, and the calibration error."""

    model: str
    bins: tuple[tuple[float, float, int, float], ...]
    pairs: int
    error: float


def reliabilities(items: Items) -> list[Reliability]:
    """For each reward model whose items say how sure it was."""
    found = []
    for (model, task), rows in items.items():
        pairs = [row for row in rows if _is_pair(row)]
        if task == "reward_accuracy" and pairs:
            found.append(_reliability(model, pairs))
    return found


def _is_pair(row: Mapping[str, Any]) -> bool:
    return row.get("probability") is not None and row.get("preference") is not None


def _reliability(model: str, rows: Sequence[Mapping[str, Any]]) -> Reliability:
    from pipeline.evals.calibration import bins, claims

    claimed_N, right_N = claims([row["probability"] for row in rows], [row["preference"] for row in rows])
    kept = [each for each in bins(claimed_N, right_N) if each.n]
    shown = tuple(
        (each.claimed, each.right, each.n, 1.96 * (each.right * (1 - each.right) / each.n) ** 0.5) for each in kept
    )
    error = sum(each.n * abs(each.right - each.claimed) for each in kept) / len(rows)
    return Reliability(model, shown, len(rows), error)
