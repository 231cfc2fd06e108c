"""`llmpipe sample REF`: a model without a recipe, its own prompts, the fields by `--set`, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifacts import Store, outside_model
from pipeline.cli.sample import is_recipe, run_of, sample_fields, short
from pipeline.errors import ConfigError
from tests.conftest import Warm
from tests.stages.conftest import demonstration, make_model


@pytest.fixture
def folder(warm: Warm) -> Path:
    """A model's folder, rows and a reward in the test's folder."""
    model = make_model(warm.folder / "chat")
    model.rename(warm.folder / "Tiny Chat")
    warm.write("rows.jsonl", "".join(json.dumps(demonstration(index)) + "\n" for index in range(40)))
    warm.write("rewards.py", "def short(prompts, responses, rows):\n    return [-float(len(r)) for r in responses]\n")
    return warm.folder


SMALL = [
    part for each in ("prompts=5", "response_length=6", "unfinished=keep", "bf16=false") for part in ("--set", each)
]


@pytest.mark.slow
def test_a_model_from_outside(folder: Path, warm: Warm):
    arguments = ("sample", "./Tiny Chat", "--data", "rows.jsonl", "--reward", "./rewards.py:short", *SMALL)
    done = warm(*arguments, "--set", "keep=best", "--json")
    assert done.code == 0, done.stderr
    assert "5 prompts, 4 answers to each" in done.stderr
    made = folder / "artifacts" / "answers" / "Tiny-Chat-sample"
    assert json.loads(done.stdout)["stages"][0]["path"] == str(made)
    rows = [json.loads(line) for line in (made / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 5
    assert all(row["score"] == -len(row["messages"][-1]["content"]) for row in rows)
    manifest = json.loads((made / "manifest.json").read_text())
    assert (manifest["kind"], manifest["stage"]) == ("rows", "sample")
    assert manifest["inputs"]["init"][0]["reference"] == str(folder / "Tiny Chat")
    again = warm(*arguments, "--set", "keep=best")
    assert "stands (made" in again.stderr
    other = warm(*arguments, "--set", "keep=pairs", "--dry-run", "--as", "other")
    assert other.stdout == "other        would run: has not run\n"


@pytest.mark.slow
def test_an_artifact_answers_what_it_was_trained_on(folder: Path, warm: Warm):
    warm.write(
        "tune.yaml",
        "run: tune\nstages:\n  sft: {init: './Tiny Chat', data: rows.jsonl, max_steps: 2, bf16: false}\n"
        "  sample: {prompts: 5, response_length: 6, unfinished: keep, bf16: false}\n",
    )
    assert warm("run", "tune.yaml", "--until", "sft").code == 0
    done = warm("sample", "tune/sft", *SMALL)
    assert done.code == 0, done.stderr
    assert warm("sample", "tune.yaml").code == 0
    one, two = (folder / f"artifacts/tune/{name}/rows.jsonl" for name in ("sft-sample", "sample"))
    assert one.read_bytes() == two.read_bytes(), "the recipe's stage and the command's are one thing"
    assert 16 <= one.read_bytes().count(b"\n") <= 20, "empty answers are left out"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("./Tiny Chat",), "nothing says which prompts it is to answer"),
        (("./nothing", "--data", "rows.jsonl"), "no model folder"),
        (("tune/sft", "--data", "rows.jsonl"), "no artifact tune/sft"),
        (("sft",), "'sft' is no reference"),
        (("./Tiny Chat", "--data", "rows.json"), "the command line: no file or folder"),
        (("./Tiny Chat", "--data", "rows.jsonl", "--set", "keeps=best"), "unknown key `keeps`; did you mean `keep`"),
        (("./Tiny Chat", "--data", "rows.jsonl", "--set", "keep=best"), "there is no reward"),
        (("./Tiny Chat", "--data", "rows.jsonl", "--reward", "./r.py:f"), "nothing at"),
    ],
)
def test_what_is_refused(folder: Path, warm: Warm, arguments: tuple[str, ...], message: str):
    done = warm("sample", *arguments)
    assert done.code != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_names():
    assert [run_of(each) for each in ("demo/sft", "./a/b", "/a", "hub:org/name")] == ["demo", *["answers"] * 3]
    references = ("demo/dpo@2", "./a b/", "./runs/a/model", "../runs/b/model/", "/model", "hub:org/name@v1", "./é")
    names = ["dpo-2", "a-b", "a-model", "b-model", "model", "org-name", "model"]
    assert [short(each) for each in references] == names
    members = [short(f"demo/dpo@{'learning_rate=0.1' * 4}@seed={seed}") for seed in (0, 1)]
    assert [len(each) for each in members] == [48, 48]
    assert members[0] != members[1], "what differs in what is cut off is another name"
    assert [is_recipe(each) for each in ("demo", "a/b.yaml", "demo/sft", "./demo")] == [True, True, False, False]


def test_a_name_with_dots_takes_fields(folder: Path, warm: Warm):
    (folder / "Tiny Chat").rename(folder / "Tiny-1.7B-v0.1")
    done = warm("sample", "./Tiny-1.7B-v0.1", "--data", "rows.jsonl", *SMALL, "--dry-run")
    assert done.stdout == "Tiny-1.7B-v0.1-sample would run: has not run\n", done.stderr
    done = warm("sample", "./Tiny-1.7B-v0.1", "--data", "rows.jsonl", "--set", "keeps=best")
    assert "unknown key `keeps`; did you mean `keep`" in done.stderr
    assert "--set keeps=best" in done.stderr


@pytest.mark.parametrize("command", ["sample", "label"])
def test_the_environment_sets_fields_too(folder: Path, warm: Warm, command: str):
    """As with a recipe, before `--set`; where it leads nowhere it is named."""
    arguments = (command, "./Tiny Chat", "--data", "rows.jsonl")
    bad = warm(*arguments, env={"LLMPIPE_SET": "keeps=best"})
    assert "unknown key `keeps`" in bad.stderr
    assert "LLMPIPE_SET keeps=best" in bad.stderr
    both = warm(*arguments, "--set", "top_p=3", env={"LLMPIPE_SET": "top_p=2"})
    assert "--set top_p=3: `top_p`" in both.stderr, both.stderr


def test_answers_that_are_there_take_no_fields(folder: Path, warm: Warm):
    made = folder / "artifacts" / "run" / "rows"
    made.mkdir(parents=True)
    manifest: dict[str, Any] = {"schema_version": 1, "kind": "rows", "fingerprint": "f"}
    (made / "manifest.json").write_text(json.dumps(manifest))
    done = warm("label", "run/rows", "--set", "top_p=0.5")
    assert done.code == 2
    assert "--set top_p=0.5: it is of the answers, and these are there already" in done.stderr


@pytest.mark.slow
def test_another_model_does_not_replace_what_stands(folder: Path, warm: Warm):
    """Under a name that was made up; one that was moved, or trained again where it lies, is the same model."""
    made = folder / "artifacts" / "answers" / "Tiny-Chat-sample"
    made.mkdir(parents=True)
    own = str(folder / "Tiny Chat")
    arguments = ("sample", "./Tiny Chat", "--data", "rows.jsonl", *SMALL, "--dry-run")

    def stand(reference: str, fingerprint: str) -> None:
        manifest: dict[str, Any] = {"schema_version": 1, "kind": "rows", "stage": "sample", "fingerprint": "f"}
        manifest["inputs"] = {"init": [{"reference": reference, "fingerprint": fingerprint}]}
        manifest["parts"] = {"config": {}, "data": {}, "inputs": {}, "code": {}}
        (made / "manifest.json").write_text(json.dumps(manifest))

    stand("/elsewhere/Tiny Chat", "another")
    refused = warm(*arguments)
    assert refused.code != 0
    assert "answers/Tiny-Chat-sample is of another model, /elsewhere/Tiny Chat" in refused.stderr
    assert "--run NAME" in refused.stderr
    assert warm(*arguments, "--run", "other").code == 0
    assert warm(*arguments, "--as", "Tiny-Chat-sample").code == 0, "a name that is given is meant"
    for reference, fingerprint in ((own, "another"), ("/elsewhere/Tiny Chat", outside_model(Path(own)).fingerprint)):
        stand(reference, fingerprint)
        assert warm(*arguments).code == 0


def test_rows_do_not_answer(tmp_path: Path):
    made = tmp_path / "run" / "rows"
    made.mkdir(parents=True)
    manifest: dict[str, Any] = {"schema_version": 1, "kind": "rows", "fingerprint": "f"}
    (made / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="a rows does not answer"):
        sample_fields("run/rows", Store(tmp_path), ["rows.jsonl"])
