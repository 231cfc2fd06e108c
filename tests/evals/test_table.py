"""The table of results."""

from __future__ import annotations

import json
from dataclasses import asdict
from io import StringIO
from pathlib import Path

from rich.console import Console

from pipeline.evals.results import Result, write_jsonl
from pipeline.evals.table import render_table, style

RESULTS = [
    Result("pretrain", "aa", "bits_per_byte", "bits_per_byte", 1.8123, 1.79, 1.83, 200),
    Result("sft", "bb", "multiple_choice", "acc", 0.4, 0.37, 0.43, 1200),
    Result("sft", "bb", "multiple_choice", "pmi", 0.654, 0.627, 0.681, 1200),
    Result("reward", "cc", "reward_accuracy", "accuracy", 0.9, 0.88, 0.92, 512),
    Result("reward", "cc", "reward_accuracy", "accuracy/other", 0.8, 0.75, 0.85, 256),
    Result("ppo", "dd", "sampled", "reward_sd", float("nan"), float("nan"), float("nan"), 0),
]


def shown(details: bool = False) -> list[list[str]]:
    rows = [json.loads(json.dumps(asdict(result)).replace("NaN", "null")) for result in RESULTS]
    out = StringIO()
    Console(file=out, width=200).print(render_table(rows, details=details))
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in out.getvalue().splitlines()]


def test_headlines() -> None:
    assert shown() == [
        ["held out, ± 95 %", "pretrain", "sft", "reward", "ppo"],
        ["bits per byte", "1.812 ± 0.020"],
        ["multiple choice, %", "65.4 ± 2.7"],
        ["reward accuracy, %", "90.0 ± 2.0"],
        ["against other, %", "80.0 ± 5.0"],
        ["above baseline, sd", "–"],
    ]


def test_a_subset_of_reward_bench_is_no_kind_of_negative() -> None:
    assert style("reward_bench", "accuracy/hep-go") == ("  hep-go, %", 1, 100)
    assert style("reward_bench", "section/chat_hard") == ("  chat hard, %", 1, 100)
    assert style("reward_accuracy", "accuracy/other") == ("  against other, %", 1, 100)
    assert style("preference_accuracy", "length_only/other") == ("  lengths only, against other, %", 1, 100)


def test_details_hold_the_rest_too() -> None:
    assert ["multiple_choice.acc", "0.400 ± 0.030"] in shown(details=True)


def test_one_item_shows_no_interval() -> None:
    """Neither as it is written (null), nor with the width of 0 of an earlier version."""
    row = {"fingerprint": "aa", "task": "bits_per_byte", "metric": "bits_per_byte", "value": 2.608, "n": 1}
    rows = [row | {"model": "a", "low": None, "high": None}, row | {"model": "b", "low": 2.608, "high": 2.608}]
    out = StringIO()
    Console(file=out, width=200).print(render_table(rows))
    assert out.getvalue().splitlines()[1].split() == ["bits", "per", "byte", *["2.608", "±", "–"] * 2]


def test_jsonl_has_null_for_what_is_not_a_number(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "results.jsonl", map(asdict, RESULTS))
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert lines[0] == {
        "model": "pretrain",
        "fingerprint": "aa",
        "task": "bits_per_byte",
        "metric": "bits_per_byte",
        "value": 1.8123,
        "low": 1.79,
        "high": 1.83,
        "n": 200,
    }
    assert lines[-1]["value"] is None
