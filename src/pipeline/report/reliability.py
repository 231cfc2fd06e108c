"""Whether the reward model is as often right as it claims, from pairs that an evaluation or its own stage scored."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.report.records import StageRecord
from pipeline.report.results import Items

KEPT = re.compile(r"<title>([1-9][0-9]*) pairs: claimed ([01]\.[0-9]{3}), right ([01]\.[0-9]{3})</title>")


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


def kept(stage: StageRecord) -> Reliability | None:
    """What a reward stage wrote of its own held-out pairs; None where it left no figure that can be read.

    The bins stand in `reliability.svg` as the titles of its points: only numbers are taken from the file.
    """
    file, error = stage.path / "reliability.svg", stage.manifest.get("metrics", {}).get("ece")
    if not file.exists() or error is None:
        return None
    found = [(float(c), float(r), int(n)) for n, c, r in KEPT.findall(file.read_text(encoding="utf-8"))]
    if not found:
        return None
    return Reliability(stage.name, tuple(_with_bar(*each) for each in found), sum(n for _, _, n in found), float(error))


def _with_bar(claimed: float, right: float, n: int) -> tuple[float, float, int, float]:
    return claimed, right, n, 1.96 * (right * (1 - right) / n) ** 0.5


def _is_pair(row: Mapping[str, Any]) -> bool:
    return row.get("probability") is not None and row.get("preference") is not None


def _reliability(model: str, rows: Sequence[Mapping[str, Any]]) -> Reliability:
    from pipeline.evals.calibration import bins, claims

    claimed_N, right_N = claims([row["probability"] for row in rows], [row["preference"] for row in rows])
    filled = [each for each in bins(claimed_N, right_N) if each.n]
    shown = tuple(_with_bar(each.claimed, each.right, each.n) for each in filled)
    error = sum(each.n * abs(each.right - each.claimed) for each in filled) / len(rows)
    return Reliability(model, shown, len(rows), error)
