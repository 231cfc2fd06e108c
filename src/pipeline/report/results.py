"""The table of an evaluation: a line a figure, a column a model, the best marked where it is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import ArtifactError
from pipeline.evals.table import headlines, style
from pipeline.report import noise
from pipeline.report.records import Row, StageRecord, read_rows

Items = Mapping[tuple[str, str], Sequence[Row]]
"""(model, task) -> the items of samples.jsonl."""


@dataclass(frozen=True)
class Cell:
    """One model's figure; `value` None where it is not defined. `left`, `width`: its interval on the line's scale."""

    model: str
    value: float | None
    shown: str
    half: str
    n: int
    is_best: bool
    left: float
    width: float
    at: float
    """Percent of the line's scale, as `left` and `width`."""


@dataclass(frozen=True)
class Line:
    """One figure of every model."""

    task: str
    metric: str
    label: str
    is_headline: bool
    is_under: bool
    """Whether it belongs to the line above."""
    cells: tuple[Cell | None, ...]
    verdict: str
    """What the comparison of the two best says; empty where there is none."""
    better: str
    """`more`, `less`, or empty."""


@dataclass(frozen=True)
class Table:
    """Models that the same tasks were put to."""

    models: tuple[str, ...]
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class _Items:
    """All items, and the model that is the baseline."""

    items: Items
    baseline: str

    def side(self, row: Row, task: str) -> noise.Side:
        theirs = () if row["model"] == self.baseline else self.items.get((self.baseline, task), ())
        return noise.Side(row, self.items.get((row["model"], task), ()), theirs)


def items_of(stage: StageRecord) -> dict[tuple[str, str], list[Row]]:
    """The evaluation's items by model and task; a user's own stage may name neither task nor item."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in read_rows(stage.path / "samples.jsonl"):
        known = found.setdefault((str(row.get("model", "")), str(row.get("task", ""))), [])
        known.append({"item": len(known), **row})
    return found


RESULT = ("model", "task", "metric", "value", "low", "high", "n")


def results_of(stage: StageRecord) -> list[Row]:
    """The evaluation's figures. ArtifactError where a line, as a user's own stage may write it, lacks a field."""
    path = stage.path / "results.jsonl"
    rows: list[Row] = [*read_rows(path)]
    for number, row in enumerate(rows, 1):
        lacks = [name for name in RESULT if name not in row]
        if lacks:
            mend = "write them in every line, null where there is none (docs/eval.md), and run the stage again"
            raise ArtifactError(f"a result without {', '.join(lacks)}", where=f"{path}:{number}", mend=mend)
    return rows


def baseline_of(stage: StageRecord) -> str:
    """The model against which the evaluation compares, as its items call it; empty where there is none."""
    return str(stage.config.get("baseline") or "")


def tables_of(stage: StageRecord, items: Items) -> list[Table]:
    """A table for the policies, another for the reward model: for models that have no task in common."""
    results = results_of(stage)
    by_key: dict[tuple[str, str], dict[str, Row]] = {}
    for row in results:
        by_key.setdefault((row["task"], row["metric"]), {})[row["model"]] = row
    first = headlines(by_key)
    sides = _Items(items, baseline_of(stage))
    order = first + [key for key in by_key if key not in first]
    tables = []
    for models in _sharing(results):
        keys = [key for key in order if {*models} & {*by_key[key]}]
        tables.append(Table(models, tuple(_line(key, by_key[key], models, sides, key in first) for key in keys)))
    return tables


def _sharing(results: Sequence[Row]) -> list[tuple[str, ...]]:
    """The models in groups, those with a task in common together."""
    groups: list[tuple[list[str], set[str]]] = []
    for model in dict.fromkeys(str(row["model"]) for row in results):
        tasks = {str(row["task"]) for row in results if row["model"] == model}
        near = [group for group in groups if group[1] & tasks]
        joined = ([each for group in near for each in group[0]] + [model], tasks.union(*(group[1] for group in near)))
        groups = [group for group in groups if group not in near] + [joined]
    return [tuple(models) for models, _ in groups]


def _line(
    key: tuple[str, str], rows: Mapping[str, Row], models: Sequence[str], items: _Items, is_headline: bool
) -> Line:
    task, metric = key
    label, digits, factor = style(task, metric)
    best, verdict = _best(task, metric, rows, items, digits, factor)
    ends = [row[end] for row in rows.values() for end in ("low", "high", "value") if row[end] is not None]
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    low, high = (low, high) if high > low else (low - 1, high + 1)
    scale = 100 / (high - low)
    cells = tuple(
        _cell(rows[model], model == best, digits, factor, low, scale) if model in rows else None for model in models
    )
    better = {1: "more", 0: "", -1: "less"}[noise.direction(metric)]
    is_under = label.startswith(" ")
    return Line(task, metric, own_label(task, label), is_headline, is_under, cells, verdict, better)


def own_label(task: str, label: str) -> str:
    """A figure's label where its task stands beside it."""
    return label.strip().removeprefix(f"{task}: ").removeprefix(f"{task}.")


def _cell(row: Row, is_best: bool, digits: int, factor: int, low: float, scale: float) -> Cell:
    value = row["value"]
    if value is None:
        return Cell(row["model"], None, "–", "", row["n"], False, 0, 0, 0)
    ends = [value if row[end] is None else row[end] for end in ("low", "high")]
    half = f"{factor * (ends[1] - ends[0]) / 2:.{digits}f}" if row["low"] is not None else ""
    half = "–" if row["n"] < 2 else half  # one item tells no noise
    left, right, at = (round((end - low) * scale, 1) for end in (*ends, value))
    return Cell(row["model"], value, f"{factor * value:.{digits}f}", half, row["n"], is_best, left, right - left, at)


def _best(
    task: str, metric: str, rows: Mapping[str, Row], items: _Items, digits: int, factor: int
) -> tuple[str | None, str]:
    """(the model whose figure is better than the next by more than noise, or None; in words)."""
    sign = noise.direction(metric)
    known = [row for row in rows.values() if row["value"] is not None]
    if not sign or len(known) < 2:
        return None, ""
    first, second = sorted(known, key=lambda row: -sign * row["value"])[:2]
    found, how = noise.compared(task, metric, items.side(first, task), items.side(second, task))
    if found is None:
        return None, ""
    ends = f"{factor * found.value:+.{digits}f} [{factor * found.low:+.{digits}f}, {factor * found.high:+.{digits}f}]"
    words = f"{first['model']} − {second['model']}: {ends}, {how}"
    return (str(first["model"]), words) if noise.is_clear(found) else (None, f"tie: {words}")
