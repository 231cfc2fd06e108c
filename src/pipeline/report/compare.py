"""Two runs side by side: what they were told differently, curves in one figure, results with their differences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.evals.table import headlines, style
from pipeline.report import noise
from pipeline.report.answers import exchanges
from pipeline.report.curves import panels_of
from pipeline.report.differences import Differing, differing
from pipeline.report.page import DETAIL, LARGEST, PRICE, Counter, Group, costs, data_of, environments, render, totals
from pipeline.report.records import Row, RunRecord, StageRecord
from pipeline.report.results import Items, baseline_of, items_of, own_label, results_of


@dataclass(frozen=True)
class Pair:
    """A stage that both runs have, or one of them."""

    name: str
    ours: StageRecord | None
    theirs: StageRecord | None
    is_same: bool
    """Whether both made it from the same config, data, parents and code."""
    changed: tuple[str, ...]
    """Beside the config: `code: …`, `data: …`, `input: …`."""
    config: Differing | None


@dataclass(frozen=True)
class Change:
    """One figure of one model in both runs; `shown`: ours, theirs, and theirs minus ours with its interval."""

    model: str
    task: str
    metric: str
    label: str
    is_headline: bool
    values: tuple[float, float]
    shown: tuple[str, str, str]
    how: str
    verdict: str
    """`better`, `worse`, `differs`, or empty where the difference is not larger than noise."""


def comparison_of(ours: RunRecord, theirs: RunRecord, price: float | None) -> str:
    """The page of two runs. `price`: as `page_of`'s."""
    names = (ours.name, theirs.name) if ours.name != theirs.name else (f"{ours.name} (1)", f"{theirs.name} (2)")
    for points, prompts in DETAIL:
        page = _page(names, ours, theirs, price, points, prompts)
        if len(page.encode()) < LARGEST:
            return page
    return page


def _page(
    names: tuple[str, str], ours: RunRecord, theirs: RunRecord, price: float | None, points: int, prompts: int
) -> str:
    counter = Counter()
    pairs = [_pair(name, ours, theirs, names) for name in _in_order(ours, theirs)]
    groups = _groups(names, ours, theirs, points, counter)
    items, bases = zip(*(_items(run) for run in (ours, theirs)), strict=True)
    merged = {
        (f"{name} · {model}", task): rows
        for name, found in zip(names, items, strict=True)
        for (model, task), rows in found.items()
    }
    sides = [{f"{name} · {model}" for model, _ in found} for name, found in zip(names, items, strict=True)]
    task, shown = exchanges(merged, prompts, sides)
    return render(
        "compare.html",
        title=" and ".join(names),
        names=names,
        price=PRICE if price is None else price,
        totals=[totals(run, price) for run in (ours, theirs)],
        pairs=pairs,
        costs=[costs(run, price) for run in (ours, theirs)],
        changes=_changes(ours, theirs, items, bases),
        task=task,
        exchanges=shown,
        has_answers=any("answer" in row for rows in merged.values() for row in rows),
        colours={model: 1 if model.startswith(f"{names[0]} · ") else 2 for model, _ in merged},
        groups=groups,
        figures=data_of([each for group in groups for each in group.all_figures]),
        environments=[environments(run.stages) for run in (ours, theirs)],
    )


def _in_order(ours: RunRecord, theirs: RunRecord) -> list[str]:
    return list(dict.fromkeys(each.name for run in (ours, theirs) for each in run.stages))


def _pair(name: str, ours: RunRecord, theirs: RunRecord, names: tuple[str, str]) -> Pair:
    a, b = (next((each for each in run.stages if each.name == name), None) for run in (ours, theirs))
    if a is None or b is None:
        return Pair(name, a, b, False, (), None)
    is_same = a.is_done and b.is_done and a.manifest["fingerprint"] == b.manifest["fingerprint"]
    fields = tuple(differing([a.config, b.config]))
    return Pair(name, a, b, is_same, tuple(_changed(a, b)), Differing(a.type, names, fields) if fields else None)


def _changed(a: StageRecord, b: StageRecord) -> Iterator[str]:
    if not (a.is_done and b.is_done):
        return
    for part, what in (("code", "code"), ("data", "data"), ("inputs", "input")):
        before, after = a.manifest["parts"][part], b.manifest["parts"][part]
        yield from (f"{what}: {key}" for key in sorted({*before, *after}) if before.get(key) != after.get(key))


def _groups(names: tuple[str, str], ours: RunRecord, theirs: RunRecord, points: int, counter: Counter) -> list[Group]:
    """The stages of both runs by what a recipe calls them, drawn into the same figures."""
    found: dict[str, dict[str, StageRecord]] = {}
    for name, run in zip(names, (ours, theirs), strict=True):
        for stage in run.stages:
            own = name if stage.name == stage.base else f"{name} · {stage.name}"
            found.setdefault(stage.base, {})[own] = stage
    groups = []
    for base, members in found.items():
        shown, more = panels_of({own: stage.metrics for own, stage in members.items()}, points)
        if shown or more:
            groups.append(Group(base, tuple(members.values()), counter.draw(shown), counter.draw(more), (), ()))
    return groups


def _items(run: RunRecord) -> tuple[dict[tuple[str, str], list[Row]], dict[tuple[str, str], list[Row]]]:
    """(model and task -> items, the same -> the baseline's items of that task)."""
    found: dict[tuple[str, str], list[Row]] = {}
    bases: dict[tuple[str, str], list[Row]] = {}
    for stage in run.evaluations():
        items, baseline = items_of(stage), baseline_of(stage)
        for key, rows in items.items():
            if key not in found:  # of two evaluations of one model the first
                found[key], bases[key] = rows, items.get((baseline, key[1]), [])
    return found, bases


def _results(run: RunRecord) -> dict[tuple[str, str, str], Row]:
    found: dict[tuple[str, str, str], Row] = {}
    for stage in run.evaluations():
        for row in results_of(stage):
            if row["value"] is not None:
                found.setdefault((row["model"], row["task"], row["metric"]), row)
    return found


def _changes(
    ours: RunRecord, theirs: RunRecord, items: Sequence[Items], bases: Sequence[Items]
) -> dict[str, list[Change]]:
    """Model -> its figures that both runs have, headlines first."""
    a, b = _results(ours), _results(theirs)
    shared = [key for key in a if key in b]
    first = headlines(dict.fromkeys(key[1:] for key in shared))
    order = {key: number for number, key in enumerate(first)}
    keys = sorted(shared, key=lambda key: order.get(key[1:], len(order)))
    found: dict[str, list[Change]] = {model: [] for model, _, _ in a}
    for key in keys:
        found[key[0]].append(_change(key, a[key], b[key], items, bases, key[1:] in order))
    return {model: changes for model, changes in found.items() if changes}


def _change(
    key: tuple[str, str, str], a: Row, b: Row, items: Sequence[Items], bases: Sequence[Items], is_headline: bool
) -> Change:
    model, task, metric = key
    label, digits, factor = style(task, metric)
    sides = [found.get((model, task), []) for found in items]
    if not _are_alike(sides):
        sides = [[], []]
    known = [
        noise.Side(row, own, base.get((model, task), ())) for row, own, base in zip((a, b), sides, bases, strict=True)
    ]
    found, how = noise.compared(task, metric, known[1], known[0])
    difference = "–"
    if found is not None:
        ends = (f"{factor * end:+.{digits}f}" for end in (found.value, found.low, found.high))
        difference = "{} [{}, {}]".format(*ends)
    shown = (f"{factor * a['value']:.{digits}f}", f"{factor * b['value']:.{digits}f}", difference)
    verdict = ""
    if found is not None and noise.is_clear(found):
        sign = noise.direction(metric) * (1 if found.value > 0 else -1)
        verdict = {1: "better", 0: "differs", -1: "worse"}[sign]
    return Change(
        model, task, metric, own_label(task, label), is_headline, (a["value"], b["value"]), shown, how, verdict
    )


QUESTION = ("prompt", "question", "reference", "answer", "bytes", "chosen_chars", "rejected_chars")
"""What an item asks, where it says so; `answer` only of a choice, whose answer is the right candidate's number."""


def _are_alike(sides: Sequence[Sequence[Row]]) -> bool:
    """Whether both sides' items ask the same, item by item."""
    asked = [{str(row.get("item")): _asked(row) for row in rows} for rows in sides]
    return bool(asked[0]) and asked[0] == asked[1]


def _asked(row: Mapping[str, Any]) -> list[Any]:
    return [row.get(name) for name in QUESTION if name != "answer" or isinstance(row.get(name), int)]
