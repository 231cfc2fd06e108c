"""`require` of an evaluation: figures that must be reached, or the run fails.

Names are checked before anything runs, as far as they are known then; figures where the evaluation stands, made now or
earlier, so that a later run fails on the same figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifacts import Artifact
from pipeline.errors import GateError, RecipeError
from pipeline.evaluation_config import ALL, BUILT_IN, FIRST, METRICS, Bound, Task, figure_named, read_bound
from pipeline.graph import Node
from pipeline.reading import Document, meant


@dataclass(frozen=True)
class Gate:
    """One line of `require`."""

    name: str
    """As the recipe has it."""
    figures: tuple[str, ...]
    """The figures it may mean; the first that there is counts."""
    bound: Bound
    where: str


def gates_of(node: Node, document: Document) -> list[Gate]:
    """What the stage requires; [] where it has no `require`. RecipeError for a name that can't be a figure of it."""
    config: Any = node.config
    if node.stage.kind != "evaluation" or "require" not in type(config).model_fields:
        return []
    found = []
    for name, text in config.require.items():
        where = document.place("stages", node.name, "require", name)
        try:
            found.append(Gate(name, _figures(name, node), read_bound(text), where))
        except ValueError as error:
            raise RecipeError(str(error), where=where) from error
    return found


def _figures(name: str, node: Node) -> tuple[str, ...]:
    """`sft.exact_match` -> `sft.exact_match.accuracy`; ValueError for what can't be measured."""
    config: Any = node.config
    models = [ref for role in ("models", "baseline", "reward") for ref in node.inputs.get(role, ())]
    called = {Path(ref).name if ref.startswith("/") else ref: ref for ref in models[::-1]}
    tasks: Sequence[Task] = config.tasks or ()
    own = {task.name: task for task in tasks if task.task not in (*BUILT_IN, ALL)}
    named = [task.task for task in tasks if task.task in BUILT_IN]
    built_in = BUILT_IN if config.tasks is None or any(task.task == ALL for task in tasks) else tuple(named)
    model, task, metric = figure_named(name, [*called, *models], (*own, *built_in))
    model = called.get(model, model)
    kind = task if task in built_in else own[task].kind or ""
    kind = "choices" if task in own and kind == "multiple_choice" else kind
    if metric:
        known: Mapping[str, tuple[str, ...]] = METRICS
        if kind in known and metric.partition("/")[0] not in known[kind]:
            raise ValueError(f"`{name}`: {task} has no figure `{metric}`{meant(metric, known[kind])}")
        return (f"{model}.{task}.{metric}",)
    first = (FIRST[kind],) if kind in FIRST else ("acc", "accuracy", "exact_match", "bits_per_byte")
    return tuple(f"{model}.{task}.{each}" for each in first)


def shown(gates: Sequence[Gate], artifact: Artifact) -> list[dict[str, Any]]:
    """Each gate with the figure and whether it is passed; a figure that is not there is None and not passed."""
    metrics: Mapping[str, float] = artifact.manifest["metrics"]
    rows = []
    for gate in gates:
        figure = next((each for each in gate.figures if each in metrics), None)
        value = None if figure is None else metrics[figure]
        passed = value is not None and gate.bound.holds(value)
        rows.append({"figure": figure or gate.name, "required": str(gate.bound), "value": value, "passed": passed})
    return rows


def failure(gates: Sequence[Gate], artifact: Artifact) -> GateError | None:
    """The error where a gate is not passed: each such figure with what it must be."""
    wrong = [(gate, row) for gate, row in zip(gates, shown(gates, artifact)) if not row["passed"]]
    if not wrong:
        return None
    lines = [f"{row['figure']} is {_number(row['value'])}, required {row['required']}" for _, row in wrong]
    what = f"{len(wrong)} of {len(gates)} required figures not reached: " if len(gates) > 1 else ""
    missing = [gate.name for gate, row in wrong if row["value"] is None]
    mend = "a figure that was not measured is never reached: see results.jsonl for those there are" if missing else ""
    return GateError(what + "; ".join(lines), where=wrong[0][0].where, mend=mend)


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"
