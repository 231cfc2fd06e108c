"""What counts for a stage's fingerprint, what does not, and how a difference is told."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import fingerprint as fp
from pipeline.errors import ConfigError
from pipeline.fingerprint import code_parts, defaults, differences, fingerprint, reached, stage_parts
from pipeline.recipe import Data, File, PeftConfig, Section, Stage, StageConfig, field

ROOT = Path(fp.__file__).parents[2]


class Inner(Section):
    depth: int = field(4, "x")
    width: int | None = field(None, "x")
    workers: int = field(1, "x", run_only=True)


class Part(Section):
    model: str | None = field(None, "x")
    models: tuple[str, ...] | None = field(None, "x")
    weight: float = field(1.0, "x")
    function: str | None = field(None, "x")
    rules: File | None = field(None, "x")
    name: str | None = field(None, "x", run_only=True)


class ToyConfig(StageConfig):
    init: str = field("base", "x")
    data: Data | None = field(None, "x")
    learning_rate: float = field(1e-3, "x")
    model: Inner = field(Inner(), "x")
    peft: PeftConfig | None = field(None, "x")
    reward: str | None = field(None, "x")
    save_steps: int = field(10, "x", run_only=True)
    must: int = field(..., "x")
    parts: str | tuple[Part, ...] = field("reward", "x")


def toy(file: Path, **inputs: str) -> Stage:
    return Stage(
        type="./toy.py",
        file=file,
        config=ToyConfig,
        inputs={"init": "causal-lm", "parts": "rows", "parts.model": "rows", "parts.models": "rows"},
        kind="rows",
        result_version=1,
        defaults={},
        trains_on="",
        run=lambda: {},
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "toy.py"
    path.write_text("x = 1\n")
    return path


def parts(file: Path, data: Any = None, inputs: Any = None, **values: Any) -> dict[str, Any]:
    return stage_parts(toy(file), ToyConfig(must=1, **values), data or {}, inputs or {"init": ["f0"]})


def why(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    assert (fingerprint(old) == fingerprint(new)) == (old == new)
    return differences("toy", old, new, defaults(ToyConfig))


def test_the_config_counts_without_what_only_runs(file: Path):
    plain = parts(file)
    assert plain["config"] == {"must": 1}
    assert parts(file, save_steps=3, model=Inner(workers=8), init="renamed") == plain
    assert parts(file, learning_rate=1e-3, model=Inner(depth=4)) == plain  # said, and the default
    assert why(plain, parts(file, learning_rate=3e-4)) == ["toy.learning_rate 0.001 → 0.0003"]
    assert why(parts(file, learning_rate=3e-4), plain) == ["toy.learning_rate 0.0003 → 0.001"]
    assert why(plain, parts(file, seed=1)) == ["toy.seed 0 → 1"]


def test_a_section_counts_by_its_fields(file: Path):
    plain = parts(file)
    changed = parts(file, model=Inner(depth=6, width=32))
    assert changed["config"] == {"must": 1, "model.depth": 6, "model.width": 32}
    assert why(plain, changed) == ["toy.model.depth 4 → 6", "toy.model.width None → 32"]
    adapted = parts(file, peft=PeftConfig())
    assert why(plain, adapted) == ["toy.peft None → set"]
    assert why(adapted, parts(file, peft=PeftConfig(r=8)))[0].startswith("toy.peft.r ")


def test_sections_in_a_list_count_by_their_fields_and_how_many_references_each_holds(file: Path):
    plain = parts(file, parts=(Part(model="a"), Part(function="exact", weight=0.0)))
    assert plain["config"] == {"must": 1, "parts.0.model": 1, "parts.1.function": "exact", "parts.1.weight": 0.0}
    renamed = (Part(model="b", name="mine"), Part(function="exact", weight=0.0))
    assert parts(file, parts=renamed) == plain  # a reference counts by what it is, a figure's name not at all
    swapped = parts(file, parts=plain_parts()[::-1])
    assert swapped != parts(file, parts=plain_parts())
    split = [(Part(models=("a", "b")), Part(models=("c",))), (Part(models=("a",)), Part(models=("b", "c")))]
    left, right = (parts(file, parts=each) for each in split)
    assert why(left, right) == ["toy.parts.0.models 2 → 1", "toy.parts.1.models 1 → 2"]
    assert why(parts(file), parts(file, parts=(Part(weight=2.0),))) == ["toy.parts.0.weight None → 2"]


def plain_parts() -> tuple[Part, ...]:
    return Part(model="a"), Part(function="exact")


def test_files_of_the_user_count_by_content_and_name(file: Path, tmp_path: Path):
    (tmp_path / "rules.md").write_text("Be kind.")
    (tmp_path / "f.py").write_text("def f(): pass\n")
    (tmp_path / "else").mkdir()
    rules = Part(rules=tmp_path / "rules.md")
    plain = parts(file, parts=(rules,))
    (tmp_path / "else/rules.md").write_text("Be kind.")
    assert parts(file, parts=(Part(rules=tmp_path / "else/rules.md"),)) == plain
    (tmp_path / "rules.md").write_text("Be brief.")
    assert parts(file, parts=(rules,)) != plain
    code = parts(file, parts=(Part(function=f"{tmp_path}/f.py:f"),))
    assert code["config"] == {"must": 1, "parts.0.function": ["f.py:f"]}
    assert sorted(code["code"]) == ["f.py", "toy.py"]


def test_data_and_parents_count_by_content(file: Path):
    plain = parts(file, data={"data": ["d0"]})
    assert parts(file, data={"data": ["d0"]}) == plain
    assert why(plain, parts(file, data={"data": ["d1"]})) == ["data: data"]
    assert why(plain, parts(file, data={"data": ["d0"]}, inputs={"init": ["f1"]})) == ["input: init"]


class MeasureConfig(StageConfig):
    models: tuple[str, ...] = field(..., "x")
    baseline: str | None = field("sft", "x")


def test_an_evaluation_counts_by_the_names_of_what_it_measures(file: Path):
    """Its figures bear the names, and which models are seeds of one variant is in the names alone."""
    stage = Stage(
        type="./toy.py",
        file=file,
        config=MeasureConfig,
        inputs={"models": "causal-lm", "baseline": "causal-lm"},
        kind="evaluation",
        result_version=1,
        defaults={},
        trains_on="",
        run=lambda: {},
    )

    def values(*models: str, baseline: str | None = "sft", kind: str = "evaluation") -> dict[str, Any]:
        config = MeasureConfig(models=models, baseline=baseline)
        return stage_parts(replace(stage, kind=kind), config, {}, {"models": ["f", "g"]})["config"]

    assert values("a", "b") == {"models": ["a", "b"]}
    assert values("dpo@seed=0", "dpo@seed=1", baseline="base") == {
        "models": ["dpo@seed=0", "dpo@seed=1"],
        "baseline": "base",
    }
    assert values("/here/tiny", "run/sft", "hub:org/x", baseline=None) == {"models": ["tiny", "run/sft", "hub:org/x"]}
    assert values("a", "b", baseline="base", kind="rows") == {}, "of other stages the parents count, not their names"


def test_a_long_value_is_told_short(file: Path):
    (reason,) = why(parts(file), parts(file, reward="x" * 100))
    assert reason == f"toy.reward None → {'x' * 37}…"


PLAIN = """
import math

def area(r):
    return math.pi * r ** 2

class Shape:
    def name(self):
        return "shape"
"""
SAME = '''"""Shapes."""

import math  # for pi


def area( r ):
    """Of a circle."""
    # the radius, squared
    return (math.pi *
            r ** 2)


class Shape:
    """A shape."""

    def name(self):
        """Its name."""
        return 'shape'
'''


def code_of(folder: Path, text: str, **beside: str) -> dict[str, str]:
    """The code's part for a stage file of this text, in a folder of its own with other files beside it."""
    folder.mkdir()
    (folder / "toy.py").write_text(text)
    for name, content in beside.items():
        (folder / f"{name}.py").write_text(content)
    return code_parts(toy(folder / "toy.py"))


def test_comments_layout_and_docstrings_do_not_count(tmp_path: Path):
    plain = code_of(tmp_path / "a", PLAIN)
    assert list(plain) == ["toy.py"]  # where it lies does not count either
    assert code_of(tmp_path / "b", SAME) == plain
    assert code_of(tmp_path / "c", PLAIN.replace("** 2", "** 3")) != plain
    assert code_of(tmp_path / "d", PLAIN.replace('"shape"', '"Shape"')) != plain


def test_a_string_that_is_no_docstring_counts(tmp_path: Path):
    text = 'def f():\n    x = 1\n    return "a"\n'
    assert code_of(tmp_path / "a", text) != code_of(tmp_path / "b", text.replace('"a"', '"b"'))


def test_modules_beside_a_users_file_count(tmp_path: Path):
    text = "def run():\n    from helper import f\n    return f()\n"
    plain = code_of(tmp_path / "a", text, helper="def f(): return 1\n", unused="1\n")
    assert sorted(plain) == ["helper.py", "toy.py"]
    assert code_of(tmp_path / "b", text, helper="def f(): return 2\n")["helper.py"] != plain["helper.py"]


def test_a_users_reward_counts_by_its_code_and_not_by_its_folder(file: Path, tmp_path: Path):
    found = []
    for folder, value in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rewards.py").write_text(f"def exact(): return {value}\n")
        found.append(parts(file, reward=f"{tmp_path}/{folder}/rewards.py:exact"))
    assert found[0] == found[1]
    assert found[0]["config"]["reward"] == ["rewards.py:exact"]
    assert why(found[0], found[2]) == ["code: rewards.py"]


def test_two_files_of_one_name_both_count(file: Path, tmp_path: Path):
    (tmp_path / "a").mkdir()
    other = tmp_path / "a" / "toy.py"
    other.write_text("def exact(): return 1\n")
    both = parts(file, reward=f"{other}:exact")["code"]
    assert len(both) == 2
    assert len(set(both.values())) == 2


def test_a_stage_of_the_checkout_reaches_the_modules_that_bear_on_its_result():
    files = {str(path.relative_to(ROOT)) for path in reached(ROOT / "stages" / "pretrain.py") if ROOT in path.parents}
    assert {
        "stages/pretrain.py",
        "src/pipeline/runtime.py",
        "src/pipeline/model/losses.py",
        "src/pipeline/model/held_out.py",
        "src/pipeline/data/packing.py",
    } <= files
    for name in ("cli", "launch", "progress", "recipe", "errors", "report", "artifacts", "checkpoint"):
        assert not [file for file in files if file.startswith(f"src/pipeline/{name}")], name
    assert not [file for file in files if "/rl/" in file or (file.startswith("stages/") and "pretrain" not in file)]


def test_the_code_of_an_installed_release_counts_by_its_version(tmp_path: Path):
    folder = tmp_path / "site-packages" / "stages"
    folder.mkdir(parents=True)
    (folder / "toy.py").write_text("x = 1\n")
    stage = toy(folder / "toy.py")
    assert code_parts(stage) == {"stages/./toy.py": "result version 1"}


def test_a_file_that_is_not_python_is_refused_with_its_line(tmp_path: Path):
    with pytest.raises(ConfigError) as caught:
        code_of(tmp_path / "a", "x = 1\ny = = 2\n")
    assert caught.value.where.endswith("toy.py:2")
