"""Two runs beside each other: what differs, whether by more than noise, and both curves in one figure."""

import json
import re
from pathlib import Path

import pytest

from pipeline.artifacts import Store
from pipeline.report.compare import comparison_of
from pipeline.report.records import read_run
from tests.report.test_page import HOSTILE, Page
from tests.report.written_run import PROMPT, answer, result, training, write_evaluation, write_stage


def write(root: Path, run: str, beta: float, gold: float, prompt: object = PROMPT, seconds: float = 60.0) -> None:
    """A run of sft (the same in all) and dpo, and an evaluation of dpo on twenty prompts."""
    more = {"fingerprint": "a" * 64, "seconds": seconds}
    write_stage(root, "sft", run=run, metrics=training(loss=lambda i: 5 - i), more=more)
    config = {"beta": beta, "init": "sft"}
    rows = training(loss=lambda i: beta * i)
    parents = {"init": [f"{run}/sft"]}
    write_stage(root, "dpo", run=run, config=config, inputs=parents, metrics=rows, more={"fingerprint": f"{beta}" * 20})
    items = [answer("dpo", i, f"{run} {i}", gold + i / 100, prompt) for i in range(20)]
    write_evaluation(root, [result("dpo", "greedy", "gold", gold + 0.095, 0.2, 20)], items, run=run)


def compared(root: Path, a: str = "a", b: str = "b") -> str:
    return comparison_of(read_run(Store(root), a), read_run(Store(root), b), 2.5)


@pytest.mark.slow
def test_what_differs(tmp_path: Path):
    write(tmp_path, "a", 0.1, 0.30)
    write(tmp_path, "b", 0.2, 0.33, seconds=90.5)
    write_stage(tmp_path, "ppo", run="b")
    text = compared(tmp_path)
    found = Page(text)
    row = {name: text.split(f'data-stage="{name}"')[1].split("</tr>")[0] for name in ("sft", "dpo", "ppo")}
    assert re.findall(r'data-seconds="(.*?)"', row["sft"]) == ["60.0", "90.5"]
    assert [">the same<" in row["sft"], ">differs<" in row["dpo"], ">only in b<" in row["ppo"]] == [True] * 3
    differences = text.split('id="differences"')[1].split('id="again"')[0]
    fields = re.findall(r'<th class="mono">(.*?)</th>(.*?)</tr>', differences, flags=re.S)
    assert [(name, re.findall(r">([^<]+)</td>", cells)) for name, cells in fields] == [("beta", ["0.1", "0.2"])]
    # paired over the same prompts: 0.03 better in each of them, though the intervals overlap
    assert found.values("data-value", data_label="a") == ["0.395"]
    assert "+0.030 [+0.030, +0.030]" in found.text
    assert "better" in [value for value in found.values("class") if value]
    data = json.loads(re.findall(r'id="data">(.*?)</script>', text)[0])
    losses = [each for each in data if each["title"] == "Loss"]
    assert [[curve["label"] for curve in each["curves"]] for each in losses] == [["a", "b"]] * 2
    assert [curve["y"] for curve in losses[1]["curves"]] == [
        [pytest.approx(beta * i) for i in range(1, 6)] for beta in (0.1, 0.2)
    ]
    assert "a 4" in found.text  # both answers to a prompt
    assert "b 4" in found.text
    assert text == compared(tmp_path)


@pytest.mark.slow
def test_two_runs_on_cpus_have_no_cost(tmp_path: Path):
    write(tmp_path, "a", 0.1, 0.30)
    write(tmp_path, "b", 0.1, 0.30)
    runs = [read_run(Store(tmp_path), name) for name in "ab"]
    assert "cost" not in comparison_of(*runs, None).split("<main>")[1]
    assert comparison_of(*runs, 2.0).count('data-label="cost, ') == 6  # three stages of each


@pytest.mark.slow
def test_other_questions_are_not_paired(tmp_path: Path):
    write(tmp_path, "a", 0.1, 0.30)
    write(tmp_path, "b", 0.1, 0.33, prompt=[{"role": "user", "content": "And `g`?"}])
    text = compared(tmp_path)
    assert "+0.030 [-0.253, +0.313]" in Page(text).text  # 0.2 · √2
    assert "better" not in [value for value in Page(text).values("class") if value]


def test_runs_of_one_name_and_hostile_text(tmp_path: Path):
    for number, folder in enumerate(("one", "two")):
        write(tmp_path / folder, "a", 0.1 + number, 0.3, prompt=[{"role": "user", "content": HOSTILE}])
    runs = [read_run(Store(tmp_path / folder), "a") for folder in ("one", "two")]
    text = comparison_of(runs[0], runs[1], 2.5)
    found = Page(text)
    assert "a (1)" in found.text
    assert "a (2)" in found.text
    assert [tag for tag, _ in found.tags].count("script") == 2
    assert "img" not in [tag for tag, _ in found.tags]


def test_answers_meet_by_their_prompts_and_not_by_their_numbers(tmp_path: Path):
    def prompt(i: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"question {i}"}]

    for run, first in (("a", 0), ("b", 3), ("c", 100)):
        items = [answer("dpo", i, f"{run} says {first + i}", 0.5, prompt(first + i)) for i in range(5)]
        write_evaluation(tmp_path, [result("dpo", "greedy", "gold", 0.5, 0.2, 5)], items, run=run)
    answers = compared(tmp_path).split('id="answers"')[1].split('id="curves"')[0]
    assert re.findall(r"(\w) says (\d)", answers) == [("a", "3"), ("b", "3"), ("a", "4"), ("b", "4")]
    assert "no prompt that models of both runs have answered" in Page(compared(tmp_path, "a", "c")).text


def test_a_difference_of_one_item_has_no_interval(tmp_path: Path):
    for run, gold in (("a", 0.3), ("b", 0.8)):
        items = [answer("dpo", 0, run, gold)]
        write_evaluation(tmp_path, [result("dpo", "greedy", "gold", gold, 0.0, 1)], items, run=run)
    text = compared(tmp_path)
    assert "[" not in text.split('data-metric="gold"')[1].split("</tr>")[0]
    assert "better" not in [value for value in Page(text).values("class") if value]
