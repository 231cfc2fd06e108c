"""The recipe's `trainer:` mapping, checked before anything heavy loads."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from trl import DPOConfig, RewardConfig, SFTConfig

from pipeline import trainer as adapter
from pipeline.artifacts import Store
from pipeline.errors import ConfigError, RecipeError
from pipeline.graph import build
from pipeline.reading import read_recipe
from pipeline.recipe import Stage
from pipeline.runtime import Runtime
from pipeline.schedule import schedule
from pipeline.trainer_config import TrainerConfig
from pipeline.trainer_options import NOT_TAKEN, OURS, config_fields, inexact, problem_with
from stages import dpo, reward, sft

KINDS = {"SFTConfig": (SFTConfig, sft), "RewardConfig": (RewardConfig, reward), "DPOConfig": (DPOConfig, dpo)}
RECIPE = """\
run: x
stages:
  sft:
    init: hub:a/b
    data: rows.jsonl
    trainer:
      adam_beta2: 0.95
      {line}
"""


def taken(kind: Any) -> set[str]:
    return {each.name for each in dataclasses.fields(kind) if each.init}


@pytest.mark.parametrize("name", KINDS)
def test_the_names_read_off_the_source_are_the_classes_own(name: str) -> None:
    kind, module = KINDS[name]
    assert config_fields(name) == taken(kind)
    assert name == vars(module)[f"{name}"].TRL, "each stage names its own"


def test_what_cannot_be_found_is_left_to_the_stage() -> None:
    assert config_fields("NoSuchConfig") == frozenset()
    assert problem_with("anything", config_fields("NoSuchConfig"), ()) == ""


def test_every_name_in_the_tables_is_one_that_trl_takes_or_took() -> None:
    now = set().union(*(taken(kind) for kind, _ in KINDS.values()))
    assert {*OURS, *NOT_TAKEN} - now == {"group_by_length", "warmup_ratio"}
    fields = {name for _, module in KINDS.values() for each in vars(module).values() if _is_config(each)
              for name in each.model_fields}  # fmt: skip
    assert set(OURS.values()) <= fields, "where the recipe is pointed to, there is a field"


def _is_config(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, TrainerConfig)


def test_all_that_the_frame_decides_is_refused_before_the_stage_would(quiet: Runtime, tmp_path: Path) -> None:
    """What `trainer_arguments` passes by itself can't be passed twice: the light check knows every such name."""
    settings = TrainerConfig(bf16=False)
    plan = schedule([5] * 20, settings, quiet)
    decided = {*adapter.SHARED_NAMES, *adapter._decided(settings, plan, tmp_path, quiet)}
    for name in decided:
        assert problem_with(name, taken(SFTConfig), TrainerConfig.model_fields), name


def recipe(folder: Path, line: str, *overrides: str) -> Any:
    """The sft stage of a recipe with this line under `trainer`, as the graph resolves it."""
    (folder / "rows.jsonl").write_text("{}\n")
    (folder / "r.yaml").write_text(RECIPE.replace("{line}", line))
    stages = {"sft": Stage.of(sft, "sft")}
    document = read_recipe(folder / "r.yaml", overrides)
    return build(document, lambda name, _: stages[name], Store(folder / "artifacts")).nodes["sft"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("adam_beta3: 0.9", r"`trainer.adam_beta3`: no such field of TRL's config; did you mean `adam_beta[12]`\?"),
        ("seed: 3", "`trainer.seed`: a field of the stage itself: write `seed` beside `trainer`, not in it"),
        ("max_steps: 3", "`trainer.max_steps`: a field of the stage itself"),
        ("output_dir: here", "`trainer.output_dir`: not taken: a stage works in its own folder of the store"),
        ("data_seed: 3", "`trainer.data_seed`: llmpipe's to decide: the stage's field is `seed`"),
        ("eval_steps: 3", "`trainer.eval_steps`: llmpipe's to decide: the stage's field is `held_out`"),
        ("hub_token: x", "`trainer.hub_token`: not taken"),
        (
            "packing_strategy: wrapped",
            "`trainer.packing_strategy`: llmpipe's to decide: the stage's field is `packing`",
        ),
        ("warmup_ratio: 0.1", "`trainer.warmup_ratio`: not taken: transformers 5 takes a share as warmup_steps"),
    ],
)
def test_a_wrong_key_is_an_error_at_its_own_line(tmp_path: Path, line: str, problem: str) -> None:
    with pytest.raises(RecipeError, match=problem) as caught:
        recipe(tmp_path, line)
    assert caught.value.where.endswith("r.yaml:8")


@pytest.mark.parametrize(
    ("kind", "mend"), [(dpo.DPOConfig, "`label_smoothing`"), (reward.RewardConfig, "`preference` below 1")]
)
def test_what_a_stages_loss_would_ignore_is_refused(kind: Any, mend: str) -> None:
    """transformers smooths the labels of a language model: no preferences. sft's loss does take it."""
    for ignored in vars(kind)["IGNORED"]:
        assert ignored in config_fields(kind.TRL), "TRL takes it and says nothing"
    with pytest.raises(ValidationError, match=f"the loss would ignore it: .*{mend}") as caught:
        kind(data=("rows.jsonl",), trainer={"label_smoothing_factor": 0.1})
    assert caught.value.errors()[0]["loc"] == ("trainer", "label_smoothing_factor")
    assert sft.SFTConfig(data=("rows.jsonl",), trainer={"label_smoothing_factor": 0.1}).IGNORED == {}


def test_what_is_said_on_the_command_line_is_checked_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"`trainer.optim`: says nothing beside optimizer: muon") as caught:
        recipe(tmp_path, "adam_beta1: 0.8", "sft.trainer={optim: lion_32bit}", "sft.optimizer=muon")
    assert caught.value.where == "--set sft.trainer={optim: lion_32bit}"


def test_right_keys_reach_the_stage_and_a_file_counts_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    node = recipe(tmp_path, "deepspeed: ds.json")
    assert node.config.trainer == {"adam_beta2": 0.95, "deepspeed": {"zero_optimization": {"stage": 2}}}
    (tmp_path / "ds.json").write_text("[2]")
    with pytest.raises(ConfigError, match="not a JSON object"):
        recipe(tmp_path, "deepspeed: ds.json")
    with pytest.raises(ConfigError, match="`deepspeed`: no file"):
        recipe(tmp_path, "deepspeed: other.json")
    options = {"optim": "paged_adamw_8bit", "use_liger_kernel": True, "neftune_noise_alpha": 5}
    line = "sft.trainer={optim: paged_adamw_8bit, use_liger_kernel: true, neftune_noise_alpha: 5}"
    assert recipe(tmp_path, "adam_beta1: 0.8", line).config.trainer == options


def test_nothing_heavy_is_imported_for_it(tmp_path: Path) -> None:
    """In a fresh process: a wrong key and a right one, and neither TRL nor torch."""
    code = (
        "import sys\n"
        "from pydantic import ValidationError\n"
        "from stages.sft import SFTConfig\n"
        "for key in ('adam_beta2', 'adam_beta3'):\n"
        "    try:\n"
        "        SFTConfig(data=(), trainer={key: 0.9})\n"
        "    except ValidationError as error:\n"
        "        print(key, error.errors()[0]['loc'])\n"
        "print([name for name in ('torch', 'trl', 'transformers') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["adam_beta3 ('trainer', 'adam_beta3')", "[]"]


def test_what_a_resume_does_not_reproduce_is_known() -> None:
    assert (
        inexact({"neftune_noise_alpha": 5.0, "adam_beta2": 0.9, "optim": "adafactor"}) == {}
    )  # runs of tests/stages/test_sft_ways.py
    assert inexact({"optim": "paged_adamw_8bit", "deepspeed": {"a": 1}, "torch_compile": False}).keys() == {
        "optim",
        "deepspeed",
    }
