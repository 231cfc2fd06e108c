"""The best is marked where its difference to the next is larger than noise, over the same items if they are known."""

import io
import json
import math
import re
from pathlib import Path
from typing import Any, cast

import pytest

from pipeline.artifacts import Store
from pipeline.errors import ArtifactError
from pipeline.report import noise
from pipeline.report.answers import exchanges
from pipeline.report.compare import comparison_of
from pipeline.report.page import page_of
from pipeline.report.records import read_run
from pipeline.report.results import Line, items_of, tables_of
from tests.report.written_run import answer, jsonl, result, write_evaluation, write_stage


def lines(root: Path) -> dict[tuple[str, str], Line]:
    stage = read_run(Store(root), "demo").stage("eval")
    return {(line.task, line.metric): line for table in tables_of(stage, items_of(stage)) for line in table.lines}


def best(line: Line) -> list[str]:
    return [cell.model for cell in line.cells if cell is not None and cell.is_best]


def evaluated(tmp_path: Path, golds: dict[str, list[float]], half: float = 0.2) -> Line:
    """The gold line of models with these values an item, and intervals that overlap."""
    root = tmp_path / "artifacts"
    items = [answer(model, i, "x", gold) for model, values in golds.items() for i, gold in enumerate(values)]
    rows = [result(model, "greedy", "gold", sum(v) / len(v), half, len(v)) for model, v in golds.items()]
    write_evaluation(root, rows, items)
    return lines(root)["greedy", "gold"]


HARD = [i % 2 for i in range(40)]  # half of the prompts are hard for everybody


def test_paired_differences_show_what_intervals_hide(tmp_path: Path):
    line = evaluated(tmp_path, {"sft": [0.3 + 0.4 * h for h in HARD], "ppo": [0.35 + 0.4 * h for h in HARD]})
    assert best(line) == ["ppo"]
    assert line.verdict == "ppo − sft: +0.050 [+0.050, +0.050], paired"  # of every item the same
    assert line.better == "more"


def test_a_tie_is_a_tie(tmp_path: Path):
    sft = [0.3 + 0.4 * h for h in HARD]
    ppo = [value + (0.21 if i % 4 < 2 else -0.2) for i, value in enumerate(sft)]
    line = evaluated(tmp_path, {"sft": sft, "ppo": ppo})
    assert best(line) == []
    assert line.verdict.startswith("tie: ppo − sft: +0.005 [-0.0")


def test_items_that_do_not_make_the_figure_are_not_paired(tmp_path: Path):
    root = tmp_path / "artifacts"
    rows = [result("sft", "greedy", "gold", 0.30, 0.06), result("ppo", "greedy", "gold", 0.35, 0.08)]
    write_evaluation(root, rows, [answer(model, i, "x", 0.9) for model in ("sft", "ppo") for i in range(9)])
    line = lines(root)["greedy", "gold"]
    # √(0.06² + 0.08²) = 0.1
    assert line.verdict == "tie: ppo − sft: +0.050 [-0.050, +0.150], unpaired"
    assert best(line) == []


@pytest.mark.parametrize(
    ("metric", "sign"),
    [
        ("bits_per_byte", -1),
        ("ece", -1),
        ("accuracy/other", 1),
        ("gold_win_rate", 1),
        ("length", 0),
        ("length_only/other", 0),
    ],
)
def test_which_way_is_better(metric: str, sign: int):
    assert noise.direction(metric) == sign


def test_less_is_better_of_bits_and_lengths_are_not_judged(tmp_path: Path):
    root = tmp_path / "artifacts"
    rows = [result(m, "bits_per_byte", "bits_per_byte", v, 0.01) for m, v in (("base", 1.2), ("sft", 1.9))]
    rows += [result(m, "greedy", "length", v, 0.1) for m, v in (("base", 10.0), ("sft", 20.0))]
    documents = [(100, 50), (300, 250)]  # bytes and bits of each
    items: list[dict[str, Any]] = [
        {"model": m, "task": "bits_per_byte", "item": i, "bytes": size, "nats": bits * factor * math.log(2)}
        for m, factor in (("base", 1.6), ("sft", 1.9 / 0.75))
        for i, (size, bits) in enumerate(documents)
    ]
    write_evaluation(root, rows, items)
    found = lines(root)
    assert best(found["bits_per_byte", "bits_per_byte"]) == ["base"]
    # 300 bits of 400 bytes, times 1.6 and 1.9 / 0.75
    assert "base − sft: -0.700 [" in found["bits_per_byte", "bits_per_byte"].verdict
    assert "paired" in found["bits_per_byte", "bits_per_byte"].verdict
    assert found["greedy", "length"].verdict == ""


def test_choices_are_worth_what_the_evaluation_says():
    item = {"item": "f", "answer": 1, "named": [-10.0, -12.0], "nameless": [-10.5, -14.0], "bytes": [10, 20]}
    worth = {metric: noise.values_of([item], "multiple_choice", metric)["f"] for metric in ("acc", "acc_norm", "pmi")}
    # likeliest: the first; by byte −1.0 and −0.6: the second; gain over nameless 0.5 and 2.0: the second
    assert worth == {"acc": (0.0, 1.0), "acc_norm": (1.0, 1.0), "pmi": (1.0, 1.0)}
    assert noise.values_of([{"item": 7, "correct": 1.0}], "exact_match", "accuracy") == {7: (1.0, 1.0)}
    own = {"item": 3, "answer": 0, "named": [-4.0, -6.0], "nameless": [-4.0, -6.0], "characters": [2, 4]}
    assert noise.values_of([own], "mine", "acc_norm") == {3: (0.0, 1.0)}  # −2 and −1.5 a character
    sampled = {"item": 1, "correct": [1.0, 0.0, 1.0, 1.0], "lengths": [4, 8, 4, 4], "ended": [True, True, True, False]}
    for metric, value in (("accuracy", 0.75), ("length", 5.0), ("ended", 0.75)):
        assert noise.values_of([sampled], "mine", metric) == {1: (value, 1.0)}
    assert noise.values_of([{"item": 2, "win": 0.5}], "win_rate", "win_rate") == {2: (0.5, 1.0)}
    harness = [{"item": 0, "figures": {"acc": 1.0}, "task_of": "arc"}, {"item": 1, "whole": {}}]
    assert noise.values_of(harness, "lm_eval:arc", "acc") == {0: (1.0, 1.0)}


def test_answers_of_a_users_own_task_stand_beside_each_other():
    rows = {
        model: [{"item": 0, "question": "1 + 1?", "reference": "2", "answers": [text, "9"], "correct": [right, 0.0]}]
        for model, text, right in (("sft", "3", 0.0), ("ppo", "2", 1.0))
    }
    task, shown = exchanges({(model, "mine"): found for model, found in rows.items()} | {("ppo", "win_rate"): []}, 5)
    assert (task, len(shown), shown[0].turns, shown[0].reference) == ("mine", 1, (("", "1 + 1?"),), "2")
    assert [(each.model, each.text, each.figures) for each in shown[0].answers] == [
        ("sft", "3", (("correct", 0.0),)),
        ("ppo", "2", (("correct", 1.0),)),
    ]


def test_models_without_a_common_task_have_tables_of_their_own(tmp_path: Path):
    root = tmp_path / "artifacts"
    rows = [result(m, "greedy", "gold", 0.5, 0.1) for m in ("sft", "ppo")]
    rows += [result("base", "multiple_choice", "pmi", 0.5, 0.1), result("sft", "multiple_choice", "pmi", 0.5, 0.1)]
    rows += [result("reward", "reward_accuracy", "accuracy", 0.9, 0.1)]
    write_evaluation(root, rows, [])
    stage = read_run(Store(root), "demo").stage("eval")
    assert [sorted(table.models) for table in tables_of(stage, {})] == [["base", "ppo", "sft"], ["reward"]]


def test_an_undefined_figure_is_a_dash(tmp_path: Path):
    root = tmp_path / "artifacts"
    row = result("sft", "greedy", "gold", 0.5, 0.1)
    nothing = {**result("ppo", "greedy", "gold", 0.5, 0.1, 0), "value": None, "low": None, "high": None}
    write_evaluation(root, [row, nothing], [])
    cells = lines(root)["greedy", "gold"].cells
    assert [(cell.shown, cell.half) for cell in cells if cell is not None] == [("0.500", "0.100"), ("–", "")]
    assert json.dumps([cell.value for cell in cells if cell is not None]) == "[0.5, null]"


def test_samples_of_a_users_own_stage_need_name_no_task(tmp_path: Path):
    root = tmp_path / "artifacts"
    items = [{"model": m, "prompt": f"{i}?", "answer": f"{m} {i}"} for m in ("sft", "ppo") for i in range(3)]
    write_evaluation(root, [result("sft", "frontier", "gold", 0.5, 0.1)], items)
    found = items_of(read_run(Store(root), "demo").stage("eval"))
    assert {key: [row["item"] for row in rows] for key, rows in found.items()} == {
        ("sft", ""): [0, 1, 2],
        ("ppo", ""): [0, 1, 2],
    }
    _, shown = exchanges(found, 5)
    assert [[answer.text for answer in each.answers] for each in shown] == [[f"sft {i}", f"ppo {i}"] for i in range(3)]
    assert "ppo 2" in page_of(read_run(Store(root), "demo"), 2.5)


def test_a_result_that_lacks_a_field_is_told_with_its_line(tmp_path: Path):
    whole = result("sft", "mine", "gold", 0.5, 0.1)
    write_evaluation(tmp_path, [whole, {key: whole[key] for key in ("model", "task", "metric", "value", "n")}], [])
    run = read_run(Store(tmp_path), "demo")
    for write in (lambda: page_of(run, None), lambda: comparison_of(run, run, None)):
        with pytest.raises(ArtifactError, match=r"results\.jsonl:2: a result without low, high"):
            write()


SEPARATORS = "one\u2028two\x85three"


def test_an_answer_may_hold_any_separator_of_lines(tmp_path: Path):
    root = tmp_path / "artifacts"
    write_evaluation(root, [result("sft", "greedy", "gold", 0.5, 0.1)], [answer("sft", 0, SEPARATORS, 0.5)])
    assert SEPARATORS in page_of(read_run(Store(root), "demo"), 2.5)


def _closing_table(folder: Path) -> str:
    from types import SimpleNamespace

    from rich.console import Console

    from pipeline.cli.closing import _print_table

    console = Console(width=120, record=True, file=io.StringIO())
    _print_table(cast("Any", SimpleNamespace(artifact=SimpleNamespace(path=folder))), console)
    return console.export_text()


def test_lines_are_those_of_bytes(tmp_path: Path):
    from pipeline.cli.card import measured
    from pipeline.tracking import _before

    root = tmp_path / "artifacts"
    write_evaluation(root, [result("sft", "greedy", "gold", 0.5, 0.1) | {"note": SEPARATORS}], [])
    write_stage(root, "sft", more={"fingerprint": "f" * 64})
    assert [row["note"] for row in measured(Store(root).artifact("demo", "sft"))] == [SEPARATORS]
    assert _closing_table(root / "demo" / "eval").count("gold") == 1
    lines_of = [{"step": 5, "sample": SEPARATORS}, {"step": 10, "loss": 1}, {"step": 10, "sample": SEPARATORS}]
    file = tmp_path / "metrics.jsonl"
    file.write_text(jsonl(lines_of), encoding="utf-8")
    assert _before(file, lines_of[2]) == [lines_of[1]]


def pair(model: str, item: int, chosen: float, rejected: float, kind: str) -> dict[str, Any]:
    found = {"model": model, "task": "preference_accuracy", "item": item, "kind": kind}
    return found | {"chosen": chosen, "rejected": rejected}


def test_pairs_are_right_where_the_margin_is_above_the_baselines():
    sft = [pair("sft", i, -5.0, -7.0, kind) for i, kind in enumerate("aabb")]  # margins of 2
    margins = zip((3, 2, 1, 4), "aabb", strict=True)
    dpo = [pair("dpo", i, -5.0, -5.0 - margin, kind) for i, (margin, kind) in enumerate(margins)]
    worth = noise.values_of(dpo, "preference_accuracy", "accuracy", sft)
    assert worth == {0: (1.0, 1.0), 1: (0.5, 1.0), 2: (0.0, 1.0), 3: (1.0, 1.0)}
    assert noise.values_of(dpo, "preference_accuracy", "accuracy/b", sft) == {2: (0.0, 1.0), 3: (1.0, 1.0)}
    assert noise.values_of(dpo, "preference_accuracy", "accuracy", []) == {}
    listed = [each | {"row": each["item"] // 2} for each in dpo]  # two pairs of a list are one item
    assert noise.values_of(listed, "preference_accuracy", "accuracy", sft) == {0: (1.5, 2.0), 1: (1.0, 2.0)}
    of_reward = noise.values_of(dpo, "reward_accuracy", "accuracy")
    assert of_reward == dict.fromkeys(range(4), (1.0, 1.0))  # its own scores: all margins are above 0


def test_figures_against_the_baseline_item_by_item():
    ours, theirs = (
        [{"item": i, "gold": gold, "correct": correct} for i, (gold, correct) in enumerate(rows)]
        for rows in (((0.5, 1), (0.2, 0), (0.3, 1)), ((0.1, 0), (0.2, 0), (0.4, 1)))
    )
    assert noise.values_of(ours, "greedy", "gold_win_rate", theirs) == {0: (1.0, 1.0), 1: (0.5, 1.0), 2: (0.0, 1.0)}
    differences = noise.values_of(ours, "greedy", "gold_difference", theirs)
    assert [value for value, _ in differences.values()] == pytest.approx([0.4, 0.0, -0.1])
    assert noise.values_of(ours, "exact_match", "difference", theirs) == {0: (1.0, 1.0), 1: (0.0, 1.0), 2: (0.0, 1.0)}
    sampled = [{"item": 4, "logprob": -3.0, "baseline_logprob": -5.5}]
    assert noise.values_of(sampled, "sampled", "kl") == {4: (2.5, 1.0)}


def test_what_is_measured_against_the_baseline_is_paired(tmp_path: Path):
    root = tmp_path / "artifacts"
    count = 40
    rows = [result("dpo", "preference_accuracy", "accuracy", 0.75, 0.2, count)]
    rows += [result("ppo", "preference_accuracy", "accuracy", 0.5, 0.2, count)]
    items = [pair("sft", i, 0.0, 0.0, "a") for i in range(count)]
    items += [pair("dpo", i, 1.0 if i % 4 else -1.0, 0.0, "a") for i in range(count)]
    items += [pair("ppo", i, 1.0 if i % 4 in (1, 2) else -1.0, 0.0, "a") for i in range(count)]
    # rewards of the baseline 0 and 2 in turns: sd √(40 / 39); 3 and 1 above it are 2.962 and 0.987 of them
    spread = math.sqrt(count / (count - 1))
    rows += [result(m, "sampled", "reward_sd", above / spread, 3, count) for m, above in (("ppo", 3), ("dpo", 1))]
    for model, above in (("sft", 0), ("ppo", 3), ("dpo", 1)):
        rewards = [above + 2.0 * (i % 2) for i in range(count)]
        items += [{"model": model, "task": "sampled", "item": i, "reward": reward} for i, reward in enumerate(rewards)]
    write_evaluation(root, rows, items, baseline="sft")
    found = lines(root)
    # one item in four differs, by 1: 0.25 ± 1.96 √(0.25 · 0.75 / 40) = 0.134
    ends = found["preference_accuracy", "accuracy"].verdict
    assert re.fullmatch(r"dpo − ppo: \+25\.0 \[\+1[0-3]\.\d, \+(3[7-9]|40)\.\d\], paired", ends)
    assert best(found["preference_accuracy", "accuracy"]) == ["dpo"]
    ends = found["sampled", "reward_sd"].verdict
    assert re.fullmatch(r"ppo − dpo: \+1\.97 \[\+1\.9\d, \+2\.\d\d\], paired", ends)  # 2 / √(40 / 39) = 1.975


def test_one_item_tells_no_noise(tmp_path: Path):
    line = evaluated(tmp_path, {"sft": [0.3], "ppo": [0.8]}, half=0.0)
    assert best(line) == []
    assert line.verdict == ""
    assert [(cell.shown, cell.half) for cell in line.cells if cell is not None] == [("0.300", "–"), ("0.800", "–")]
    nothing = {"low": None, "high": None}  # as an evaluation writes it that knows this itself
    rows = [result(m, "greedy", "gold", 0.5, 0.0, 1) | nothing for m in ("sft", "ppo")]
    write_evaluation(tmp_path / "other", rows, [])
    assert [cell.half for cell in lines(tmp_path / "other")["greedy", "gold"].cells if cell is not None] == ["–", "–"]
