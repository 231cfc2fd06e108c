"""Which metrics are drawn, and which of them in one panel.

Stages whose names differ behind the `@` alone are drawn together: the seeds and variants of a matrix, the rounds of a
repeat. Of a long run so many points are kept as a panel can show, the smallest and the largest of each stretch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeGuard

from pipeline.report.records import Row, StageRecord

Kind = Literal["lines", "points", "stack"]


@dataclass(frozen=True)
class Curve:
    """One line. Of several stages in a panel each has a colour, and each of its metrics another stroke."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    colour: int = 0
    stroke: int = 0


@dataclass(frozen=True)
class Panel:
    """One figure."""

    title: str
    x_label: str
    y_label: str
    kind: Kind
    curves: tuple[Curve, ...]
    note: str = ""


@dataclass(frozen=True)
class Shape:
    """A panel that is drawn where its metrics are. `metrics`: name -> label."""

    title: str
    y_label: str
    metrics: Mapping[str, str]
    kind: Kind = "lines"
    x: str = "step"
    factor: float = 1.0
    note: str = ""


PHASES = "seconds_"
STEP = "step"
SHAPES = (
    Shape("Loss", "loss, nats", {"loss": "training", "eval_loss": "held out"}),
    Shape("Held-out text", "bits per byte", {"bits_per_byte": "held out"}),
    Shape("Policy and value loss", "loss", {"policy_loss": "policy", "value_loss": "value"}),
    Shape("Learning rate", "learning rate", {"learning_rate": "learning rate"}),
    Shape(
        "Gradient norm",
        "before clipping",
        {"grad_norm": "gradient", "policy_grad_norm": "policy", "value_grad_norm": "value"},
    ),
    Shape("Speed", "tokens / s", {"tokens_per_second": "tokens a second"}),
    Shape("Utilisation", "MFU, %", {"mfu": "model FLOPs utilisation"}, factor=100),
    Shape(
        "Reward",
        "reward",
        {
            "score": "proxy, in training",
            "eval_reward": "proxy, held out",
            "gold": "gold, in training",
            "eval_gold": "gold, held out",
        },
    ),
    Shape(
        "Reward over √KL, in training",
        "reward",
        {"score": "proxy", "gold": "gold"},
        kind="points",
        x="sqrt_kl",
        note="sampled answers, a point a step",
    ),
    Shape(
        "Reward over √KL, held out",
        "reward",
        {"eval_reward": "proxy", "eval_gold": "gold"},
        kind="points",
        x="eval_sqrt_kl",
        note="greedy answers; gold that falls while the proxy rises is overoptimisation",
    ),
    Shape("KL from the start", "nats an answer", {"kl": "sampled", "eval_kl": "held out"}),
    Shape("Margin", "chosen − rejected", {"rewards/margins": "implicit reward", "margin": "score"}),
    Shape("Chosen and rejected", "implicit reward", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}),
    Shape("Scores", "score", {"max_reward": "largest", "mean_reward": "mean", "min_reward": "smallest"}),
    Shape(
        "Accuracy",
        "%",
        {
            "rewards/accuracies": "pairs",
            "accuracy": "pairs",
            "mean_token_accuracy": "tokens",
        },
        factor=100,
    ),
    Shape(
        "Wins over the start",
        "%",
        {"eval_win_rate": "held out"},
        factor=100,
        note="by gold, else by the reward; a tie counts half",
    ),
    Shape(
        "Length", "tokens", {"length": "answer", "eval_length": "answer, held out", "row_length": "prompt and answer"}
    ),
    Shape("Ended", "%", {"ended": "sampled", "eval_ended": "held out"}, factor=100, note="answers with a stop token"),
    Shape("Entropy", "nats a token", {"entropy": "entropy", "eval_entropy": "held out"}),
    Shape(
        "Within an update",
        "",
        {"clip_fraction": "policy clipped", "value_clip_fraction": "value clipped", "approx_kl": "KL"},
    ),
    Shape("Critic", "explained variance", {"explained_variance": "explained variance"}),
    Shape("Memory", "GB", {"peak_memory_bytes": "peak"}, factor=1e-9),
)
HIDDEN = {
    "step",
    "time",
    "tokens",
    "flops_per_second",
    "member",
    "best_step",
    "updates",
    "episodes",
    "sqrt_kl",
}
HIDDEN |= {"eval_sqrt_kl", "samples_per_second"}


def panels(stages: Sequence[StageRecord], points: int) -> tuple[list[Panel], list[Panel]]:
    """(the panels of stages drawn together, further figures that no panel knows or that never change), with so many
    points a curve."""
    series = {_suffix(stage, stages): stage.metrics for stage in stages}
    return panels_of(series, points)


def _suffix(stage: StageRecord, among: Sequence[StageRecord]) -> str:
    """What tells the stage from those it is drawn with: nothing where it is alone."""
    return "" if len(among) == 1 else stage.name


def panels_of(series: Mapping[str, Sequence[Row]], points: int) -> tuple[list[Panel], list[Panel]]:
    """As `panels`, of named lists of rows."""
    found_ones = [found for shape in SHAPES if (found := _panel(shape, series, points))]
    shown = [panel for panel in found_ones if not _is_flat(panel)]
    flat = [panel for panel in found_ones if _is_flat(panel)]
    phases = _phases(series, points)
    known = {name for shape in SHAPES for name in shape.metrics} | HIDDEN
    other = dict.fromkeys(
        key
        for rows in series.values()
        for row in rows
        for key in row
        if key not in known and not key.startswith(PHASES)
    )
    rest = [found for key in other if (found := _panel(Shape(key, "", {key: key}), series, points))]
    return shown + phases, flat + rest


def _is_flat(panel: Panel) -> bool:
    """Whether nothing in it ever changes."""
    return all(len({*curve.y}) == 1 for curve in panel.curves)


ROUND = re.compile(r"[^@]+@(\d+)")


def over_rounds(stages: Sequence[StageRecord]) -> list[Panel]:
    """The closing figures of a repeat's rounds, over the rounds."""
    rounds = [(ROUND.fullmatch(stage.name), stage) for stage in stages]
    rows = [{STEP: int(found[1]), **stage.manifest["metrics"]} for found, stage in rounds if found and stage.is_done]
    keys = dict.fromkeys(key for row in rows for key in row if key != STEP)
    panels = [found for key in keys if (found := _panel(Shape(key, "", {key: key}), {"": rows}, len(rows)))]
    return [replace(panel, x_label="round") for panel in panels if len({*panel.curves[0].y}) > 1]


def _panel(shape: Shape, series: Mapping[str, Sequence[Row]], points: int) -> Panel | None:
    curves: list[Curve] = []
    for at, (name, rows) in enumerate(series.items()):
        for nth, (metric, label) in enumerate(shape.metrics.items()):
            pairs = _pairs(rows, shape.x, metric, shape.factor)
            if len(pairs) < 2:
                continue
            whole = " · ".join(part for part in (name, label) if part)
            curve = _curve(whole, pairs, points)
            colour, stroke = (at, nth) if len(series) > 1 else (len(curves), 0)
            curves.append(replace(curve, colour=colour, stroke=stroke))
    if not curves:
        return None
    labels = {curve.label.rpartition(" · ")[2] for curve in curves}
    if len(series) > 1 and len(labels) == 1:  # the stages alone tell the curves apart
        curves = [replace(curve, label=curve.label.rpartition(" · ")[0], stroke=0) for curve in curves]
    x_label = {"step": "step", "sqrt_kl": "√KL", "eval_sqrt_kl": "√KL"}[shape.x]
    return Panel(shape.title, x_label, shape.y_label, shape.kind, tuple(curves), shape.note)


def _pairs(rows: Sequence[Row], x_name: str, metric: str, factor: float) -> list[tuple[float, float]]:
    """(x, value) of the lines that hold both as numbers."""
    found = [(row.get(x_name), row.get(metric)) for row in rows]
    pairs = [(float(x), float(y) * factor) for x, y in found if is_number(x) and is_number(y)]
    if x_name == STEP:  # a stage's closing line says of the whole what its last line has said of a step
        pairs = list({x: (x, y) for x, y in reversed(pairs)}.values())[::-1]
    return pairs


def _phases(series: Mapping[str, Sequence[Row]], points: int) -> list[Panel]:
    """Where a step's time goes, a panel for each stage that says."""
    found = []
    for name, rows in series.items():
        names = sorted({key for row in rows for key in row if key.startswith(PHASES)})
        whole = [row for row in rows if names and all(is_number(row.get(key)) for key in names)]
        if len(whole) < 2:
            continue
        kept = whole[:: math.ceil(len(whole) / points)]
        x = tuple(float(row[STEP]) for row in kept)
        curves = [
            Curve(key.removeprefix(PHASES), x, tuple(float(row[key]) for row in kept), i) for i, key in enumerate(names)
        ]
        title = "Time of a step" + (f", {name}" if name else "")
        found.append(Panel(title, "step", "seconds", "stack", tuple(curves)))
    return found


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _curve(label: str, pairs: Iterable[tuple[float, float]], points: int) -> Curve:
    kept = thinned(list(pairs), points)
    return Curve(label, tuple(x for x, _ in kept), tuple(y for _, y in kept))


def thinned(pairs: list[tuple[float, float]], points: int) -> list[tuple[float, float]]:
    """At most `points` of the pairs: of each stretch the smallest and the largest y, in order; the ends stay."""
    if len(pairs) <= points:
        return pairs
    stretches = max(1, (points - 2) // 2)
    inner = pairs[1:-1]
    kept = [pairs[0]]
    for number in range(stretches):
        stretch = inner[number * len(inner) // stretches : (number + 1) * len(inner) // stretches]
        low = min(range(len(stretch)), key=lambda i: stretch[i][1])
        high = max(range(len(stretch)), key=lambda i: stretch[i][1])
        kept += [stretch[i] for i in sorted({low, high})]
    return [*kept, pairs[-1]]
