"""sft, token by token: what is trained of every kind of row, packed and not, and that packed rows are apart."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from pipeline.data.chat import stop_token_id
from pipeline.data.formats import read_rows
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import DataError
from pipeline.model.build import load_causal_lm
from pipeline.recipe import DataEntry
from pipeline.runtime import Runtime
from stages import sft
from tests.tool_rows import HERMES, ROW

STOP = "<|im_end|>"
CALL = '<tool_call>{"name": "listen", "arguments": {"to": "cat"}}</tool_call>'

ROWS: dict[str, list[dict[str, Any]]] = {
    "single turn": [{"role": "user", "content": "What does the cat say?"}, {"role": "assistant", "content": "meow"}],
    "several turns and a system message": [
        {"role": "system", "content": f"Be short. {STOP}"},
        {"role": "user", "content": "What does the cat say?"},
        {"role": "assistant", "content": "meow"},
        {"role": "user", "content": "Again?"},
        {"role": "assistant", "content": f"I type {STOP} as letters."},
    ],
    "a tool is called": [
        {"role": "user", "content": "What does the cat say?"},
        {"role": "assistant", "content": CALL},
        {"role": "tool", "content": f'{{"sound": "meow"}}{STOP}'},
        {"role": "assistant", "content": "The cat says meow."},
    ],
    "a turn of weight 0": [
        {"role": "user", "content": "What does the cat say?"},
        {"role": "assistant", "content": "woof", "weight": 0},
        {"role": "user", "content": "No!"},
        {"role": "assistant", "content": "meow", "weight": 1},
    ],
}


def by_hand(tokenizer: Any, messages: list[dict[str, Any]], trained: list[int]) -> tuple[list[int], list[int]]:
    """(ids, labels) of a row in ChatML, put together piece by piece; `trained`: the messages whose words count."""
    ids: list[int] = []
    labels: list[int] = []

    def add(piece: str | int, counts: bool) -> None:
        own = [piece] if isinstance(piece, int) else tokenizer(piece, split_special_tokens=True)["input_ids"]
        ids.extend(own)
        labels.extend(own if counts else [-100] * len(own))

    start, stop = tokenizer.convert_tokens_to_ids("<|im_start|>"), tokenizer.convert_tokens_to_ids(STOP)
    for place, message in enumerate(messages):
        is_answer = message["role"] == "assistant"
        add(start, False)
        if is_answer:  # cut where generation starts
            add("assistant\n", False)
            add(message["content"], place in trained)
        else:
            add(f"{message['role']}\n{message['content']}", False)
        add(stop, place in trained)
        if place + 1 < len(messages):
            add("\n", False)
    return ids, labels


def encoded(config: sft.SFTConfig, tokenizer: Any, quiet: Runtime) -> list[dict[str, Any]]:
    rows = sft._encode(config, tokenizer, "train", quiet)
    return sft._fit(rows, stop_token_id(tokenizer), config.max_length, quiet.say)


def written(folder: Path, *rows: list[dict[str, Any]], **fields: Any) -> sft.SFTConfig:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return sft.SFTConfig(data=(DataEntry(source=str(file)),), held_out=0.0, **fields)


@pytest.mark.parametrize(
    ("name", "turns", "trained"),
    [
        ("single turn", "all", [1]),
        ("single turn", "last", [1]),
        ("several turns and a system message", "all", [2, 4]),
        ("several turns and a system message", "last", [4]),
        ("a tool is called", "all", [1, 3]),
        ("a tool is called", "last", [3]),
        ("a turn of weight 0", "all", [3]),
        ("a turn of weight 0", "last", [3]),
    ],
)
def test_each_token_is_trained_or_not(
    name: str, turns: str, trained: list[int], model_folder: Path, tmp_path: Path, quiet: Runtime
) -> None:
    """Ids and labels against rows put together by hand. The row with a system message begins without the template's
    newline, and a typed stop token is letters, in the answer as in a tool's output."""
    tokenizer = load_tokenizer(model_folder)
    row = encoded(written(tmp_path, ROWS[name], train_on_turns=turns), tokenizer, quiet)[0]
    ids, labels = by_hand(tokenizer, ROWS[name], trained)
    assert row["input_ids"] == ids
    assert row["labels"] == labels
    stop = stop_token_id(tokenizer)
    assert labels.count(stop) == len(trained), "every trained turn ends in its stop token"


def collated(rows: list[dict[str, Any]], *, packed: bool) -> dict[str, Tensor]:
    found: dict[str, Tensor] = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=packed)(rows)
    return found


@pytest.mark.parametrize("pad", ["its own", "the stop token"])
def test_padding_is_never_trained_and_stop_tokens_always_are(
    pad: str, model_folder: Path, tmp_path: Path, quiet: Runtime
) -> None:
    """The batch that TRL makes of all four rows: a label stands where it stood in its row and nowhere else."""
    tokenizer = load_tokenizer(model_folder)
    stop = stop_token_id(tokenizer)
    rows = encoded(written(tmp_path, *ROWS.values()), tokenizer, quiet)
    pad_id = stop if pad == "the stop token" else tokenizer.pad_token_id
    batch = DataCollatorForLanguageModeling(pad_token_id=pad_id)(rows)
    longest = max(len(row["input_ids"]) for row in rows)
    assert min(len(row["input_ids"]) for row in rows) < longest, "there is padding"
    for labels, row in zip(batch["labels"].tolist(), rows, strict=True):
        assert labels == row["labels"] + [-100] * (longest - len(row["labels"]))
    assert int((batch["labels"] == stop).sum()) == 1 + 2 + 2 + 1


def test_packed_rows_keep_their_masks(model_folder: Path, tmp_path: Path, quiet: Runtime) -> None:
    """Best fit first: of rows of several lengths nothing is cut, none lies across two packs, and every token keeps its
    label; the first of each row, which nothing predicts, has none."""
    tokenizer = load_tokenizer(model_folder)
    rows = encoded(written(tmp_path, *ROWS.values(), *ROWS.values()), tokenizer, quiet)
    lengths = sorted((len(row["input_ids"]) for row in rows), reverse=True)
    room = lengths[0] + lengths[-1]
    packs = sft._pack(rows, room)
    found = []
    for pack in packs:
        assert len(pack["input_ids"]) <= room
        batch = collated([pack], packed=True)
        starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
        assert starts == [sum(pack["seq_lengths"][:place]) for place in range(len(pack["seq_lengths"]))]
        for begin, end in zip(starts, [*starts[1:], len(pack["input_ids"])], strict=True):
            found.append((batch["input_ids"][0, begin:end].tolist(), batch["labels"][0, begin:end].tolist()))
    assert sorted(found) == sorted((row["input_ids"], row["labels"]) for row in rows)
    assert len(packs) < len(rows)


def test_nothing_leaks_between_the_rows_of_a_pack(model_folder: Path, tmp_path: Path, quiet: Runtime) -> None:
    """Logits of every token in a pack, as TRL would feed it, equal those of its row alone; and the check can fail:
    with positions that run on, they do not."""
    tokenizer = load_tokenizer(model_folder)
    model = load_causal_lm(model_folder).eval()
    rows = encoded(written(tmp_path, *ROWS.values()), tokenizer, quiet)
    pack = sft._pack(rows, sum(len(row["input_ids"]) for row in rows))[0]
    assert len(pack["seq_lengths"]) == len(rows)
    batch = collated([pack], packed=True)
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "seq_idx")}
    with torch.no_grad():
        packed = model(**inputs, use_cache=False).logits[0]
        alone = torch.cat(
            [
                model(input_ids=torch.tensor([part.tolist()])).logits[0]
                for part in batch["input_ids"][0].split(pack["seq_lengths"])
            ]
        )
        seen = model(input_ids=batch["input_ids"], use_cache=False).logits[0]
    torch.testing.assert_close(packed, alone, rtol=0, atol=2e-5)
    first = pack["seq_lengths"][0]
    torch.testing.assert_close(seen[:first], alone[:first], rtol=0, atol=2e-5)
    assert float((seen[first:] - alone[first:]).abs().max()) > 0.01


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}], "every answer has"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5}], "the weight 0.5"),
        (
            [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b", "tool_calls": [{"name": "f"}]},
            ],
            "call 1 of message 2 of `messages` names no function",
        ),
    ],
)
def test_what_cannot_be_masked_is_refused(row: list[dict[str, Any]], problem: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=problem) as caught:
        read_rows(written(tmp_path, row).data, "messages")
    assert caught.value.where.endswith("rows.jsonl:1")


CALL_OF = '<tool_call>\n{{"name": "weather", "arguments": {{"city": "{}"}}}}\n</tool_call>'
SAID = [
    f"{CALL_OF.format('Oslo')}\n{CALL_OF.format('Rome')}",
    f"In Oslo alone. I look again.\n{CALL_OF.format('Oslo')}",
    "Yes.",
    "At your service.",
]
"""What the assistant of `tool_rows.ROW` writes, in the template's words."""


@pytest.mark.parametrize(("turns", "trained"), [("all", [0, 1, 2, 3]), ("last", [3])])
def test_calls_are_trained_and_tools_and_their_output_are_not(
    turns: str, trained: list[int], model_folder: Path, tmp_path: Path, quiet: Runtime
) -> None:
    """One conversation with two calls in a turn, one beside words and none, alone and packed with others."""
    tokenizer = load_tokenizer(model_folder)
    tokenizer.chat_template = HERMES
    config = written(tmp_path, train_on_turns=turns)
    rows = [{"messages": ROWS["single turn"]}, ROW, {**ROW, "messages": ROW["messages"][:3]}]
    Path(config.data[0].source).write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = encoded(config, tokenizer, quiet)
    theirs = tokenizer.apply_chat_template(
        [{**each, "content": each["content"] or ""} for each in ROW["messages"]], tools=ROW["tools"], return_dict=True
    )["input_ids"]
    assert found[1]["input_ids"] == theirs[:-1]  # less the newline after the last stop token
    stop = stop_token_id(tokenizer)

    def spoken(labels: list[int]) -> list[str]:
        said = tokenizer.decode([label for label in labels if label != -100], skip_special_tokens=False)
        assert labels[-1] == stop
        return str(said).split(STOP)[:-1]

    assert spoken(found[1]["labels"]) == [SAID[turn] for turn in trained]
    assert spoken(found[2]["labels"]) == SAID[:1], "a row may end in calls"
    (pack,) = sft._pack(found, sum(len(row["input_ids"]) for row in found))
    batch = collated([pack], packed=True)
    parts = zip(
        batch["input_ids"][0].split(pack["seq_lengths"]), batch["labels"][0].split(pack["seq_lengths"]), strict=True
    )
    packed = sorted((ids.tolist(), labels.tolist()) for ids, labels in parts)
    assert packed == sorted((row["input_ids"], row["labels"]) for row in found)


def test_tokens_do_not_hang_on_what_is_trained(model_folder: Path, tmp_path: Path, quiet: Runtime) -> None:
    """A mask changes no ids, even where an answer begins with what the template's newline could join."""
    tokenizer = load_tokenizer(model_folder)
    row = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "\n\nb"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    found = [encoded(written(tmp_path, row, train_on_turns=turns), tokenizer, quiet)[0] for turns in ("all", "last")]
    assert found[0]["input_ids"] == found[1]["input_ids"]
    assert found[0]["labels"] != found[1]["labels"]
