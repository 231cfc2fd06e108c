"""Byte-level BPE: trained with Hugging Face's `tokenizers`, shipped as a Hugging Face folder.

The vocabulary is four special tokens, the 256 bytes, then the merges, so any text can be written and read
back exactly. Text is cut before merging by GPT-4's pattern (published in tiktoken, `cl100k_base`), with the
number of digits that may share a token as a parameter. Special strings that stand inside a text are text:
they come out as the letters they are written with, never as control tokens.

A token id is always read as text by `encode_text`, or in bulk by `BatchEncoder`; the chat template's own
control tokens are the business of `pipeline.data.chat`.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pipeline.artifacts import runs_code_of
from pipeline.errors import ConfigError, MismatchError, MissingInputError

BOS = "<|endoftext|>"  # stands after every document of a shard, and opens a text
EOS = "<|im_end|>"  # the stop token: ends a turn of the chat template
TURN = "<|im_start|>"
PAD = "<|pad|>"  # a token of its own: where pad is eos, a loss that ignores pads never learns to stop
SPECIALS = (BOS, EOS, TURN, PAD)
SMALLEST_VOCAB = 256 + len(SPECIALS)

# An upper bound for what has no model yet; the stage that makes a model writes that model's context length.
MODEL_MAX_LENGTH = 131_072

# Line by line; the assistant's words and the stop token after them are what is trained (`{% generation %}`).
CHATML = """\
{%- for message in messages -%}
    {%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] -%}
        {{- raise_exception('a message cannot have the role ' ~ message['role']) -}}
    {%- endif -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- message['content'] + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


CHARACTERS = r"[\s\S]"
"""Every character alone, newlines too: no token spans two."""
SPLITS = ("gpt4", "gpt2")


def split_pattern(digits: int, style: str = "gpt4") -> str:
    """Pre-tokenisation with at most `digits` digits to a token, as a regex both HF and tiktoken read.

    "gpt4", in order: an English contraction; a word with the one character before it; a number; punctuation with
    the space before and the newlines after it; newlines; the spaces before a word's own; any other spaces. "gpt2":
    a contraction; a word, a number or punctuation, each with the space before it; spaces.
    """
    if style == "gpt2":
        return r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}{1," + str(digits) + r"}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1," + str(digits) + r"}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def train_bytes() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the 256 bytes and the specials: nothing to train."""
    return train_bpe(iter(()), SMALLEST_VOCAB, pattern=CHARACTERS)


def train_characters(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A token for every character of `texts`, the commonest first and at most `vocab_size` tokens in all.

    Any other character comes out as its UTF-8 bytes, so that every text can be written and read back.
    """
    return train_bpe(texts, vocab_size, pattern=CHARACTERS)


def train_bpe(texts: Iterator[str], vocab_size: int, *, pattern: str = split_pattern(1)) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE of `vocab_size` tokens (specials and bytes included) on `texts`, no token longer than
    what `pattern` matches.

    The same texts in the same order give the same tokenizer. A corpus with fewer pairs than asked for gives a
    smaller vocabulary; the caller compares. Raises ConfigError if the bytes and the specials don't fit.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise ConfigError(
            f"a vocabulary of {vocab_size} has no room for the 256 bytes and {len(SPECIALS)} special tokens",
            where="vocab_size",
            mend=f"set vocab_size to {SMALLEST_VOCAB} or more (4096 suits a few dozen MB of text)",
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer=trainer)
    return with_specials(bpe)


def with_specials(bpe: Tokenizer) -> PreTrainedTokenizerFast:
    """The Hugging Face tokenizer around a trained BPE: specials named, ChatML template, length bound."""
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[TURN],
        chat_template=CHATML,
        model_max_length=MODEL_MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def complete(tokenizer: PreTrainedTokenizerFast) -> str:
    """Gives a tokenizer from outside ChatML and its tokens where it has no chat template; says what was done.

    A tokenizer with a template is left as it is: its ids belong to the model it came with.
    """
    if tokenizer.chat_template:
        return f"a tokenizer of {len(tokenizer):,} tokens with its own chat template"
    before = len(tokenizer)
    separator = tokenizer.convert_ids_to_tokens(separator_id(tokenizer))
    pad = tokenizer.pad_token if tokenizer.pad_token not in (None, tokenizer.eos_token) else PAD
    tokenizer.add_special_tokens(
        {"bos_token": separator, "eos_token": EOS, "pad_token": pad, "extra_special_tokens": [TURN]}
    )
    tokenizer.chat_template = CHATML
    return (
        f"a tokenizer of {before:,} tokens without a chat template: ChatML and {len(tokenizer) - before} tokens added"
    )


def separator_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The token that stands after every document: `<|endoftext|>` under its usual names, else eos."""
    vocab = tokenizer.get_vocab()
    for name in (BOS, "<|end_of_text|>", tokenizer.eos_token):
        if name in vocab:
            return int(vocab[name])
    raise MismatchError(
        "the tokenizer has no token that could end a document",
        where=tokenizer.name_or_path,
        mend="set its eos_token",
    )


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerFast:
    """A tokenizer from a Hugging Face folder (or hub name), as a fast one.

    Raises MissingInputError where there is none, MismatchError where it has no fast form (`tokenizer.json`).
    """
    runs_code = runs_code_of(Path(folder))
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=runs_code)
    except Exception as error:  # of a file that is no tokenizer: `tokenizers` raises plain Exceptions
        raise MissingInputError(
            f"no tokenizer could be read: {first_line(error)}",
            where=str(folder),
            mend="name a folder with tokenizer.json and tokenizer_config.json",
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise MismatchError(
            f"{type(tokenizer).__name__} has no fast form, which llmpipe needs to read text as text",
            where=str(folder),
            mend="convert it to a tokenizer.json once, with transformers' convert_slow_tokenizer",
        )
    if not is_as_written(tokenizer, Path(folder) / "tokenizer.json"):
        return PreTrainedTokenizerFast.from_pretrained(str(folder))  # of no family: the file as it is
    return tokenizer


def is_as_written(tokenizer: PreTrainedTokenizerFast, file: Path) -> bool:
    """Whether text is normalised and cut as `tokenizer.json` says. Some classes of transformers build both anew, as
    GPT2Tokenizer, which drops the step that cuts digits out: other ids than a model was trained on."""
    if not file.exists():
        return True
    written = json.loads(file.read_text(encoding="utf-8"))
    loaded = json.loads(tokenizer.backend_tokenizer.to_str())
    return all(written.get(part) == loaded.get(part) for part in ("normalizer", "pre_tokenizer"))


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, for quoting inside one of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@dataclass(frozen=True)
class PlainText:
    """A tokenizer's Rust half, as private copies that read special strings as text and neither pad nor cut.

    Copies, because whoever calls the tokenizer with padding or truncation leaves that set on the shared one,
    and because `tokenizer.json` does not remember `encode_special_tokens`. An eos that the folder does not
    mark as special is marked here, else a user could type it.

    Tokenizers in SentencePiece's manner write a space before a text: `prefixed` does so, `bare` never does.
    Where in a row that happens is `prefix`: "never", "first" (at the row's start) or "section" (after every
    special).
    """

    prefixed: Tokenizer
    bare: Tokenizer
    prefix: str
    size: int


_plain: weakref.WeakKeyDictionary[PreTrainedTokenizerFast, PlainText] = weakref.WeakKeyDictionary()


def plain_text(tokenizer: PreTrainedTokenizerFast) -> PlainText:
    """The copies, made once for each tokenizer and again when tokens are added to it."""
    kept = _plain.get(tokenizer)
    if kept is None or kept.size != len(tokenizer):
        kept = _plain[tokenizer] = read_plainly(tokenizer, ())
    return kept


def read_plainly(tokenizer: PreTrainedTokenizerFast, letters: Collection[str]) -> PlainText:
    """The copies, made anew; added tokens among `letters` are read as text too, though they are not marked special."""
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in state["added_tokens"]:
        token["special"] |= token["content"] == tokenizer.eos_token or token["content"] in letters
    state["truncation"] = state["padding"] = None
    prefixed = Tokenizer.from_str(json.dumps(state))
    prefix = take_prefix(state)
    bare = prefixed if prefix == "never" else Tokenizer.from_str(json.dumps(state))
    prefixed.encode_special_tokens = bare.encode_special_tokens = True
    return PlainText(prefixed, bare, prefix, len(tokenizer))


def take_prefix(state: dict[str, Any]) -> str:
    """Takes what writes a space before texts out of a parsed `tokenizer.json`; returns where that was."""
    found = "never"
    normalizer = state["normalizer"]
    steps = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer]
    if any(step and step["type"] == "Prepend" for step in steps):
        rest = [step for step in steps if step["type"] != "Prepend"]
        state["normalizer"] = {"type": "Sequence", "normalizers": rest} if rest else None
        found = "section"
    before = state["pre_tokenizer"]
    for step in before["pretokenizers"] if before and before["type"] == "Sequence" else [before]:
        if step and step["type"] == "Metaspace" and step["prepend_scheme"] != "never":
            found = "first" if step["prepend_scheme"] == "first" else "section"
            step["prepend_scheme"] = "never"
        elif step and step["type"] == "ByteLevel" and step["add_prefix_space"]:
            found = "section"
            step["add_prefix_space"] = False
    return found


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The ids of `text` read as text: no bos or eos is added and a typed `<|im_end|>` is letters."""
    ids: list[int] = plain_text(tokenizer).prefixed.encode(text, add_special_tokens=False).ids
    return ids
