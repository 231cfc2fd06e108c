"""`llmpipe preview`: the rows a stage trains on, before anything of it has run but the tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

RECIPE = """\
run: tiny
stages:
  tokenize: {data: corpus.jsonl, vocab_size: 512}
  pretrain: {context_length: 16, max_steps: 5}
  sft: {data: rows.jsonl}
  reward: {data: pairs.jsonl}
  ppo: {}
  sample: {}
  dpo: {init: sft, data: pairs.jsonl}
  kto: {stage: dpo, objective: kto, init: sft, data: [lone.jsonl, pairs.jsonl]}
  eval: {models: [sft]}
"""


@pytest.fixture
def recipe(tokenized: Path) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"ka {i}"}, {"role": "assistant", "content": "lo mi"}]}
        for i in range(40)
    ]
    pairs = [{"prompt": f"ka {i}", "chosen": "lo mi", "rejected": "ru"} for i in range(40)]
    lone = [{"prompt": f"ka {i}", "completion": "mu", "label": i % 2 == 1} for i in range(40)]
    for name, each in (("rows", rows), ("pairs", pairs), ("lone", lone)):
        (tokenized.parent / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    path = tokenized.with_name("all.yaml")
    path.write_text(RECIPE)
    return path


EXPECTED = {
    "sft": ["lo mi<|im_end|>"],
    "reward": ["<|im_end|>", "<|im_end|>"],
    "dpo": ["lo mi<|im_end|>", "ru<|im_end|>"],
    "kto": ["mu<|im_end|>"],
    "ppo": [""],
    "sample": [""],
}
"""Stage -> what is trained in the rows of its first example."""


@pytest.mark.parametrize("stage", EXPECTED)
def test_what_is_trained_is_marked(stage: str, recipe: Path, warm: Any) -> None:
    shown = warm("preview", recipe, stage, "-n", "1", "--json")
    assert shown.code == 0, shown.stderr
    tokenizer = AutoTokenizer.from_pretrained(recipe.parent / "artifacts" / "tiny" / "tokenize" / "model")
    rows = json.loads(shown.stdout)
    trained = []
    for row in rows:
        assert "".join(row["tokens"]) == tokenizer.decode(row["ids"])
        assert row["tokens"][0] == "<|im_start|>"
        trained.append("".join(token for token, is_trained in zip(row["tokens"], row["is_trained"]) if is_trained))
    assert trained == EXPECTED[stage]


def test_samples_of_pretrain_are_those_it_will_read(recipe: Path, warm: Any) -> None:
    from pipeline.data.packing import Windows
    from pipeline.data.shards import TokenFile

    rows = json.loads(warm("preview", recipe, "pretrain", "--rows", "2", "--json").stdout)
    train = TokenFile(recipe.parent / "artifacts" / "tiny" / "tokenize" / "train.ds")
    assert [row["ids"] for row in rows] == Windows(train.tokens, 16, 0).batch(range(2)).tolist()
    assert [row["is_trained"] for row in rows] == [[False] + [True] * 16] * 2


def test_packed_rows_are_shown_packed(recipe: Path, warm: Any) -> None:
    words = ["--set", "sft.packing=true", "--set", "sft.max_length=64"]
    rows = json.loads(warm("preview", recipe, "sft", "--json", *words).stdout)
    assert len(rows) == 3
    assert all(row["tokens"].count("<|im_start|>") >= 4 and len(row["ids"]) <= 64 for row in rows)


def test_text_has_marks_and_ids(recipe: Path, warm: Any) -> None:
    shown = warm("preview", recipe, "sft", "-n", "2", "--ids").stdout
    assert "row 1: " in shown
    assert "row 2: " in shown
    assert shown.count("«") == shown.count("»") == 2
    assert "⏎·" in shown
    assert "·" not in warm("preview", recipe, "sft").stdout


@pytest.mark.parametrize(
    ("stage", "message"), [("eval", "eval has no rows to show"), ("stf", "no stage `stf`; did you mean `sft`")]
)
def test_what_has_no_rows_is_refused(stage: str, message: str, recipe: Path, warm: Any) -> None:
    refused = warm("preview", recipe, stage)
    assert refused.code == 2
    assert message in refused.stderr


def test_without_a_tokenizer_it_says_what_to_run(recipe: Path, warm: Any) -> None:
    refused = warm("preview", recipe, "sft", "--run", "other")
    assert refused.code == 2
    assert "no tokenizer" in refused.stderr
    assert "--until tokenize" in refused.stderr


def test_a_given_tokenizer_is_there_before_anything_has_run(recipe: Path, warm: Any) -> None:
    alone = recipe.parent / "alone"
    alone.mkdir()
    made = recipe.parent / "artifacts" / "tiny" / "tokenize" / "model"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (made / name).rename(alone / name)
    shown = warm("preview", recipe, "sft", "-n", "1", "--run", "other", "--set", f"tokenize.tokenizer={alone}")
    assert shown.code == 0, shown.stderr
    assert "«lo mi<|im_end|>»" in shown.stdout
