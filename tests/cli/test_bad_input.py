"""Every bad input, at the command line: the exit code, the file and the line, what was meant, and no torch."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RECIPE = """\
run: demo
seed: 0
stages:
  tokenize:
    data: text.txt
  pretrain:
    max_steps: 10
    learning_rate: 1e-5
  sft: {init: pretrain, data: rows.jsonl}
  reward: {init: sft, data: rows.jsonl}
  ppo: {init: sft, reward: reward}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("a\n")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "gpt.py").write_text("class GPT: ...\n")
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path / "r.yaml"


@pytest.mark.slow
def test_a_good_recipe_is_planned(warm: Any, recipe: Path):
    done = warm("run", "r.yaml", "--dry-run")
    assert (done.code, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"{name:<12} would run: has not run" for name in ("tokenize", "pretrain", "sft", "reward", "ppo")
    ]


@pytest.mark.parametrize(
    ("old", "new", "line", "what"),
    [
        ("learning_rate", "learning_rat", 8, "unknown key `learning_rat`; did you mean `learning_rate`?"),
        ("max_steps: 10", "max_steps: ten", 7, "`max_steps`: input should be a valid integer"),
        ("text.txt", "text.txt\n    added_merges: 9", 6, "`added_merges`: there is no `tokenizer` to add merges to"),
        ("init: pretrain", "init: './gpt.py:GPT'", 9, "`init` takes a causal-lm; code of yours stands for a reward"),
        ("init: pretrain", "init: pretrian", 9, "no stage `pretrian`; did you mean `pretrain`?"),
        ("init: pretrain", "init: sft", 9, "the stages go round in a circle: sft → sft"),
        ("seed: 0", "run: twice", 2, 'duplicate key "run"'),
        ("text.txt", "txet.txt", 5, "no file or folder"),
        ("  ppo:", "  pppo:", 11, "no stage `pppo`; did you mean `ppo`?"),
        ("run: demo", "run: ../demo", 1, "'../demo' is no name"),
        ("max_steps: 10", "max_steps: [10", 8, "not YAML"),
    ],
)
def test_what_is_wrong_in_a_recipe(warm: Any, recipe: Path, old: str, new: str, line: int, what: str):
    recipe.write_text(RECIPE.replace(old, new))
    done = warm("run", "r.yaml")
    assert done.code == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: r.yaml:{line}: ")
    assert what in done.stderr
    assert not (warm.folder / "artifacts").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["r.yaml", "--set", "pretrain.max_stpes=3"], "error: --set pretrain.max_stpes=3: unknown key `max_stpes`"),
        (["r.yaml", "--set", "pretrain.max_steps"], "error: --set pretrain.max_steps: write it as stage.field=value"),
        (["r.yaml", "--set", "pretrian.max_steps=3"], "there is no 'pretrian'; did you mean `pretrain`?"),
        (["r.yaml", "--run", "../x"], "error: --run ../x: '../x' is no name"),
        (["r.yaml", "--until", "pppo"], "--until pppo: no such stage; did you mean `ppo`?"),
        (["r.yaml", "--keep", "nothing"], "--keep nothing: the recipe has no such stage"),
        (["r.yaml", "--strategy", "fsdp3"], "--strategy is one of auto, single, ddp, fsdp, not 'fsdp3'"),
        (["missing.yaml"], "no recipe missing.yaml"),
        (["smoek"], "no recipe smoek; did you mean `smoke`?"),
        (["r.yaml", "--fource"], "--fource"),
    ],
)
def test_what_is_wrong_in_a_command(warm: Any, recipe: Path, arguments: list[str], message: str):
    done = warm("run", *arguments)
    assert done.code == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_wrong_in_the_environment(warm: Any, recipe: Path):
    done = warm("run", "r.yaml", env={"LLMPIPE_SET": "pretrain.max_stpes=3"})
    assert done.code == 2
    assert "error: LLMPIPE_SET pretrain.max_stpes=3: unknown key `max_stpes`; did you mean `max_steps`?" in done.stderr


def test_a_run_may_be_named_like_a_number(warm: Any, recipe: Path):
    assert warm("run", "r.yaml", "--run", "2024", "--dry-run").code == 0


def test_an_unknown_command_is_refused(warm: Any):
    done = warm("pretrian")
    assert done.code == 2
    assert "pretrain" in done.stderr


def test_a_reward_model_of_another_tokenizer(warm: Any, recipe: Path):
    recipe.write_text(
        RECIPE.replace("reward: {init: sft,", "reward: {init: base2, demonstrations: rows.jsonl,")
        + "  tokens2: {stage: tokenize, data: text.txt}\n  base2: {stage: pretrain, tokens: tokens2}\n"
    )
    done = warm("run", "r.yaml")
    assert done.code == 2
    assert done.stderr.startswith(
        "error: r.yaml:11: the reward model `reward` has another tokenizer (stage:tokens2) than `sft` (stage:tokenize)"
    )


def test_a_stage_alone_wants_what_it_takes(warm: Any, recipe: Path):
    done = warm("pretrain", "r.yaml")
    assert done.code == 2
    assert "`pretrain` takes `tokenize`, which does not stand (it has not run)" in done.stderr
    assert "mend: llmpipe run r.yaml --until pretrain" in done.stderr


def test_a_stage_that_cannot_be_sharded_refuses_it(warm: Any, recipe: Path):
    done = warm("sft", "r.yaml", "--strategy", "fsdp")
    assert done.code == 2
    assert "r.yaml: --strategy fsdp: `sft` keeps the model whole in every process; only pretrain can" in done.stderr
    assert "mend: --strategy ddp" in done.stderr
    none = warm("run", "r.yaml", "--strategy", "fsdp", "--until", "tokenize")
    assert (none.code, "`tokenize` keeps the model whole" in none.stderr) == (2, True)
    some = warm("run", "r.yaml", "--strategy", "fsdp", "--dry-run")
    assert some.code == 0
    assert some.stderr == (
        "--strategy fsdp: tokenize, sft, reward, ppo as under ddp, the model whole in every process\n"
    )


WITHOUT_TORCH = """
import sys
from pipeline.cli import main
sys.argv = ["llmpipe", *sys.argv[1:]]
try:
    main()
finally:
    print(*[name for name in ("torch", "transformers", "datasets", "accelerate") if name in sys.modules], sep="\\n")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "r.yaml", "--dry-run"],
        ["run", "bad.yaml"],
        ["sft", "r.yaml", "--strategy", "fsdp"],
        ["config", "show", "r.yaml"],
        ["status", "r.yaml"],
        ["--help"],
    ],
)
def test_nothing_heavy_is_imported_to_check_a_recipe(cli: Any, recipe: Path, arguments: list[str]):
    cli.write("bad.yaml", RECIPE.replace("init: sft, reward: reward", "init: sft, reward: pretrain"))
    command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
    done = subprocess.run(command, cwd=cli.folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == (2 if {"bad.yaml", "fsdp"} & set(arguments) else 0), done.stderr
    assert not {"torch", "transformers", "datasets", "accelerate"} & set(done.stdout.split())
