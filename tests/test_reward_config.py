"""What a recipe may say of a reward, and every way it can be said wrong: file, line and what was meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RecipeError
from pipeline.reading import read_recipe, validate
from pipeline.recipe import StageConfig, field
from pipeline.reward_config import OPTIONS, Reward, RewardTerm


class Toy(StageConfig):
    reward: Reward = field("reward", "x")


def read(folder: Path, lines: str) -> Any:
    """`reward` of a recipe whose first line is `reward:` and whose others are `lines`."""
    path = folder / "r.yaml"
    path.write_text(f"reward:\n{lines}")
    document = read_recipe(path)
    return validate(Toy, document.values, document, ()).reward


def test_a_string_stays_a_string(tmp_path: Path):
    assert Toy().reward == "reward"
    assert read(tmp_path, "  ./rewards.py:exact\n") == "./rewards.py:exact"


def test_terms_of_every_kind(tmp_path: Path):
    terms = read(
        tmp_path,
        """\
  - {model: reward}
  - {models: [a, b, c], combine: min, name: worst, weight: 0.5}
  - {function: number, weight: 2}
  - {function: exact, ignore_case: true}
  - {function: regex, pattern: '\\d+'}
  - {function: json_schema, schema_file: ./s.json}
  - {function: ./rewards.py:Mine}
  - {length: 200, weight: 0.01}
  - {repetition: 3}
  - {judge: sft, constitution: ./c.md}
  - {judge_url: 'http://127.0.0.1:8000/v1', judge_model: m, constitution: ./c.md, name: far, weight: -1}
""",
    )
    assert [term.kind for term in terms] == [
        *("model", "models", *["function"] * 5, "length", "repetition", "judge", "judge_url"),
    ]
    assert [term.figure for term in terms] == [
        *("model", "worst", "number", "exact", "regex", "json_schema", "mine", "length", "repetition", "judge", "far"),
    ]
    assert [term.weight for term in terms] == [1, 0.5, 2, 1, 1, 1, 1, 0.01, 1, 1, -1]
    assert terms[5].schema_file == Path("s.json")


def test_a_lone_term_is_a_list_of_one(tmp_path: Path):
    assert read(tmp_path, "  function: exact\n") == (RewardTerm(function="exact"),)


@pytest.mark.parametrize(
    ("lines", "line", "what"),
    [
        ("  [a, b]", 1, "weighted sum of terms: {model: a}, {model: b}; an ensemble is {models: [a, b]}"),
        ("  []", 1, "no terms"),
        ("  7", 1, "should be an object"),
        ("  - {}", 2, "a term needs one: of model, models, function"),
        ("  - {model: a}\n  - {weight: 2}", 3, "a term needs one"),
        ("  - {model: a}\n  - {model: b, function: exact}", 3, "a term is one thing, this one is model and function"),
        ("  - {modle: a}", 2, "unknown key `reward.0.modle`; did you mean `model`?"),
        ("  - {function: numbr}", 2, "unknown function `numbr`; did you mean `number`?"),
        ("  - {function: ./rewards.py}", 2, "./rewards.py:name"),
        ("  - {model: './rewards.py:f'}", 2, "code of yours is a function"),
        ("  - {model: a, weight: 0}", 2, "a weight of zero leaves a term out"),
        ("  - {model: a, weight: .nan}", 2, "a weight of nan"),
        ("  - {model: a, weight: .inf}", 2, "a weight of inf"),
        ("  - {model: a, weight: '1'}", 2, "`reward.0.weight`: input should be a valid number"),
        ("  - {models: [a, a]}", 2, "each named once"),
        ("  - {models: [a, b], combine: mean}", 2, "'mean_minus_std' or 'min'"),
        ("  - {models: [a, b], std_weight: -1}", 2, "greater than or equal to 0"),
        ("  - {model: a, std_weight: 1}", 2, "`std_weight` is an option of models, and this is model"),
        ("  - {function: number, ignore_case: true}", 2, "`ignore_case` is an option of exact and regex"),
        ("  - {function: regex}", 2, "regex needs `pattern`"),
        ("  - {function: regex, pattern: '('}", 2, "no regular expression"),
        ("  - {function: json_schema}", 2, "json_schema needs `schema_file`"),
        ("  - {length: 0}", 2, "greater than 0"),
        ("  - {repetition: 0}", 2, "greater than 0"),
        ("  - {judge: a}", 2, "judge needs `constitution`"),
        ("  - {judge: 'http://x/v1', constitution: ./c}", 2, "an address is a judge_url"),
        ("  - {judge_url: 'http://x/v1', constitution: ./c}", 2, "judge_url needs `judge_model`"),
        ("  - {judge_url: 'x/v1', judge_model: m, constitution: ./c}", 2, "not an address"),
        ("  - {judge_url: 'file:///etc', judge_model: m, constitution: ./c}", 2, "not an address"),
        ("  - {judge_url: 'http://me:key@x/v1', judge_model: m, constitution: ./c}", 2, "OPENAI_API_KEY"),
        ("  - {judge_url: 'http://x/v1?key=k', judge_model: m, constitution: ./c}", 2, "OPENAI_API_KEY"),
        ("  - {model: a}\n  - {model: b}", 1, "two terms are called `model` in the figures: give each a `name`"),
        ("  - {model: a, name: A-b}", 2, "small letters"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, lines: str, line: int, what: str):
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, lines + "\n")
    assert what in caught.value.what
    assert caught.value.where.endswith(f"r.yaml:{line}")


@pytest.mark.parametrize("name", ["judge", "judge_url"])
def test_a_password_in_an_address_is_not_shown(tmp_path: Path, name: str):
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, f"  - {{{name}: 'http://me:s3cret@x/v1', judge_model: m, constitution: ./c}}\n")
    assert "s3cret" not in str(caught.value)
    assert "//…@x/v1" in str(caught.value)


def test_every_option_is_some_kinds(tmp_path: Path):
    kinds = {"model", "models", "function", "length", "repetition", "judge", "judge_url"}
    assert set(RewardTerm.model_fields) == {*kinds, *OPTIONS, "weight", "name"}
