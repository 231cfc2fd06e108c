"""A row that the chat template cannot write is named by its file and line, in every format."""

import json
import pickle
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from pipeline.data.chat import encode_messages, encode_prompt
from pipeline.data.places import naming_rows
from pipeline.errors import RowError
from stages.dpo import DPOConfig
from stages.ppo import PPOConfig
from stages.sft import SFTConfig, _turns

NO_SYSTEM = """\
{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}\
<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"""
DROPS_TOOLS = NO_SYSTEM.replace(
    "{% if m['role'] == 'system' %}{{ raise_exception('no system message') }}",
    "{% if m['role'] == 'tool' %}{% continue %}",
)
S, Q, A, T = (
    {"role": role, "content": text}
    for role, text in (("system", "S"), ("user", "Q"), ("assistant", "A"), ("tool", "T"))
)
FORMATS = {
    "messages": ({"messages": [Q, A]}, {"messages": [S, Q, A]}),
    "prompt_completion": ({"prompt": "Q", "completion": "A"}, {"prompt": [S, Q], "completion": [A]}),
    "question_answer": ({"question": "Q", "answer": "A"}, {"question": "Q", "answer": "A", "system": "S"}),
    "alpaca": ({"instruction": "Q", "output": "A"}, {"instruction": "Q", "output": "A", "system": "S"}),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {
            "conversations": [
                {"from": "system", "value": "S"},
                {"from": "human", "value": "Q"},
                {"from": "gpt", "value": "A"},
            ]
        },
    ),
}


def written(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", FORMATS)
def test_a_role_that_the_template_refuses(name: str, fresh: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    good, bad = FORMATS[name]
    fresh.chat_template = NO_SYSTEM
    config = SFTConfig(data=written(tmp_path / "rows.jsonl", good, good, bad))
    encode_messages(fresh, [Q, A])
    with (
        pytest.raises(RowError, match="cannot render the roles system user assistant: no system") as caught,
        naming_rows(config),
    ):
        encode_messages(fresh, [S, Q, A])
    assert caught.value.where.startswith(f"{tmp_path / 'rows.jsonl'}:3 (")
    assert "the row that begins 'S'" in caught.value.where
    assert pickle.loads(pickle.dumps(caught.value)).where == caught.value.where


def test_a_message_that_the_template_drops(fresh: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    fresh.chat_template = DROPS_TOOLS
    rows = [{"messages": [Q, A]}, {"messages": [Q, A, T, A]}]
    config = SFTConfig(data=written(tmp_path / "rows.jsonl", *rows))
    with pytest.raises(RowError, match=r"message 3 \(role tool\) 0 times") as caught, naming_rows(config):
        encode_messages(fresh, rows[1]["messages"])
    assert caught.value.where.startswith(f"{tmp_path / 'rows.jsonl'}:2 (")


def test_a_row_of_which_the_last_turn_alone_is_trained(fresh: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    fresh.chat_template = DROPS_TOOLS
    rows = [{"messages": [Q, A]}, {"messages": [Q, A, T, A]}]
    config = SFTConfig(data=written(tmp_path / "rows.jsonl", *rows), train_on_turns="last")
    with pytest.raises(RowError, match=r"message 3 \(role tool\) 0 times") as caught, naming_rows(config):
        encode_messages(fresh, _turns(config, rows[1]["messages"]))
    assert caught.value.where.startswith(f"{tmp_path / 'rows.jsonl'}:2 (")


def test_preferences_and_prompts(fresh: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    fresh.chat_template = NO_SYSTEM
    good = {"prompt": "Q", "chosen": "A", "rejected": "B"}
    pairs = written(tmp_path / "pairs.jsonl", good, {"prompt": [S, Q], "chosen": [A], "rejected": "B"})
    with pytest.raises(RowError) as caught, naming_rows(DPOConfig(data=pairs)):
        encode_messages(fresh, [S, Q, {**A, "content": "B"}])
    assert caught.value.where.startswith(f"{tmp_path / 'pairs.jsonl'}:2 (")
    other = written(tmp_path / "other.jsonl", good)
    with pytest.raises(RowError) as caught, naming_rows(PPOConfig(data=[other, pairs])):
        encode_prompt(fresh, [S, Q])
    assert caught.value.where.startswith(f"{tmp_path / 'pairs.jsonl'}:2 (")


def test_a_row_that_is_in_no_file_keeps_its_words(fresh: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    fresh.chat_template = NO_SYSTEM
    config = SFTConfig(data=written(tmp_path / "rows.jsonl", {"messages": [Q, A]}))
    with pytest.raises(RowError) as caught, naming_rows(config):
        encode_messages(fresh, [S, Q, A])
    assert caught.value.where == "chat template, the row that begins 'S'"
