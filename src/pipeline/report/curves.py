"""Which metrics are drawn, and which of them in one panel.

Stages whose names differ behind the `@` alone are drawn together: the seeds and variants of a matrix, the rounds of a
repeat. Of a long run so many points are kept as a panel can show, the smallest and the largest of each stretch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.report.records import Row, StageRecord

Kind = Literal["lines", "points", "stack"]


@dataclass(frozen=True)
class Curve:
    """What is drawn in one colour."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]


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
    Shape("Loss", "loss", {"loss": "training", "eval_loss": "held out"}, note="nats; of dpo and reward −log σ"),
    Shape("Held-out text", "bits per byte", {"bits_per_byte": "held out"}),
    Shape("Policy and value loss", "loss", {"policy_loss": "policy", "value_loss": "value"}),
    Shape("Learning rate", "", {"learning_rate": "learning rate"}),
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
            "score": "reward in training",
            "eval_reward": "held out, greedy",
            "gold": "gold in training",
            "eval_gold": "gold, held out",
        },
    ),
    Shape(
        "Proxy and gold over √KL",
        "reward",
        {"score": "reward", "gold": "gold"},
        kind="points",
        x="sqrt_kl",
        note="sampled in training; every point is a step",
    ),
    Shape(
        "Proxy and gold over √KL, held out",
        "reward",
        {"eval_reward": "reward", "eval_gold": "gold"},
        kind="points",
        x="eval_sqrt_kl",
        note="greedy answers; gold that falls while the reward rises is overoptimisation",
    ),
    Shape(
        "KL from the start", "nats an answer", {"kl": "sampled", "eval_kl": "held out", "approx_kl": "within an update"}
    ),
    Shape(
        "Margins",
        "reward",
        {"rewards/margins": "chosen − rejected", "margin": "chosen − rejected"},
        note="of dpo the implicit reward, β·log-ratio",
    ),
    Shape("Chosen and rejected", "implicit reward", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}),
    Shape("Rewards", "score", {"max_reward": "largest", "mean_reward": "mean", "min_reward": "smallest"}),
    Shape(
        "Accuracy",
        "%",
        {
            "rewards/accuracies": "pairs",
            "accuracy": "pairs",
            "mean_token_accuracy": "tokens",
            "eval_win_rate": "wins, held out",
        },
        factor=100,
    ),
    Shape("Length", "tokens", {"length": "answer", "eval_length": "held out", "row_length": "row"}),
    Shape(
        "Ended",
        "%",
        {"ended": "sampled", "eval_ended": "held out"},
        factor=100,
        note="answers that came to their stop token",
    ),
    Shape("Entropy", "nats a token", {"entropy": "sampled", "eval_entropy": "held out"}),
    Shape("Clipping", "share", {"clip_fraction": "policy", "value_clip_fraction": "value"}),
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
    "reward",
}
HIDDEN |= {"eval_sqrt_kl", "samples_per_second"}


def panels(stages: Sequence[StageRecord], points: int) -> tuple[list[Panel], list[Panel]]:
    """(the panels of stages drawn together, further figures that no panel knows), with so many points a curve."""
    series = {_suffix(stage, stages): stage.metrics for stage in stages}
    return panels_of(series, points)


def _suffix(stage: StageRecord, among: Sequence[StageRecord]) -> str:
    """What tells the stage from those it is drawn with: nothing where it is alone."""
    return "" if len(among) == 1 else stage.name


def panels_of(series: Mapping[str, Sequence[Row]], points: int) -> tuple[list[Panel], list[Panel]]:
    """As `panels`, of named lists of rows."""
    shown = [found for shape in SHAPES if (found := _panel(shape, series, points))]
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
    return shown + phases, rest


def _panel(shape: Shape, series: Mapping[str, Sequence[Row]], points: int) -> Panel | None:
    curves = []
    for name, rows in series.items():
        for metric, label in shape.metrics.items():
            found = [(row.get(shape.x), row.get(metric)) for row in rows]
            pairs = [(float(x), float(y) * shape.factor) for x, y in found if is_number(x) and is_number(y)]  # type: ignore[arg-type]
            if len(pairs) < 2:
                continue
            whole = " · ".join(part for part in (name, label) if part)
            curves.append(_curve(whole, pairs, points))
    if not curves:
        return None
    labels = {curve.label.rpartition(" · ")[2] for curve in curves}
    if len(series) > 1 and len(labels) == 1:  # the stages alone tell the curves apart
        curves = [Curve(curve.label.rpartition(" · ")[0], curve.x, curve.y) for curve in curves]
    x_label = {"step": "step", "sqrt_kl": "√KL", "eval_sqrt_kl": "√KL"}[shape.x]
    return Panel(shape.title, x_label, shape.y_label, shape.kind, tuple(curves), shape.note)


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
        curves = [Curve(key.removeprefix(PHASES), x, tuple(float(row[key]) for row in kept)) for key in names]
        title = "Time of a step" + (f", {name}" if name else "")
        found.append(Panel(title, "step", "seconds", "stack", tuple(curves)))
    return found


def is_number(value: object) -> bool:
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
