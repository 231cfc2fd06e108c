"""`llmpipe config`: every value and where it came from, and the schema that editors read."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.cli.show import schema
from pipeline.cli.stages import STAGES, shipped_recipes
from tests.conftest import Warm

RECIPE = """\
seed: 5
stages:
  tokenize: {data: text.txt}
  pretrain:
    max_steps: 10
    model: {depth: 2}
  sft: {init: pretrain, data: rows.jsonl, seed: 2}
  reward: {init: sft, data: rows.jsonl}
"""


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory, warm_server: Any) -> Warm:
    """`llmpipe` in a folder with the recipe."""
    found = Warm(tmp_path_factory.mktemp("config"), tmp_path_factory.mktemp("logs"), warm_server)
    found.write("text.txt", "a\n")
    found.write("rows.jsonl", "{}\n")
    found.write("r.yaml", RECIPE)
    return found


@pytest.fixture(scope="module")
def shown(there: Warm) -> dict[str, dict[str, Any]]:
    done = there(
        *("config", "show", "r.yaml", "--json", "--set", "pretrain.learning_rate=1e-5"),
        *("--set", "pretrain.model.hidden_size=64"),
        env={"LLMPIPE_SET": "pretrain.bf16=false sft.max_length=77"},
    )
    assert done.code == 0, done.stderr
    return {f"{row['stage']}.{row['field']}": row for row in json.loads(done.stdout)}


@pytest.mark.parametrize(
    ("name", "value", "origin"),
    [
        ("pretrain.max_steps", 10, "r.yaml:5"),
        ("pretrain.model.depth", 2, "r.yaml:6"),
        ("pretrain.model.hidden_size", 64, "--set pretrain.model.hidden_size=64"),
        ("pretrain.model.architecture", "llama", "default"),
        ("pretrain.learning_rate", 1e-5, "--set pretrain.learning_rate=1e-5"),
        ("pretrain.bf16", False, "LLMPIPE_SET pretrain.bf16=false"),
        ("sft.max_length", 77, "LLMPIPE_SET sft.max_length=77"),
        ("pretrain.tokens", "tokenize", "default"),
        ("pretrain.seed", 5, "r.yaml:1"),
        ("sft.seed", 2, "r.yaml:7"),
        ("sft.init", "pretrain", "r.yaml:7"),
    ],
)
def test_every_value_and_where_it_came_from(shown: dict[str, dict[str, Any]], name: str, value: object, origin: str):
    assert (shown[name]["value"], shown[name]["from"]) == (value, origin)


def test_units_inherited_data_and_paths(shown: dict[str, dict[str, Any]], there: Warm):
    assert shown["pretrain.max_steps"]["unit"] == "steps"
    demonstrations = shown["reward.demonstrations"]
    assert demonstrations["from"] == "default: the data of `sft`"
    assert [entry["source"] for entry in demonstrations["value"]] == [str(there.folder / "rows.jsonl")]


def test_the_table_holds_the_same(there: Warm, shown: dict[str, dict[str, Any]]):
    lines = there("config", "show", "r.yaml").stdout.splitlines()
    assert lines[0].strip() == "run demo"
    assert lines[1].split() == ["field", "value", "unit", "from"]
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines]
    assert ["pretrain.max_steps", "10", "steps", "r.yaml:5"] in rows
    assert ["pretrain.adam_beta2", "0.95", "default"] in rows
    assert len({row[0] for row in rows if "." in row[0]} & shown.keys()) > 50


TYPES = {
    "null": type(None),
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "string": str,
    "array": list,
    "object": dict,
}


def accepts(part: Any, value: Any, root: dict[str, Any]) -> bool:
    """Whether the JSON Schema `part` accepts `value`: of the standard, what our schema uses."""
    if part is True or part is False:
        return bool(part)
    if "$ref" in part:
        return accepts(root["$defs"][part["$ref"].rpartition("/")[2]], value, root)
    if "anyOf" in part and not any(accepts(option, value, root) for option in part["anyOf"]):
        return False
    if "type" in part and not is_of(value, part["type"]):
        return False
    if value not in part.get("enum", [value]) or value != part.get("const", value):
        return False
    if is_of(value, "number"):
        inside = part.get("minimum", value) <= value <= part.get("maximum", value)
        return inside and part.get("exclusiveMinimum", value - 1) < value < part.get("exclusiveMaximum", value + 1)
    if isinstance(value, list):
        return all(accepts(part.get("items", True), item, root) for item in value)
    if isinstance(value, dict):
        own, rest = part.get("properties", {}), part.get("additionalProperties", True)
        is_whole = set(part.get("required", [])) <= value.keys()
        return is_whole and all(accepts(own.get(key, rest), item, root) for key, item in value.items())
    return True


def is_of(value: Any, types: str | list[str]) -> bool:
    names = [types] if isinstance(types, str) else types
    return any(isinstance(value, TYPES[name]) and (not isinstance(value, bool) or name == "boolean") for name in names)


def test_the_schema_is_printed_as_json(warm: Any):
    printed = json.loads(warm("config", "schema").stdout)
    assert printed == schema()
    assert printed["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(STAGES) <= printed["$defs"].keys()
    assert printed["$defs"]["pretrain"]["properties"]["learning_rate"]["description"]


@pytest.mark.parametrize("path", shipped_recipes().values(), ids=lambda path: path.stem)
def test_the_schema_accepts_the_recipes_that_ship(path: Path):
    root = schema()
    assert accepts(root, YAML(typ="safe", pure=True).load(path.read_text()), root)


GOOD = {"tokenize": {"data": "a"}, "pretrain": {}, "dpo-ipo": {"stage": "dpo", "anything": 1}}


@pytest.mark.parametrize(
    ("stages", "is_good"),
    [
        (GOOD, True),
        ({**GOOD, "tokenize": {"data": ["a", {"source": "b", "weight": 2}]}}, True),
        ({**GOOD, "tokenize": {"data": {"source": "b"}}}, True),
        ({**GOOD, "pretrain": None}, True),
        ({**GOOD, "pretrain": {"model": {"depth": 3}, "bf16": None}}, True),
        ({**GOOD, "mine": {"stage": "./mine.py"}}, True),
        ({**GOOD, "pretrain": {"stage": "./mine.py"}}, True),
        ({**GOOD, "pretrain": {"learning_rat": 1}}, False),
        ({**GOOD, "pretrain": {"model": {"depht": 3}}}, False),
        ({**GOOD, "pretrain": {"learning_rate": 0}}, False),
        ({**GOOD, "pretrain": {"optimizer": "adam"}}, False),
        ({**GOOD, "pretrain": {"max_steps": 1.5}}, False),
        ({**GOOD, "tokenize": {}}, False),
        ({**GOOD, "tokenize": {"data": [{"weight": 1}]}}, False),
        ({**GOOD, "mine": {}}, False),
        ({**GOOD, "dpo": {"matrix": {"seed": [0, 1], "data": {"a": "a", "b": ["b"]}}}}, True),
        ({**GOOD, "dpo": {"matrix": {"seed": 3}, "data": "a"}}, False),
        ({**GOOD, "repeat": {"times": 2, "stages": {"dpo": {"data": "a"}}}}, True),
        ({**GOOD, "repeat": [{"times": 2, "carry": {"p": {"first": "sft", "then": "dpo"}}, "stages": {}}]}, True),
        ({**GOOD, "repeat": {"times": 0, "stages": {}}}, False),
        ({**GOOD, "repeat": {"times": 2, "stages": {"dpo": {"dat": "a"}}}}, False),
        ({**GOOD, "repeat": {"times": 2, "carry": {"p": {"first": "sft"}}, "stages": {}}}, False),
    ],
)
def test_the_schema_refuses_what_the_recipe_would(stages: dict[str, Any], is_good: bool):
    root = schema()
    assert accepts(root, {"run": "x", "stages": stages}, root) == is_good
    assert not accepts(root, {"stages": stages, "sede": 1}, root)
