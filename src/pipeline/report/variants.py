"""What an evaluation says of variants (`repeat:`, `matrix:`, several seeds): means, differences, matched ones."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.evals.table import MATCHED, PAIRS, headlines, is_beyond, style
from pipeline.report import noise
from pipeline.report.records import StageRecord

WORDS = ("kind", "model", "against", "nearest", "task", "metric")
NUMBERS = ("value", "low", "high", "n", "seeds_low", "seeds_high", "seeds")


@dataclass(frozen=True)
class Said:
    """A line of table.csv."""

    words: Mapping[str, str]
    value: float | None
    low: float | None
    high: float | None
    n: float | None
    seeds_low: float | None
    seeds_high: float | None
    seeds: float | None

    @property
    def kind(self) -> str:
        return self.words["kind"]

    @property
    def pair(self) -> tuple[str, str]:
        return self.words["model"], self.words["against"]

    @property
    def figure(self) -> tuple[str, str]:
        return self.words["task"], self.words["metric"]


@dataclass(frozen=True)
class Between:
    """A cell: the figure, half of its intervals over seeds and over items, and how it is (`better`, `worse`,
    `differs`, or empty where it may be noise)."""

    shown: str
    halves: str
    verdict: str


@dataclass(frozen=True)
class Comparisons:
    """One kind of comparison: heads across, figures down. `left`: columns that only table.csv holds."""

    title: str
    heads: tuple[tuple[str, str], ...]
    """(variant, the other one or empty)."""
    lines: tuple[tuple[str, str, tuple[Between | None, ...]], ...]
    """(label, task.metric, a cell a head)."""
    left: int


def comparisons(stage: StageRecord) -> list[Comparisons]:
    """A table for each kind of line that table.csv holds beside the models' own; of the headlines."""
    rows = _read(stage)
    found = [_table(kind, [row for row in rows if row.kind == kind]) for kind in ("mean", "difference", "matched")]
    return [each for each in found if each is not None]


def _read(stage: StageRecord) -> list[Said]:
    """Nothing where a stage of the user's own has written another table."""
    path = stage.path / "table.csv"
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {*WORDS, *NUMBERS} <= rows[0].keys():
        return []
    return [
        Said({name: row[name] for name in WORDS}, *(float(row[name]) if row[name] else None for name in NUMBERS))
        for row in rows
        if row["kind"] != "model"
    ]


def _table(kind: str, rows: Sequence[Said]) -> Comparisons | None:
    across = everything = list(dict.fromkeys(row.pair for row in rows))
    if kind == "difference" and len(across) > PAIRS:  # as the terminal: those against the first of each stage
        firsts = {model.partition("@")[0]: against for model, against in reversed(across)}
        across = [pair for pair in across if pair[1] == firsts[pair[0].partition("@")[0]]]
    cells = {(row.figure, row.pair): row for row in rows}
    lines = []
    for task, metric in headlines(dict.fromkeys(row.figure for row in rows)):
        label, digits, factor = style(task, metric)
        found = [cells.get(((task, metric), pair)) for pair in across]
        between = tuple(None if row is None else _between(row, digits, factor) for row in found)
        lines.append((label.strip(), f"{task}.{metric}", between))
    if not lines:
        return None
    title = {"mean": "Mean over seeds", "difference": "Difference"}.get(kind) or _nearest(rows[0].words["nearest"])
    return Comparisons(title, tuple(across), tuple(lines), len(everything) - len(across))


def _nearest(what: str) -> str:
    words = MATCHED[what]
    return words[0].upper() + words[1:]


def _between(row: Said, digits: int, factor: int) -> Between:
    if row.value is None:
        return Between("–", "", "")
    sign = "" if row.kind == "mean" else "+"
    halves = [_half(row.seeds_low, row.seeds_high, digits, factor), _half(row.low, row.high, digits, factor)]
    if (row.n or 0) < 2:
        halves[1] = "–"
    return Between(f"{factor * row.value:{sign}.{digits}f}", " | ".join(halves), _verdict(row))


def _half(low: float | None, high: float | None, digits: int, factor: int) -> str:
    return "–" if low is None or high is None else f"{factor * (high - low) / 2:.{digits}f}"


def _verdict(row: Said) -> str:
    """Of a difference whose intervals over items, and over seeds where there are several, both leave out 0."""
    if row.kind == "mean" or row.low is None or row.high is None or row.value is None:
        return ""
    seeds = (row.seeds_low, row.seeds_high)
    over_seeds = seeds[0] is None or seeds[1] is None or is_beyond(seeds[0], seeds[1], int(row.seeds or 0))
    if not (over_seeds and is_beyond(row.low, row.high, int(row.n or 0))):
        return ""
    return {1: "better", 0: "differs", -1: "worse"}[noise.direction(row.figure[1]) * (1 if row.value > 0 else -1)]
