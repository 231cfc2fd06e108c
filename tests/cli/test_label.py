"""`llmpipe label REF [REF]`: keys to labels, on disk at once, blind, resumed, and rows at the end."""

from __future__ import annotations

import io
import itertools
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.artifacts import Store
from pipeline.cli import label as module
from pipeline.cli.label import Asked, converse, label_name, label_references, plain
from pipeline.cli.sample import short
from pipeline.data.labels import mend_end, read_labels
from pipeline.errors import ConfigError, PipelineError
from pipeline.launch import Launch
from pipeline.recipe import NAME
from tests.stages.conftest import demonstration, make_model

ASKED = [Asked([{"role": "user", "content": f"p{n}"}], f"left {n}", f"right {n}") for n in range(5)]


def type_in(monkeypatch: pytest.MonkeyPatch, keys: str) -> None:
    """These keys in lines, then the end of input."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{key}\n" for key in keys)))


def labels_in(path: Path) -> list[tuple[str, str]]:
    """(the left answer, the label) of each line."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(line["answers"][0], line["label"]) for line in lines]


def test_keys_are_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "labels.jsonl"
    type_in(monkeypatch, "1r=s2")
    said = converse(ASKED, path)
    expected = ["left", "right", "tie", "skip", "right"]
    assert labels_in(path) == [(f"left {n}", label) for n, label in enumerate(expected)]
    assert list(said.values()) == expected
    captured = capsys.readouterr()
    assert captured.out == "", "results alone are on stdout"
    for shown in ("5 of 5", "user: p4", "left 4", "right 4", "5 of 5 labelled"):
        assert shown in captured.err


def test_it_goes_on_where_it_was_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "labels.jsonl"
    type_in(monkeypatch, "1q2")
    assert list(converse(ASKED, path).values()) == ["left"]
    with path.open("a") as file:
        file.write('{"prompt": [{"ro')  # a kill in the middle of a line
    mend_end(path)
    type_in(monkeypatch, "s")  # then the end of input
    converse(ASKED, path)
    type_in(monkeypatch, "x222")
    assert list(converse(ASKED, path).values()) == ["left", "skip", "right", "right", "right"]
    assert len(labels_in(path)) == 5, "an unknown key asks again"


def test_back_changes_a_mind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "labels.jsonl"
    type_in(monkeypatch, "11b=")
    said = converse(ASKED, path)
    assert list(said.values()) == ["left", "tie"]
    assert labels_in(path) == [("left 0", "left"), ("left 1", "left"), ("left 1", "tie")]
    assert read_labels(path) == said


def test_ctrl_c_keeps_what_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "labels.jsonl"
    keys = iter("12")

    def read_key() -> str:
        try:
            return next(keys)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(module, "read_key", read_key)
    assert list(converse(ASKED, path).values()) == ["left", "right"]


def test_a_file_of_other_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "labels.jsonl"
    type_in(monkeypatch, "1")
    converse(ASKED[:1], path)
    with pytest.raises(ConfigError, match="1 of its 1 labels are of other pairs than these"):
        converse(ASKED[1:], path)


def test_one_label_of_another_pair_is_refused_before_anything_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "labels.jsonl"
    type_in(monkeypatch, "11")
    converse(ASKED[:2], path)
    type_in(monkeypatch, "1111")
    with pytest.raises(ConfigError, match="1 of its 2 labels are of other pairs than these"):
        converse(ASKED[1:], path)
    assert len(labels_in(path)) == 2


def test_nothing_steers_the_terminal():
    assert plain("a\x1b[2Jb\rc\td\ne\x07") == "a·[2Jb·c\td\ne·"


TERMINAL = """
import sys
from collections.abc import Callable
from pathlib import Path
from pipeline.cli.label import Asked, converse
asked = [Asked([{"role": "user", "content": f"p{n}"}], f"left {n}", f"right {n}") for n in range(6)]
converse(asked, Path(sys.argv[1]))
"""


def test_on_a_terminal_a_key_needs_no_enter(tmp_path: Path):
    ours, theirs = pty.openpty()
    path = tmp_path / "labels.jsonl"
    with subprocess.Popen([sys.executable, "-c", TERMINAL, str(path)], stdin=theirs, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        shown = ""
        for number, key in enumerate((b"1", b"\x1b[C", b"=", b"\x1b[D", b"s", b"q"), start=1):
            while f"{number} of 6" not in shown or "to go on later" not in shown.rpartition(f"{number} of 6")[2]:
                line = process.stderr.readline().decode()
                assert line, shown
                shown += line
            os.write(ours, key)
        shown += process.stderr.read().decode()
        assert process.wait(timeout=60) == 0, shown
    os.close(ours)
    os.close(theirs)
    assert [label for _, label in labels_in(path)] == ["left", "right", "tie", "left", "skip"]
    assert "5 of 6 labelled" in shown


@pytest.fixture
def label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`llmpipe label` in this process with these keys typed; the folder of the run."""
    for place, name in enumerate(("a", "b")):
        make_model(tmp_path / f"parts-{name}", seed=place).rename(tmp_path / name)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(demonstration(index)) + "\n" for index in range(40)))
    monkeypatch.chdir(tmp_path)

    def run(keys: str, *references: str, unfinished: str = "keep") -> Path:
        type_in(monkeypatch, keys)
        fields = {"prompts": 12, "response_length": 6, "unfinished": unfinished}
        label_references(
            references, Store(Path("artifacts")), data=["rows.jsonl"], fields=fields, pairs="one", seed=0,
            labels=None, run="people", name=None, launch=Launch(quiet=True), as_json=False,
        )  # fmt: skip
        return tmp_path / "artifacts" / "people"

    return run


def test_names_are_short_enough():
    members = [f"demo/dpo@learning_rate=1e-05@loss_type=sigmoid@seed={seed}" for seed in (0, 1, 2)]
    names = [label_name(pair) for pair in itertools.pairwise(members)]
    assert all(NAME.fullmatch(name) for name in names)
    assert names[0] != names[1]
    assert label_name(["demo/sft", "demo/dpo"]) == "sft-dpo-label"
    assert label_name(["a" * 58]) == f"{short('a' * 58)}-label"


@pytest.mark.parametrize(("option", "run", "name"), [("--as", "people", "x" * 65), ("--run", "a/b", None)])
def test_a_bad_name_is_refused_before_anything_runs(tmp_path: Path, option: str, run: str, name: str | None):
    with pytest.raises(ConfigError, match="is no name") as caught:
        label_references(
            ["./nothing"], Store(tmp_path), data=[], fields={}, pairs="one", seed=0,
            labels=None, run=run, name=name, launch=Launch(quiet=True), as_json=False,
        )  # fmt: skip
    assert caught.value.where == option


@pytest.mark.slow
def test_two_models_are_compared_blind(label: Callable[..., Path], capfd: pytest.CaptureFixture[str]):
    """The whole way: both answer the same prompts, the sides are mixed, the labels are rows with a lineage."""
    with pytest.raises(PipelineError):
        label("", "./a", "./b", unfinished="leave_out")
    assert "nothing is kept" in capfd.readouterr().err, "models that never end their turn have no answers to compare"
    folder = label("", "./a", "./b")
    assert "nothing is labelled yet: no artifact" in capfd.readouterr().err
    label("12", "./a", "./b")
    label("=s" + "1" * 8, "./a", "./b")
    assert "12 of 12 labelled" in capfd.readouterr().err
    assert len((folder / "a-b-label.labels.jsonl").read_text().splitlines()) == 12
    rows = [json.loads(line) for line in (folder / "a-b-label" / "rows.jsonl").read_text().splitlines()]
    assert [row["preference"] for row in rows].count(0.5) == 1
    assert len(rows) == 11
    said = [json.loads(line) for line in (folder / "a-1-answers" / "rows.jsonl").read_text().splitlines()]
    from_a = {row["messages"][-1]["content"] for row in said}
    assert 2 < sum(row["chosen"] in from_a for row in rows) < 9, "always the left key, and not always one model"
    manifest = json.loads((folder / "a-b-label" / "manifest.json").read_text())
    assert [each["reference"] for each in manifest["inputs"]["data"]] == ["people/a-1-answers", "people/b-2-answers"]
    assert 0 < manifest["metrics"]["win_rate"] < 1
    label("11q", "people/a-b-label")  # pairs that were labelled before, anew
    again = json.loads((folder / "a-b-label-label" / "manifest.json").read_text())
    assert again["metrics"]["rows"] == 2
    assert "agreement" in again["metrics"]
