"""A tokenizer in llama.cpp's words."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from pipeline.data.gguf_tokens import CONTROL, NORMAL, UNUSED, plain_template, split_name, vocabulary
from pipeline.data.tokenizers import CHATML, SPECIALS, split_pattern, train_bpe, train_bytes
from pipeline.errors import ConfigError

TEXTS = ["the cat sat on the mat 1234", "le chat était là"] * 20


def trained(folder: Path, **options: Any) -> Path:
    train_bpe(iter(TEXTS), 280, **options).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("digits", "style", "name"), [(1, "gpt4", "qwen2"), (3, "gpt4", "llama-bpe")])
def test_a_pattern_has_llama_cpps_name(tmp_path: Path, digits: int, style: str, name: str):
    folder = trained(tmp_path, pattern=split_pattern(digits, style))
    assert vocabulary(folder, 300).pre == name


def test_a_pattern_without_a_name_is_refused(tmp_path: Path):
    for digits, style in ((2, "gpt4"), (1, "gpt2")):
        folder = trained(tmp_path / f"{digits}{style}", pattern=split_pattern(digits, style))
        with pytest.raises(ConfigError, match="no name for how this tokenizer cuts"):
            vocabulary(folder, 300)


def test_gpt2s_own_and_smollms_are_known():
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    assert split_name({"pre_tokenizer": byte_level, "normalizer": None}) == "gpt-2"
    digits = {"type": "Digits", "individual_digits": True}
    both = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
    assert split_name({"pre_tokenizer": both}) == "smollm"
    with pytest.raises(ConfigError):
        split_name({"pre_tokenizer": both, "normalizer": {"type": "Lowercase"}})


def test_tokens_stand_at_their_ids_and_unused_rows_are_filled(tmp_path: Path):
    found = vocabulary(trained(tmp_path), 283)
    assert found.tokens[:4] == list(SPECIALS)
    assert found.types == [CONTROL] * 4 + [NORMAL] * 276 + [UNUSED] * 3
    assert found.tokens[280:] == ["[PAD280]", "[PAD281]", "[PAD282]"]
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    assert [merge.split(" ") for merge in found.merges] == [list(merge) for merge in merges]
    with pytest.raises(ConfigError, match="the tokenizer has 280 tokens, the model 279"):
        vocabulary(tmp_path, 279)


def test_without_merges_any_cut_is_right(tmp_path: Path):
    train_bytes().save_pretrained(tmp_path)
    assert vocabulary(tmp_path, 260).pre == "gpt-2"


def test_another_kind_of_tokenizer_is_refused(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram"}, "decoder": None}))
    with pytest.raises(ConfigError, match="a Unigram tokenizer with the decoder None"):
        vocabulary(tmp_path, 10)


def test_a_template_without_marks_writes_the_same(tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(trained(tmp_path))
    said = [{"role": "user", "content": " Hi \n"}, {"role": "assistant", "content": "Yes?"}]
    plain = plain_template(CHATML)
    assert "generation" in CHATML
    assert "generation -%" not in plain
    for more in (True, False):
        texts = [
            tokenizer.apply_chat_template(said, chat_template=text, tokenize=False, add_generation_prompt=more)
            for text in (CHATML, plain)
        ]
        assert texts[0] == texts[1]
