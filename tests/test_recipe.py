"""Reading a recipe: YAML and --set into plain values, the line of each, and configs that refuse what does not fit."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.errors import ConfigError, MissingInputError, RecipeError
from pipeline.reading import Document, read_recipe, validate
from pipeline.recipe import Data, PeftConfig, Stage, StageConfig, field, is_data, is_run_only, unit_of
from pipeline.usercode import load_file, load_member


class ToyConfig(StageConfig):
    data: Data = field(..., "rows")
    learning_rate: float = field(1e-3, "peak rate", gt=0)
    max_steps: int = field(10, "steps", unit="steps", gt=0)
    bf16: bool | None = field(None, "autocast")
    save_steps: int = field(5, "how often to save", run_only=True)
    peft: PeftConfig | None = field(None, "adapters")


def read(folder: Path, text: str, *overrides: str) -> Document:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return read_recipe(path, overrides)


def toy(folder: Path, text: str, *overrides: str) -> ToyConfig:
    document = read(folder, text, *overrides)
    return validate(ToyConfig, document.values["stages"]["toy"], document, ("stages", "toy"))


def refused(folder: Path, text: str, *overrides: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        toy(folder, text, *overrides)
    return caught.value


TOY = "stages:\n  toy:\n    data: a.txt\n"


def test_yaml_1_2_values(tmp_path: Path):
    text = "a: 1e-5\nb: 3e-4\nc: yes\nd: 0o17\ne: 1_0\nf: ~\ng: 'x'\nh: 2024-01-01\ni: [1, 2.5, true]\nj: {k: no}\n"
    values = read(tmp_path, text).values
    assert values == {
        "a": 1e-5,
        "b": 3e-4,
        "c": "yes",
        "d": 15,
        "e": 10,
        "f": None,
        "g": "x",
        "h": "2024-01-01",
        "i": [1, 2.5, True],
        "j": {"k": "no"},
    }
    assert [type(value) for value in (values["a"], values["d"], values["i"][2])] == [float, int, bool]


def test_anchors_and_merges_are_plain_values_with_lines(tmp_path: Path):
    text = (
        "base: &base\n  max_steps: 3\n  bf16: &on true\nstages:\n  toy:\n    <<: *base\n    data: a.txt\n    b: *on\n"
    )
    document = read(tmp_path, text)
    assert document.values["stages"]["toy"] == {"max_steps": 3, "bf16": True, "data": "a.txt", "b": True}
    assert document.values["stages"]["toy"]["bf16"] is True
    assert document.place("stages", "toy", "data").endswith("recipe.yaml:7")
    assert document.place("stages", "toy", "max_steps").endswith(("recipe.yaml:2", "recipe.yaml:5", "recipe.yaml:6"))


def test_every_value_has_its_line(tmp_path: Path):
    document = read(tmp_path, "run: x\nstages:\n  toy:\n    data:\n      - source: a\n        limit: 3\n      - b\n")
    name = document.name
    assert document.place("run") == f"{name}:1"
    assert document.place("stages", "toy", "data", 0, "limit") == f"{name}:6"
    assert document.place("stages", "toy", "data", 1) == f"{name}:7"
    assert document.place("stages", "toy", "data", 1, "deeper") == f"{name}:7"  # the nearest that has a line


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rat: 1", "unknown key `learning_rat`; did you mean `learning_rate`?"),
        ("learning_rate: fast", '`learning_rate`: input should be a valid number (got "fast")'),
        ("learning_rate: 0", "`learning_rate`: input should be greater than 0 (got 0)"),
        ("max_steps: 1.5", "`max_steps`: input should be a valid integer"),
        ("max_steps: '3'", "`max_steps`: input should be a valid integer"),
        ("max_steps: true", "`max_steps`: input should be a valid integer"),
        ("bf16: yes", "`bf16`: input should be a valid boolean"),
        (
            "peft: {rank: 3}",
            "unknown key `peft.rank`; there are lora_alpha, lora_dropout, r, target_modules, use_dora, use_rslora",
        ),
        ("peft: {use_rslor: 3}", "unknown key `peft.use_rslor`; did you mean `use_rslora`?"),
        ("peft: {r: 0}", "`peft.r`: input should be greater than 0"),
        ("peft: 3", "`peft`: input should be"),
    ],
)
def test_what_does_not_fit_is_named_with_its_line(tmp_path: Path, line: str, message: str):
    error = refused(tmp_path, f"{TOY}    {line}\n")
    assert message in error.what
    assert error.where.endswith("recipe.yaml:4")
    assert error.exit_code == 2


def test_an_unknown_key_is_reported_before_what_it_leaves_missing(tmp_path: Path):
    error = refused(tmp_path, "stages:\n  toy:\n    dat: a.txt\n")
    assert error.what == "unknown key `dat`; did you mean `data`?"
    assert error.where.endswith(":3")


def test_a_missing_value_is_reported_at_its_stage(tmp_path: Path):
    error = refused(tmp_path, "stages:\n  toy:\n    max_steps: 3\n")
    assert (error.what, error.where.rpartition(":")[2]) == ("`data` is required", "2")


def test_a_wrong_data_entry_is_reported_at_its_own_line(tmp_path: Path):
    error = refused(tmp_path, "stages:\n  toy:\n    data:\n      - a.txt\n      - {source: b, wieght: 2}\n")
    assert error.what == "unknown key `data.1.wieght`; did you mean `weight`?"
    assert error.where.endswith(":5")


@pytest.mark.parametrize("written", ["a.txt", "[a.txt]", "{source: a.txt}", "[{source: a.txt}]"])
def test_data_is_one_source_or_several(tmp_path: Path, written: str):
    (entry,) = toy(tmp_path, f"stages:\n  toy:\n    data: {written}\n").data
    assert (entry.source, entry.weight, entry.limit) == ("a.txt", 1.0, None)


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("run: a\nseed: 1\nrun: b\n", 3, 'duplicate key "run"'),
        ("stages:\n  toy: {max_steps: 1, max_steps: 2}\n", 2, 'duplicate key "max_steps"'),
        ("stages:\n  toy: [1\n", 3, "not YAML"),
        ("a: b: c\n", 1, "not YAML"),
        ("- 1\n", 1, "a recipe is a mapping"),
        ("", 1, "a recipe is a mapping"),
    ],
)
def test_what_is_no_recipe(tmp_path: Path, text: str, line: int, what: str):
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, text)
    assert what in caught.value.what
    assert caught.value.where.endswith(f"recipe.yaml:{line}")


def test_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(MissingInputError, match="No such file"):
        read_recipe(tmp_path / "none.yaml")
    with pytest.raises(MissingInputError, match="Is a directory"):
        read_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"run: \xe9\n")
    with pytest.raises(RecipeError, match="not UTF-8"):
        read_recipe(tmp_path / "latin.yaml")


def test_set_lays_yaml_values_over_the_recipe(tmp_path: Path):
    text = f"{TOY}    max_steps: 3\n"
    config = toy(tmp_path, text, "toy.learning_rate=1e-5", "toy.max_steps=7", "toy.data=[b.txt, {source: c}]")
    assert (config.learning_rate, config.max_steps) == (1e-5, 7)
    assert [entry.source for entry in config.data] == ["b.txt", "c"]
    assert read(tmp_path, TOY, "seed=4", "run=other").values["seed"] == 4


def test_set_reaches_into_lists_and_mappings_that_are_not_there_yet(tmp_path: Path):
    text = "stages:\n  toy:\n    data: [{source: a}, {source: b}]\n  empty:\n"
    document = read(tmp_path, text, "toy.data.1.limit=3", "toy.peft.r=4", "empty.max_steps=2")
    assert document.values["stages"]["toy"]["data"][1] == {"source": "b", "limit": 3}
    assert document.values["stages"]["toy"]["peft"] == {"r": 4}
    assert document.values["stages"]["empty"] == {"max_steps": 2}
    assert document.place("stages", "toy", "peft", "r") == "--set toy.peft.r=4"


@pytest.mark.parametrize(
    ("assignment", "what"),
    [
        ("toy.learning_rate", "write it as stage.field=value"),
        ("toy..x=1", "write it as stage.field=value"),
        ("=1", "write it as stage.field=value"),
        ("tyo.max_steps=1", "there is no 'tyo'; did you mean `toy`?"),
        ("toy.data.5.limit=1", "there is no 5"),
        ("toy.max_steps.deeper=1", "toy.max_steps holds no fields"),
        ("toy.max_steps=[1", "not YAML"),
        ("toy.max_stpes=1", "unknown key `max_stpes`; did you mean `max_steps`?"),
        ("toy.pfet.r=1", "unknown key `pfet`; did you mean `peft`?"),
        ("toy.max_steps=", "`max_steps`: input should be a valid integer (got null)"),
    ],
)
def test_a_bad_set_is_refused_at_itself(tmp_path: Path, assignment: str, what: str):
    error = refused(tmp_path, "stages:\n  toy:\n    data: [{source: a}]\n    max_steps: 3\n", assignment)
    assert what in error.what
    assert error.where.startswith(f"--set {assignment}")


def test_the_environment_comes_before_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LLMPIPE_SET", "toy.max_steps=4 'toy.data=a file.txt'")
    document = read(tmp_path, TOY)
    assert document.values["stages"]["toy"] == {"data": "a file.txt", "max_steps": 4}
    assert document.place("stages", "toy", "max_steps") == "LLMPIPE_SET toy.max_steps=4"
    assert document.is_set("stages", "toy", "data")
    assert toy(tmp_path, TOY, "toy.max_steps=9").max_steps == 9


def test_an_environment_with_an_open_quote_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LLMPIPE_SET", "toy.max_steps='4")
    with pytest.raises(RecipeError, match="LLMPIPE_SET"):
        read(tmp_path, TOY)


def test_a_config_is_frozen_and_knows_its_fields(tmp_path: Path):
    config = toy(tmp_path, TOY)
    with pytest.raises(ValidationError, match="frozen"):
        config.max_steps = 3  # type: ignore[misc]
    assert is_run_only(ToyConfig, "save_steps")
    assert not is_run_only(ToyConfig, "max_steps")
    assert (unit_of(ToyConfig, "max_steps"), unit_of(ToyConfig, "bf16")) == ("steps", "")
    assert [name for name in ToyConfig.model_fields if is_data(ToyConfig, name)] == ["data"]


STAGE = """
from pipeline.recipe import StageConfig, field
class C(StageConfig):
    init: str | None = field(None, "x")
INPUTS = {"init": "causal-lm"}
KIND = "rows"
def run(config, inputs, out, runtime): return {}
"""


def test_a_stage_file_says_what_it_is(tmp_path: Path):
    (tmp_path / "whole.py").write_text(STAGE)
    stage = Stage.of(load_file(tmp_path / "whole.py"), "./whole.py")
    assert (stage.type, stage.kind, dict(stage.inputs), stage.result_version) == (
        "./whole.py",
        "rows",
        {"init": "causal-lm"},
        1,
    )


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (('KIND = "rows"', ""), "no KIND"),
        (("def run", "def walk"), "no run"),
        (('"rows"', '"row"'), "KIND is none of tokens, causal-lm, reward-model, rows, evaluation"),
        (("class C(StageConfig)", "class C"), "one subclass of StageConfig, this one 0"),
        (('INPUTS = {"init"', 'INPUTS = {"model"'), "INPUTS names `model`"),
        (("return {}", "return {"), "does not load: SyntaxError"),
        (("KIND =", "import nothing_there\nKIND ="), "does not load: ModuleNotFoundError"),
    ],
)
def test_a_stage_file_that_is_no_whole_stage_is_refused(tmp_path: Path, change: tuple[str, str], what: str):
    file = tmp_path / "half.py"
    file.write_text(STAGE.replace(*change))
    with pytest.raises(ConfigError) as caught:
        Stage.of(load_file(file), "./half.py")
    assert what in caught.value.what
    assert caught.value.where.startswith(str(file))


def test_a_users_function_is_loaded_with_what_lies_beside_it(tmp_path: Path):
    (tmp_path / "beside_it_lies.py").write_text("WORD = 'yes'\n")
    (tmp_path / "rewards.py").write_text("from beside_it_lies import WORD\ndef exact(x): return (WORD, x)\n")
    exact: Any = load_member(f"{tmp_path}/rewards.py:exact")
    assert exact(1) == ("yes", 1)
    with pytest.raises(ConfigError, match="defines no `other`"):
        load_member(f"{tmp_path}/rewards.py:other")
    with pytest.raises(MissingInputError, match="no such file"):
        load_member(f"{tmp_path}/none.py:x")
    (tmp_path / "bad.py").write_text("x = 1\ny = 1 / 0\n")
    with pytest.raises(ConfigError) as caught:
        load_file(tmp_path / "bad.py")
    assert caught.value.where == f"{tmp_path}/bad.py:2"


def test_a_format_that_is_none_is_refused_at_its_line(tmp_path: Path) -> None:
    text = (
        "stages:\n  toy:\n    data:\n      - {source: a, format: alpaca}\n      - source: b\n        format: alpacca\n"
    )
    error = refused(tmp_path, text)
    assert "`data.1.format`: input should be 'messages', 'prompt_completion'" in error.what
    assert '; did you mean `alpaca`? (got "alpacca")' in error.what
    assert error.where == f"{tmp_path / 'recipe.yaml'}:6"
    assert "did you mean" not in refused(tmp_path, text.replace("alpacca", "bogus")).what
