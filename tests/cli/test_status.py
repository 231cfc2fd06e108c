"""`llmpipe status` and `gc`: what stands, what is stale and why, whose bytes have changed, what nobody needs."""

import calendar
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline import recipe as installed

ROOT = Path(installed.__file__).parents[2]


def rows(done: Any) -> dict[str, dict[str, Any]]:
    assert done.stdout, done.stderr
    return {row["stage"]: row for row in json.loads(done.stdout)["stages"]}


def test_what_stands(warm: Any, trained: Path):
    found = rows(warm("status", "tiny.yaml", "--json"))
    assert [(row["state"], row["reasons"], row["unfinished"]) for row in found.values()] == [("stands", [], False)] * 2
    assert found["pretrain"]["metrics"]["parameters"] == 43168
    printed = warm("status", "tiny.yaml").stdout
    assert "stands" in printed
    assert "bits_per_byte" in printed


def test_what_is_missing_and_what_comes_next(warm: Any, tokenized: Path):
    found = rows(warm("status", "tiny.yaml", "--json"))
    assert [row["state"] for row in found.values()] == ["stands", "missing"]
    assert "next: llmpipe run tiny.yaml   (pretrain)" in warm("status", "tiny.yaml").stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("assignments", "reasons"),
    [
        (["pretrain.learning_rate=0.001"], ["pretrain.learning_rate 0.01 → 0.001"]),
        (["pretrain.model.depth=3"], ["pretrain.model.depth 2 → 3"]),
        (["pretrain.seed=1", "pretrain.bf16=true"], ["pretrain.bf16 None → True", "pretrain.seed 0 → 1"]),
        (["tokenize.digits=2"], ["input: tokens (tokenize)"]),
        (["pretrain.save_steps=1", "pretrain.logging_steps=3", "pretrain.eval_steps=7"], []),
    ],
)
def test_what_is_stale_and_why(warm: Any, trained: Path, assignments: list[str], reasons: list[str]):
    options = [part for assignment in assignments for part in ("--set", assignment)]
    row = rows(warm("status", "tiny.yaml", "--json", *options))["pretrain"]
    assert (row["state"], row["reasons"]) == ("stale" if reasons else "stands", reasons)
    for reason in reasons:
        assert reason in warm("status", "tiny.yaml", *options).stdout


def test_moving_data_does_not_count_and_changing_bytes_does(warm: Any, trained: Path):
    (warm.folder / "elsewhere").mkdir()
    shutil.move(warm.folder / "corpus.jsonl", warm.folder / "elsewhere" / "text.jsonl")
    trained.write_text(trained.read_text().replace("corpus.jsonl", "elsewhere/text.jsonl"))
    assert [row["state"] for row in rows(warm("status", "tiny.yaml", "--json")).values()] == ["stands", "stands"]
    with (warm.folder / "elsewhere" / "text.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    found = rows(warm("status", "tiny.yaml", "--json"))
    assert found["tokenize"]["reasons"] == [f"data: data ({warm.folder}/elsewhere/text.jsonl)"]
    assert found["pretrain"]["reasons"] == ["input: tokens (tokenize)"]


@pytest.fixture
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this checkout's code, to be changed."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("src/pipeline", "stages", "recipes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.mark.slow
def test_the_code_that_computes_a_stage_counts(cli: Any, trained: Path, checkout: Path):
    """A cold process each: a changed checkout is another program."""

    def reasons() -> list[list[str]]:
        path = f"{checkout}/src:{checkout}"
        found = rows(cli("status", "tiny.yaml", "--json", env={"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}))
        return [row["reasons"] for row in found.values()]

    def change(file: str, old: str, new: str) -> None:
        text = (checkout / file).read_text()
        assert text.count(old) >= 1
        (checkout / file).write_text(text.replace(old, new, 1))

    change("src/pipeline/model/losses.py", "import torch\n", "import torch  # a comment\n\n\n")
    change("src/pipeline/model/losses.py", '"""', '"""Said otherwise. ')
    change("src/pipeline/launch.py", "import os\n", "import os\n\nUNUSED = 1\n")
    change("src/pipeline/progress.py", "SECONDS_BETWEEN_LINES = 5.0", "SECONDS_BETWEEN_LINES = 6.0")
    change("src/pipeline/rl/kl.py", "import torch\n", "import torch\n\nUNUSED = 1\n")
    assert reasons() == [[], []]
    change("src/pipeline/model/losses.py", "IGNORED = -100", "IGNORED = -101")
    assert reasons() == [[], ["code: pipeline/model/losses.py"]]
    change("stages/tokenize.py", "def run(", "UNUSED = 1\n\n\ndef run(")
    assert reasons() == [["code: stages/tokenize.py"], ["code: pipeline/model/losses.py", "input: tokens (tokenize)"]]


@pytest.mark.slow
def test_keep_blesses_on_the_record(warm: Any, trained: Path):
    changed = ("--set", "pretrain.learning_rate=0.001")
    assert warm("run", "tiny.yaml", "--keep", "pretrain", *changed).code == 0
    row = rows(warm("status", "tiny.yaml", "--json", *changed))["pretrain"]
    assert (row["state"], row["kept"]) == ("stands", True)
    assert "stands (kept)" in warm("status", "tiny.yaml", *changed).stdout
    assert "pretrain.learning_rate 0.01 → 0.001" in warm("status", "tiny/pretrain").stdout
    assert (
        rows(warm("status", "tiny.yaml", "--json", "--set", "pretrain.learning_rate=0.1"))["pretrain"]["state"]
        == "stale"
    )


def test_one_artifact(warm: Any, trained: Path):
    printed = warm("status", "tiny/pretrain").stdout
    assert printed.startswith("tiny/pretrain: causal-lm made by pretrain, ")
    manifest = json.loads(warm("status", "tiny/pretrain", "--json").stdout)
    assert manifest["path"] == f"{warm.folder}/artifacts/tiny/pretrain"
    assert f"tokens       tiny/tokenize ({manifest['inputs']['tokens'][0]['fingerprint'][:12]})" in printed
    missing = warm("status", "tiny/sft")
    assert missing.code == 1
    assert "no artifact tiny/sft" in missing.stderr
    outside = warm("status", "../x")
    assert outside.code == 2


@pytest.mark.slow
def test_changed_bytes_are_found(warm: Any, trained: Path):
    for command in (("status", "tiny.yaml"), ("status", "tiny/pretrain")):
        assert warm(*command, "--verify").code == 0
    weights = warm.folder / "artifacts" / "tiny" / "pretrain" / "model" / "model.safetensors"
    stat, content = weights.stat(), bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # not to be seen by its time
    for command in (("status", "tiny.yaml"), ("status", "tiny/pretrain")):
        assert warm(*command).code == 0
        done = warm(*command, "--verify")
        assert done.code == 1
        assert "model/model.safetensors: bytes changed" in done.stderr


@pytest.mark.slow
def test_an_unfinished_stage_is_shown_and_collected(warm: Any, tokenized: Path):
    done = warm("run", "tiny.yaml", "--set", "pretrain.learning_rate=1e30", "--set", "pretrain.warmup_steps=0")
    assert done.code == 1, done.stderr
    options = ("--set", "pretrain.learning_rate=1e30", "--set", "pretrain.warmup_steps=0")
    row = rows(warm("status", "tiny.yaml", "--json", *options))["pretrain"]
    assert row["unfinished"]
    told = done.stderr.partition("error: ")[2].strip()
    assert "the gradient's norm is nan" in told
    assert row["failed"]["error"] == told
    assert abs(time.time() - calendar.timegm(time.strptime(row["failed"]["time"], "%Y-%m-%dT%H:%M:%SZ"))) < 600
    printed = warm("status", "tiny.yaml", *options).stdout
    assert "failed" in printed
    assert told.splitlines()[0] in printed
    assert rows(warm("status", "tiny.yaml", "--json"))["pretrain"]["failed"] is None  # other values have not failed
    (partial,) = (warm.folder / "artifacts" / "tiny").glob(".pretrain.*.partial")

    assert json.loads(warm("gc", "--dry-run", "--json").stdout) == []  # younger than a day
    (found,) = json.loads(warm("gc", "--dry-run", "--json", "--older-than", "0").stdout)
    assert found["path"] == str(partial)
    assert partial.exists()
    for path in (partial, *partial.rglob("*")):
        os.utime(path, (time.time() - 30 * 3600,) * 2)
    assert "freed" in warm("gc").stdout
    assert not partial.exists()
    assert rows(warm("status", "tiny.yaml", "--json"))["tokenize"]["state"] == "stands"


def test_recipes_that_ship(warm: Any):
    found = json.loads(warm("recipes", "--json").stdout)
    assert "smoke" in found
    assert all(each["about"] and "#" not in each["about"] for each in found.values())
    assert all(each["about"].endswith(".") for each in found.values())  # to the end, however many lines
    assert found["smoke"]["stages"] == ["tokenize", "pretrain", "sft", "reward", "ppo", "dpo", "eval"]
    assert found["smoke"]["hub"] == []
    assert found["gpt2-124m"]["hub"][0].startswith("hub:")
    assert warm("config", "show", "smoke", "--json").code == 0


@pytest.mark.slow
def test_the_graph_its_sizes_and_where_to_go(warm: Any, trained: Path):
    found = json.loads(warm("status", "tiny.yaml", "--json").stdout)
    assert [row["parents"] for row in found["stages"]] == [[], ["tokenize"]]
    assert found["next"] == ["llmpipe report tiny"]  # nothing that can be talked to
    files = [path for path in (warm.folder / "artifacts").rglob("*") if path.is_file() and path.name[0] != "."]
    whole = sum(path.stat().st_size for path in files if path.name != "manifest.json")
    assert sum(row["bytes"] for row in found["stages"]) == whole
    printed = warm("status", "tiny.yaml").stdout
    assert "└─ pretrain" in printed
    assert "2 of 2 stand" in printed
    assert "next: llmpipe report tiny" in printed


@pytest.mark.slow
def test_a_stage_at_work_is_said_to_be_running(warm: Any, tokenized: Path):
    """While it runs, who and where, and whether with the recipe's values; stopped, that it would be resumed."""
    long = ("--set", "pretrain.max_steps=200000")
    running = warm.start("run", "tiny.yaml", *long)
    folder = warm.folder / "artifacts" / "tiny"
    running.wait_for(lambda: any('"step": 10,' in f.read_text() for f in folder.glob(".pretrain.*.partial/*.jsonl")))
    before = rows(warm("status", "tiny.yaml", "--json", *long))
    assert before["tokenize"]["running"] is None
    found = before["pretrain"]
    assert (found["state"], found["running"]["by"]) == ("missing", f"process {running.pid} on {os.uname().nodename}")
    assert found["running"]["step"] >= 10
    assert found["running"]["is_planned"]
    assert 0 <= found["running"]["seconds_ago"] < 60
    printed = warm("status", "tiny.yaml", *long).stdout
    assert f" ago, by process {running.pid} on " in next(line for line in printed.splitlines() if " running " in line)
    assert "1 of 2 stand" in printed
    assert "(pretrain; it waits for what is running)" in printed
    assert "with other values than the recipe has now" in warm("status", "tiny.yaml").stdout
    running.signal(signal.SIGTERM)
    assert running.wait().code == 75
    after = rows(warm("status", "tiny.yaml", "--json", *long))["pretrain"]
    assert (after["running"], after["unfinished"], after["failed"]) == (None, True, None)  # to be stopped is no failure
    assert after["step"] >= found["running"]["step"]
    assert rows(warm("status", "tiny.yaml", "--json"))["pretrain"]["unfinished"] is False
