"""Every row format into its canonical layout, from real files, and one bad row each: file, line, reason."""

import gzip
import json
from pathlib import Path
from typing import get_args

import pyarrow
import pyarrow.parquet
import pytest

from pipeline.data.answers import read_answers
from pipeline.data.formats import KEYS, prompt_key, read_rows
from pipeline.data.sources import share
from pipeline.errors import ConfigError, DataError, MissingInputError
from pipeline.recipe import DataEntry, RowFormat

SHARED = Path(__file__).parents[3] / "shared" / "data"
Q, A, B, C = ({"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "QABC", strict=True))
S = {"role": "system", "content": "S"}


def written(path: Path, *rows: object) -> DataEntry:
    """A jsonl file of these rows, as an entry."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataEntry(source=str(path))


def turn(role: str, text: str) -> dict[str, str]:
    return {"from": role, "value": text}


DEMONSTRATIONS = {
    "messages": ({"messages": [S, Q, A], "id": 7}, [S, Q, A]),
    "multi-turn": ({"messages": [Q, A, Q, A]}, [Q, A, Q, A]),
    "prompt_completion": ({"prompt": "Q", "completion": "A"}, [Q, A]),
    "prompt_completion messages": ({"prompt": [S, Q], "completion": [A]}, [S, Q, A]),
    "question_answer": ({"question": "Q", "answer": "A"}, [Q, A]),
    "question_answer with system": ({"question": "Q", "answer": "A", "system": "S"}, [S, Q, A]),
    "alpaca": ({"instruction": "Q", "input": "", "output": "A"}, [Q, A]),
    "alpaca with input": (
        {"instruction": "I", "input": "X", "output": "A"},
        [{"role": "user", "content": "I\n\nX"}, A],
    ),
    "alpaca with system": ({"instruction": "Q", "input": None, "output": "A", "system": "S"}, [S, Q, A]),
    "sharegpt": ({"conversations": [turn("human", "Q"), turn("gpt", "A")]}, [Q, A]),
    "sharegpt with system": ({"conversations": [turn("human", "Q"), turn("gpt", "A")], "system": "S"}, [S, Q, A]),
}


@pytest.mark.parametrize("name", DEMONSTRATIONS)
def test_demonstrations(name: str, tmp_path: Path) -> None:
    row, messages = DEMONSTRATIONS[name]
    said: list[str] = []
    entry = written(tmp_path / "rows.jsonl", row)
    assert read_rows([entry], "messages", split="all", say=said.append) == [{"messages": messages}]
    assert read_rows([entry], "prompt", split="all") == [{"prompt": messages[:-1], "reference": "A"}]
    assert len(said) == 1
    assert f"rows.jsonl: {name.split()[0].replace('multi-turn', 'messages')} rows" in said[0]


PREFERENCES = {
    "texts": ({"prompt": "Q", "chosen": "A", "rejected": "C"}, [Q]),
    "messages": ({"prompt": [S, Q], "chosen": [A], "rejected": [C]}, [S, Q]),
    "implicit prompt": ({"chosen": [S, Q, A], "rejected": [S, Q, C]}, [S, Q]),
    "prompt repeated in the sides": ({"prompt": "Q", "chosen": [Q, A], "rejected": [Q, C]}, [Q]),
    "implicit, several turns": ({"chosen": [Q, A, B, A], "rejected": [Q, A, B, C]}, [Q, A, B]),
    "sharegpt": (
        {"conversations": [turn("human", "Q")], "chosen": turn("gpt", "A"), "rejected": turn("gpt", "C")},
        [Q],
    ),
    "sharegpt texts": ({"conversations": [turn("human", "Q")], "chosen": "A", "rejected": "C", "system": "S"}, [S, Q]),
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences(name: str, tmp_path: Path) -> None:
    row, prompt = PREFERENCES[name]
    entry = written(tmp_path / "rows.jsonl", row, {**row, "kind": "truncated"})
    first, second = read_rows([entry], "preference", split="all")
    assert first == {"prompt": prompt, "chosen": [A], "rejected": [C], "kind": "", "margin": 0.0, "preference": 1.0}
    assert second["kind"] == "truncated"
    assert read_rows([entry], "prompt", split="all")[0] == {"prompt": prompt, "reference": "A"}


def test_a_tie_a_probability_and_a_margin_are_the_rows_own(tmp_path: Path) -> None:
    pair = {"prompt": "Q", "chosen": "A", "rejected": "C"}
    entry = written(tmp_path / "rows.jsonl", {**pair, "preference": 0.5, "margin": 3}, {**pair, "preference": 0.75})
    rows = read_rows([entry], "preference", split="all")
    assert [(row["preference"], row["margin"]) for row in rows] == [(0.5, 3.0), (0.75, 0.0)]


def test_unpaired_rows_are_read_as_they_are_and_pairs_are_taken_apart(tmp_path: Path) -> None:
    lone = written(
        tmp_path / "lone.jsonl",
        {"prompt": "Q", "completion": "A", "label": True},
        {"prompt": [S, Q], "completion": [C], "label": False, "kind": "rude"},
    )
    said: list[str] = []
    good = {"prompt": [Q], "completion": [A], "label": True, "kind": ""}
    bad = {"prompt": [S, Q], "completion": [C], "label": False, "kind": "rude"}
    assert read_rows([lone], "unpaired", split="all", say=said.append) == [good, bad]
    assert said[0].endswith("lone.jsonl: unpaired rows (prompt, completion, label)")
    assert [row["reference"] for row in read_rows([lone], "prompt", split="all")] == ["A", ""]

    pair = {"prompt": "Q", "chosen": "A", "rejected": "C", "kind": "other"}
    pairs = written(tmp_path / "pairs.jsonl", pair, {**pair, "preference": 0.5}, {**pair, "preference": 0.9})
    apart = [
        {"prompt": [Q], "completion": [A], "label": True, "kind": "other"},
        {"prompt": [Q], "completion": [C], "label": False, "kind": "other"},
    ]
    assert read_rows([pairs], "unpaired", split="all") == apart * 2, "a tie says nothing of either answer"

    with pytest.raises(ConfigError, match="unpaired rows, and demonstrations") as caught:
        read_rows([lone], "messages", split="all")
    assert "format: prompt_completion" in caught.value.mend
    with pytest.raises(ConfigError, match="unpaired rows, and preferences are needed"):
        read_rows([lone], "preference", split="all")
    with pytest.raises(ConfigError, match="alpaca rows, and preferences or answers with a label are needed"):
        read_rows(
            [written(tmp_path / "a.jsonl", {"instruction": "Q", "output": "A"})],
            "unpaired",
            split="all",
        )
    forced = lone.model_copy(update={"format": "prompt_completion"})
    assert read_rows([forced], "messages", split="all")[0] == {"messages": [Q, A]}


def test_bad_rows_are_left_out_up_to_a_number_and_said(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"prompt": "Q", "completion": "A"})
    lines = ['{"query": "first of all"}', good, "no JSON", '{"prompt": "Q"}', good, "[1]", good]
    path.write_bytes("\n".join(lines).encode() + b"\n\xff\n")
    entry = DataEntry(source=str(path), max_bad_rows=5)
    said: list[str] = []
    assert read_rows([entry], "messages", split="all", say=said.append) == [{"messages": [Q, A]}] * 3
    assert said[1].startswith(f"{path}: 5 bad rows are left out, the first at {path}:1: no known format has the fields")
    with pytest.raises(DataError, match=r"not UTF-8 .* \(bad row 5; max_bad_rows is 4\)") as caught:
        read_rows([entry.model_copy(update={"max_bad_rows": 4})], "messages", split="all")
    assert caught.value.where == f"{path}:8"
    with pytest.raises(DataError, match=r"no known format has the fields query\n"):
        read_rows([entry.model_copy(update={"max_bad_rows": 0})], "messages", split="all")

    listed = tmp_path / "rows.json"
    listed.write_text(json.dumps([json.loads(good), 3, json.loads(good)]))
    entry = DataEntry(source=str(listed), max_bad_rows=1)
    assert len(read_rows([entry], "messages", split="all", say=said.append)) == 2
    assert said[-1] == f"{listed}: 1 bad rows are left out, the first at {listed}: row 2: " + (
        "a row is an object with named fields, not int"
    )


BAD_DEMONSTRATIONS = {
    "no messages": ({"messages": []}, "`messages` is no list of messages"),
    "a null": ({"messages": None}, "field `messages` of a messages row is missing"),
    "another row": ({"text": "x"}, "field `messages` of a messages row is missing"),
    "unknown role": ({"messages": [{"role": "alien", "content": "x"}]}, "message 1 of `messages` has the role 'alien'"),
    "no content": ({"messages": [Q, {"role": "assistant"}]}, "message 2 of `messages` has no text"),
    "no answer": ({"messages": [Q]}, "the last message is from user: nothing answers it"),
    "an empty answer": (
        {"messages": [Q, {"role": "assistant", "content": " \n"}]},
        "message 2, an assistant's, is empty",
    ),
    "a list": ([1, 2], "a row is an object with named fields, not list"),
    "no list": ({"messages": "hello"}, "`messages` is no list of messages"),
}


@pytest.mark.parametrize("name", BAD_DEMONSTRATIONS)
def test_a_bad_demonstration_is_named_by_file_and_line(name: str, tmp_path: Path) -> None:
    bad, reason = BAD_DEMONSTRATIONS[name]
    entry = written(tmp_path / "rows.jsonl", {"messages": [Q, A]}, {"messages": [Q, A]}, bad)
    with pytest.raises(DataError) as caught:
        read_rows([entry], "messages", split="all")
    assert caught.value.where == f"{tmp_path / 'rows.jsonl'}:3"
    assert reason in caught.value.what
    assert caught.value.exit_code == 1


BAD_ROWS = {
    "question_answer": (
        {"question": "Q", "answer": "A"},
        {"question": "Q", "answer": ["A"]},
        "messages",
        "field `answer` holds list, not text",
    ),
    "alpaca": (
        {"instruction": "Q", "output": "A"},
        {"instruction": "Q", "output": 4},
        "messages",
        "field `output` holds int, not text",
    ),
    "prompt_completion": (
        {"prompt": "Q", "completion": "A"},
        {"prompt": "Q"},
        "messages",
        "field `completion` of a prompt_completion row is missing",
    ),
    "sharegpt": (
        {"conversations": [turn("human", "Q"), turn("gpt", "A")]},
        {"conversations": [turn("robot", "Q"), turn("gpt", "A")]},
        "messages",
        "message 1 of `conversations` has the role 'robot'",
    ),
    "equal sides": (
        {"prompt": "Q", "chosen": "A", "rejected": "C"},
        {"prompt": "Q", "chosen": "A", "rejected": "A"},
        "preference",
        "chosen and rejected are the same",
    ),
    "prompts that differ": (
        {"chosen": [Q, A], "rejected": [Q, C]},
        {"chosen": [Q, A], "rejected": [B, C]},
        "preference",
        "the prompts of chosen and rejected differ (user assistant where the two sides part)",
    ),
    "one prompt that differs": (
        {"prompt": "Q", "chosen": [Q, A], "rejected": [Q, C]},
        {"prompt": "Q", "chosen": [Q, A], "rejected": [{**Q, "content": "another"}, C]},
        "preference",
        "the prompts of chosen and rejected differ",
    ),
    "two answers to one": (
        {"prompt": "Q", "chosen": "A", "rejected": "C"},
        {"prompt": "Q", "chosen": [A, B, A], "rejected": [C]},
        "preference",
        "`chosen` is assistant user assistant where the two sides part, not one assistant's answer",
    ),
    "a preference below a half": (
        {"prompt": "Q", "chosen": "A", "rejected": "C", "preference": 0.5},
        {"prompt": "Q", "chosen": "A", "rejected": "C", "preference": 0.4},
        "preference",
        "`preference` is 0.4, not a number between 0.5 and 1",
    ),
    "a margin below nothing": (
        {"prompt": "Q", "chosen": "A", "rejected": "C", "margin": 0},
        {"prompt": "Q", "chosen": "A", "rejected": "C", "margin": -1},
        "preference",
        "`margin` is -1, not a number of at least 0",
    ),
    "a margin that is a word": (
        {"prompt": "Q", "chosen": "A", "rejected": "C", "margin": 2},
        {"prompt": "Q", "chosen": "A", "rejected": "C", "margin": "much"},
        "preference",
        "`margin` is 'much', not a number",
    ),
    "a label that is no label": (
        {"prompt": "Q", "completion": "A", "label": True},
        {"prompt": "Q", "completion": "A", "label": 1},
        "unpaired",
        "`label` is 1, not true or false",
    ),
    "a completion of several": (
        {"prompt": "Q", "completion": "A", "label": True},
        {"prompt": [Q], "completion": [A, B, A], "label": False},
        "unpaired",
        "`completion` is assistant user assistant, not one assistant's answer",
    ),
    "an empty lone answer": (
        {"prompt": "Q", "completion": "A", "label": True},
        {"prompt": "Q", "completion": " ", "label": False},
        "unpaired",
        "an assistant's, is empty",
    ),
    "an empty side": (
        {"prompt": "Q", "chosen": "A", "rejected": "C"},
        {"prompt": "Q", "chosen": "A", "rejected": ""},
        "preference",
        "an assistant's, is empty",
    ),
    "sharegpt preference": (
        {"conversations": [turn("human", "Q")], "chosen": "A", "rejected": "C"},
        {"conversations": [turn("human", "Q"), turn("gpt", "A")], "chosen": "A", "rejected": "C"},
        "preference",
        "the prompt ends with an assistant's message",
    ),
}


WORDS = {"@half": '"a\\ud83d"', "@huge": "1" + "0" * 400, "@digits": "7" * 5000}
CRASHES = {
    "a role that is a list": (
        '{"messages": [{"role": ["user"], "content": "Q"}, {"role": "assistant", "content": "A"}]}',
        "message 1 of `messages` has the role ['user']",
    ),
    "half a character in a message": (
        '{"messages": [{"role": "user", "content": @half}, {"role": "assistant", "content": "A"}]}',
        "message 1 of `messages` holds half a character (a lone surrogate, character 2)",
    ),
    "in a prompt": ('{"prompt": @half, "completion": "A"}', "field `prompt` holds half a character"),
    "in an alpaca row": ('{"instruction": "Q", "output": @half}', "field `output` holds half a character"),
    "in a system field": ('{"prompt": "Q", "completion": "A", "system": @half}', "field `system` holds half a"),
    "in a sharegpt side": (
        '{"conversations": [{"from": "human", "value": "Q"}], "chosen": @half, "rejected": "C"}',
        "field `chosen` holds half a character",
    ),
    "in a list": ('{"prompt": "Q", "answers": ["A", @half]}', "answer 2 holds half a character"),
    "a margin without end": ('{"prompt": "Q", "chosen": "A", "rejected": "C", "margin": Infinity}', "`margin` is inf"),
    "a margin that is none": ('{"prompt": "Q", "chosen": "A", "rejected": "C", "margin": NaN}', "`margin` is nan"),
    "a margin that no float holds": (
        '{"prompt": "Q", "chosen": "A", "rejected": "C", "margin": @huge}',
        "not a number of at least 0",
    ),
    "a number of 5,000 digits": ('{"prompt": "Q", "completion": "A", "id": @digits}', "not JSON that can"),
    "lists in lists": ("[" * 200000 + "]" * 200000, "not JSON that can be read"),
}
FITTING = {
    "messages": {"messages": [Q, A]},
    "alpaca": {"instruction": "Q", "output": "A"},
    "sharegpt_preference": {"conversations": [turn("human", "Q")], "chosen": "A", "rejected": "C"},
    "preference": {"prompt": "Q", "chosen": "A", "rejected": "C"},
    "ranked": {"prompt": "Q", "answers": ["A", "C"]},
    "prompt_completion": {"prompt": "Q", "completion": "A"},
}


@pytest.mark.parametrize("name", CRASHES)
def test_what_would_crash_later_is_a_bad_row_with_its_line(name: str, tmp_path: Path) -> None:
    line, reason = CRASHES[name]
    for word, meant in WORDS.items():
        line = line.replace(word, meant)
    known = [each for each in FITTING.values() if all(f'"{key}"' in line for key in each)]
    good = known[0] if known else FITTING["prompt_completion"]
    layout = "preference" if "chosen" in good or "answers" in good else "messages"
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(good)}\n{line}\n{json.dumps(good)}\n")
    with pytest.raises(DataError) as caught:
        read_rows([DataEntry(source=str(path))], layout, split="all")
    assert caught.value.where == f"{path}:2"
    assert reason in caught.value.what
    assert len(read_rows([DataEntry(source=str(path), max_bad_rows=1)], layout, split="all")) == 2


SYSTEM_FIELDS = {
    "messages": ({"messages": [Q, A]}, "messages"),
    "prompt_completion": ({"prompt": "Q", "completion": "A"}, "messages"),
    "question_answer": ({"question": "Q", "answer": "A"}, "messages"),
    "alpaca": ({"instruction": "Q", "output": "A"}, "messages"),
    "sharegpt": ({"conversations": [turn("human", "Q"), turn("gpt", "A")]}, "messages"),
    "preference": ({"prompt": "Q", "chosen": "A", "rejected": "C"}, "preference"),
    "preference, implicit": ({"chosen": [Q, A], "rejected": [Q, C]}, "preference"),
    "sharegpt_preference": (
        {"conversations": [turn("human", "Q")], "chosen": "A", "rejected": "C"},
        "preference",
    ),
    "ranked": ({"prompt": "Q", "answers": ["A", "C"]}, "ranked"),
    "unpaired": ({"prompt": "Q", "completion": "A", "label": True}, "unpaired"),
}


@pytest.mark.parametrize("name", SYSTEM_FIELDS)
def test_a_system_field_is_the_first_message_and_holds_the_tools_in_every_format(name: str, tmp_path: Path) -> None:
    row, layout = SYSTEM_FIELDS[name]
    entry = written(tmp_path / "rows.jsonl", row, {**row, "system": "S", "tools": []}, {**row, "system": None})
    plain, told, empty = read_rows([entry], layout, split="all")
    key = "messages" if layout == "messages" else "prompt"
    assert plain[key][0] == Q
    assert told == {**plain, key: [S, *plain[key]]}
    assert empty == plain
    prompts = [row["prompt"] for row in read_rows([entry], "prompt", split="all")]
    assert prompts == [[Q], [S, Q], [Q]]
    tools = {"tools": [{"name": "f"}], "system": "S"}
    (found,) = read_rows([written(tmp_path / "told.jsonl", {**row, **tools})], layout, split="all")
    assert found == {**told, key: [{**S, "tools": '[{"name": "f"}]'}, *plain[key]]}
    with pytest.raises(DataError, match="tool 1 of `tools` has no name") as caught:
        read_rows([written(tmp_path / "tools.jsonl", row, {**row, "tools": [{"type": "f"}]})], layout, split="all")
    assert caught.value.where == f"{tmp_path / 'tools.jsonl'}:2"


OWN_SYSTEM = {
    "messages": ({"messages": [S, Q, A]}, "messages"),
    "prompt_completion": ({"prompt": [S, Q], "completion": "A"}, "messages"),
    "sharegpt": ({"conversations": [turn("system", "S"), turn("human", "Q"), turn("gpt", "A")]}, "messages"),
    "preference": ({"prompt": [S, Q], "chosen": "A", "rejected": "C"}, "preference"),
    "ranked": ({"prompt": [S, Q], "answers": ["A", "C"]}, "ranked"),
    "unpaired": ({"prompt": [S, Q], "completion": "A", "label": True}, "unpaired"),
}


@pytest.mark.parametrize("name", OWN_SYSTEM)
def test_a_row_with_two_system_messages_is_refused_unless_they_are_equal(name: str, tmp_path: Path) -> None:
    row, layout = OWN_SYSTEM[name]
    one, same = read_rows([written(tmp_path / "rows.jsonl", row, {**row, "system": "S"})], layout, split="all")
    assert one == same
    with pytest.raises(DataError, match="two system messages that differ") as caught:
        read_rows([written(tmp_path / "rows.jsonl", row, {**row, "system": "T"})], layout, split="all")
    assert caught.value.where == f"{tmp_path / 'rows.jsonl'}:2"


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_of_each_format(name: str, tmp_path: Path) -> None:
    good, bad, layout, reason = BAD_ROWS[name]
    entry = written(tmp_path / "rows.jsonl", good, bad)
    with pytest.raises(DataError) as caught:
        read_rows([entry], layout, split="all")
    assert caught.value.where == f"{tmp_path / 'rows.jsonl'}:2"
    assert reason in caught.value.what


def test_rows_of_json_and_parquet_are_counted(tmp_path: Path) -> None:
    rows = [{"instruction": "Q", "output": "A"}, {"instruction": "Q", "output": None}]
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=2))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for name in ("rows.json", "rows.parquet"):
        with pytest.raises(DataError, match="field `output`") as caught:
            read_rows([DataEntry(source=str(tmp_path / name))], "messages", split="all")
        assert caught.value.where == f"{tmp_path / name}: row 2"


def test_a_format_can_be_forced_and_must_exist(tmp_path: Path) -> None:
    entry = written(tmp_path / "rows.jsonl", {"messages": [Q, A], "prompt": "Q", "completion": "C"})
    assert read_rows([entry], "messages", split="all") == [{"messages": [Q, A]}]
    forced = entry.model_copy(update={"format": "prompt_completion"})
    assert read_rows([forced], "messages", split="all") == [{"messages": [Q, {**A, "content": "C"}]}]
    for read in (lambda text: read_rows([text], "messages"), lambda text: read_answers([text])):
        with pytest.raises(ConfigError, match="`format: text` is of documents") as caught:
            read(entry.model_copy(update={"format": "text"}))
        assert "sharegpt" in caught.value.mend
    assert set(get_args(RowFormat)) == set(KEYS)


def test_unknown_fields_are_refused_with_the_formats_there_are(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no known format has the fields query, reply") as caught:
        read_rows([written(tmp_path / "rows.jsonl", {"query": "Q", "reply": "A"})], "messages")
    assert caught.value.where.endswith("rows.jsonl:1")
    assert "alpaca: instruction, output" in caught.value.mend


def test_preferences_are_no_demonstrations_nor_the_other_way_round(tmp_path: Path) -> None:
    pairs = written(tmp_path / "pairs.jsonl", {"prompt": "Q", "chosen": "A", "rejected": "C"})
    answers = written(tmp_path / "answers.jsonl", {"prompt": "Q", "completion": "A"})
    with pytest.raises(ConfigError, match="demonstrations are needed here"):
        read_rows([pairs], "messages", split="all")
    with pytest.raises(ConfigError, match="preferences are needed here"):
        read_rows([answers], "preference", split="all")


def test_the_split_is_by_the_question_alone_and_the_same_everywhere(tmp_path: Path) -> None:
    questions = [f"question {i}" for i in range(1000)]
    answers = written(tmp_path / "a.jsonl", *({"prompt": q, "completion": "A"} for q in questions))
    pairs = written(
        tmp_path / "b.jsonl",
        *({"prompt": [S, {**Q, "content": f" {q}\n"}], "chosen": "A", "rejected": "C"} for q in reversed(questions)),
    )
    held_out = read_rows([answers], "messages", split="held_out", held_out=0.1)
    train = read_rows([answers], "messages", split="train", held_out=0.1)
    assert [prompt_key(row) for row in held_out] == [q for q in questions if share(q) < 0.1]
    assert 70 <= len(held_out) <= 130  # 100 expected, standard deviation 9.5
    assert len(held_out) + len(train) == 1000
    pair_keys = {prompt_key(row) for row in read_rows([pairs], "preference", split="held_out", held_out=0.1)}
    assert pair_keys == {prompt_key(row) for row in held_out}
    fewer = {prompt_key(row) for row in read_rows([answers], "messages", split="held_out", held_out=0.05)}
    assert fewer < pair_keys


def test_rows_with_one_question_fall_on_one_side(tmp_path: Path) -> None:
    rows = [{"messages": [Q, {**A, "content": str(i)}, *([B, C] if i % 2 else [])]} for i in range(20)]
    entry = written(tmp_path / "rows.jsonl", *rows)
    assert len(read_rows([entry], "messages", split="held_out" if share("Q") < 0.5 else "train", held_out=0.5)) == 20


def test_limit_and_weight(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {i}", "completion": "A"} for i in range(400)]
    entry = written(tmp_path / "rows.jsonl", *rows)
    limited = read_rows([entry.model_copy(update={"limit": 7})], "messages", split="all")
    assert [prompt_key(row) for row in limited] == [f"question {i}" for i in range(7)]
    heavy = read_rows([entry.model_copy(update={"weight": 2.5})], "messages", held_out=0.1)
    train = read_rows([entry], "messages", held_out=0.1)
    times = [heavy.count(row) for row in train]
    assert set(times) == {2, 3}
    assert 0.4 < times.count(3) / len(train) < 0.6
    held_out = entry.model_copy(update={"weight": 2.5})
    assert len(read_rows([held_out], "messages", split="held_out", held_out=0.1)) == 400 - len(train)


def test_an_empty_side_is_refused(tmp_path: Path) -> None:
    entry = written(tmp_path / "rows.jsonl", {"prompt": "Q", "completion": "A"})
    with pytest.raises(ConfigError, match="no held-out row"):
        read_rows([entry], "messages", split="held_out", held_out=1e-9)
    with pytest.raises(ConfigError, match="no train row"):
        read_rows([entry], "messages", split="train", held_out=0.999999)
    pair = [entry, DataEntry(source="pydocs", limit=3)]
    assert len(read_rows(pair, "messages", split="held_out", held_out=1e-9)) == 3


def test_missing_files_and_text_files(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError) as caught:
        read_rows([DataEntry(source=str(tmp_path / "none.jsonl"))], "messages")
    assert caught.value.exit_code == 2
    (tmp_path / "book.txt").write_text("Once upon a time")
    with pytest.raises(DataError, match="holds documents, not rows"):
        read_rows([DataEntry(source=str(tmp_path / "book.txt"))], "messages")


def test_compressed_rows_are_the_same_rows(tmp_path: Path) -> None:
    row = {"instruction": "Q", "input": "", "output": "A"}
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write(json.dumps(row) + "\n")
    assert read_rows([DataEntry(source=str(tmp_path / "rows.jsonl.gz"))], "messages", split="all") == [
        {"messages": [Q, A]}
    ]


@pytest.mark.parametrize("layout", ["messages", "preference", "unpaired", "prompt"])
def test_pydocs_is_divided_by_itself(layout: str) -> None:
    train = read_rows([DataEntry(source="pydocs", limit=50)], layout)
    held_out = read_rows([DataEntry(source="pydocs", limit=50)], layout, split="held_out")
    assert len(train) == len(held_out) == (100 if layout == "unpaired" else 50)  # two of each pair
    assert not {prompt_key(row) for row in train} & {prompt_key(row) for row in held_out}
    keys = {"messages": {"messages"}, "prompt": {"prompt", "reference"}}
    keys["unpaired"] = {"prompt", "completion", "label", "kind"}
    assert set(train[0]) == keys.get(layout, {"prompt", "chosen", "rejected", "kind", "margin", "preference"})
    with pytest.raises(ConfigError, match="pydocs is divided by llmpipe itself"):
        read_rows([DataEntry(source="pydocs", split="test")], layout)


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is not beside this checkout")
def test_files_that_others_made() -> None:
    alpaca = read_rows([DataEntry(source=str(SHARED / "alpaca_en_demo.json"))], "messages", split="all")
    assert len(alpaca) == 999
    assert alpaca[0]["messages"][0] == {"role": "user", "content": "Describe a process of making crepes."}
    pairs = read_rows([DataEntry(source=str(SHARED / "dpo_en_demo.json"))], "preference", split="all")
    assert len(pairs) == 300
    assert all(len(row["chosen"]) == len(row["rejected"]) == 1 for row in pairs)
    assert {len(row["prompt"]) for row in pairs} >= {1}


FIRST = {"role": "user", "content": "Again?"}


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("Q", [Q, A], [Q, A]),
        ([Q], [{**Q, "content": " Q\n"}, A], [{**Q, "content": " Q\n"}, A]),
        ([S, Q], [Q, A], [S, Q, A]),
        ([S, Q], [S, Q, A], [S, Q, A]),
        ([Q, A, FIRST], [Q, A, FIRST, C], [Q, A, FIRST, C]),
        ([FIRST], [Q, A, FIRST, C], [Q, A, FIRST, C]),  # the last question of the conversation
        ([Q], [A, Q, C], [Q, A, Q, C]),  # asked a second time
        ([Q], [A], [Q, A]),
    ],
)
def test_a_completion_that_repeats_its_prompt_is_taken_once(
    prompt: object, completion: object, expected: object, tmp_path: Path
) -> None:
    (row,) = read_rows(
        [written(tmp_path / "rows.jsonl", {"prompt": prompt, "completion": completion})], "messages", split="all"
    )
    assert row["messages"] == expected
