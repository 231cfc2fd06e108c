"""The statistics of rows against counts made by hand and transformers' own tokens."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from pipeline.data.duplicates import GRAM
from pipeline.data.placed import Placed
from pipeline.data.sources import share
from pipeline.data.survey import (
    Others,
    conversations,
    format_of,
    lengths,
    overlap,
    read_source,
    repeats,
    spread,
)
from pipeline.recipe import DataEntry

SYSTEM = {"role": "system", "content": "Be old."}


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def written(path: Path, *rows: object) -> DataEntry:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataEntry(source=str(path))


def asked(question: str, answer: str = "Rain falls.", *, where: str = "") -> Placed:
    return Placed({"messages": [said("user", question), said("assistant", answer)]}, where)


def test_a_source_is_read_once_whatever_its_weight_and_divided(tmp_path: Path) -> None:
    questions = [f"question {i}" for i in range(50)]
    entry = written(tmp_path / "rows.jsonl", *({"prompt": q, "completion": "A"} for q in questions))
    source = read_source(entry.model_copy(update={"weight": 2.5}), "demonstrations", 0.2)
    held_out = [i for i, q in enumerate(questions, start=1) if share(q) < 0.2]
    assert [row.where for row in source.held_out] == [f"{tmp_path}/rows.jsonl:{i}" for i in held_out]
    assert source.summary() == {
        "source": entry.source,
        "format": "prompt_completion",
        "weight": 2.5,
        "rows": 50 - len(held_out),
        "held_out": len(held_out),
    }
    assert read_source(entry, "demonstrations", 0.0).held_out == []


def test_formats_decide_how_preferences_are_read(tmp_path: Path) -> None:
    unpaired = written(tmp_path / "a.jsonl", {"prompt": "Q", "completion": "A", "label": True})
    (row,) = read_source(unpaired, "preferences", 0.0).train
    assert list(row.answers) == ["completion"]
    pair = written(tmp_path / "b.jsonl", {"prompt": "Q", "chosen": "A", "rejected": "B"})
    (row,) = read_source(pair, "preferences", 0.0).train
    assert {name: answer[0]["content"] for name, answer in row.answers.items()} == {"chosen": "A", "rejected": "B"}
    (row,) = read_source(pair, "prompts", 0.0).train
    assert (row.asked, {name: answer[0]["content"] for name, answer in row.answers.items()}) == (
        "Q",
        {"reference": "A"},
    )
    assert (format_of(DataEntry(source="pydocs")), format_of(written(tmp_path / "c.jsonl"))) == ("built in", "nothing")


def test_messages_are_counted_by_role_and_turn() -> None:
    turns = [said("user", "Q"), said("assistant", "A"), said("user", "B"), said("assistant", "C")]
    rows = [
        asked("Q"),
        Placed({"messages": [SYSTEM, *turns]}, ""),
        Placed({"prompt": [SYSTEM, turns[0]], "reference": ""}, ""),
    ]
    assert conversations(rows) == {
        "roles": {"user": 4, "assistant": 3, "system": 2},
        "orders": {"user assistant": 1, "system user assistant user assistant": 1, "system user": 1},
        "turns": {"1": 2, "2": 1},
    }


def test_tokens_are_those_of_the_template(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [asked("The king speaks" * n, "Rain falls." * m, where=f"f:{n}") for n, m in ((1, 1), (5, 2), (2, 9))]
    found = lengths(rows, tokenizer, 60)

    def tokens(messages: list[dict[str, str]], prompt: bool) -> int:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=True)["input_ids"]
        return len(ids)

    prompts = [tokens(row.row["messages"][:1], True) for row in rows]
    whole = [tokens(row.row["messages"], False) - 1 for row in rows]  # the newline after the stop token is left out
    figures = found["figures"]
    assert (figures["prompt"]["mean"], figures["prompt"]["max"]) == (round(sum(prompts) / 3, 1), max(prompts))
    assert [figures["row"][name] for name in ("min", "median", "max")] == sorted(whole)
    assert figures["answer"]["max"] == max(w - p for w, p in zip(whole, prompts, strict=True))
    over = [(row.where, count) for row, count in zip(rows, whole, strict=True) if count > 60]
    assert found["too_long"]["count"] == len(over) == 2
    assert found["too_long"]["share"] == pytest.approx(2 / 3, abs=1e-4)
    assert [(each["row"], each["tokens"]) for each in found["too_long"]["examples"]] == over
    assert lengths(rows, tokenizer, None).keys() == {"figures"}


def test_a_pair_is_as_long_as_its_longer_side(tokenizer: PreTrainedTokenizerFast) -> None:
    sides = {"chosen": [said("assistant", "old")], "rejected": [said("assistant", "old stone house " * 9)]}
    found = lengths([Placed({"prompt": [said("user", "The king?")], **sides}, "")], tokenizer, None)["figures"]
    assert found["row"]["max"] == found["prompt"]["max"] + found["rejected"]["max"] > found["chosen"]["max"]


def test_quantiles_are_values_that_occur() -> None:
    assert spread(range(1, 101)) == {"mean": 50.5, "min": 1, "p10": 10, "median": 50, "p90": 90, "p99": 99, "max": 100}
    assert spread([]) == {}


def test_repeats_of_three_kinds() -> None:
    long = [f"word{i}" for i in range(40)]
    rows = [
        asked("Who?", " ".join(long), where="f:1"),
        asked("Who?", " ".join(long), where="f:2"),  # the same row
        asked("Who?", "Rain, he said, falls on the old stone house.", where="f:3"),  # the same prompt
        asked("Who?!", " ".join(long[:-1]), where="f:4"),  # nearly the same row: 36 of 37 runs of five words
        asked("When?", "Never.", where="f:5"),
    ]
    found = repeats(rows)
    assert {name: [each["row"] for each in value["examples"]] for name, value in found.items()} == {
        "exact": ["f:2"],
        "same prompt": ["f:2", "f:3"],
        "near": ["f:2", "f:4"],
    }
    assert [value["share"] for value in found.values()] == [0.2, 0.4, 0.4]
    assert {each["like"] for value in found.values() for each in value["examples"]} == {"f:1"}


def test_system_messages_are_no_overlap() -> None:
    system = said("system", " ".join(f"s{i}" for i in range(30)))
    run = " ".join(f"w{i}" for i in range(GRAM))
    rows = [
        Placed({"messages": [system, *asked("What is it?", run).row["messages"]]}, "train:1"),
        Placed({"messages": [system, *asked("Tell me of the king.", "No.").row["messages"]]}, "train:2"),
    ]
    others = [
        Placed({"prompt": [system, said("user", f"Say {run}")], "reference": ""}, "eval:1"),
        Placed({"prompt": [system, said("user", "tell me of THE king")], "reference": "Yes."}, "eval:2"),
        Placed({"prompt": [system, said("user", "another question")], "reference": ""}, "eval:3"),
    ]
    found = overlap(rows, Others("eval.data", others))
    assert found["shared runs"] == {
        "count": 1,
        "share": 0.3333,
        "examples": [{"row": "eval:1", "like": "train:1"}],
        "too_short": 2,
    }
    assert found["near prompts"]["examples"] == [{"row": "eval:2", "like": "train:2"}]
    assert (found["with"], found["rows"]) == ("eval.data", 3)
