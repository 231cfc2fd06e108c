"""Tokenizers: merges worked by hand, bytes kept whatever they are, special strings as letters."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pipeline.data.encoding import choose
from pipeline.data.tokenizers import (
    CHATML,
    SPECIALS,
    complete,
    encode_text,
    load_tokenizer,
    separator_id,
    split_pattern,
    train_bpe,
    train_bytes,
    train_characters,
)
from pipeline.errors import ConfigError, MissingInputError
from pipeline.hashes import template_hash, tokenizer_hash


def test_the_merges_are_those_worked_by_hand() -> None:
    # Words: "ab" once, " ab" three times, " cd" once. Pairs: a+b 4, space+a 3, space+c 1, c+d 1.
    # So the first merge is a+b, the second space+ab (3); then there is room for no more.
    bpe = train_bpe(iter(["ab ab ab ab cd"]), 256 + 4 + 2)
    assert len(bpe) == 262
    assert bpe.convert_ids_to_tokens([260, 261]) == ["ab", "Ġab"]
    assert encode_text(bpe, "ab ab") == [260, 261]
    assert encode_text(bpe, "b ab") == [encode_text(bpe, "b")[0], 261]


def test_specials_are_the_first_ids_and_pad_is_not_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.convert_tokens_to_ids(list(SPECIALS)) == [0, 1, 2, 3]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|im_end|>", "<|pad|>")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert separator_id(tokenizer) == 0


def test_a_folder_that_auto_tokenizer_loads(tokenizer: PreTrainedTokenizerFast, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path)
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= {p.name for p in tmp_path.iterdir()}
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 3)
    assert loaded.model_max_length == 131_072
    assert loaded.chat_template == CHATML
    assert encode_text(loaded, "The king speaks") == encode_text(tokenizer, "The king speaks")
    assert tokenizer_hash(tmp_path) != ""
    assert template_hash(tmp_path) != ""


def test_special_strings_in_a_text_are_letters(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "a<|im_end|>b <|endoftext|><|pad|>\n<|im_start|>assistant"
    ids = encode_text(tokenizer, text)
    assert not set(ids) & {0, 1, 2, 3}
    assert tokenizer.decode(ids) == text
    assert 1 in tokenizer("a<|im_end|>b")["input_ids"]  # what Hugging Face's own call does


def test_any_text_comes_back(tokenizer: PreTrainedTokenizerFast) -> None:
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(chr(draw.choice([draw.randrange(32, 127), draw.randrange(0xD800)])) for _ in range(40))
        assert tokenizer.decode(encode_text(tokenizer, text), clean_up_tokenization_spaces=False) == text


def test_what_others_set_on_the_tokenizer_does_not_matter(fresh: PreTrainedTokenizerFast) -> None:
    before = encode_text(fresh, "The king speaks to a friend")
    assert len(before) > 3
    padded = fresh(["The king speaks", "rain"], padding="max_length", truncation=True, max_length=3)
    assert len(padded["input_ids"][1]) == 3  # padding and truncation are left set on the shared half
    assert encode_text(fresh, "The king speaks to a friend") == before
    fresh.add_tokens(["friend"])
    assert encode_text(fresh, "a friend")[-1] == 320


@pytest.mark.parametrize(("digits", "tokens"), [(1, 6), (2, 3), (3, 2)])
def test_digits_that_may_share_a_token(digits: int, tokens: int) -> None:
    bpe = train_bpe(iter(["123123 123 12 23 31\n"] * 50), 300, pattern=split_pattern(digits))
    assert len(encode_text(bpe, "123123")) == tokens  # 1|2|3|1|2|3, 12|31|23, 123|123


@pytest.mark.slow
def test_the_same_texts_give_the_same_tokenizer() -> None:
    program = (
        "from pipeline.data.tokenizers import train_bpe\n"
        "bpe = train_bpe((f'w{i % 7} x{i % 5}y z{i % 3}' for i in range(999)), 300)\n"
        "print(bpe.backend_tokenizer.to_str())"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    here = train_bpe((f"w{i % 7} x{i % 5}y z{i % 3}" for i in range(999)), 300)
    assert json.loads(other) == json.loads(here.backend_tokenizer.to_str())


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match="no room for the 256 bytes and 4 special tokens") as caught:
        train_bpe(iter(["text"]), 259)
    assert caught.value.exit_code == 2
    assert "260" in caught.value.mend


def test_a_folder_without_a_tokenizer_is_missing_input(tmp_path) -> None:
    with pytest.raises(MissingInputError) as caught:
        load_tokenizer(tmp_path)
    assert caught.value.exit_code == 2
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("text", ["{", "{}", '{"added_tokens": [], "model": {"type": "no such"}}'])
def test_a_file_that_is_no_tokenizer_is_said_to_be_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(MissingInputError, match="no tokenizer could be read: "):
        load_tokenizer(tmp_path)


def test_a_tokenizer_from_outside_gets_chatml_where_it_has_no_template(fresh: PreTrainedTokenizerFast) -> None:
    outside = PreTrainedTokenizerFast(tokenizer_object=fresh.backend_tokenizer, eos_token="<|endoftext|>")
    outside.chat_template = "{{ messages[0]['content'] }}<|endoftext|>"
    assert "with its own chat template" in complete(outside)
    assert (outside.eos_token, len(outside)) == ("<|endoftext|>", 320)
    outside.chat_template = None
    assert "ChatML" in complete(outside)
    assert outside.chat_template == CHATML
    assert (outside.eos_token_id, outside.pad_token_id, separator_id(outside)) == (1, 3, 0)


def test_chatml_tokens_are_added_where_they_are_missing(fresh: PreTrainedTokenizerFast) -> None:
    state = json.loads(fresh.backend_tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:1]  # <|endoftext|> alone, as GPT-2 has it
    for token in SPECIALS[1:]:
        state["model"]["vocab"][f"unused {token}"] = state["model"]["vocab"].pop(token)
    outside = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    assert "3 tokens added" in complete(outside)
    assert outside.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>", "<|pad|>"]) == [320, 322, 321]
    assert separator_id(outside) == 0


def test_text_is_cut_as_the_pattern_says(tokenizer: PreTrainedTokenizerFast) -> None:
    cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("I'll pay 42$,\n\n  two  words\t(x)")
    parts = [word.replace("Ġ", " ").replace("Ċ", "\n").replace("ĉ", "\t") for word, _ in cut]
    assert parts == ["I", "'ll", " pay", " ", "4", "2", "$,\n\n", " ", " two", " ", " words", "\t", "(x", ")"]


TEXT = "Füße, 12 & 中文\n\n\tend"


def test_bytes_are_a_token_each(tmp_path: Path) -> None:
    tokenizer = train_bytes()
    assert len(tokenizer) == 260
    ids = encode_text(tokenizer, TEXT)
    assert len(ids) == len(TEXT.encode())
    assert tokenizer.decode(ids) == TEXT
    tokenizer.save_pretrained(tmp_path)
    assert choose(tmp_path, [TEXT])[1].startswith("encoding with tiktoken: the same ids")


def test_characters_are_a_token_each_and_unknown_ones_their_bytes(tmp_path: Path) -> None:
    tokenizer = train_characters(iter([TEXT] * 3), 1000)
    assert len(tokenizer) == 260 + 2 + 4, "ü and ß take one merge, 中 and 文 two"
    assert len(encode_text(tokenizer, TEXT)) == len(TEXT)
    other = TEXT + "ö日"
    assert len(encode_text(tokenizer, other)) == len(TEXT) + 2 + 3
    assert tokenizer.decode(encode_text(tokenizer, other)) == other
    assert len(train_characters(iter(["中" * 9 + "文"]), 261)) == 261, "the commonest first"
    assert len(encode_text(train_characters(iter(["中" * 9 + "文"]), 262), "中文")) == 1 + 3  # 中 takes two merges
    tokenizer.save_pretrained(tmp_path)
    assert choose(tmp_path, [TEXT, other])[1].startswith("encoding with tiktoken: the same ids")


def test_gpt2_and_gpt4_cut_otherwise() -> None:
    """GPT-4 lets a word take any one character before it and keeps newlines with punctuation; GPT-2 a space alone."""
    import regex

    text = "(word) it'LL\n\n1234"
    assert regex.findall(split_pattern(3, "gpt4"), text) == ["(word", ")", " it", "'LL", "\n\n", "123", "4"]
    assert regex.findall(split_pattern(3, "gpt2"), text) == ["(", "word", ")", " it", "'", "LL", "\n", "\n", "123", "4"]
    assert regex.findall(split_pattern(1, "gpt2"), " 12")[0] == " 1"


@pytest.mark.parametrize("split", ["gpt2", "gpt4"])
def test_both_are_encoded_by_tiktoken_alike(split: str, tmp_path: Path) -> None:
    texts = ["it'll (word) 12 345\n\n x", TEXT] * 9
    train_bpe(iter(texts), 300, pattern=split_pattern(2, split)).save_pretrained(tmp_path)
    assert choose(tmp_path, texts)[1].startswith("encoding with tiktoken: the same ids")


def test_text_is_cut_as_the_file_says_whatever_class_its_settings_name(tmp_path: Path) -> None:
    """SmolLM2's settings name GPT2Tokenizer, which makes a pre-tokenisation of its own, without the digits' step."""
    made = train_bpe(iter(["12 apples and 34 pears, 2024"] * 50), 300, pattern=split_pattern(3, "gpt2"))
    made.save_pretrained(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    digits = {"type": "Digits", "individual_digits": True}
    words = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, words]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "GPT2Tokenizer"}))
    expected = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("12 apples").tokens
    assert expected[:2] == ["1", "2"]
    assert AutoTokenizer.from_pretrained(tmp_path).tokenize("12 apples")[:1] == ["12"]
    found = load_tokenizer(tmp_path)
    assert found.tokenize("12 apples") == expected
    assert (found.eos_token, found.chat_template) == (made.eos_token, made.chat_template)
