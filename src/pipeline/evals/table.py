"""The table of an evaluation, for the terminal. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table

Row = Mapping[str, Any]
STAR = " *"
FEWEST = 6  # 2 × (1/2)^6 = 3 %
NOTE = "* larger than noise: its intervals leave out no difference"


def _percent(label: str) -> tuple[str, int, int]:
    return f"{label}, %", 1, 100


# (task, metric) -> (label, digits after the point, factor): what the table shows first, in this order.
HEADLINES = {
    ("bits_per_byte", "bits_per_byte"): ("bits per byte", 3, 1),
    ("multiple_choice", "pmi"): _percent("multiple choice"),
    ("multiple_choice", "pmi_swapped"): _percent("  names swapped"),
    ("multiple_choice", "pmi_difference"): _percent("  minus baseline"),
    ("reward_accuracy", "accuracy"): _percent("reward accuracy"),
    ("reward_accuracy", "length_only"): _percent("  lengths only"),
    ("reward_accuracy", "ece"): _percent("  calibration error"),
    ("reward_accuracy", "length_spearman"): ("  rank correlation with length", 2, 1),
    ("reward_bench", "score"): _percent("RewardBench"),
    ("reward_bench", "section"): ("  section", 1, 100),
    ("reward_bench", "accuracy"): _percent("  all rows"),
    ("preference_accuracy", "accuracy"): _percent("preference accuracy"),
    ("preference_accuracy", "length_only"): _percent("  lengths only"),
    ("exact_match", "accuracy"): _percent("exact match"),
    ("exact_match", "difference"): _percent("  minus baseline"),
    ("exact_match", "length"): ("  length, tokens", 1, 1),
    ("win_rate", "win_rate"): _percent("win rate against baseline"),
    ("win_rate", "swayed"): _percent("  swayed by the order"),
    ("sampled", "reward"): ("reward", 2, 1),
    ("sampled", "reward_sd"): ("  above baseline, sd", 2, 1),
    ("sampled", "kl"): ("KL from baseline, nats", 2, 1),
    ("sampled", "length"): ("length, tokens", 1, 1),
    ("sampled", "ended"): _percent("ended"),
    ("greedy", "gold"): ("gold (greedy)", 3, 1),
    ("greedy", "gold_win_rate"): _percent("  against baseline"),
    ("sampled", "gold"): ("gold (sampled)", 3, 1),
    ("sampled", "gold_win_rate"): _percent("  against baseline"),
}
OWN = {
    "acc": _percent("acc"),
    "acc_norm": _percent("acc by length"),
    "pmi": _percent("PMI"),
    "acc_centred": _percent("centred (0: guessing)"),
    "acc_difference": _percent("minus baseline"),
    "accuracy": _percent("accuracy"),
    "exact_match": _percent("exact match"),
    "majority": _percent("majority"),
    "difference": _percent("minus baseline"),
    "win_rate": _percent("win rate against baseline"),
    "swayed": _percent("swayed by the order"),
    "bits_per_byte": ("bits per byte", 3, 1),
    "word_perplexity": ("word perplexity", 2, 1),
}
"""Metric of a task that is not built in -> the same; its label stands behind the task's name."""
SPLIT = ("accuracy", "section")
"""Figures whose kinds are shown with the headlines."""


PAIRS = 6
"""Differences within a stage that the terminal shows, at most; where there are more, those against the first."""
BUILT_IN = {task for task, _ in HEADLINES}
FLOPS = (("training FLOPs", "flops", ".3g"), ("  with all before it", "flops_cumulative", ".3g"))
MATCHED = {"kl": "nearest in KL", "flops": "nearest in all FLOPs"}

Lines = list[tuple[str, list[str]]]
"""(label, a cell a column)."""


def render_table(
    results: Sequence[Row],
    *,
    details: bool = False,
    flops: Mapping[str, float | None] | None = None,
    cumulative: Mapping[str, float | None] | None = None,
    width: int = 120,
) -> Group:
    """Figures down, models across, each with half the width of its interval. `results`: rows of results.jsonl.

    The headlines only, kinds of negative included; with `details` every figure there is. `flops`: of each model's
    own training, `cumulative`: and of all before it; None where it is not known. What does not fit the width is put
    below. A star marks a comparison with the baseline that is larger than noise.
    """
    models = list(dict.fromkeys(result["model"] for result in results))
    cells: dict[tuple[str, str], dict[str, Row]] = {}
    for result in results:
        cells.setdefault((result["task"], result["metric"]), {})[result["model"]] = result
    lines: Lines = []
    for key in _order(list(cells), details):
        label, digits, factor = style(*key)
        row = cells[key]
        lines.append((label, [_cell(row[m], digits, factor) if m in row else "" for m in models]))
    for (label, _, _), known in zip(FLOPS, (flops, cumulative), strict=True):
        if known and any(known.values()):
            lines.append((label, [_flops(known.get(model)) for model in models]))
    note = NOTE if any(cell.endswith(STAR) for _, cells_ in lines for cell in cells_) else ""
    return _tables("held out, ± 95 %", [_folded(model) for model in models], lines, width, note)


def render_comparisons(rows: Sequence[Row], kind: str, *, width: int = 120) -> Group:
    """Headlines down; variants, or pairs of them, across, each with half its interval over seeds and over items.

    rows: of table.csv. kind: mean, difference or matched.
    """
    shown = [row for row in rows if row["kind"] == kind]
    everything = across = list(dict.fromkeys((row["model"], row["against"]) for row in shown))
    if kind == "difference" and len(across) > PAIRS:
        firsts = {model.partition("@")[0]: against for model, against in reversed(across)}
        across = [pair for pair in across if pair[1] == firsts[pair[0].partition("@")[0]]]
    cells = {((row["task"], row["metric"]), (row["model"], row["against"])): row for row in shown}
    lines: Lines = []
    for key in _order(list(dict.fromkeys(key for key, _ in cells)), details=False):
        label, digits, factor = style(*key)
        found = [cells.get((key, pair)) for pair in across]
        lines.append((label, ["" if row is None else _both(row, digits, factor) for row in found]))
    known = {(row["model"], row["against"]): row for row in shown}
    for label, name, form in (("KL of both, nats", "kl", ".2f"), *FLOPS):
        sides = (name, f"against_{name}") if kind != "mean" else (name,) if name != "kl" else ()
        costs = [[known[pair].get(side) for side in sides] for pair in across]
        if any(value is not None for pair in costs for value in pair):
            lines.append((label, [", ".join("–" if v is None else f"{v:{form}}" for v in pair) for pair in costs]))
    heads = [_folded(model) + (f"\n− {_folded(against)}" if against else "") for model, against in across]
    what = {"mean": "mean over seeds", "difference": "difference"}.get(kind) or MATCHED[shown[0]["nearest"]]
    left = len(everything) - len(across)
    notes = [NOTE] * any(cell.endswith(STAR) for _, row in lines for cell in row)
    notes += [f"{left} more in table.csv"] * (left > 0)
    return _tables(f"{what},\n± 95 % over seeds | items", heads, lines, width, "\n".join(notes))


def _tables(title: str, heads: Sequence[str], lines: Lines, width: int, note: str = "") -> Group:
    """As many columns beside each other as fit, the others below, under the same labels."""
    labels = max(len(line) for text in (title, *(label for label, _ in lines)) for line in text.split("\n"))
    columns = [[*head.split("\n"), *(cells[i] for _, cells in lines)] for i, head in enumerate(heads)]
    wide = [2 + max(map(len, column)) for column in columns]
    tables: list[Table | str] = []
    start = 0
    while start < len(heads):
        end = start + 1
        while end < len(heads) and labels + sum(wide[start : end + 1]) <= width:
            end += 1
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column(title, no_wrap=True)
        for head in heads[start:end]:
            table.add_column(head, justify="right", no_wrap=True)
        for label, cells in lines:
            if any(cells[start:end]):
                table.add_row(label, *cells[start:end])
        tables += [""] * bool(tables) + [table]
        start = end
    return Group(*tables, *[note] * bool(note))


def _folded(model: str) -> str:
    """A name that a recipe's `repeat:` or `matrix:` made, a line for each of its parts, two for a long one."""
    first, *parts = model.split("@")
    return "\n@".join([first, *(part.replace("=", "\n=") if len(part) > 16 else part for part in parts)])


def _flops(value: float | None) -> str:
    return f"{value:.3g}" if value else ""


def _both(line: Row, digits: int, factor: int) -> str:
    """`+1.2 ± 0.8 | 0.5`; a dash where there are no two seeds; a star where it is larger than both noises."""
    if line["value"] is None:
        return "–"
    sign = "" if line["kind"] == "mean" else "+"
    ends = [(line["seeds_low"], line["seeds_high"]), (line["low"], line["high"])]
    halves = ["–" if low is None else f"{factor * (high - low) / 2:.{digits}f}" for low, high in ends]
    star = STAR if line.get("beyond_noise") else ""
    return f"{factor * line['value']:{sign}.{digits}f} ± {halves[0]} | {halves[1]}{star}"


def full_label(task: str, metric: str) -> str:
    """The label of a headline where it stands alone: `gold (greedy): against baseline, %`."""
    above = ""
    for key, (label, _, _) in HEADLINES.items():
        above = above if label.startswith(" ") else label
        if key == (task, metric):
            return label if label == above else f"{above.removesuffix(', %')}: {label.strip()}"
    assert metric in OWN, f"{task}.{metric} is no headline"
    return f"{task}: {OWN[metric][0]}"


def headlines(keys: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Of these (task, metric) those that are shown first: the built-in tasks' in their own order, then the others'."""
    known = list(keys)
    others = dict.fromkeys(task for task, _ in known if task not in BUILT_IN)
    shown = [key for key in HEADLINES if key in known]
    return shown + [(task, metric) for task in others for metric in OWN if (task, metric) in known]


def _order(keys: Sequence[tuple[str, str]], details: bool) -> list[tuple[str, str]]:
    """Headlines in their own order, each followed by its kinds; then the rest by task."""
    shown: list[tuple[str, str]] = []
    for task, metric in dict.fromkeys([*HEADLINES, *headlines(keys)]):
        kinds = [key for key in keys if key[0] == task and key[1].startswith(f"{metric}/")]
        shown += [(task, metric)] * ((task, metric) in keys)
        shown += kinds if (task in BUILT_IN and metric in SPLIT) or details else []
    return shown + [key for key in keys if key not in shown] * details


def style(task: str, metric: str) -> tuple[str, int, int]:
    """(label, digits, factor) of a figure."""
    name, _, kind = metric.partition("/")
    if kind and (task, name) in HEADLINES:
        _, digits, factor = HEADLINES[task, name]
        if name == "section":
            return f"  {kind.replace('_', ' ')}, %", digits, factor
        if task == "reward_bench":
            return f"  {kind}, %", digits, factor
        return f"  {'lengths only, ' if name == 'length_only' else ''}against {kind}, %", digits, factor
    if task not in BUILT_IN and name in OWN:
        label, digits, factor = OWN[name]
        return f"{task}: {f'{kind}, ' if kind else ''}{label}", digits, factor
    return HEADLINES.get((task, metric), (f"{task}.{metric}", 3, 1))


def no_difference(metric: str) -> float | None:
    """What a comparison with the baseline would be where there is no difference; None for another figure."""
    if metric in ("win_rate", "gold_win_rate"):
        return 0.5
    return 0.0 if metric.rpartition("_")[2] == "difference" or metric == "reward_sd" else None


def is_beyond(low: float, high: float, n: int, nothing: float = 0.0) -> bool:
    """Whether the interval over `n` items leaves out what no difference would be; False for one that is not known.

    Where all items say the same the bootstrap has no width: then they must be as many as make a coin's one side 5 %.
    """
    return (low > nothing or high < nothing) and (low < high or n >= FEWEST)


def has_interval(result: Row) -> bool:
    """Whether the row of results.jsonl has one; results of an earlier version give one item a width of 0."""
    return result["low"] is not None and result["high"] is not None and result["n"] > 1


def _cell(result: Row, digits: int, factor: int) -> str:
    """`54.3 ± 2.8`; a dash where there is no figure or no interval; a star where a comparison is larger than noise."""
    if result["value"] is None:
        return "–"
    if not has_interval(result):
        return f"{factor * result['value']:.{digits}f} ± –"
    half, nothing = (result["high"] - result["low"]) / 2, no_difference(result["metric"])
    star = STAR if nothing is not None and is_beyond(result["low"], result["high"], result["n"], nothing) else ""
    return f"{factor * result['value']:.{digits}f} ± {factor * half:.{digits}f}{star}"
