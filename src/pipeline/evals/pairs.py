"""What the two preference tasks share: accuracy by kind of negative, and the length-only scorer beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.data.messages import words
from pipeline.evals import statistics
from pipeline.evals.statistics import Estimate, Floats

Item = dict[str, Any]
Row = dict[str, Any]
Scorer = Callable[[npt.ArrayLike], Floats]


def describe(number: int, row: Row) -> Item:
    """What an item says of its pair: its place, the list it is of, its kind of negative, the characters of both
    answers."""
    chosen, rejected = (len(words(row[side][-1])) for side in ("chosen", "rejected"))
    return {
        "item": number,
        "row": row.get("row", number),
        "kind": row["kind"],
        "chosen_chars": chosen,
        "rejected_chars": rejected,
    }


def accuracies(
    margins_N: npt.ArrayLike,
    items: Sequence[Item],
    length_only: Scorer,
    seed: int,
    rows_N: npt.ArrayLike | None = None,
) -> dict[str, Estimate]:
    """accuracy and length_only, over all rows and as `accuracy/KIND` by kind of negative; a tie counts half.

    rows_N: which row an item is of, where several are of one (the pairs of a list): intervals are over rows.
    """
    lengths_N = length_only([i["chosen_chars"] for i in items]) - length_only([i["rejected_chars"] for i in items])
    kinds_N = np.array([item["kind"] for item in items])
    rows_N = None if rows_N is None else np.asarray(rows_N)
    found = {}
    for name, scores_N in (("accuracy", np.asarray(margins_N)), ("length_only", lengths_N)):
        correct_N = statistics.wins(scores_N, np.zeros(len(items)))
        found[name] = share(correct_N, rows_N, seed)
        for kind in sorted({str(kind) for kind in kinds_N} - {""}):
            here_N = kinds_N == kind
            found[f"{name}/{kind}"] = share(correct_N[here_N], None if rows_N is None else rows_N[here_N], seed)
    return found


def share(values_N: Floats, rows_N: npt.ArrayLike | None, seed: int) -> Estimate:
    """Mean of the values; its interval draws rows, each with all of its items."""
    rows_N = np.arange(len(values_N)) if rows_N is None else np.asarray(rows_N)
    _, place_N, counts_R = np.unique(rows_N, return_inverse=True, return_counts=True)
    if len(counts_R) == len(values_N):
        return statistics.mean(values_N, seed)
    found = statistics.ratio(np.bincount(place_N, weights=values_N), counts_R, seed)
    return replace(found, n=len(values_N))
