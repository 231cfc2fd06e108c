"""The one runner: every task over every model, a part at a time, resumable by sample.

A unit is one task of one model. Its samples are done in parts of a few batches, and what is found of each part is a
line of the unit's file in the checkpoints' folder, on disk before the next one begins: a run that was killed loses the
part it was at. The parts are the same wherever a run went on, so the bits are too (on a CPU, under one `token_budget`).
Figures and comparisons are made from the items at the end, in milliseconds. With several ranks the units are dealt
out; no unit needs another.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.errors import ConfigError
from pipeline.evals import (
    bits_per_byte,
    exact_match,
    length_only,
    lm_eval_tasks,
    multiple_choice,
    own_tasks,
    preference_accuracy,
    reward_accuracy,
    reward_bench,
    samples,
    win_rate,
)
from pipeline.evals.planned import FOR_REWARD, WITHOUT_BASELINE, Plan, Unit, units
from pipeline.evals.results import Result
from pipeline.evals.scorers import Job, Scorers
from pipeline.evals.statistics import Estimate, PerItem
from pipeline.evals.variants import Found

if TYPE_CHECKING:
    from pipeline.runtime import Runtime

Item = dict[str, Any]
BATCHES_A_PART = 4
"""What a kill loses at most, in token budgets."""


def evaluate(plan: Plan, folder: Path, runtime: Runtime) -> tuple[list[Result], list[Item], Found]:
    """All figures, all items behind them, each with its model and task, and what the models' figures are item by item.
    Every rank returns the same.

    folder: where the units' files are kept and looked for.
    """
    todo = units(plan, runtime.say)
    if not todo:
        raise ConfigError("no task applies to these models", mend="leave `tasks` unset, or add a chat model")
    files = [folder / f"{number:03d}-{_file_name(unit.task)}.jsonl" for number, unit in enumerate(todo)]
    if runtime.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    runtime.barrier()
    before = [_read(file) for file in files]
    for threads in [part["threads"] for parts in before for part in parts][:1]:  # other thread counts give other bits
        runtime.threads = threads
        torch.set_num_threads(threads)
    runtime.checkpoints.resumed_from = sum(len(part["places"]) for parts in before for part in parts)
    if runtime.is_main:
        runtime.metrics.cut(0, sum(part["seconds"] for parts in before for part in parts))
    runtime.barrier()  # every rank has looked before any writes: they must agree on what is left
    _work(plan, todo, files, before, runtime)
    runtime.barrier()
    found = {(unit.model.name, unit.task): _items(_read(file)) for unit, file in zip(todo, files, strict=True)}
    _say_what_is_too_long(plan, todo, found, runtime)
    reported = [unit for unit in todo if unit.is_reported]
    results = [result for unit in reported for result in _results(plan, unit, found)]
    items = [
        {"model": unit.model.name, "task": unit.task} | item
        for unit in reported
        for item in found[unit.model.name, unit.task]
    ]
    per_item: dict[str, dict[str, PerItem]] = {model.name: {} for model in plan.models}
    for unit in reported:
        if unit.task not in FOR_REWARD:  # the reward model's, which is one
            name, task = unit.model.name, unit.task
            per_item[name][task] = _per_item(plan, task, found[name, task], _baselines(plan, unit, found))
    return results, items, per_item


def _say_what_is_too_long(
    plan: Plan, todo: Sequence[Unit], found: dict[tuple[str, str], list[Item]], runtime: Runtime
) -> None:
    """Of tasks of the user's own: how many rows did not fit a model."""
    for unit in todo:
        own = plan.own.get(unit.task)
        asked = 0 if own is None else len(own.questions) + len(own.exercises)
        left = asked - len(found[unit.model.name, unit.task])
        if left > 0:
            what = f"{left:,} of {asked:,} rows are longer than {unit.model.name} reads, and left out"
            runtime.say(f"{unit.task}: {what} (fewer examples, or a larger max_length)")


def _file_name(task: str) -> str:
    return "".join(sign if sign.isalnum() or sign in "._-" else "_" for sign in task)


def _read(file: Path) -> list[dict[str, Any]]:
    """The whole parts of a unit's file; a line that a kill has cut short is taken off it."""
    if not file.exists():
        return []
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    return [json.loads(line) for line in whole.splitlines()]


def _items(parts: Sequence[dict[str, Any]]) -> list[Item]:
    """The items of all parts in the samples' order."""
    placed = [(place, item) for part in parts for place, item in zip(part["of"], part["items"], strict=True)]
    return [item for _, item in sorted(placed, key=lambda each: each[0])]


def cut(job: Job, budget: int) -> list[list[int]]:
    """The samples' places in parts that cost `budget` or a little more, like with like and the longest first; within a
    part in their own order."""
    groups = job.groups or [""] * len(job.costs)
    order = sorted(range(len(job.costs)), key=lambda place: (groups[place], -job.costs[place]))
    parts: list[list[int]] = []
    left = 0
    for place in order:
        if left <= 0:
            parts.append([])
            left = budget
        parts[-1].append(place)
        left -= job.costs[place]
    return [sorted(part) for part in parts]


def _work(
    plan: Plan, todo: Sequence[Unit], files: Sequence[Path], before: Sequence[list[dict[str, Any]]], runtime: Runtime
) -> None:
    """This rank's share of the units, in so far as they are not done."""
    done = [{place for part in parts for place in part["places"]} for parts in before]
    finished = sum(map(len, done))

    def tick() -> None:
        if runtime.halt.asked is not None:
            runtime.stop(finished)

    scorers = Scorers(plan, runtime, tick)
    jobs = [scorers.job(unit) for unit in todo]
    with runtime.progress("evaluate", sum(len(job.costs) for job in jobs), "samples") as bar:
        bar.start_at(finished)
        for number, (unit, job, file) in enumerate(zip(todo, jobs, files, strict=True)):
            if number % runtime.world_size != runtime.rank:
                bar.advance(len(job.costs) - len(done[number]))
                continue
            _cut_back(file)
            for part in cut(job, BATCHES_A_PART * plan.token_budget):
                left = [place for place in part if place not in done[number]]
                if left:
                    start = time.monotonic()
                    found = job.score(left)
                    line = {"model": unit.model.name, "task": unit.task, "seconds": round(time.monotonic() - start, 3)}
                    line |= {"threads": runtime.threads, "places": left}
                    line |= {"of": [place for place, _ in found], "items": [item for _, item in found]}
                    _append(file, line)
                    finished += len(left)
                    bar.advance(len(left))
                    tick()


def _cut_back(file: Path) -> None:
    """Take off a line that a kill has cut short, or begin the file."""
    data = file.read_bytes() if file.exists() else b""
    with file.open("ab") as end:
        end.truncate(data.rfind(b"\n") + 1)


def _append(file: Path, line: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as end:
        end.write(json.dumps(line, ensure_ascii=False) + "\n")
        end.flush()
        os.fsync(end.fileno())


def _results(plan: Plan, unit: Unit, found: dict[tuple[str, str], list[Item]]) -> Iterator[Result]:
    items = found[unit.model.name, unit.task]
    for metric, estimate in _figures(plan, unit.task, items, _baselines(plan, unit, found)).items():
        figure = (estimate.value, estimate.low, estimate.high, estimate.n)
        yield Result(unit.model.name, unit.model.artifact.fingerprint, unit.task, metric, *figure)


def _baselines(plan: Plan, unit: Unit, found: dict[tuple[str, str], list[Item]]) -> list[Item] | None:
    """The baseline's items of the unit's task; None for the baseline itself."""
    if plan.baseline is None or unit.model.name == plan.baseline.name or plan.kind(unit.task) in WITHOUT_BASELINE:
        return None
    return found.get((plan.baseline.name, unit.task))


def _per_item(plan: Plan, task: str, items: list[Item], baseline: list[Item] | None) -> PerItem:
    """The figures of one unit, item by item, of those that are a mean or a ratio of sums."""
    if task in plan.own:
        own = plan.own[task]
        return lm_eval_tasks.per_item(items) if own.kind == "lm_eval" else own_tasks.per_item(own, items)
    if task == "bits_per_byte":
        return bits_per_byte.per_item(items)
    if task == "multiple_choice":
        return multiple_choice.per_item(items)
    if task == "preference_accuracy":
        return preference_accuracy.per_item(items, baseline) if baseline is not None else {}
    if task == "exact_match":
        return exact_match.per_item(items)
    if task == "win_rate":
        return win_rate.per_item(items)
    return samples.per_item(items)


def _figures(plan: Plan, task: str, items: list[Item], baseline: list[Item] | None) -> dict[str, Estimate]:
    """The figures of one unit; `baseline` is the baseline's items of the same task, None for itself."""
    if task in plan.own:
        own = plan.own[task]
        if own.kind == "lm_eval":
            return lm_eval_tasks.figures(items, plan.seed)
        return own_tasks.figures(own, items, baseline, plan.seed)
    if task == "bits_per_byte":
        return bits_per_byte.figures(items, plan.seed)
    if task == "multiple_choice":
        return multiple_choice.figures(items, baseline, plan.seed)
    if task == "reward_accuracy":
        return reward_accuracy.figures(items, length_only.fit(*plan.lengths), plan.seed)
    if task == "reward_bench":
        return reward_bench.figures(items, plan.seed)
    if task == "preference_accuracy":
        scorer = length_only.fit(*plan.lengths)
        return preference_accuracy.figures(items, baseline, scorer, plan.seed) if baseline is not None else {}
    if task == "exact_match":
        return exact_match.figures(items, baseline, plan.seed)
    if task == "win_rate":
        return win_rate.figures(items, plan.seed)
    return samples.figures(items, baseline, plan.seed)
