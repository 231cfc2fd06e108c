"""Variants over their seeds and against each other, by hand; the CSV and the LaTeX of it; what the terminal shows."""

from __future__ import annotations

import math
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from pipeline.evals import bits_per_byte, exact_match, multiple_choice, preference_accuracy, samples, statistics
from pipeline.evals.export import COLUMNS, lines_of, read_csv, write_csv, write_latex
from pipeline.evals.results import Result
from pipeline.evals.spent import Spent
from pipeline.evals.statistics import PerItem
from pipeline.evals.table import NOTE, full_label, render_comparisons, render_table
from pipeline.evals.variants import Comparison, compare, variants

NAN = math.nan


def test_students_quantile() -> None:
    """Tables; for one and two degrees of freedom in closed form; the expansion where it takes over and far out."""
    assert statistics.student_t(1) == pytest.approx(math.tan(math.pi * 0.475), abs=1e-4)
    assert statistics.student_t(2) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)), abs=1e-4)
    for freedom, value in ((9, 2.26216), (10, 2.22814), (11, 2.20099), (20, 2.08596), (30, 2.04227), (100, 1.98397)):
        assert statistics.student_t(freedom) == pytest.approx(value, abs=2e-4)
    falling = [statistics.student_t(freedom) for freedom in range(1, 60)]
    assert falling == sorted(falling, reverse=True)


def test_three_seeds_by_hand() -> None:
    """1, 2, 3: sd 1, t(2) = 4.3027, half 4.3027 / sqrt 3 = 2.4842."""
    found = statistics.over_seeds([1.0, 2.0, 3.0])
    assert (found.value, found.n) == (2.0, 3)
    assert (found.low, found.high) == (pytest.approx(2 - 2.4842, abs=1e-4), pytest.approx(2 + 2.4842, abs=1e-4))


def test_one_seed_has_no_interval_and_none_no_mean() -> None:
    one, none = statistics.over_seeds([4.0]), statistics.over_seeds([])
    assert (one.value, one.n, none.n) == (4.0, 1, 0)
    assert all(math.isnan(end) for end in (one.low, one.high, none.value, none.low))


def test_students_interval_covers_the_mean() -> None:
    """Of 4,000 draws of three seeds about 95 % hold the mean of the distribution: 190 to 210 don't, four sd wide."""
    draws = np.random.default_rng(0).normal(5.0, 2.0, size=(4000, 3))
    missed = sum(not (found.low <= 5.0 <= found.high) for found in map(statistics.over_seeds, draws))
    assert abs(missed - 200) < 4 * math.sqrt(4000 * 0.95 * 0.05)


def test_which_models_are_a_variant() -> None:
    names = ["sft", "dpo@beta=0.1@seed=0", "dpo@beta=0.1@seed=1", "dpo@2@seed=0@beta=0.1", "old/dpo@beta=0.1", "dpo"]
    found = {each.name: (each.stage, each.members) for each in variants(names)}
    assert found == {
        "sft": ("sft", {"": "sft"}),
        "dpo@beta=0.1": ("dpo", {"0": "dpo@beta=0.1@seed=0", "1": "dpo@beta=0.1@seed=1"}),
        "dpo@2@beta=0.1": ("dpo", {"0": "dpo@2@seed=0@beta=0.1"}),
        "old/dpo@beta=0.1": ("old/dpo", {"": "old/dpo@beta=0.1"}),
        "dpo": ("dpo", {"": "dpo"}),
    }


def right(*values: float, kl: float | None = None) -> dict[str, PerItem]:
    """exact_match of these items, and a KL."""
    found: dict[str, PerItem] = {"exact_match": {"accuracy": {i: (value, 1.0) for i, value in enumerate(values)}}}
    return found | ({"sampled": {"kl": {0: (kl, 1.0)}}} if kl is not None else {})


FOUR = {
    "dpo@beta=0.1@seed=0": right(1, 1, 0, 0),
    "dpo@beta=0.1@seed=1": right(1, 1, 1, 0),
    "dpo@beta=0.5@seed=0": right(1, 0, 0, 0),
    "dpo@beta=0.5@seed=1": right(1, 0, 0, 0),
}


def test_means_and_the_paired_difference_by_hand() -> None:
    """beta 0.1: 1/2 and 3/4, mean 5/8, sd 0.17678, half 12.7062 * 0.17678 / sqrt 2 = 1.58828.
    Minus beta 0.5's 1/4 and 1/4, seed by seed: -1/4 and -1/2 (0.5 is the later one), mean -3/8, the same half."""
    mean, other, difference = compare([*FOUR], FOUR, {}, None, 0)
    assert [(row.kind, row.model, row.against) for row in (mean, other, difference)] == [
        ("mean", "dpo@beta=0.1", ""),
        ("mean", "dpo@beta=0.5", ""),
        ("difference", "dpo@beta=0.5", "dpo@beta=0.1"),
    ]
    assert (mean.value, mean.seeds, mean.items) == (0.625, 2, 4)
    assert mean.seeds_high - mean.value == pytest.approx(1.58828, abs=1e-5)
    assert (other.value, other.seeds_low, other.seeds_high) == (0.25, 0.25, 0.25)
    assert difference.value == -0.375
    assert difference.seeds_high + 0.375 == pytest.approx(1.58828, abs=1e-5)
    items = statistics.paired_difference([1, 0, 0, 0], [1, 1, 0.5, 0], 0)  # the seeds averaged, item by item
    assert (difference.items_low, difference.items_high) == (pytest.approx(items.low), pytest.approx(items.high))


def test_a_pair_is_of_the_seeds_and_items_that_both_have() -> None:
    """Seeds 0 and 1 against 1 and 2: only 1. Of the items, those of every model."""
    found = {
        "a@size=1@seed=0": right(1, 1, 1),
        "a@size=1@seed=1": right(0, 1, 1),
        "a@size=2@seed=1": right(1, 1),
        "a@size=2@seed=2": right(0, 0),
    }
    difference = compare([*found], found, {}, None, 0)[-1]
    assert (difference.value, difference.seeds, difference.items) == (0.5, 1, 2)
    assert math.isnan(difference.seeds_low)
    assert (difference.items_low, difference.items_high) == (0.0, 1.0)


def test_variants_that_share_no_seed_have_an_interval_over_items_alone() -> None:
    found = {"a@size=1@seed=0": right(1, 1), "a@size=1@seed=1": right(0, 1), "a@size=2": right(0, 0)}
    difference = compare([*found], found, {}, None, 0)[-1]
    assert (difference.model, difference.value, difference.seeds) == ("a@size=2", -0.75, 0)
    assert math.isnan(difference.seeds_low)
    assert not math.isnan(difference.items_low)


def test_rounds_are_compared_and_stages_are_not() -> None:
    found = {"sft": right(0, 0), "dpo@1": right(0, 1), "dpo@2": right(1, 1), "ppo": right(1, 1)}
    (row,) = compare([*found], found, {}, None, 0)
    assert (row.kind, row.model, row.against, row.value) == ("difference", "dpo@2", "dpo@1", 0.5)


def test_documents_weigh_by_their_bytes() -> None:
    """(8 + 2) bits of (4 + 1) bytes are 2 a byte, (4 + 1) are 1: a mean of the documents' ratios would be another."""
    found = {
        f"a@size={size}": {"bits_per_byte": {"bits_per_byte": {0: (4.0 * size, 4.0), 1: (6.0 - 4.0 * size, 1.0)}}}
        for size in (1, 2)
    }
    (row,) = compare([*found], found, {}, None, 0)
    assert row.value == pytest.approx((8 - 2) / 5 - (4 + 2) / 5)
    # two documents drawn: both the first (2 - 1), both the second (-2 - 2), or one of each (as above)
    assert (row.items_low, row.items_high) == (pytest.approx(-4.0), pytest.approx(1.0))


MATCHED = {
    "dpo@beta=0.1": right(1, 0, kl=9.0),
    "dpo@beta=0.5": right(0, 0, kl=2.0),
    "ppo@kl_coef=0.1": right(1, 1, kl=7.0),
    "ppo@kl_coef=0.3": right(1, 0, kl=3.0),
    "sft": right(0, 0),
}


def test_the_nearest_in_kl_by_hand() -> None:
    rows = compare([*MATCHED], MATCHED, {}, "kl", 0)
    matched = [row for row in rows if row.kind == "matched" and row.task == "exact_match"]
    assert [(row.model, row.against, row.nearest, row.value) for row in matched] == [
        ("ppo@kl_coef=0.1", "dpo@beta=0.1", "kl", 0.5),
        ("ppo@kl_coef=0.3", "dpo@beta=0.5", "kl", 0.5),
    ]


def test_the_nearest_in_flops_is_by_their_ratio() -> None:
    """100 stands nearer to 30 (a factor of 3.3) than to 500 (of 5) - and 200 nearer to 500 than to 30."""
    flops = {"dpo@beta=0.1": 30.0, "dpo@beta=0.5": 500.0, "ppo@kl_coef=0.1": 100.0, "ppo@kl_coef=0.3": 200.0}
    rows = compare([*MATCHED], MATCHED, flops | {"sft": NAN}, "flops", 0)
    matched = [row for row in rows if row.kind == "matched" and row.task == "exact_match"]
    assert [(row.model, row.against) for row in matched] == [
        ("ppo@kl_coef=0.1", "dpo@beta=0.1"),
        ("ppo@kl_coef=0.3", "dpo@beta=0.5"),
    ]


# ---- the figures item by item are the figures ----


def test_every_figure_item_by_item_adds_up_to_the_figure() -> None:
    draw = np.random.default_rng(0)
    documents = [{"item": i, "tokens": 5, "bytes": 9 + i, "nats": 3.0 * i + 1} for i in range(5)]
    choices = [
        {
            "item": "same",
            "answer": i % 4,
            "bytes": [3, 4, 5, 6],
            **{k: [*draw.normal(size=4)] for k in ("named", "nameless")},
        }
        for i in range(20)
    ]
    pairs = [
        {
            "item": i,
            "row": i,
            "kind": "",
            "chosen_chars": 1,
            "rejected_chars": 2,
            "chosen": draw.normal(),
            "rejected": draw.normal(),
        }
        for i in range(9)
    ]
    before = [{"item": i, "chosen": 0.0, "rejected": 0.0} for i in range(1, 9)]
    pairs[3] |= {"chosen": 1.0, "rejected": 1.0}
    answers = [{"item": i, "correct": float(i % 2), "length": i, "ended": i != 2} for i in range(4)]
    written = [
        {
            "item": i,
            "length": i,
            "ended": i != 2,
            "gold": 0.1 * i,
            "reward": -i,
            "logprob": -1.0,
            "baseline_logprob": -3.0,
        }
        for i in range(4)
    ]
    for figures, per_item, count in (
        (bits_per_byte.figures(documents, 0), bits_per_byte.per_item(documents), 1),
        (multiple_choice.figures(choices, None, 0), multiple_choice.per_item(choices), 3),
        (
            preference_accuracy.figures(pairs, before, lambda lengths: np.zeros(len(np.atleast_1d(lengths))), 0),
            preference_accuracy.per_item(pairs, before),
            1,
        ),
        (exact_match.figures(answers, None, 0), exact_match.per_item(answers), 3),
        (samples.figures(written, written, 0), samples.per_item(written), 5),
    ):
        assert len(per_item) == count
        for name, values in per_item.items():
            sums = np.array([*values.values()]).sum(0)
            assert sums[0] / sums[1] == pytest.approx(figures[name].value), name
            assert len(values) == figures[name].n
    assert samples.per_item([]) == {}


# ---- on paper and on the terminal ----


def lines() -> list[dict[str, Any]]:
    results = [
        Result("sft", "f", "exact_match", "accuracy", 0.5, 0.4, 0.6, 4),
        *(
            Result(model, "f", "exact_match", "accuracy", 0.5, 0.4, 0.6, 4)
            for model in ("d_po@beta=0.1@seed=0", "d_po@beta=0.1@seed=1")
        ),
        Result("d_po@beta=0.1@seed=0", "f", "sampled", "kl", 3.0, 2.0, 4.0, 4),
        Result("d_po@beta=0.1@seed=1", "f", "sampled", "kl", 5.0, 4.0, 6.0, 4),
    ]
    seeds = Comparison("mean", "d_po@beta=0.1", "", "", "exact_match", "accuracy", 0.5, 0.45, 0.55, 0.4, 0.6, 2, 4)
    other = Comparison(
        "difference",
        "d_po@beta=0.5",
        "d_po@beta=0.1",
        "",
        "exact_match",
        "accuracy",
        0.125,
        NAN,
        NAN,
        0.025,
        0.225,
        0,
        4,
    )
    known = variants([*dict.fromkeys(result.model for result in results), "d_po@beta=0.5"])
    spent = {
        "d_po@beta=0.1@seed=0": Spent(1e12, 2e12),
        "d_po@beta=0.1@seed=1": Spent(3e12, 4e12),
        "d_po@beta=0.5": Spent(4e12, NAN),
    }
    return lines_of(results, [seeds, other], known, spent)


def test_the_csv_by_hand(tmp_path: Path) -> None:
    write_csv(tmp_path / "table.csv", lines())
    text = (tmp_path / "table.csv").read_text().splitlines()
    assert text[0] == ",".join(COLUMNS)
    assert text[1] == "model,sft,,,exact_match,accuracy,0.5,0.4,0.6,4,,,,,,,,,,"
    assert text[2].endswith(",0.5,0.4,0.6,4,,,,3.0,1000000000000.0,,,2000000000000.0,,")
    assert text[-2] == (
        "mean,d_po@beta=0.1,,,exact_match,accuracy,0.5,0.4,0.6,4,0.45,0.55,2,4.0,2000000000000.0,,,3000000000000.0,,"
    )
    assert text[-1] == (
        "difference,d_po@beta=0.5,d_po@beta=0.1,,exact_match,accuracy,0.125,0.025,0.225,4,,,0,"
        ",4000000000000.0,4.0,2000000000000.0,,3000000000000.0,1.0"
    )
    read = read_csv(tmp_path / "table.csv")
    assert (read[0]["model"], read[0]["value"], read[0]["kl"], read[0]["against"]) == ("sft", 0.5, None, "")
    assert len(read) == len(text) - 1


def test_latex_of_a_figure_without_an_interval(tmp_path: Path) -> None:
    lone = Result("sft", "aa", "exact_match", "accuracy", 0.5, math.nan, math.nan, 1)
    write_latex(tmp_path / "table.tex", lines_of([lone], [], [], {}))
    assert r"\texttt{sft} & $50.0$ \\" in (tmp_path / "table.tex").read_text().splitlines()


def test_the_latex_by_hand(tmp_path: Path) -> None:
    write_latex(tmp_path / "table.tex", lines())
    text = (tmp_path / "table.tex").read_text()
    assert text.splitlines()[2:] == [
        r"\begin{tabular}{lrr}",
        r"\toprule",
        r" & exact match, \% & KL from baseline, nats \\",
        r"\midrule",
        r"\texttt{sft} & $50.0 \pm 10.0$ &  \\",
        r"\texttt{d\_po@beta=0.1@seed=0} & $50.0 \pm 10.0$ & $3.00 \pm 1.00$ \\",
        r"\texttt{d\_po@beta=0.1@seed=1} & $50.0 \pm 10.0$ & $5.00 \pm 1.00$ \\",
        r"\midrule",
        r"\texttt{d\_po@beta=0.1}, mean & $50.0 \pm 5.0$ &  \\",
        r"\bottomrule",
        r"\end{tabular}",
        "",
        r"\begin{tabular}{lr}",
        r"\toprule",
        r" & exact match, \% \\",
        r"\midrule",
        r"\texttt{d\_po@beta=0.5} $-$ \texttt{d\_po@beta=0.1} & $12.5 \pm 10.0^{*}$ \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def shown(table: Any) -> list[list[str]]:
    out = StringIO()
    Console(file=out, width=200).print(table)
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in out.getvalue().splitlines()]


def test_the_terminal_by_hand(tmp_path: Path) -> None:
    write_csv(tmp_path / "table.csv", lines())
    read = read_csv(tmp_path / "table.csv")
    assert shown(render_comparisons(read, "mean")) == [
        ["mean over seeds,", "d_po"],
        ["± 95 % over seeds | items", "@beta=0.1"],
        ["exact match, %", "50.0 ± 5.0 | 10.0"],
        ["training FLOPs", "2e+12"],
        ["with all before it", "3e+12"],
    ]
    found = shown(render_comparisons(read, "difference"))
    assert [cell for line in found for cell in line if cell.startswith(("d_po", "− d_po"))] == ["d_po", "− d_po"]
    assert found[-5:] == [
        ["exact match, %", "+12.5 ± – | 10.0 *"],
        ["KL of both, nats", "–, 4.00"],
        ["training FLOPs", "4e+12, 2e+12"],
        ["with all before it", "–, 3e+12"],
        [NOTE],
    ]
    flops = {line["model"]: line["flops"] for line in read if line["kind"] == "model"}
    models = [line for line in read if line["kind"] == "model"]
    assert shown(render_table(models, flops=flops)) == [
        ["d_po", "d_po"],
        ["@beta=0.1", "@beta=0.1"],
        ["held out, ± 95 %", "sft", "@seed=0", "@seed=1"],
        ["exact match, %", "50.0 ± 10.0", "50.0 ± 10.0", "50.0 ± 10.0"],
        ["KL from baseline, nats", "3.00 ± 1.00", "5.00 ± 1.00"],
        ["training FLOPs", "1e+12", "3e+12"],
    ]


def test_many_pairs_are_shown_against_the_first(tmp_path: Path) -> None:
    found = {f"a@size={size}": right(0, 1) for size in range(5)}
    rows = compare([*found], found, {}, None, 0)
    assert len(rows) == 10
    write_csv(tmp_path / "table.csv", lines_of([], rows, variants([*found]), {}))
    lines = shown(render_comparisons(read_csv(tmp_path / "table.csv"), "difference"))
    assert lines[:2] == [["a"] * 4, ["@size=1", "@size=2", "@size=3", "@size=4"]]
    assert lines[2:4] == [["difference,", *["− a"] * 4], ["± 95 % over seeds | items", *["@size=0"] * 4]]
    assert lines[-2:] == [["exact match, %", *["+0.0 ± – | 0.0"] * 4], ["6 more in table.csv"]]


def test_what_does_not_fit_the_width_is_put_below() -> None:
    rows = [Result(f"model-{i}", "f", "exact_match", "accuracy", 0.5, 0.4, 0.6, 4).__dict__ for i in range(5)]
    rows.append(Result("model-4", "f", "sampled", "kl", 3.0, 2.0, 4.0, 4).__dict__)
    assert shown(render_table(rows, width=22 + 3 * 13)) == [
        ["held out, ± 95 %", "model-0", "model-1", "model-2"],
        ["exact match, %", *["50.0 ± 10.0"] * 3],
        [],
        ["held out, ± 95 %", "model-3", "model-4"],
        ["exact match, %", *["50.0 ± 10.0"] * 2],
        ["KL from baseline, nats", "3.00 ± 1.00"],
    ]
    assert len(shown(render_table(rows, width=22 + 5 * 13))) == 3
    assert len(shown(render_table(rows, width=1))) == 5 * 2 + 4 + 1, "one at a time at the least"


def test_a_headline_where_it_stands_alone() -> None:
    assert full_label("greedy", "gold_win_rate") == "gold (greedy): against baseline, %"
    assert full_label("multiple_choice", "pmi_swapped") == "multiple choice: names swapped, %"
    assert full_label("sampled", "kl") == "KL from baseline, nats"
