"""All of it as one file of HTML that needs nothing from outside and stays under three megabytes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipeline.report import formats, layout
from pipeline.report.answers import Exchange, exchanges, written_while_training
from pipeline.report.blamed import blamed
from pipeline.report.curves import Panel, over_rounds, panels
from pipeline.report.differences import within
from pipeline.report.drawing import COLOURS, Figured, draw_all, draw_reliability
from pipeline.report.recipe_of import as_yaml, command, missing_parts, recipe_of
from pipeline.report.records import RunRecord, StageRecord
from pipeline.report.reliability import kept, reliabilities
from pipeline.report.results import Table, items_of, tables_of
from pipeline.report.variants import Comparisons, comparisons

LARGEST = 3_000_000
"""Bytes of a page, which it stays below."""
PRICE = 2.5
"""Euros an hour of a rented GPU, as `plan --price`."""
DETAIL = ((240, 10), (100, 6), (40, 3), (16, 1))
"""(points a curve, prompts whose answers are shown): the first with which the page is small enough."""


@dataclass(frozen=True)
class Group:
    """Stages drawn together, their panels and what they wrote while training."""

    name: str
    stages: tuple[StageRecord, ...]
    figures: tuple[Figured, ...]
    more: tuple[Figured, ...]
    rounds: tuple[Figured, ...]
    texts: tuple[tuple[str, int, str, str], ...]
    """(stage, step, name, text)."""

    @property
    def all_figures(self) -> tuple[Figured, ...]:
        """In the order in which they stand on the page."""
        return (*self.figures, *self.rounds, *self.more)


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: its tables, answers to the same prompts, reliability figures, and comparisons of variants."""

    stage: str
    tables: tuple[Table, ...]
    task: str
    exchanges: tuple[Exchange, ...]
    rated: tuple[str, ...]
    """Reward models of the reliability figures."""
    reliability: tuple[Figured, ...]
    compared: tuple[Comparisons, ...]

    @property
    def colours(self) -> dict[str, int]:
        """Of each model, of its answers."""
        of_tables = [model for table in self.tables for model in table.models]
        of_answers = [answer.model for each in self.exchanges for answer in each.answers]
        return {model: i % COLOURS + 1 for i, model in enumerate(dict.fromkeys([*of_tables, *of_answers]))}


def page_of(run: RunRecord, price: float | None) -> str:
    """The report of a run. `price`: euros an hour and device; None for `PRICE` of a GPU and none of a CPU."""
    for points, prompts in DETAIL:
        page = _page(run, price, points, prompts)
        if len(page.encode()) < LARGEST:
            return page
    return page


def _page(run: RunRecord, price: float | None, points: int, prompts: int) -> str:
    counter = Counter()
    evaluations = [evaluation_of(stage, prompts, counter) for stage in run.evaluations()]
    calibration = [figure for each in evaluations for figure in each.reliability] + _kept(run, evaluations, counter)
    groups = [_group(members, points, counter) for members in grouped(run.stages)]
    shown = [group for group in groups if group.all_figures or group.texts]
    recipe = as_yaml(recipe_of(run))
    return render(
        "report.html",
        title=run.name,
        run=run,
        price=PRICE if price is None else price,
        totals=totals(run, price),
        costs=costs(run, price),
        has_shards=any(map(is_tokens, run.stages)),
        shares=layout.shares({stage.name: stage.seconds for stage in run.stages}),
        wide=layout.lay_out(run.stages, is_upright=False),
        tall=layout.lay_out(run.stages, is_upright=True),
        evaluations=evaluations,
        calibration=calibration,
        blamed=blamed(run),
        groups=shown,
        linked={group.stages[0].base for group in shown},
        figures=data_of([*calibration, *(each for group in shown for each in group.all_figures)]),
        differing=within(run.stages),
        environments=environments(run.stages),
        command=command(recipe, run.name) if any(stage.is_done for stage in run.stages) else "",
        missing=missing_parts(run.stages),
    )


class Counter:
    """Numbers for the figures of one page."""

    def __init__(self) -> None:
        self.next = 0

    def draw(self, shown: Sequence[Panel]) -> tuple[Figured, ...]:
        found = tuple(draw_all(shown, self.next))
        self.next += len(found)
        return found

    def take(self) -> int:
        self.next += 1
        return self.next - 1


def grouped(stages: Sequence[StageRecord]) -> list[list[StageRecord]]:
    """Those whose names differ behind the `@` alone, together."""
    found: dict[tuple[str, str], list[StageRecord]] = {}
    for each in stages:
        found.setdefault((each.base, each.type), []).append(each)
    return list(found.values())


def _group(members: Sequence[StageRecord], points: int, counter: Counter) -> Group:
    shown, more = panels(members, points)
    texts = [(stage.name, *text) for stage in members for text in written_while_training(stage.metrics)]
    name = members[0].name if len(members) == 1 else f"{members[0].base}@…"
    rounds = over_rounds(members)
    return Group(name, tuple(members), counter.draw(shown), counter.draw(more), counter.draw(rounds), tuple(texts))


def evaluation_of(stage: StageRecord, prompts: int, counter: Counter) -> Evaluation:
    """What a finished evaluation holds."""
    items = items_of(stage)
    task, shown = exchanges(items, prompts)
    rated = reliabilities(items)
    drawn = tuple(draw_reliability(each, counter.take()) for each in rated)
    names = tuple(each.model for each in rated)
    tables, compared = tuple(tables_of(stage, items)), tuple(comparisons(stage))
    return Evaluation(stage.name, tables, task, tuple(shown), names, drawn, compared)


def data_of(figures: Sequence[Figured]) -> list[dict[str, Any]]:
    """What the page's script reads, a figure each, in the order in which they stand on the page."""
    return [each.data | {"colours": each.colours} for each in figures]


def _kept(run: RunRecord, evaluations: Sequence[Evaluation], counter: Counter) -> list[Figured]:
    """Of reward models that no evaluation asked: what their own stages wrote."""
    asked = {model for each in evaluations for model in each.rated}
    found = [kept(each) for each in run.stages if each.manifest.get("kind") == "reward-model"]
    shown = [each for each in found if each is not None and each.model not in asked]
    return [draw_reliability(each, counter.take()) for each in shown]


def costs(run: RunRecord, price: float | None) -> dict[str, float | None]:
    """Stage -> euros; None without a price of one's own where it ran on a CPU, or where nothing tells on what."""
    devices = [str(each.manifest["device"]) for each in run.stages if each.is_done]
    found: dict[str, float | None] = {}
    for stage in run.stages:
        device = str(stage.manifest["device"]) if stage.is_done else (devices or ["cpu"])[-1]  # as what was before it
        own = None if device.startswith(("cpu", "mps")) else PRICE
        each = own if price is None else price
        found[stage.name] = None if each is None else stage.seconds / 3600 * each * stage.processes
    return found


def totals(run: RunRecord, price: float | None) -> dict[str, Any]:
    """Sums over all stages, and what is left. Tokens are those that models were trained on or wrote: without those
    that were only written into shards."""
    done = [each for each in run.stages if each.is_done]
    known = [each for each in costs(run, price).values() if each is not None]
    return {
        "seconds": sum(each.seconds for each in run.stages),
        "tokens": sum(each.tokens for each in run.stages if not is_tokens(each)),
        "flops": sum(each.flops or 0.0 for each in run.stages),
        "cost": sum(known) if known else None,
        "done": len(done),
        "unfinished": len(run.stages) - len(done),
        "last": max((each.manifest["created"] for each in done), default=""),
    }


def is_tokens(stage: StageRecord) -> bool:
    """Whether what it made is tokens, which no model has seen yet."""
    return stage.manifest.get("kind") == "tokens" or (not stage.is_done and stage.type == "tokenize")


def environments(stages: Sequence[StageRecord]) -> list[tuple[dict[str, str], list[str]]]:
    """(what computed them, the stages), once for each that differs."""
    found: dict[str, tuple[dict[str, str], list[str]]] = {}
    for stage in stages:
        if not stage.is_done:
            continue
        manifest = stage.manifest
        processes = manifest["processes"]
        values = {
            "device": manifest["device"] + (f" × {processes}" if processes > 1 else ""),
            "threads": str(manifest["threads"]),
            "git commit": manifest["git_commit"] or "none",
            **manifest["versions"],
        }
        found.setdefault(json.dumps(values), (values, []))[1].append(stage.name)
    return list(found.values())


def render(template: str, **context: Any) -> str:  # the names that a template uses are its own
    """A template of this package, everything escaped that is not markup of its own."""
    environment = Environment(
        loader=PackageLoader("pipeline.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "si": formats.si,
        "flops": formats.flops,
        "duration": formats.duration,
        "money": formats.money,
        "number": formats.number,
        "short": formats.short,
        "markup": Markup,
    }
    folder = Path(__file__).parent / "templates"
    parts: Mapping[str, Any] = {
        "style": Markup((folder / "style.css").read_text(encoding="utf-8")),
        "script": Markup((folder / "page.js").read_text(encoding="utf-8")),
        "box": layout.BOX,
    }
    return environment.get_template(template).render(**parts, **context)
