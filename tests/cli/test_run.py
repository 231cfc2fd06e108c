"""`llmpipe run` and the stage commands: what runs, what stands, what is said, and two of them at once."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest


def sha(folder: Path, run: str = "tiny") -> str:
    manifest = json.loads((folder / "artifacts" / run / "pretrain" / "manifest.json").read_text())
    return str(manifest["files"]["model/model.safetensors"]["sha256"])


@pytest.mark.slow
def test_a_second_run_does_nothing_and_says_why(cli: Any, trained: Path):
    done = cli("run", "tiny.yaml")
    assert done.code == 0
    assert [line.split()[:2] for line in done.stderr.splitlines()] == [["tokenize", "stands"], ["pretrain", "stands"]]
    lines = done.stdout.splitlines()
    assert "nothing to do: all tokenize, pretrain stand (data, config and code are what they were)" in lines
    assert f"artifacts   {cli.folder}/artifacts/tiny" in lines
    assert "report      llmpipe report tiny" in lines
    assert "next        llmpipe chat tiny/pretrain" in lines


@pytest.mark.slow
def test_results_are_json_on_stdout_and_progress_is_on_stderr(warm: Any, tiny: Path, made: Path):
    done = warm("run", "tiny.yaml", "--json")
    assert done.code == 0, done.stderr
    printed = json.loads(done.stdout)
    assert (printed["run"], printed["artifacts"]) == ("tiny", f"{warm.folder}/artifacts")
    tokenize, pretrain = printed["stages"]
    assert (tokenize["stage"], tokenize["kind"], pretrain["kind"]) == ("tokenize", "tokens", "causal-lm")
    assert pretrain["tokens"] == 30 * 4 * 32
    assert pretrain["metrics"]["bits_per_byte"] > 0
    assert "tokenize  runs\n" in done.stderr
    assert "pretrain  done in" in done.stderr
    assert sha(warm.folder) == sha(made)  # the same bits in another folder


@pytest.mark.slow
def test_quiet_says_nothing(cli: Any, trained: Path):
    assert cli("run", "tiny.yaml", "--quiet") == (0, "", "")


@pytest.mark.slow
def test_a_dry_run_says_what_would_be_done_and_does_nothing(warm: Any, trained: Path):
    before = sorted(warm.folder.rglob("*"))
    changed = ("--set", "pretrain.learning_rate=0.001")
    done = warm("run", "tiny.yaml", "--dry-run", *changed)
    assert done.stdout.splitlines() == [
        "tokenize     stands",
        "pretrain     would run: pretrain.learning_rate 0.01 → 0.001",
    ]
    kept = warm("run", "tiny.yaml", "--dry-run", "--json", "--keep", "pretrain", *changed)
    assert [row["runs"] for row in json.loads(kept.stdout)] == [False, False]
    forced = warm("run", "tiny.yaml", "--dry-run", "--json", "--force")
    assert [row["runs"] for row in json.loads(forced.stdout)] == [True, True]
    assert sorted(warm.folder.rglob("*")) == before
    assert warm("run", "tiny.yaml", "--dry-run", *changed).stdout == done.stdout  # nothing was blessed


@pytest.mark.slow
def test_run_until_and_one_stage(warm: Any, tiny: Path):
    done = warm("run", "tiny.yaml", "--until", "tokenize")
    assert done.code == 0, done.stderr
    assert "next        llmpipe run tiny.yaml" in done.stdout
    assert not (warm.folder / "artifacts" / "tiny" / "pretrain").exists()
    alone = warm("pretrain", "tiny.yaml", "--set", "pretrain.max_steps=2")
    assert alone.code == 0, alone.stderr
    assert "1 of 1 stages ran" in alone.stdout


@pytest.mark.slow
def test_a_stage_of_another_name_is_found_by_its_type(warm: Any, trained: Path):
    text = trained.read_text()
    trained.write_text(text.replace("  pretrain:", "  base:\n    stage: pretrain"))
    assert warm("pretrain", "tiny.yaml", "--dry-run").stdout.startswith("base ")
    trained.write_text(f"{text}  again: {{stage: pretrain}}\n")
    assert warm("pretrain", "tiny.yaml", "--dry-run").stdout.startswith("pretrain ")
    assert warm("pretrain", "tiny.yaml", "--stage", "again", "--dry-run").stdout.startswith("again ")
    trained.write_text(text.replace("  pretrain:", "  base:\n    stage: pretrain") + "  again: {stage: pretrain}\n")
    done = warm("pretrain", "tiny.yaml")
    assert done.code == 2
    assert "several pretrain stages: base, again\n  mend: llmpipe pretrain tiny.yaml --stage base" in done.stderr
    assert warm("pretrain", "tiny.yaml", "--stage", "bsae").code == 2
    assert "no sft stage" in warm("sft", "tiny.yaml").stderr
    warm("eject", "pretrain")
    trained.write_text(text.replace("  pretrain:", "  pretrain:\n    stage: ./my_pretrain.py"))
    assert warm("pretrain", "tiny.yaml", "--dry-run").stdout.startswith("pretrain ")


@pytest.mark.slow
def test_force_runs_again_what_stands(warm: Any, trained: Path):
    before = sha(warm.folder)
    created = (warm.folder / "artifacts" / "tiny" / "pretrain" / "config.yaml").stat().st_ino
    done = warm("pretrain", "tiny.yaml", "--force")
    assert done.code == 0, done.stderr
    assert "pretrain  runs: again (--force)" in done.stderr
    assert (warm.folder / "artifacts" / "tiny" / "pretrain" / "config.yaml").stat().st_ino != created
    assert sha(warm.folder) == before


@pytest.mark.slow
def test_what_was_kept_and_is_forced_is_made_anew(warm: Any, trained: Path):
    changed = ("--set", "pretrain.learning_rate=0.001")
    kept = warm("run", "tiny.yaml", "--keep", "pretrain", *changed)
    assert kept.code == 0, kept.stderr
    assert "nothing to do" in kept.stdout
    before = sha(warm.folder)
    assert warm("pretrain", "tiny.yaml", "--force", *changed).code == 0
    assert sha(warm.folder) != before
    (row,) = json.loads(warm("status", "tiny.yaml", "--json", *changed).stdout)["stages"][1:]
    assert (row["state"], row["kept"]) == ("stands", False)
    assert json.loads(warm("status", "tiny.yaml", "--json").stdout)["stages"][1]["state"] == "stale"


@pytest.mark.slow
def test_the_artifacts_root_by_flag_and_environment(warm: Any, tiny: Path):
    until = ("run", "tiny.yaml", "--until", "tokenize", "--quiet")
    assert warm(*until, "--artifacts", "here").code == 0
    assert warm(*until, "--run", "other", env={"LLMPIPE_ARTIFACTS": str(warm.folder / "there")}).code == 0
    found = {str(path.relative_to(warm.folder)) for path in warm.folder.rglob("tokenize/manifest.json")}
    assert found == {"here/tiny/tokenize/manifest.json", "there/other/tokenize/manifest.json"}


@pytest.mark.slow
def test_two_runs_at_once_make_each_stage_once(warm: Any, tiny: Path, made: Path):
    both = [warm.start("run", "tiny.yaml") for _ in range(2)]
    ended = [running.wait() for running in both]
    assert [done.code for done in ended] == [0, 0], ended
    said = "".join(done.stderr for done in ended)
    for stage in ("tokenize", "pretrain"):
        assert said.count(f"{stage}  runs") == 1
        assert said.count(f"{stage}  stands") == 1
    assert sha(warm.folder) == sha(made)
    assert json.loads(warm("status", "tiny.yaml", "--verify", "--json").stdout)["stages"][1]["broken"] == []
    left = {path.name for path in (warm.folder / "artifacts" / "tiny").iterdir()}
    assert left == {"tokenize", "pretrain", ".tokenize.lock", ".pretrain.lock"}


@pytest.mark.slow
def test_two_runs_of_other_recipes_at_once_do_not_hurt_each_other(warm: Any, tokenized: Path):
    """They fight for one name: each makes its own in turn, and what stands at the end is whole."""
    both = [warm.start("run", "tiny.yaml", "--set", f"pretrain.learning_rate={rate}") for rate in (0.01, 0.001)]
    assert [running.wait().code for running in both] == [0, 0]
    rows = [
        json.loads(warm("status", "tiny.yaml", "--verify", "--json", "--set", f"pretrain.learning_rate={rate}").stdout)
        for rate in (0.01, 0.001)
    ]
    assert sorted(row["stages"][1]["state"] for row in rows) == ["stale", "stands"]
    assert rows[0]["stages"][1]["broken"] == []


def test_a_bad_row_ends_the_run_with_its_file_and_line(warm: Any, tiny: Path):
    rows = (warm.folder / "corpus.jsonl").read_text().splitlines()
    rows[16] = '{"body": "no text here"}'
    (warm.folder / "corpus.jsonl").write_text("\n".join(rows))
    done = warm("run", "tiny.yaml")
    assert done.code == 1
    assert f"error: {warm.folder}/corpus.jsonl:17: field `text` is missing" in done.stderr


@pytest.mark.slow
def test_the_recipe_may_lie_elsewhere(warm: Any, tiny: Path):
    (warm.folder / "deep").mkdir()
    shutil.move(tiny, warm.folder / "deep" / "tiny.yaml")
    shutil.move(warm.folder / "corpus.jsonl", warm.folder / "deep" / "corpus.jsonl")
    done = warm("run", "deep/tiny.yaml", "--until", "tokenize")
    assert done.code == 0, done.stderr
    assert (warm.folder / "artifacts" / "tiny" / "tokenize").exists()


@pytest.mark.slow
@pytest.mark.parametrize("argument", ["--help", "-h"])
def test_help_lists_the_commands(cli: Any, argument: str):
    done = cli(argument)
    assert done.code == 0
    for command in ("run", "tokenize", "pretrain", "sft", "reward", "ppo", "dpo", "eval", "status", "eject", "chat"):
        assert f" {command} " in done.stdout


@pytest.mark.slow
def test_no_command_shows_the_help(cli: Any):
    done = cli()
    assert "Usage" in done.stdout + done.stderr


GIVEN = """\
run: given
stages:
  tokenize: {data: corpus.jsonl, tokenizer: tiny/tokenize}
  again: {stage: tokenize, data: corpus.jsonl, tokenizer: tokenize, added_tokens: ["<|x|>"]}
  alone: {stage: tokenize, data: corpus.jsonl, tokenizer: ./alone}
"""


@pytest.mark.slow
def test_a_tokenizer_of_an_artifact_and_of_a_folder_with_nothing_else(warm: Any, tokenized: Path):
    made = tokenized.parent / "artifacts" / "tiny" / "tokenize"
    alone = tokenized.parent / "alone"
    alone.mkdir()
    shutil.copy2(made / "model" / "tokenizer.json", alone)
    tokenized.with_name("given.yaml").write_text(GIVEN)
    ran = warm("run", "given.yaml", "--json")
    assert ran.code == 0, ran.stderr
    found = {row["stage"]: row["metrics"]["vocab_size"] for row in json.loads(ran.stdout)["stages"]}
    assert found == {"tokenize": 512.0, "again": 513.0, "alone": 512.0}
    for name in found:
        tokens = tokenized.parent / "artifacts" / "given" / name / "train.ds"
        assert tokens.read_bytes() == (made / "train.ds").read_bytes(), name

    def stale() -> list[tuple[str, list[str]]]:
        rows = json.loads(warm("status", "given.yaml", "--json").stdout)["stages"]
        return [(row["stage"], row["reasons"]) for row in rows if row["state"] != "stands"]

    (alone / "model.safetensors").write_text("weights")
    assert stale() == []
    with (alone / "tokenizer.json").open("a") as file:
        file.write("\n")
    assert stale() == [("alone", [f"input: tokenizer ({alone})"])]
