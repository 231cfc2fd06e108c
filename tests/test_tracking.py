"""`track:`: the figures of metrics.jsonl, the same tracker run after a kill; a tracker that fails ends nothing."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from pipeline.tracking import PACKAGES, Sender, Track, check_packages, flat, resuming
from tests.written import line, recipe, refused

STAND_IN = '''
import json, os, signal
from pathlib import Path
from accelerate.tracking import GeneralTracker

class Lines(GeneralTracker):
    """Appends all it is told to a file; dies, or fails, at a step, once."""
    name = "lines"
    requires_logging_directory = False
    tracker = None

    def __init__(self, run_name, file, kill_at=None, fail_at=None):
        super().__init__()
        self.run_name, self.file, self.kill_at, self.fail_at = run_name, Path(file), kill_at, fail_at

    def write(self, *what):
        with self.file.open("a") as file:
            file.write(json.dumps(what) + "\\n")

    def start(self):
        self.write("start", self.run_name)

    def store_init_configuration(self, values):
        self.write("config", values)

    def log(self, values, step=None, **kwargs):
        if step == self.kill_at and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if step == self.fail_at:
            raise ConnectionError("the server is gone\\nand more")
        self.write("log", step, values)

    def finish(self):
        self.write("finish")
'''


def said(folder: Path) -> list[list[Any]]:
    return [json.loads(each) for each in (folder / "lines.jsonl").read_text().splitlines()]


def logged(folder: Path) -> list[tuple[int, dict[str, float]]]:
    return [(each[1], each[2]) for each in said(folder) if each[0] == "log"]


def measured(artifact: Path) -> list[tuple[int, dict[str, float]]]:
    """The numbers of metrics.jsonl."""
    rows = [json.loads(each) for each in (artifact / "metrics.jsonl").read_text().splitlines()]
    numbers = [{key: value for key, value in row.items() if isinstance(value, int | float)} for row in rows]
    return [(row.pop("step"), row) for row in numbers]


def tracked(warm: Any, **options: Any) -> str:
    """`--set` of a tracker of the user's own, whose file is written beside the recipe."""
    warm.write("lines.py", STAND_IN)
    settings = {"file": str(warm.folder / "lines.jsonl"), **options}
    return "track=" + json.dumps({"./lines.py:Lines": settings})


@pytest.mark.slow
def test_a_tracker_gets_what_is_measured_and_goes_on_after_a_kill(warm: Any, tokenized: Path, made: Path):
    setting = tracked(warm, kill_at=20)
    dead = warm("run", "tiny.yaml", "--set", setting)
    assert dead.code == 1
    before = logged(warm.folder)
    assert [step for step, _ in before] == [5, 10, 15]
    done = warm("run", "tiny.yaml", "--set", setting)
    assert done.code == 0, done.stderr
    artifact = warm.folder / "artifacts" / "tiny" / "pretrain"
    after = logged(warm.folder)[len(before) :]
    assert after == measured(artifact)[-len(after) :]
    assert {step for step, _ in before + after} == {step for step, _ in measured(artifact)}
    kinds = [each[0] for each in said(warm.folder)]
    assert (kinds.count("start"), kinds.count("config"), kinds.count("finish")) == (2, 1, 1)  # its config once
    names = {each[1] for each in said(warm.folder) if each[0] == "start"}
    assert [name.partition("-")[0] for name in names] == ["pretrain"]  # the stage, at its one fingerprint
    config = next(each[1] for each in said(warm.folder) if each[0] == "config")
    assert (config["max_steps"], config["model.depth"]) == (30, 2)
    theirs = made / "artifacts" / "tiny" / "pretrain"
    manifests = [json.loads((each / "manifest.json").read_text()) for each in (artifact, theirs)]
    assert manifests[0]["fingerprint"] == manifests[1]["fingerprint"]  # that it is tracked changes nothing
    assert len({each["files"]["model/model.safetensors"]["sha256"] for each in manifests}) == 1
    assert "track" not in (artifact / "config.yaml").read_text()


@pytest.mark.slow
def test_a_tracker_that_fails_is_told_of_once_and_ends_nothing(warm: Any, tokenized: Path):
    done = warm("run", "tiny.yaml", "--set", tracked(warm, fail_at=10))
    assert done.code == 0, done.stderr
    assert done.stderr.count("failed and gets no more (ConnectionError: the server is gone)") == 1
    assert [step for step, _ in logged(warm.folder)] == [5]
    never = warm("run", "tiny.yaml", "--force", "--until", "pretrain", "--set", tracked(warm, nonsense=1))
    assert never.code == 0, never.stderr
    assert never.stderr.count("failed and gets no more (TypeError") == 2  # once in each of the two stages


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_holds_the_same_and_a_resumed_stage_goes_on(warm: Any, tokenized: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    warm.write("lines.py", STAND_IN)
    killing = {"file": str(warm.folder / "lines.jsonl"), "kill_at": 25}
    setting = "track=" + json.dumps({"tensorboard": None, "./lines.py:Lines": killing})
    assert warm("run", "tiny.yaml", "--set", setting, "--set", "pretrain.save_steps=10").code == 1
    done = warm("run", "tiny.yaml", "--set", setting, "--set", "pretrain.save_steps=10")
    assert done.code == 0, done.stderr
    assert "failed" not in done.stderr
    folders = list((warm.folder / "artifacts" / "tiny" / ".track").glob("pretrain-*"))
    assert len(folders) == 1
    events = EventAccumulator(str(folders[0]))
    events.Reload()
    rows = measured(warm.folder / "artifacts" / "tiny" / "pretrain")
    for name in ("loss", "learning_rate", "bits_per_byte"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(step, pytest.approx(row[name], rel=1e-6)) for step, row in rows if name in row]
    assert json.loads(warm("status", "tiny.yaml", "--json").stdout)["stages"][1]["state"] == "stands"
    assert json.loads(warm("gc", "--json").stdout) == []


BASE = "run: r\nstages:\n  tokenize: {data: [{source: pydocs}]}\n"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", ()),
        ("track: wandb\n", (Track("wandb"),)),
        ("track: [wandb, mlflow]\n", (Track("wandb"), Track("mlflow"))),
        ("track: {wandb: {entity: me}, tensorboard: null}\n", (Track("wandb", {"entity": "me"}), Track("tensorboard"))),
    ],
)
def test_what_a_recipe_may_say(tmp_path: Path, value: str, expected: tuple[Track, ...]):
    assert recipe(tmp_path, value + BASE).tracks == expected


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("wandd", "no tracker `wandd`; did you mean `wandb`?"),
        ("[wandb, tensorbord]", "no tracker `tensorbord`; did you mean `tensorboard`?"),
        ("{mlflo: {}}", "no tracker `mlflo`; did you mean `mlflow`?"),
        ("3", "`track`"),
    ],
)
def test_what_is_refused_with_its_line(tmp_path: Path, value: str, what: str):
    error = refused(tmp_path, f"run: r\ntrack: {value}\n" + BASE.removeprefix("run: r\n"))
    assert what in str(error)
    assert line(error) == 2


@pytest.mark.slow
def test_a_package_that_is_missing_is_told_before_anything_runs(warm: Any, tiny: Path):
    missing = next(name for name, needed in PACKAGES.items() if not any(map(importlib.util.find_spec, needed)))
    done = warm("run", "tiny.yaml", "--set", f"track={missing}")
    assert done.code == 1
    assert f"`{missing}` needs the package" in done.stderr
    assert "pip install" in done.stderr
    assert not (warm.folder / "artifacts").exists()
    gone = warm("run", "tiny.yaml", "--set", "track=./gone.py:Tracker")
    assert (gone.code, "no file" in gone.stderr) == (2, True)
    warm.write("lines.py", STAND_IN)
    wrong = warm("run", "tiny.yaml", "--set", "track={./lines.py:Line: {}}")
    assert (wrong.code, "defines no `Line`; did you mean `Lines`?" in wrong.stderr) == (2, True), wrong.stderr
    assert not (warm.folder / "artifacts").exists()
    check_packages((Track("/folder/file.py:Own"),))  # needs none


@pytest.mark.parametrize(
    ("text", "is_there"),
    [
        ("class Nope:\n    pass\n", True),
        ("try:\n    from wandb import Nope\nexcept ImportError:\n    Nope = None\n", True),
        ("from other import That as Nope\n", True),
        ("from other import *\n", True),
        ("A, Nope = 1, 2\n", True),
        ("def f():\n    class Nope: ...\n", False),
        ("print(Nope)\n", False),
        ("", False),
        ("class Nope(:\n", False),
    ],
)
def test_a_class_is_looked_for_without_running_its_file(tmp_path: Path, text: str, is_there: bool):
    (tmp_path / "own.py").write_text(text)
    said = f"run: r\ntrack: {tmp_path}/own.py:Nope\n" + BASE.removeprefix("run: r\n")
    if is_there:
        assert recipe(tmp_path, said).tracks == (Track(f"{tmp_path}/own.py:Nope"),)
    else:
        error = refused(tmp_path, said)
        assert line(error) == 2
        assert ("is no Python" if "(:" in text else "defines no `Nope`") in str(error)


@pytest.mark.parametrize("name", sorted({*PACKAGES, "own"}))
def test_the_stages_of_a_run_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    made: list[tuple[Any, ...]] = []

    class Recorded:
        requires_logging_directory = name in ("tensorboard", "aim", "mlflow")

        def __init__(self, first: str, /, **options: Any) -> None:
            made.append((first, options))

        def start(self) -> None: ...

        def store_init_configuration(self, values: dict[str, Any]) -> None: ...

    monkeypatch.setattr("pipeline.tracking._class_of", lambda name: Recorded)
    monkeypatch.setattr("pipeline.tracking._run_id", lambda name, tracker: "")
    track = Track("/folder/own.py:Own" if name == "own" else name)
    for stage in ("sft-01", "dpo-02"):
        Sender((track,), tmp_path / ".track" / stage, "demo", stage, {})._started(track, 5)
    assert made[0] != made[1]
    if name not in ("comet_ml", "wandb"):  # of these a key alone, or beside the name
        assert [("sft-01" in str(each), "dpo-02" in str(each)) for each in made] == [(True, False), (False, True)]


def test_the_trackers_are_accelerates():
    assert PACKAGES.keys() == {str(name) for name in LOGGER_TYPE_TO_CLASS}


def test_what_a_resumed_stage_goes_on_in():
    first = {name: resuming(name, "demo", "sft-0123", 5, {}) for name in PACKAGES}
    again = {name: resuming(name, "demo", "sft-0123", 40, {"mlflow": "a1b2"}) for name in PACKAGES}
    other = {name: resuming(name, "demo", "sft-4567", 5, {}) for name in PACKAGES}
    for name in ("wandb", "trackio", "comet_ml"):
        assert first[name] == again[name] != other[name]
    assert (first["wandb"]["resume"], first["trackio"]["resume"]) == ("allow", "allow")
    assert len(first["comet_ml"]["experiment_key"]) == 32  # of 32 to 50 letters and digits, as it asks
    assert first["comet_ml"]["experiment_key"].isalnum()
    assert (first["tensorboard"], again["tensorboard"]) == ({"purge_step": 5}, {"purge_step": 40})
    assert (first["mlflow"], again["mlflow"]) == ({"run_name": "sft-0123"}, {"run_id": "a1b2"})


def test_a_config_becomes_flat_values_that_every_tracker_takes():
    config = {"seed": 0, "peft": None, "model": {"depth": 2, "tie": True}, "data": [{"source": "pydocs"}], "beta": 0.1}
    expected = {"seed": 0, "model.depth": 2, "model.tie": True, "data": '[{"source": "pydocs"}]', "beta": 0.1}
    assert flat(config) == expected
