"""The table of an evaluation, for the terminal. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

Row = Mapping[str, Any]

# (task, metric) -> (label, digits after the point, factor): what the table shows first, in this order.
HEADLINES = {
    ("bits_per_byte", "bits_per_byte"): ("bits per byte", 3, 1),
    ("multiple_choice", "pmi"): ("multiple choice, %", 1, 100),
    ("multiple_choice", "pmi_swapped"): ("  names swapped, %", 1, 100),
    ("multiple_choice", "pmi_difference"): ("  minus baseline, %", 1, 100),
    ("reward_accuracy", "accuracy"): ("reward accuracy, %", 1, 100),
    ("reward_accuracy", "length_only"): ("  lengths only, %", 1, 100),
    ("preference_accuracy", "accuracy"): ("preference accuracy, %", 1, 100),
    ("preference_accuracy", "length_only"): ("  lengths only, %", 1, 100),
    ("exact_match", "accuracy"): ("exact match, %", 1, 100),
    ("exact_match", "difference"): ("  minus baseline, %", 1, 100),
    ("exact_match", "length"): ("  length, tokens", 1, 1),
    ("sampled", "reward"): ("reward", 2, 1),
    ("sampled", "reward_sd"): ("  above baseline, sd", 2, 1),
    ("sampled", "kl"): ("KL from baseline, nats", 2, 1),
    ("sampled", "length"): ("length, tokens", 1, 1),
    ("sampled", "ended"): ("ended, %", 1, 100),
    ("greedy", "gold"): ("gold (greedy)", 3, 1),
    ("greedy", "gold_win_rate"): ("  against baseline, %", 1, 100),
    ("sampled", "gold"): ("gold (sampled)", 3, 1),
    ("sampled", "gold_win_rate"): ("  against baseline, %", 1, 100),
}


def render_table(results: Sequence[Row], *, details: bool = False) -> Table:
    """Figures down, models across, each with half the width of its interval. `results`: rows of results.jsonl.

    The headlines only, kinds of negative included; with `details` every figure there is.
    """
    models = list(dict.fromkeys(result["model"] for result in results))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("held out, ± 95 %")
    for model in models:
        table.add_column(model, justify="right", no_wrap=True)
    cells: dict[tuple[str, str], dict[str, Row]] = {}
    for result in results:
        cells.setdefault((result["task"], result["metric"]), {})[result["model"]] = result
    for key in _order(list(cells), details):
        label, digits, factor = _style(*key)
        row = cells[key]
        table.add_row(label, *(_cell(row[m], digits, factor) if m in row else "" for m in models))
    return table


def _order(keys: Sequence[tuple[str, str]], details: bool) -> list[tuple[str, str]]:
    """Headlines in their own order, each followed by its kinds; then the rest by task."""
    shown = []
    for task, metric in HEADLINES:
        kinds = [key for key in keys if key[0] == task and key[1].startswith(f"{metric}/")]
        shown += [(task, metric)] * ((task, metric) in keys) + (kinds if metric == "accuracy" or details else [])
    return shown + [key for key in keys if key not in shown] * details


def _style(task: str, metric: str) -> tuple[str, int, int]:
    """(label, digits, factor) of a figure."""
    name, _, kind = metric.partition("/")
    if kind:
        _, digits, factor = HEADLINES[task, name]
        return f"  {'lengths only, ' if name == 'length_only' else ''}against {kind}, %", digits, factor
    return HEADLINES.get((task, metric), (f"{task}.{metric}", 3, 1))


def _cell(result: Row, digits: int, factor: int) -> str:
    """`54.3 ± 2.8`; a dash where there is no figure."""
    if result["value"] is None:
        return "–"
    half = (result["high"] - result["low"]) / 2
    return f"{factor * result['value']:.{digits}f} ± {factor * half:.{digits}f}"
