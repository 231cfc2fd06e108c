"""Answers to one prompt gathered from rows of any layout, and the pairs of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.answers import Answers, pairs_of, read_answers
from pipeline.errors import ConfigError, DataError
from pipeline.recipe import DataEntry


def entry(folder: Path, name: str, *rows: dict[str, Any], **fields: Any) -> DataEntry:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataEntry(source=str(path), **fields)


def told(prompt: str, answer: str) -> dict[str, Any]:
    return {"prompt": prompt, "completion": answer}


def test_rows_of_two_layouts_and_sources_stand_together(tmp_path: Path):
    left = entry(tmp_path, "left", told("p", "a"), told("q", "x"), told("p", "a "), told("p", "b"))
    pair = {"prompt": [{"role": "user", "content": "p"}], "chosen": "c", "rejected": "b"}
    right = entry(tmp_path, "right", pair, {"prompt": "r", "chosen": "y", "rejected": "z"}, pair, limit=2)
    tie = entry(tmp_path, "tie", {"prompt": "r", "chosen": "z", "rejected": "y", "preference": 0.5})
    p, q, r = read_answers((left, right, tie))
    assert (p.prompt, p.texts, p.sources) == ([{"role": "user", "content": "p"}], ["a", "b", "c"], [0, 0, 1])
    assert p.was_better == {("c", "b")}
    assert (q.texts, r.texts, r.sources) == (["x"], ["y", "z"], [1, 1])
    assert r.was_better == {("y", "z")}, "a tie says neither"


def test_lone_answers_and_bad_rows(tmp_path: Path):
    row = {"prompt": "p", "completion": "a", "label": False}
    rows = (row, row | {"completion": "b", "label": True}, row | {"completion": " "})
    said: list[str] = []
    (group,) = read_answers((entry(tmp_path, "rows", *rows, max_bad_rows=1),), said.append)
    assert group.texts == ["a", "b"]
    assert "1 bad rows are left out" in said[0]
    with pytest.raises(DataError, match="is empty"):
        read_answers((entry(tmp_path, "rows", *rows),))


def test_a_ranked_row_is_all_its_answers_and_what_its_ranks_say(tmp_path: Path):
    row = {"prompt": "p", "answers": ["a", "b", "c"], "ranks": [1, 2, 2]}
    (group,) = read_answers((entry(tmp_path, "rows", row),))
    assert group.texts == ["a", "b", "c"]
    assert group.was_better == {("a", "b"), ("a", "c")}, "a tie says neither"


def test_a_system_message_makes_another_prompt(tmp_path: Path):
    row = {"question": "p", "answer": "b"}
    groups = read_answers((entry(tmp_path, "rows", row, row | {"answer": "c"}, row | {"system": "s", "answer": "d"}),))
    assert [group.texts for group in groups] == [["b", "c"], ["d"]]


def test_what_cannot_be_compared(tmp_path: Path):
    with pytest.raises(ConfigError, match="none of 2 prompts has two different answers"):
        read_answers((entry(tmp_path, "one", told("p", "a"), told("q", "b"), told("p", "a")),))
    silent = {"messages": [{"role": "user", "content": "p"}]}
    with pytest.raises(DataError, match="a row without an answer") as caught:
        read_answers((entry(tmp_path, "none", {"messages": [{"role": "user", "content": "p"}] * 1}, silent),))
    assert caught.value.where.endswith("none.jsonl:1")


def test_the_pairs_of_a_group():
    group = Answers([], ["a", "b", "c", "d"], [0, 0, 0, 0])
    found = pairs_of(group, 3, "all", 0)
    assert sorted(tuple(sorted(pair)) for pair in found) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert pairs_of(group, 3, "all", 0) == found
    of_two = Answers([], ["a", "b", "c"], [0, 0, 1])
    assert {tuple(sorted(pair)) for pair in pairs_of(of_two, 0, "all", 0)} == {(0, 2), (1, 2)}
    assert pairs_of(Answers([], ["a"], [0]), 0, "one", 0) == []


def test_which_pair_and_which_side_first_is_chance():
    group = Answers([], ["a", "b", "c"], [0, 0, 0])
    drawn = Counter(pairs_of(group, number, "one", 0)[0] for number in range(1200))
    assert len(drawn) == 6
    assert all(150 < count < 250 for count in drawn.values())
    assert [pairs_of(group, n, "one", 1) for n in range(9)] != [pairs_of(group, n, "one", 0) for n in range(9)]
