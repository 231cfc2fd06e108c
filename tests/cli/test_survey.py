"""`llmpipe preview --stats`: what is planted in the rows is found, by file and line."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.sources import share

RECIPE = """\
run: tiny
stages:
  tokenize: {data: corpus.jsonl, vocab_size: 512}
  pretrain: {context_length: 16, max_steps: 5}
  sft: {data: rows.jsonl, max_length: 40, held_out: 0.1}
  dpo: {init: sft, data: pairs.jsonl}
  ppo: {reward: "./rewards.py:long"}
  eval: {models: [sft], tokens: null, reward: null, data: test.jsonl, preferences: null, held_out: 0.999}
"""
RUN = " ".join(f"te{i} ka{i}" for i in range(10))  # 20 words


@pytest.fixture
def recipe(tokenized: Path) -> Path:
    rows = [{"prompt": f"ka {i}", "completion": f"lo {i} mi"} for i in range(20)]
    rows += [rows[3], {"prompt": "ru ru", "completion": RUN}]
    tests = [
        {"question": f"is it {RUN}?", "answer": "mi"},
        {"question": "Ka 7?", "answer": "lo"},
        {"question": "x", "answer": "y"},
    ]
    pairs = [{"prompt": f"ka {i}", "chosen": "lo mi", "rejected": "ru"} for i in range(9)]
    assert all(share(each["question"]) < 0.999 for each in tests)
    for name, each in (("rows", rows), ("test", tests), ("pairs", pairs)):
        (tokenized.parent / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    (tokenized.parent / "rewards.py").write_text("def long(prompt, answer, reference):\n    return 0.0\n")
    path = tokenized.with_name("all.yaml")
    path.write_text(RECIPE)
    return path


def test_what_is_planted_is_found(recipe: Path, warm: Any) -> None:
    shown = warm("preview", recipe, "sft", "--stats", "--json")
    assert shown.code == 0, shown.stderr
    found = json.loads(shown.stdout)
    rows, tests = (f"{recipe.parent / name}.jsonl" for name in ("rows", "test"))
    held_out = [i for i in range(20) if share(f"ka {i}") < 0.1]
    assert 3 not in held_out
    assert 7 not in held_out
    assert found["sources"] == [
        {
            "source": rows,
            "format": "prompt_completion",
            "weight": 1.0,
            "rows": 22 - len(held_out),
            "held_out": len(held_out),
        }
    ]
    assert found["repeats"]["exact"]["examples"] == [{"row": f"{rows}:21", "like": f"{rows}:4"}]
    assert found["tokens"]["too_long"]["examples"][0]["row"] == f"{rows}:22"
    (own, other) = found["overlaps"]
    assert (own["with"], own["rows"]) == ("held-out rows of sft.data", len(held_out))
    assert (other["with"], other["rows"]) == ("eval.data", 3)
    assert other["shared runs"]["examples"] == [{"row": f"{tests}:1", "like": f"{rows}:22"}]
    assert other["near prompts"]["examples"] == [{"row": f"{tests}:2", "like": f"{rows}:8"}]


def test_it_reads_as_text(recipe: Path, warm: Any) -> None:
    lines = warm("preview", recipe, "sft", "--stats").stdout.splitlines()
    assert "1 row (33.3%) with 13 words in a row that a row to train on has too" in lines
    assert f"         {recipe.parent}/test.jsonl:1 like {recipe.parent}/rows.jsonl:22" in lines
    assert any(line.split()[:2] == ["tokens", "mean"] for line in lines)


@pytest.mark.parametrize(("stage", "answers"), [("dpo", ["chosen", "rejected"]), ("ppo", ["reference"])])
def test_stages_that_read_rows_otherwise(stage: str, answers: list[str], recipe: Path, warm: Any) -> None:
    shown = warm("preview", recipe, stage, "--stats", "--json")
    assert shown.code == 0, shown.stderr
    assert list(json.loads(shown.stdout)["tokens"]["figures"]) == ["prompt", *answers, "row"]


@pytest.mark.slow
def test_a_member_and_a_round_are_looked_at_by_their_names(recipe: Path, warm: Any) -> None:
    text = recipe.read_text().replace("max_length: 40, ", "matrix: {max_length: [40, 50]}, ")
    block = "  repeat: {times: 2, stages: {dpo: {init: pretrain, data: pairs.jsonl}}}\n"
    text = text.replace("  dpo: {init: sft, data: pairs.jsonl}\n", block).replace(
        "[sft]", "[sft@max_length=40], baseline: null"
    )
    recipe.write_text("".join(line for line in text.splitlines(keepends=True) if "ppo:" not in line))
    for named, stage in (("sft@max_length=50", "sft@max_length=50"), ("dpo", "dpo@2"), ("dpo@1", "dpo@1")):
        shown = warm("preview", recipe, named, "--stats", "--json")
        assert shown.code == 0, shown.stderr
        assert json.loads(shown.stdout)["stage"] == stage
    refused = warm("preview", recipe, "sft", "--stats")
    assert "`sft` is 2 stages: sft@max_length=40, sft@max_length=50" in refused.stderr


def test_a_reward_bench_counts_whole_and_with_its_rejected_answers(recipe: Path, warm: Any) -> None:
    """eval measures all its rows, whatever `held_out` says of others."""
    bench = [
        {"prompt": f"{'x' * n}", "chosen": "mi", "rejected": RUN if n == 3 else "ru", "subset": "donotanswer"}
        for n in range(1, 7)
    ]
    assert any(share(each["prompt"]) > 0.05 for each in bench)
    path = recipe.with_name("bench.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in bench))
    recipe.write_text(
        recipe.read_text()
        .replace("reward: null, data: test.jsonl", "reward: null, reward_bench: bench.jsonl, data: null")
        .replace("held_out: 0.999", "held_out: 0.05")
    )
    shown = warm("preview", recipe, "sft", "--stats", "--json")
    assert shown.code == 0, shown.stderr
    found = {each["with"]: each for each in json.loads(shown.stdout)["overlaps"]}["eval.reward_bench"]
    assert found["rows"] == 6
    (like,) = found["shared runs"]["examples"]
    assert like == {"row": f"{path}:3", "like": f"{recipe.parent}/rows.jsonl:22"}


@pytest.mark.parametrize("stage", ["tokenize", "eval", "pretrain"])
def test_what_has_no_rows_is_refused(stage: str, recipe: Path, warm: Any) -> None:
    refused = warm("preview", recipe, stage, "--stats")
    assert refused.code == 2
    assert "has no rows to count" in refused.stderr
