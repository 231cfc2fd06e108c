"""Whole files in the layouts that people publish, written here, and a bad row of each: file, line and reason.

The layouts are those of alpaca_en_demo.json and dpo_en_demo.json (LLaMA-Factory), of GSM8K, UltraFeedback, HH-RLHF,
ShareGPT dumps and Hugging Face parquet; the words are not theirs.
"""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from pipeline.data.formats import read_rows
from pipeline.data.sources import read_documents, share
from pipeline.errors import DataError
from pipeline.recipe import DataEntry

Rows = list[dict[str, Any]]


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def turn(role: str, text: str) -> dict[str, str]:
    return {"from": role, "value": text}


def as_list(path: Path, rows: Rows) -> None:
    """A JSON list, indented, as LLaMA-Factory's files are."""
    path.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")


def as_lines(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_gzip(path: Path, rows: Rows) -> None:
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def as_parquet(path: Path, rows: Rows) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


# name -> (file, writer, good rows, the first of them in the layout, its layout)
ALPACA = [
    {"instruction": "Name a tree.", "input": "", "output": "An oak."},
    {"instruction": "Translate.", "input": "der Baum", "output": "the tree"},
]
SHAREGPT_PAIRS = [
    {
        "conversations": [turn("system", "Be kind."), turn("human", "Hi"), turn("gpt", "Hello."), turn("human", "Bye")],
        "chosen": turn("gpt", "Goodbye."),
        "rejected": turn("gpt", "Fine."),
    },
    {"conversations": [turn("human", "Hi")], "chosen": turn("gpt", "Hello."), "rejected": turn("gpt", "What?")},
]
GSM8K = [
    {"question": "Two and three?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"},
    {"question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
]
CHATS = [
    {
        "id": "a_0",
        "conversations": [turn("human", "Hi"), turn("gpt", "Hello."), turn("human", "Bye"), turn("gpt", "So long.")],
    },
    {
        "id": "a_1",
        "conversations": [turn("human", "Sum?"), turn("gpt", "call"), turn("observation", "5"), turn("gpt", "Five.")],
    },
]
MESSAGES = [
    {"prompt_id": "p0", "messages": [said("system", "Be brief."), said("user", "Hi"), said("assistant", "Hello.")]},
    {
        "prompt_id": "p1",
        "messages": [said("user", "Sum?"), said("assistant", "call"), said("tool", "5"), said("assistant", "5")],
    },
]
ULTRAFEEDBACK = [
    {
        "prompt": f"Question {i}",
        "chosen": [said("user", f"Question {i}"), said("assistant", "good")],
        "rejected": [said("user", f"Question {i}"), said("assistant", "bad")],
        "score_chosen": 8.5,
    }
    for i in range(2)
]
IMPLICIT = [{key: row[key] for key in ("chosen", "rejected")} for row in ULTRAFEEDBACK]
COMPLETIONS = [{"prompt": "Hi", "completion": " Hello."}, {"prompt": "Bye", "completion": " So long."}]
UNPAIRED = [
    {"prompt": "Hi", "completion": "Hello.", "label": True},
    {"prompt": "Hi", "completion": "What?", "label": False},
]

LAYOUTS: dict[str, tuple[str, Callable[[Path, Rows], None], Rows, str]] = {
    "alpaca": ("alpaca_en.json", as_list, ALPACA, "messages"),
    "sharegpt_preference": ("dpo_en.json", as_list, SHAREGPT_PAIRS, "preference"),
    "question_answer": ("gsm8k-train.jsonl", as_lines, GSM8K, "messages"),
    "sharegpt": ("chats.json", as_list, CHATS, "messages"),
    "messages": ("sft.parquet", as_parquet, MESSAGES, "messages"),
    "preference": ("train_prefs.parquet", as_parquet, ULTRAFEEDBACK, "preference"),
    "preference, implicit": ("harmless.jsonl.gz", as_gzip, IMPLICIT, "preference"),
    "prompt_completion": ("completions.jsonl", as_lines, COMPLETIONS, "messages"),
    "unpaired": ("kto.jsonl", as_lines, UNPAIRED, "unpaired"),
}
EXPECTED: dict[str, Rows] = {
    "alpaca": [
        {"messages": [said("user", "Name a tree."), said("assistant", "An oak.")]},
        {"messages": [said("user", "Translate.\n\nder Baum"), said("assistant", "the tree")]},
    ],
    "sharegpt_preference": [
        {
            "prompt": [
                said("system", "Be kind."),
                said("user", "Hi"),
                said("assistant", "Hello."),
                said("user", "Bye"),
            ],
            "chosen": [said("assistant", "Goodbye.")],
            "rejected": [said("assistant", "Fine.")],
        },
        {
            "prompt": [said("user", "Hi")],
            "chosen": [said("assistant", "Hello.")],
            "rejected": [said("assistant", "What?")],
        },
    ],
    "question_answer": [
        {"messages": [said("user", row["question"]), said("assistant", row["answer"])]} for row in GSM8K
    ],
    "sharegpt": [
        {
            "messages": [
                said("user", "Hi"),
                said("assistant", "Hello."),
                said("user", "Bye"),
                said("assistant", "So long."),
            ]
        },
        {"messages": [said("user", "Sum?"), said("assistant", "call"), said("tool", "5"), said("assistant", "Five.")]},
    ],
    "messages": [{"messages": row["messages"]} for row in MESSAGES],
    "preference": [
        {
            "prompt": [said("user", f"Question {i}")],
            "chosen": [said("assistant", "good")],
            "rejected": [said("assistant", "bad")],
        }
        for i in range(2)
    ],
    "prompt_completion": [
        {"messages": [said("user", "Hi"), said("assistant", " Hello.")]},
        {"messages": [said("user", "Bye"), said("assistant", " So long.")]},
    ],
    "unpaired": [
        {"prompt": [said("user", "Hi")], "completion": [said("assistant", "Hello.")], "label": True},
        {"prompt": [said("user", "Hi")], "completion": [said("assistant", "What?")], "label": False},
    ],
}
EXPECTED["preference, implicit"] = EXPECTED["preference"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_file_of_this_layout(name: str, tmp_path: Path) -> None:
    file, write, rows, layout = LAYOUTS[name]
    write(tmp_path / file, rows)
    said_of: list[str] = []
    found = read_rows([DataEntry(source=str(tmp_path / file))], layout, split="all", say=said_of.append)
    keys = list(EXPECTED[name][0])
    assert [{key: row[key] for key in keys} for row in found] == EXPECTED[name]
    assert said_of[0].startswith(f"{tmp_path / file}: {name.partition(',')[0]} rows (")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "alpaca": ({"instruction": "Name a tree.", "input": "", "output": ""}, "message 2, an assistant's, is empty"),
    "sharegpt_preference": (
        {"conversations": [turn("human", "Hi")], "chosen": turn("gpt", "Hello."), "rejected": turn("human", "What?")},
        "`rejected` is user where the two sides part, not one assistant's answer",
    ),
    "question_answer": ({"question": "Two and two?"}, "field `answer` of a question_answer row is missing"),
    "sharegpt": (
        {"id": "a_2", "conversations": [turn("human", "Hi"), turn("gpt", "Hello."), turn("human", "Bye")]},
        "the last message is from user: nothing answers it",
    ),
    "messages": (
        {"prompt_id": "p2", "messages": [said("user", "Hi"), said("critic", "No.")]},
        "message 2 of `messages` has the role 'critic'",
    ),
    "preference": (
        {**ULTRAFEEDBACK[0], "rejected": ULTRAFEEDBACK[0]["chosen"]},
        "chosen and rejected are the same",
    ),
    "preference, implicit": (
        {"chosen": IMPLICIT[0]["chosen"], "rejected": IMPLICIT[1]["rejected"]},
        "the prompts of chosen and rejected differ",
    ),
    "prompt_completion": ({"prompt": "Hi", "completion": [1]}, "message 1 of `completion` is int, not an object"),
    "unpaired": ({"prompt": "Hi", "completion": "Hello.", "label": "yes"}, "`label`"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_bad_row_in_it(name: str, tmp_path: Path) -> None:
    file, write, rows, layout = LAYOUTS[name]
    bad, reason = BAD[name]
    write(tmp_path / file, [*rows, bad])
    with pytest.raises(DataError) as caught:
        read_rows([DataEntry(source=str(tmp_path / file))], layout, split="all")
    number = ":3" if "jsonl" in file else ": row 3"
    assert caught.value.where == f"{tmp_path / file}{number}"
    assert reason in caught.value.what
    allowed = DataEntry(source=str(tmp_path / file), max_bad_rows=1)
    assert len(read_rows([allowed], layout, split="all")) == 2


def test_layouts_without_answers_are_refused_with_those_there_are(tmp_path: Path) -> None:
    """Self-Instruct's seed tasks and HumanEval: their answers stand where no format looks."""
    seeds = {"id": "seed_task_0", "name": "x", "instruction": "Do.", "instances": [{"input": "", "output": "Done."}]}
    tests = {"task_id": "H/0", "prompt": "def f():\n", "entry_point": "f", "canonical_solution": "", "test": ""}
    as_lines(tmp_path / "seeds.jsonl", [seeds])
    as_gzip(tmp_path / "HumanEval.jsonl.gz", [tests])
    for file, fields in (
        ("seeds.jsonl", "id, name, instruction, instances"),
        ("HumanEval.jsonl.gz", "task_id, prompt"),
    ):
        with pytest.raises(DataError, match=f"no known format has the fields {fields}") as caught:
            read_rows([DataEntry(source=str(tmp_path / file))], "messages", split="all")
        assert caught.value.where == f"{tmp_path / file}:1"
        assert "alpaca: instruction, output" in caught.value.mend


def test_plain_text_is_documents(tmp_path: Path) -> None:
    (tmp_path / "wiki.txt").write_text("A tree is a plant.\nAn oak is a tree.\n")
    (document,) = read_documents(DataEntry(source=str(tmp_path / "wiki.txt")))
    assert document.text == "A tree is a plant.\nAn oak is a tree.\n"
    with pytest.raises(DataError, match="a text file holds documents, not rows"):
        read_rows([DataEntry(source=str(tmp_path / "wiki.txt"))], "messages", split="all")


def test_a_hub_name_gives_the_rows_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `datasets` itself, its own loader pointed at a local folder laid out as a dataset's repository is."""
    repository = tmp_path / "ultra"
    (repository / "data").mkdir(parents=True)
    as_parquet(repository / "data" / "train-00000-of-00001.parquet", ULTRAFEEDBACK)
    as_parquet(repository / "data" / "test-00000-of-00001.parquet", [*ULTRAFEEDBACK, BAD["preference"][0]])
    load = datasets.load_dataset
    asked = []

    def local(name: str, *rest: Any, **more: Any) -> Any:
        asked.append((name, more.get("revision")))
        more.pop("revision")
        return load(str(repository), *rest, cache_dir=str(tmp_path / "cache"), **more)

    monkeypatch.setattr(datasets, "load_dataset", local)
    rows = read_rows([DataEntry(source="hub:org/ultra@v2")], "preference", split="all")
    assert [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows] == EXPECTED["preference"]
    assert asked == [("org/ultra", "v2")]
    with pytest.raises(DataError, match="chosen and rejected are the same") as caught:
        read_rows([DataEntry(source="hub:org/ultra", split="test")], "preference", split="all")
    assert caught.value.where == "hub:org/ultra test: row 3"


COUNT = """\
import json, sys
from pipeline.data.formats import read_rows
from pipeline.recipe import DataEntry
entries = [DataEntry(source=path, weight=weight) for path, weight in zip(sys.argv[1:], (0.5, 2.0, 1.0))]
print(json.dumps([row["prompt"][0]["content"] for row in read_rows(entries, "prompt", held_out=0.1)]))
"""


@pytest.mark.slow
def test_weights_choose_the_same_rows_in_every_run_and_rank(tmp_path: Path) -> None:
    files = []
    for name in "abc":
        files.append(str(tmp_path / f"{name}.jsonl"))
        as_lines(Path(files[-1]), [{"prompt": f"{name}{i}", "completion": "x"} for i in range(200)])
    runs = []
    for rank in ("0", "1"):
        env = {**os.environ, "RANK": rank, "WORLD_SIZE": "2", "PYTHONHASHSEED": rank}
        done = subprocess.run(
            [sys.executable, "-c", COUNT, *files], env=env, capture_output=True, text=True, check=True
        )
        runs.append(json.loads(done.stdout))
    assert runs[0] == runs[1]
    trained = {name: [f"{name}{i}" for i in range(200) if share(f"{name}{i}") >= 0.1] for name in "abc"}
    assert [row for row in runs[0] if row[0] == "b"] == [row for row in trained["b"] for _ in range(2)]
    assert [row for row in runs[0] if row[0] == "c"] == trained["c"]
    half = [row for row in runs[0] if row[0] == "a"]
    assert half == [row for row in trained["a"] if share(f"copy {row}") < 0.5]
    assert abs(len(half) - len(trained["a"]) / 2) < 21  # three standard deviations of so many coins
