"""Rows with a list of answers: what is read, what they are to pairs, what is refused with its line."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.formats import read_rows
from pipeline.data.ranked import as_pairs
from pipeline.errors import ConfigError, DataError, PipelineError
from pipeline.recipe import DataEntry

ROW = {"prompt": "Capital of France?", "answers": ["Paris.", "Lyon.", "A city."], "kind": "facts"}


def read(folder: Path, *rows: Any, layout: str = "ranked", said: list[str] | None = None) -> list[dict[str, Any]]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_rows([DataEntry(source=str(path))], layout, split="all", say=(said if said is not None else []).append)


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_a_list_of_texts_or_messages_is_recognised_and_said(tmp_path: Path) -> None:
    lines: list[str] = []
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Capital of France?"}]
    answers = ["Paris.", {"role": "assistant", "content": "Lyon."}, said("A city.")]
    found = read(
        tmp_path, ROW, {"prompt": asked, "answers": answers, "ranks": [3, 5, 5], "reference": "Paris"}, said=lines
    )
    assert lines[0].endswith("rows.jsonl: ranked rows (prompt, answers)")
    three = [said("Paris."), said("Lyon."), said("A city.")]
    plain = {"margin": 0.0, "preference": 1.0}
    question = [{"role": "user", "content": "Capital of France?"}]
    first = {"prompt": question, "answers": three, "ranks": [0, 1, 2], "kind": "facts", "reference": ""}
    second = {"prompt": asked, "answers": three, "ranks": [0, 1, 1], "kind": "", "reference": "Paris"}
    assert found == [first | plain, second | plain]


def test_a_pair_is_a_list_of_two_with_its_margin_or_its_doubt(tmp_path: Path) -> None:
    pair = {"prompt": "Hi", "chosen": "Hello.", "rejected": "What?"}
    found = read(tmp_path, pair | {"margin": 2, "reference": "Hello!"}, pair | {"preference": 0.5})
    assert [row["answers"] for row in found] == [[said("Hello."), said("What?")]] * 2
    assert [(row["ranks"], row["margin"], row["preference"], row["reference"]) for row in found] == [
        ([0, 1], 2.0, 1.0, "Hello!"),
        ([0, 1], 0.0, 0.5, ""),
    ]


def test_where_pairs_are_wanted_a_list_is_its_pairs_without_ties(tmp_path: Path) -> None:
    found = read(tmp_path, ROW | {"ranks": [1, 2, 2]}, layout="preference")
    sides = [(row["chosen"][0]["content"], row["rejected"][0]["content"], row["kind"]) for row in found]
    assert sides == [("Paris.", "Lyon.", "facts"), ("Paris.", "A city.", "facts")]
    (prompt,) = read(tmp_path, ROW, layout="prompt")
    assert (prompt["prompt"][0]["content"], prompt["reference"]) == ("Capital of France?", "Paris.")


def test_a_pair_that_is_a_tie_is_no_pair(tmp_path: Path) -> None:
    pair = {"prompt": "Hi", "chosen": "Hello.", "rejected": "What?"}
    tie, doubt = read(tmp_path, pair | {"preference": 0.5}, pair | {"preference": 0.6})
    assert as_pairs(tie) == []
    assert [(row["chosen"], row["preference"]) for row in as_pairs(doubt)] == [(said("Hello."), 0.6)]


BAD = {
    "answers is text": (ROW | {"answers": "Paris."}, "`answers` is str, not a list of two or more"),
    "one answer": (ROW | {"answers": ["Paris."]}, "`answers` is 1 of them, not a list of two or more"),
    "an empty answer": (ROW | {"answers": ["Paris.", " "]}, "message 2, an assistant's, is empty"),
    "a user's answer": (
        ROW | {"answers": ["Paris.", {"role": "user", "content": "?"}]},
        "answer 2 is user, not one assistant's",
    ),
    "twice the same": (ROW | {"answers": ["a", "b", "a"]}, "answers 1 and 3 are the same"),
    "too few ranks": (ROW | {"ranks": [1, 2]}, r"`ranks` is \[1, 2\], not 3 whole numbers"),
    "ranks of text": (ROW | {"ranks": ["1", "2", "3"]}, "not 3 whole numbers"),
    "ranks that fall": (ROW | {"ranks": [3, 2, 1]}, "answers stand best first"),
    "nothing preferred": (ROW | {"ranks": [1, 1, 1]}, "all answers have one rank"),
    "a margin": (ROW | {"margin": 1}, "`margin` and `preference` are of two answers"),
    "no prompt": ({"answers": ["a", "b"]}, "field `prompt` of a ranked row is missing"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_refused_with_its_line(tmp_path: Path, name: str) -> None:
    row, what = BAD[name]
    good = ROW if "answers" in row else {"prompt": "Hi", "chosen": "a", "rejected": "b"}
    with pytest.raises(DataError, match=what) as caught:
        read(tmp_path, good, row)
    assert caught.value.where is not None
    assert caught.value.where.endswith("rows.jsonl:2")


@pytest.mark.parametrize("layout", ["messages", "unpaired"])
def test_lists_are_no_demonstrations_and_no_labels(tmp_path: Path, layout: str) -> None:
    with pytest.raises(ConfigError, match="these are ranked rows"):
        read(tmp_path, ROW, layout=layout)


def test_demonstrations_are_no_lists(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="preferences are needed here"):
        read(tmp_path, {"prompt": "Hi", "completion": "Hello."})
