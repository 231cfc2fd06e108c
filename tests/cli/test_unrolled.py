"""What `repeat:` and `matrix:` make, on the command line: shown, planned, picked by name, run round by round."""

import json
from pathlib import Path
from typing import Any

import pytest

MAKE = """
from pathlib import Path
from pipeline.recipe import Ref, StageConfig, field
class C(StageConfig):
    init: Ref | None = field(None, "x")
    size: int = field(1, "x")
INPUTS = {"init": "rows"}
KIND = "rows"
def run(config, inputs, out, runtime):
    before = (inputs["init"].path / "rows.jsonl").read_text() if inputs["init"] else ""
    (out / "rows.jsonl").write_text(f"{before}{config.size}.{config.seed} ")
    return {"size": float(config.size)}
"""
RECIPE = """\
run: toy
stages:
  start: {stage: ./make.py}
  repeat:
    times: 2
    carry: {last: {first: start, then: next}}
    stages:
      next: {stage: ./make.py, init: last}
  wide:
    stage: ./make.py
    matrix: {size: [2, 3]}
    init: next
"""
NAMES = ["start", "next@1", "next@2", "wide@size=2", "wide@size=3"]


@pytest.fixture
def toy(warm: Any) -> Any:
    warm.write("make.py", MAKE)
    warm.write("r.yaml", RECIPE)
    return warm


def rows(folder: Path, stage: str) -> list[str]:
    return (folder / "artifacts" / "toy" / stage / "rows.jsonl").read_text().split()


def runs(done: Any) -> list[str]:
    assert done.code == 0, done.stderr
    return [row["stage"] for row in json.loads(done.stdout) if row["runs"]]


def test_all_is_shown_by_the_names_that_are_made(toy: Any):
    done = toy("run", "r.yaml", "--dry-run")
    assert done.stdout.splitlines() == [f"{name:<12} would run: has not run" for name in NAMES]
    shown = json.loads(toy("config", "show", "r.yaml", "--json", "--set", "wide@size=3.seed=5").stdout)
    found = {f"{row['stage']}.{row['field']}": (row["value"], row["from"]) for row in shown}
    assert found["next@1.init"] == ("start", "r.yaml:8")
    assert found["next@2.init"] == ("next@1", "r.yaml:8")
    assert found["next@2.seed"] == (1000, "default + 1000, round 2")
    assert found["wide@size=3.size"] == (3, "r.yaml:11")
    assert found["wide@size=2.seed"] == (0, "default")
    assert found["wide@size=3.seed"] == (5, "--set wide@size=3.seed=5")
    assert found["wide@size=3.init"] == ("next@2", "r.yaml:12")
    status = json.loads(toy("status", "r.yaml", "--json").stdout)
    assert [row["stage"] for row in status["stages"]] == NAMES


@pytest.mark.slow
def test_a_plan_has_a_line_a_stage(toy: Any):
    assert [row["stage"] for row in json.loads(toy("plan", "r.yaml", "--json").stdout)["stages"]] == NAMES


@pytest.mark.slow
def test_a_name_on_the_command_line_is_what_it_is_in_the_recipe(toy: Any):
    def dry(*options: str) -> list[str]:
        return runs(toy("run", "r.yaml", "--dry-run", "--json", *options))

    assert dry("--until", "next") == NAMES[:3]
    assert dry("--until", "next@1") == NAMES[:2]
    assert dry("--until", "wide") == NAMES
    assert dry("--until", "wide@size=3") == [*NAMES[:3], "wide@size=3"]
    refused = toy("run", "r.yaml", "--until", "next@3")
    assert (refused.code, "--until next@3: no such stage; did you mean `next@" in refused.stderr) == (2, True)
    for name, what in (("wide", "`wide` is 2 stages: wide@size=2, wide@size=3"), ("next", "has no rows to show")):
        done = toy("preview", "r.yaml", name)
        assert (done.code, what in done.stderr) == (2, True)


def test_one_of_several_is_picked_by_name(trained: Path, warm: Any):
    trained.write_text(trained.read_text().replace("    max_steps: 30\n", "    matrix: {max_steps: [2, 30]}\n"))
    done = warm("pretrain", "tiny.yaml", "--dry-run")
    assert "several pretrain stages: pretrain@max_steps=2, pretrain@max_steps=30" in done.stderr
    done = warm("pretrain", "tiny.yaml", "--dry-run", "--stage", "pretrain")
    assert "--stage pretrain: 2 stages: pretrain@max_steps=2, pretrain@max_steps=30" in done.stderr
    done = warm("pretrain", "tiny.yaml", "--dry-run", "--stage", "pretrain@max_steps=2")
    assert done.stdout == "pretrain@max_steps=2 would run: has not run\n"


@pytest.mark.slow
def test_rounds_run_are_skipped_and_go_on(toy: Any):
    assert toy("run", "r.yaml", "--until", "next@1").code == 0
    done = toy("run", "r.yaml")
    assert done.code == 0, done.stderr
    states = [line.split()[:2] for line in done.stderr.splitlines()]
    assert [name for name, state in states if state == "stands"] == NAMES[:2]
    assert [name for name, state in states if state == "done"] == NAMES[2:]
    assert rows(toy.folder, "next@2") == ["1.0", "1.0", "1.1000"]
    assert rows(toy.folder, "wide@size=3") == ["1.0", "1.0", "1.1000", "3.0"]
    more = ("--set", "repeat.times=3")
    assert runs(toy("run", "r.yaml", "--dry-run", "--json", *more)) == ["next@3", *NAMES[3:]]
    done = toy("run", "r.yaml", *more, "--set", "next@3.size=7")
    assert done.code == 0, done.stderr
    assert rows(toy.folder, "wide@size=2") == ["1.0", "1.0", "1.1000", "7.2000", "2.0"]
    shown = toy("status", "toy/wide@size=2", "--verify")
    assert "init         toy/next@3" in shown.stdout
    assert toy("gc", "--older-than", "0").code == 0
    assert {path.name for path in (toy.folder / "artifacts" / "toy").iterdir() if path.name[0] != "."} == {
        *NAMES,
        "next@3",
    }
