"""`deduplicate`: which rows are left out, of which sources, and what is said of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.answers import read_answers
from pipeline.data.formats import read_rows
from pipeline.data.sources import read_documents, share
from pipeline.errors import ConfigError
from pipeline.recipe import DataEntry

LONG = [f"w{i}" for i in range(40)]
NEARLY = " ".join([*LONG[:-1], "x"])  # 35 of 37 runs of five words are shared: 35 / 37 > 0.8


def written(path: Path, *rows: object, **options: Any) -> DataEntry:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataEntry(source=str(path), **options)


def pair(question: str, answer: str) -> dict[str, str]:
    return {"prompt": question, "completion": answer}


def answers(entries: list[DataEntry], said: list[str] | None = None) -> list[str]:
    rows = read_rows(entries, "messages", held_out=0.0, say=(said if said is not None else []).append)
    return [row["messages"][-1]["content"] for row in rows]


ROWS = [pair("Q", " ".join(LONG)), pair("Q", "short"), pair("Q", " ".join(LONG)), pair("Q", NEARLY), pair("R", "short")]


@pytest.mark.parametrize(("how", "kept"), [(None, [0, 1, 2, 3, 4]), ("exact", [0, 1, 3, 4]), ("near", [0, 1, 4])])
def test_within_a_source(how: str | None, kept: list[int], tmp_path: Path) -> None:
    said: list[str] = []
    entry = written(tmp_path / "rows.jsonl", *ROWS, deduplicate=how)
    assert answers([entry], said) == [ROWS[place]["completion"] for place in kept]
    if how is None:
        assert len(said) == 1
    else:
        told = f"{5 - len(kept)} of 5 rows are left out as repeats ({how}), the first at {entry.source}:3, like"
        assert said[1] == f"{entry.source}: {told} {entry.source}:1"


def test_across_sources_by_the_entry_that_says_so(tmp_path: Path) -> None:
    first = written(tmp_path / "a.jsonl", *ROWS[:2])
    again = written(tmp_path / "b.jsonl", ROWS[1], ROWS[1], deduplicate="exact")
    assert answers([first, again]) == [ROWS[0]["completion"], "short"]  # all of it is left out, and that is no error
    assert answers([again, first]) == ["short", ROWS[0]["completion"], "short"]


def test_copies_by_weight_are_no_repeats(tmp_path: Path) -> None:
    entry = written(tmp_path / "rows.jsonl", *ROWS, deduplicate="near", weight=2)
    assert answers([entry]) == [ROWS[place]["completion"] for place in (0, 0, 1, 1, 4, 4)]


def test_what_is_held_out_is_not_touched(tmp_path: Path) -> None:
    entry = written(tmp_path / "rows.jsonl", *ROWS, deduplicate="near")
    share_of_q = share("Q")
    rows = read_rows([entry], "messages", split="held_out", held_out=(share_of_q + 1) / 2)
    assert len([row for row in rows if row["messages"][0]["content"] == "Q"]) == 4


def test_answers_of_other_labels_are_no_repeats(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "label": label} for label in (True, False, True)]
    entry = written(tmp_path / "rows.jsonl", *rows, deduplicate="near")
    assert [row["label"] for row in read_rows([entry], "unpaired", held_out=0.0)] == [True, False]
    exact = entry.model_copy(update={"deduplicate": "exact"})
    assert [row["label"] for row in read_rows([exact], "unpaired", held_out=0.0)] == [True, False]


PASSAGE = " ".join(f"p{i}" for i in range(200))


def test_two_questions_on_one_passage_are_no_repeats(tmp_path: Path) -> None:
    rows = [
        pair(f"{PASSAGE}\n\nWho paid?", "Yes"),
        pair(f"{PASSAGE}\n\nWhen did it sail?", "Yes"),
        pair(f"{PASSAGE}\n\nWho paid?", "No"),
        pair(f"{PASSAGE} more\n\nWho paid?", "Yes"),
    ]
    entry = written(tmp_path / "rows.jsonl", *rows, deduplicate="near")
    assert answers([entry]) == ["Yes", "Yes", "No"], "the last one repeats the first"


def test_a_pair_with_its_sides_swapped_is_no_repeat(tmp_path: Path) -> None:
    one = {"prompt": "Q", "chosen": " ".join(LONG), "rejected": PASSAGE}
    rows = [one, {**one, "chosen": PASSAGE, "rejected": " ".join(LONG)}, {**one, "chosen": NEARLY}]
    entry = written(tmp_path / "rows.jsonl", *rows, deduplicate="near")
    kept = read_rows([entry], "preference", held_out=0.0)
    assert [row["chosen"][0]["content"] for row in kept] == [" ".join(LONG), PASSAGE]


@pytest.mark.parametrize("split", ["held_out", "all"])
def test_where_nothing_is_trained_on_that_it_does_nothing_is_said(split: Any, tmp_path: Path) -> None:
    entry = written(tmp_path / "rows.jsonl", *ROWS, deduplicate="near", weight=2.0)
    said: list[str] = []
    assert len(read_rows([entry], "messages", split=split, held_out=0.99, say=said.append)) == len(ROWS)
    assert said[1:] == [f"{entry.source}: deduplicate and weight left out of account, for rows to train on alone"]


@pytest.mark.parametrize("field", ["label", "text_field"])
def test_what_is_for_documents_is_refused_for_rows(field: str, tmp_path: Path) -> None:
    entry = written(tmp_path / "rows.jsonl", *ROWS, **{field: "other"})
    for read in (lambda: read_rows([entry], "messages"), lambda: read_answers([entry])):
        with pytest.raises(ConfigError, match=f"`{field}` is for documents") as caught:
            read()
        assert caught.value.where == entry.source


@pytest.mark.parametrize(("field", "value"), [("weight", 2.0), ("deduplicate", "exact")])
def test_what_does_nothing_where_answers_are_compared_is_refused(field: str, value: Any, tmp_path: Path) -> None:
    entry = written(tmp_path / "rows.jsonl", pair("Q", "a"), pair("Q", "b"), **{field: value})
    with pytest.raises(ConfigError, match=f"`{field}` does nothing where answers are compared"):
        read_answers([entry])


def test_documents_are_not_deduplicated(tmp_path: Path) -> None:
    entry = written(tmp_path / "a.jsonl", {"text": "a"}, deduplicate="exact")
    with pytest.raises(ConfigError, match="`deduplicate` is for rows"):
        next(read_documents(entry))
