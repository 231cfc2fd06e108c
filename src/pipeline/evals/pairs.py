"""What the two preference tasks share: accuracy by kind of negative, and the length-only scorer beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.evals import statistics
from pipeline.evals.statistics import Estimate, Floats

Item = dict[str, Any]
Row = dict[str, Any]
Scorer = Callable[[npt.ArrayLike], Floats]


def describe(number: int, row: Row) -> Item:
    """What an item says of its row: its place, its kind of negative, the characters of both answers."""
    chosen, rejected = (len(row[side][-1]["content"]) for side in ("chosen", "rejected"))
    return {"item": number, "kind": row["kind"], "chosen_chars": chosen, "rejected_chars": rejected}


def accuracies(margins_N: npt.ArrayLike, items: Sequence[Item], length_only: Scorer, seed: int) -> dict[str, Estimate]:
    """accuracy and length_only, over all rows and as `accuracy/KIND` by kind of negative; a tie counts half."""
    lengths_N = length_only([i["chosen_chars"] for i in items]) - length_only([i["rejected_chars"] for i in items])
    kinds_N = np.array([item["kind"] for item in items])
    found = {}
    for name, scores_N in (("accuracy", np.asarray(margins_N)), ("length_only", lengths_N)):
        correct_N = statistics.wins(scores_N, np.zeros(len(items)))
        found[name] = statistics.mean(correct_N, seed)
        kinds = sorted({str(kind) for kind in kinds_N} - {""})
        found |= {f"{name}/{kind}": statistics.mean(correct_N[kinds_N == kind], seed) for kind in kinds}
    return found
