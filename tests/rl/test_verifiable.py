"""Verifiable rewards on tables of cases, the hostile ones among them."""

from __future__ import annotations

import json
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError, MachineError, TrainingError
from pipeline.rl import verifiable
from pipeline.rl.verifiable import answer_number, exact, json_schema, number, pattern, strict_json


@pytest.mark.parametrize(
    ("response", "reference", "score", "score_without_case"),
    [
        ("Paris", "Paris", 1.0, 1.0),
        (" the  cat\n sat ", "the cat sat", 1.0, 1.0),
        ("paris", "Paris", 0.0, 1.0),
        ("STRASSE", "straße", 0.0, 1.0),
        ("Paris.", "Paris", 0.0, 0.0),
        ("Paris, Paris", "Paris", 0.0, 0.0),
        ("Pa ris", "Paris", 0.0, 0.0),
        ("", "Paris", 0.0, 0.0),
        ("Paris\u00a0", "Paris", 1.0, 1.0),  # a space that does not break is a space
        ("Paris\u200b", "Paris", 0.0, 0.0),  # one of no width is a letter
    ],
)
def test_exact(response: str, reference: str, score: float, score_without_case: float):
    assert exact(response, reference) == score
    assert exact(response, reference, ignore_case=True) == score_without_case


NUMBERS: list[tuple[str, Any]] = [
    ("42", 42),
    ("so 6 x 7 = 42.", 42),
    ("1 2 3", 3),
    ("she has 7 apples #### 42", 42),
    ("#### 42 apples in 3 boxes", 42),
    ("#### 1\n#### 2", 2),
    ("1,234,567", 1234567),
    ("12,34", 34),  # a list, not thousands
    ("1,2345", 2345),
    ("12,345,67", 67),
    ("1234,567", 567),
    ("0.5", "1/2"),
    (".50", "1/2"),
    ("3.", 3),
    ("3.14.15", "157/50"),
    ("-3", -3),
    ("\u22123", -3),
    ("+3", 3),
    ("x=-5", -5),
    ("(-5)", -5),
    ("10-5", 5),  # a minus between two numbers is no sign
    ("10 - 5", 5),
    ("a-5", 5),
    ("1\u20135", 5),
    ("$5", 5),
    ("-$5.25", "-21/4"),
    ("$-5", -5),
    ("\u20ac1,000", 1000),
    ("50%", 50),
    ("5kg", 5),
    ("3/4", "3/4"),
    ("-3/4 cup", "-3/4"),
    ("12/05/2024", 2024),
    ("1e-3", "1/1000"),
    ("1.5E3", 1500),
    ("9" * 100, 10**100 - 1),
    # no number
    ("", None),
    ("none", None),
    ("H2O x2 _3", None),
    ("\u0664\u0662", None),  # digits of another script
    ("\u00bd", None),
    ("3/0", None),
    ("9" * 101, None),
    ("1e400000000", None),  # would fill the memory
    ("7 ####", None),
    ("#### none, though 3 before", 3),
    ("- $ . ,", None),
]


@pytest.mark.parametrize(("text", "value"), NUMBERS)
def test_the_number_of_an_answer(text: str, value: Any):
    assert answer_number(text) == (None if value is None else Fraction(value))


def test_number_is_exact():
    assert number("it is 0.50", "1/2") == 1.0
    assert number("1,000.0", "She earned it.\n#### 1000") == 1.0
    assert number("0.3333333333333333", "1/3") == 0.0
    assert number("0.1000000000000000055511151231257827", "0.1") == 0.0  # one float, two numbers
    assert number("no idea", "none either") == 0.0
    assert number("1 2 3 4 5 6 7", "4") == 0.0  # naming them all does not pay
    assert number("9" * 50_000, "9") == 0.0


@pytest.mark.parametrize(
    ("expression", "response", "reference", "score"),
    [
        (r"[0-9]+", "a 12 b", "", 1.0),
        (r"\A[0-9]+\Z", "a 12 b", "", 0.0),
        (r"\A[0-9]+\Z", "12", "", 1.0),
        (r"\A[0-9]+\Z", "12\n", "", 0.0),
        (r"yes", "YES", "", 0.0),
        (r"Answer: (?P<answer>.+)", "Answer: 4", "4", 1.0),
        (r"Answer: (?P<answer>.+)", "Answer:   4 ", "4", 1.0),
        (r"Answer: (?P<answer>.+)", "Answer: 5", "4", 0.0),
        (r"Answer: (?P<answer>\w+)", "Answer: 5. Answer: 4", "4", 1.0),  # the last time counts
        (r"Answer: (?P<answer>\w+)", "Answer: 4. Answer: 5", "4", 0.0),
        (r"Answer: (?P<answer>\w+)", "4", "4", 0.0),
        (r"no|(?P<answer>x)", "no", "x", 0.0),  # the group caught nothing
    ],
)
def test_pattern(expression: str, response: str, reference: str, score: float):
    assert pattern(expression)(response, reference) == score


def test_pattern_without_case():
    assert pattern("yes", ignore_case=True)("YES", "") == 1.0
    assert pattern("is (?P<answer>.+)", ignore_case=True)("It IS paris", "Paris") == 1.0


def test_a_pattern_that_never_ends_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(verifiable, "PATIENCE", 0.05)
    with pytest.raises(TrainingError, match=r"\(a\|aa\)\+\$.* takes more than") as caught:
        pattern(r"^(a|aa)+$")("a" * 200 + "!", "")
    assert "repetition inside a repetition" in caught.value.mend


def test_json_is_read_strictly():
    assert strict_json(' {"a": [1, null]}\n') == {"a": [1, None]}
    for text in (
        "NaN",
        '{"a": Infinity}',
        '{"a": 1, "a": 2}',
        "{'a': 1}",
        '```json\n{"a": 1}\n```',
        '{"a": 1} and so',
        "",
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            strict_json(text)


def schema_file(folder: Path, schema: Any) -> Path:
    (folder / "schema.json").write_text(schema if isinstance(schema, str) else json.dumps(schema))
    return folder / "schema.json"


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "minLength": 1}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ('{"name": "Ada", "age": 36}', 1.0),
        ('\n {"name": "Ada"} ', 1.0),
        ('{"age": 36}', 0.0),
        ('{"name": "Ada", "age": -1}', 0.0),
        ('{"name": "Ada", "age": 1.5}', 0.0),
        ('{"name": "Ada", "born": 1815}', 0.0),
        ('{"name": "", "name": "Ada"}', 0.0),
        ('{"name": "Ada", "age": NaN}', 0.0),
        ('Here you are: {"name": "Ada"}', 0.0),
        ('```json\n{"name": "Ada"}\n```', 0.0),
        ("", 0.0),
        ("[" * 100_000, 0.0),  # deeper than Python's stack
        ('{"name": "Ada", "age": ' + "9" * 5000 + "}", 0.0),  # more digits than Python reads
    ],
)
def test_json_schema(tmp_path: Path, response: str, score: float):
    pytest.importorskip("jsonschema")
    assert json_schema(schema_file(tmp_path, PERSON))(response, "") == score


def test_a_schema_of_an_older_draft_is_read_by_its_own_rules(tmp_path: Path):
    pytest.importorskip("jsonschema")
    old = {"$schema": "http://json-schema.org/draft-04/schema#", "minimum": 3, "exclusiveMinimum": True}
    verify = json_schema(schema_file(tmp_path, old))
    assert [verify(text, "") for text in ("3", "4")] == [0.0, 1.0]


@pytest.mark.parametrize("schema", ['{"type": "objekt"}', "{", "[]", '{"type": NaN}', "7"])
def test_a_file_that_is_no_schema_is_refused(tmp_path: Path, schema: str):
    pytest.importorskip("jsonschema")
    file = schema_file(tmp_path, schema)
    with pytest.raises(ConfigError, match="no JSON Schema") as caught:
        json_schema(file)
    assert caught.value.where == str(file)


def test_a_schema_elsewhere_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("jsonschema")
    monkeypatch.setattr("urllib.request.urlopen", lambda *_: pytest.fail("it went to the network"))
    verify = json_schema(schema_file(tmp_path, {"$ref": "http://example.com/schema.json"}))
    with pytest.raises(ConfigError, match=r"a \$ref to what the file does not hold: .*example.com"):
        verify("1", "")


def test_without_its_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    monkeypatch.setitem(sys.modules, "jsonschema.exceptions", None)
    with pytest.raises(MachineError, match="jsonschema") as caught:
        json_schema(schema_file(tmp_path, PERSON))
    assert caught.value.mend == "pip install jsonschema"


def test_rouge_l_by_hand():
    # The longest common subsequence of "a b c d" and "b d x" is "b d": 2 x 2 / (4 + 3).
    assert verifiable.rouge_l("A b c d", "b d x") == pytest.approx(4 / 7)
    assert verifiable.rouge_l("b d x", "b d x") == 1.0
    assert verifiable.rouge_l("", "b d x") == 0.0
