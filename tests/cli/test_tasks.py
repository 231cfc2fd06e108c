"""`tasks: [./my_task]` and `require:` on the command line: what is refused at once, what fails once it is kept."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli.gates import gates_of
from pipeline.errors import MissingInputError, PipelineError, RecipeError
from pipeline.lineage import survey
from tests.conftest import Warm
from tests.stages.conftest import make_model
from tests.written import recipe, refused

ROWS = [
    {"question": f"Is {i} even?", "choices": {"text": ["Yes", "No"], "label": ["A", "B"]}, "answerKey": "AB"[i % 2]}
    for i in range(40)
]
HEAD = "run: t\nstages:\n  eval:\n    models: [./chat]\n    tokens: null\n    data: null\n    preferences: null\n"


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a task."""
    root = tmp_path_factory.mktemp("tasks")
    make_model(root / "made", context=256).rename(root / "chat")
    write(root, "my_task/questions.jsonl", lines(ROWS))
    write(root, "my_task/task.yaml", "num_fewshot: 2\ndescription: Say yes or no.\n")
    return root


def task_of(folder: Path, text: str) -> Any:
    return recipe(folder, f"{HEAD}    tasks: {text}\n").nodes["eval"].config.tasks  # type: ignore[attr-defined]


def test_a_folder_says_what_the_task_is_and_the_recipe_has_the_last_word(folder: Path):
    (plain,) = task_of(folder, "./my_task")
    assert (plain.task, plain.data, plain.num_fewshot) == ("my_task", folder / "my_task/questions.jsonl", 2)
    (changed,) = task_of(folder, "[{task: ./my_task, num_fewshot: 0}]")
    assert (changed.num_fewshot, changed.description) == (0, "Say yes or no.")
    (lone,) = task_of(folder, "[./my_task/questions.jsonl]")
    assert (lone.task, lone.num_fewshot) == ("questions", 0)
    assert [each.task for each in task_of(folder, "[all, greedy, ./my_task]")] == ["all", "greedy", "my_task"]


def test_a_folder_holds_one_file_of_rows_of_any_kind_beside_its_readme_and_examples(tmp_path: Path):
    for name in ("README.md", ".rows.jsonl", "few.jsonl"):
        write(tmp_path, f"mine/{name}", "{}\n")
    write(tmp_path, "mine/task.yaml", "num_fewshot: 1\nfewshot_data: ./few.jsonl\n")
    make_model(tmp_path / "made", context=256).rename(tmp_path / "chat")
    for name in ("rows.ndjson", "rows.jsonl.gz", "rows.parquet"):
        write(tmp_path, f"mine/{name}", "{}\n")
        (task,) = task_of(tmp_path, "./mine")
        assert (task.data, task.fewshot_data) == (tmp_path / "mine" / name, tmp_path / "mine/few.jsonl")
        (tmp_path / "mine" / name).unlink()


def test_yamls_cannot_give_two_tasks_one_name(folder: Path):
    for name in ("one", "two"):
        write(folder, f"{name}/rows.jsonl", lines(ROWS))
        write(folder, f"{name}/task.yaml", "task: same\n")
    assert task_of(folder, "./one")[0].name == "same"
    with pytest.raises(RecipeError, match="two tasks are called `same`") as found:
        task_of(folder, "[./one, ./two]")
    assert found.value.where.endswith(":8")


@pytest.mark.slow
def test_the_rows_count_by_their_content_and_the_folder_not_by_its_place(folder: Path, tmp_path: Path):
    def planned(root: Path) -> str:
        os.symlink(folder / "chat", root / "chat")
        found = recipe(root, f"{HEAD}    tasks: ./my_task\n")
        from pipeline.artifacts import Store

        return survey(found, Store(root / "artifacts"))["eval"].planned

    found = []
    for name, rows in (("one", ROWS), ("two", ROWS), ("three", ROWS[1:])):
        write(tmp_path / name, "my_task/questions.jsonl", lines(rows))
        write(tmp_path / name, "my_task/task.yaml", "num_fewshot: 2\n")
        found.append(planned(tmp_path / name))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("tasks", "kind", "why"),
    [
        ("[greedi]", RecipeError, "no task `greedi`; did you mean `greedy`?"),
        ("[./no_task]", MissingInputError, "no file or folder"),
        ("[./chat]", MissingInputError, "a task's folder holds one YAML, this one 0"),
        ("[./wrong]", RecipeError, "unknown key `num_fewshots`; did you mean `num_fewshot`?"),
        ("[./my_task, {task: my_task, data: my_task/questions.jsonl}]", RecipeError, "two tasks are called `my_task`"),
        ("[{task: greedy, data: my_task/questions.jsonl}]", RecipeError, "is built in and takes no `data`"),
        ("[{task: ./my_task, shots: 3}]", RecipeError, "unknown key `tasks.0.shots`"),
        ("[{task: ./my_task, num_fewshot: two}]", RecipeError, "`tasks.0.num_fewshot`"),
        ("[{task: 'lm_eval:arc_easy', letters: true}]", RecipeError, "a task of lm-eval takes no `letters`"),
        ("[{data: my_task/none.jsonl}]", MissingInputError, "`data`: no file"),
    ],
)
def test_what_a_task_cannot_be(folder: Path, tasks: str, kind: type[PipelineError], why: str):
    write(folder, "wrong/task.yaml", "data: rows.jsonl\nnum_fewshots: 3\n")
    write(folder, "wrong/rows.jsonl", lines(ROWS))
    error = refused(folder, f"{HEAD}    tasks: {tasks}\n", kind=kind)
    assert why in str(error)
    place = "task.yaml:2" if "wrong" in tasks else ".yaml:8"
    assert place in error.where or error.where.endswith("chat"), error.where


@pytest.mark.parametrize(
    ("gate", "why"),
    [
        ("chat.my_tusk: '>= 0'", "no task `my_tusk` is measured; did you mean `my_task`?"),
        ("chit.my_task: '>= 0'", "no model `chit` is measured; did you mean `chat`?"),
        ("chat.greedy.golf: '>= 0'", "greedy has no figure `golf`; did you mean `gold`?"),
        ("chat.sampled: '>= 0'", "no task `sampled` is measured"),
        ("chat.my_task: '= 0'", "is no bound"),
        ("chat.my_task: 0.5", "`require.chat.my_task`"),
    ],
)
def test_a_figure_that_cannot_be_is_refused_before_anything_runs(folder: Path, gate: str, why: str):
    text = f"{HEAD}    tasks: [./my_task, greedy]\n    require:\n      {gate}\n"
    try:
        made = recipe(folder, text)
        with pytest.raises(RecipeError) as found:
            gates_of(made.nodes["eval"], made.document)
        error = found.value
    except RecipeError as early:
        error = early
    assert why in str(error)
    assert error.where.endswith((".yaml:10", ".yaml:9"))


@pytest.mark.slow
def test_a_gate_fails_the_run_after_the_figures_are_kept_and_again_where_they_stand(folder: Path, warm: Warm):
    os.symlink(folder / "chat", warm.folder / "chat")
    os.symlink(folder / "my_task", warm.folder / "my_task")
    gates = "{chat.my_task: '>= 0', chat.my_task.acc_norm: '>= 2', chat.my_task.acc/x: '> 0'}"
    text = f"{HEAD}    tasks: ./my_task\n    bf16: false\n    require: "
    warm.write("gates.yaml", f"{text}{gates}\n  late: {{stage: eval, models: [./chat], tasks: ./my_task}}\n")
    done = warm("run", "gates.yaml", "--json")
    assert done.code == 1
    (stage,) = json.loads(done.stdout)["stages"]  # nothing that follows has run
    assert stage["stage"] == "eval"
    passed = {each["figure"].rpartition("/chat.")[2]: each["passed"] for each in stage["require"]}
    assert passed == {"my_task.acc": True, "my_task.acc_norm": False, "chat.my_task.acc/x": False}
    assert "2 of 3 required figures not reached" in done.stderr
    value = next(each["value"] for each in stage["require"] if each["figure"].endswith("acc_norm"))
    assert f"acc_norm is {value:.4g}, required >= 2" in done.stderr
    assert (warm.folder / "artifacts/t/eval/manifest.json").exists()
    again = warm("run", "gates.yaml")
    assert again.code == 1
    assert "eval  stands" in again.stderr
    assert "my_task: acc, %" in again.stdout, "the table is shown all the same"
    warm.write("gates.yaml", f"{text}{{chat.my_task: '>= 0'}}\n")
    assert warm("run", "gates.yaml").code == 0, "another gate is no other evaluation"


@pytest.mark.slow
def test_killed_in_the_middle_of_a_task_it_goes_on_to_the_same_bytes(folder: Path, warm: Warm):
    os.symlink(folder / "chat", warm.folder / "chat")
    write(
        warm.folder,
        "long/questions.jsonl",
        lines([row | {"question": f"{row['question']} {i}"} for i in range(30) for row in ROWS]),
    )
    write(warm.folder, "long/task.yaml", "num_fewshot: 2\n")
    warm.write("long.yaml", f"{HEAD}    tasks: ./long\n    bf16: false\n    token_budget: 64\n")
    assert warm("run", "long.yaml", "--run", "whole").code == 0
    running = warm.start("run", "long.yaml")
    units = lambda: [*(warm.folder / "artifacts/t").glob(".eval.*/checkpoints/units/*.jsonl")]  # noqa: E731
    running.wait_for(lambda: any(file.read_bytes().count(b"\n") > 4 for file in units()))
    running.signal(signal.SIGKILL, group=True)
    running.wait()
    before = sum(len(json.loads(line)["places"]) for line in units()[0].read_bytes().splitlines()[:-1])
    assert 0 < before < len(ROWS) * 30 - 2
    done = warm("run", "long.yaml", "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["stages"][0]["resumed_from"] >= before
    for name in ("results.jsonl", "samples.jsonl"):
        one, two = (warm.folder / "artifacts" / run / "eval" / name for run in ("whole", "t"))
        assert one.read_bytes() == two.read_bytes()
    assert two.read_bytes().count(b"\n") == len(ROWS) * 30 - 2, "all but the examples"
