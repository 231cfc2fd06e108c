"""The table of an evaluation for other programs: table.csv, a figure a line, and table.tex for a paper. No torch.

A line of table.csv is a model's own figure (`kind` model), a mean over seeds, a difference of two variants or a
matched one (`variants.py`). `low` and `high` are the interval over items, `seeds_low` and `seeds_high` that over seeds
of training. `kl` is the model's KL from the baseline in nats an answer, `flops` what its own stage took to train it and
`flops_cumulative` that and all it was made of (`spent.py`); of a variant the mean over its seeds. `beyond_noise` is 1
for a difference whose intervals (over items, and over seeds where there are several) leave out 0, and 0 for one that
may be noise. What there is not is empty.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.evals.results import Result
from pipeline.evals.spent import Spent
from pipeline.evals.table import full_label, headlines, is_beyond, no_difference, style
from pipeline.evals.variants import KL, Comparison, Variant

COLUMNS = (
    *("kind", "model", "against", "nearest", "task", "metric", "value", "low", "high", "n"),
    *("seeds_low", "seeds_high", "seeds", "kl", "flops", "against_kl", "against_flops"),
    *("flops_cumulative", "against_flops_cumulative", "beyond_noise"),
)
Line = dict[str, Any]


def lines_of(
    results: Sequence[Result],
    comparisons: Sequence[Comparison],
    variants: Sequence[Variant],
    spent: Mapping[str, Spent],
) -> list[Line]:
    """The lines of table.csv: the models' figures first, then the comparisons."""
    kls = {row.model: row.value for row in results if (row.task, row.metric) == KL}
    flops = {name: each.own for name, each in spent.items()}
    whole = {name: each.cumulative for name, each in spent.items()}
    members = {variant.name: list(variant.members.values()) for variant in variants}

    def cost(name: str, known: Mapping[str, float]) -> float:
        values = [known.get(model, math.nan) for model in members.get(name, [name])]
        return sum(values) / len(values)

    lines: list[Line] = []
    for row in results:
        line = {"kind": "model", "model": row.model, "task": row.task, "metric": row.metric, "value": row.value}
        line |= {"low": row.low, "high": row.high, "n": row.n}
        line |= {"kl": kls.get(row.model, math.nan), "flops": flops.get(row.model, math.nan)}
        line["flops_cumulative"] = whole.get(row.model, math.nan)
        nothing = no_difference(row.metric)
        if nothing is not None:
            line["beyond_noise"] = float(is_beyond(row.low, row.high, row.n, nothing))
        lines.append(line)
    for each in comparisons:
        line = {key: vars(each)[key] for key in COLUMNS if key in vars(each)}
        line |= {"low": each.items_low, "high": each.items_high, "n": each.items}
        line |= {"kl": cost(each.model, kls), "flops": cost(each.model, flops)}
        line["flops_cumulative"] = cost(each.model, whole)
        if each.against:
            line |= {"against_kl": cost(each.against, kls), "against_flops": cost(each.against, flops)}
            line["against_flops_cumulative"] = cost(each.against, whole)
            over_seeds = math.isnan(each.seeds_low) or is_beyond(each.seeds_low, each.seeds_high, each.seeds)
            line["beyond_noise"] = float(over_seeds and is_beyond(each.items_low, each.items_high, each.items))
        lines.append(line)
    return [{name: line.get(name, "") for name in COLUMNS} for line in lines]


def write_csv(path: Path, lines: Sequence[Line]) -> None:
    """One line a figure, under a line of names; a number that is not finite is left empty."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: "" if _is_not_finite(value) else value for key, value in line.items()} for line in lines)


def read_csv(path: Path) -> list[Line]:
    """The lines that `write_csv` wrote, numbers as floats and None where there is none."""
    words = ("kind", "model", "against", "nearest", "task", "metric")
    with path.open(encoding="utf-8", newline="") as file:
        return [
            {key: value if key in words else float(value) if value else None for key, value in line.items()}
            for line in csv.DictReader(file)
        ]


def write_latex(path: Path, lines: Sequence[Line]) -> None:
    """Two tabulars for booktabs: models and variants by headline figure; then what was compared, where anything was."""
    levels = [line for line in lines if line["kind"] in ("model", "mean")]
    others = [line for line in lines if line["kind"] not in ("model", "mean")]
    text = "% \\usepackage{booktabs}. 95 % intervals: over seeds where a line has several, else over items\n"
    text += "% *: larger than noise\n"
    text += _tabular(levels, lambda line: _name(line["model"]) + (", mean" if line["kind"] == "mean" else ""))
    if others:
        text += "\n" + _tabular(others, lambda line: f"{_name(line['model'])} $-$ {_name(line['against'])}")
    path.write_text(text, encoding="utf-8")


def _tabular(lines: Sequence[Line], title: Callable[[Line], str]) -> str:
    metrics = headlines(dict.fromkeys((line["task"], line["metric"]) for line in lines))
    rows: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    for line in lines:
        key = (line["task"], line["metric"])
        if key in metrics:
            of = (line["kind"] + line["nearest"], title(line))
            rows.setdefault(of, {})[key] = _cell(line, *style(*key)[1:])
    head = " & ".join(["", *(_escape(full_label(*key)) for key in metrics)])
    body, before = [], ""
    for (kind, name), cells in rows.items():
        body += ["\\midrule"] * (bool(before) and kind != before)
        body.append(" & ".join([name, *(cells.get(key, "") for key in metrics)]) + " \\\\")
        before = kind
    begin = f"\\begin{{tabular}}{{l{'r' * len(metrics)}}}"
    return "\n".join([begin, "\\toprule", f"{head} \\\\", "\\midrule", *body, "\\bottomrule", "\\end{tabular}"]) + "\n"


def _cell(line: Line, digits: int, factor: int) -> str:
    if _is_not_finite(line["value"]):
        return "--"
    low, high = (line["seeds_low"], line["seeds_high"])
    if low == "" or _is_not_finite(low):
        low, high = line["low"], line["high"]
    if low == "" or _is_not_finite(low):
        return f"${factor * line['value']:.{digits}f}$"
    star = "^{*}" if line["beyond_noise"] not in ("", None) and line["beyond_noise"] else ""
    return f"${factor * line['value']:.{digits}f} \\pm {factor * (high - low) / 2:.{digits}f}{star}$"


def _name(name: str) -> str:
    return f"\\texttt{{{_escape(name)}}}"


def _escape(text: str) -> str:
    signs = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    return "".join(signs.get(sign, f"\\{sign}" if sign in "&%#_${}" else sign) for sign in text)


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
