"""A tokenizer that is there, made to fit text of one's own: special tokens added, merges learnt on top.

The learnt merges stand after all of the base's, as if its training had gone on with this text: every old token
keeps its id, and a text is encoded as the base encodes it, then the new merges are applied in their order.
They are learnt by `tokenizers`' own trainer, at its speed: every word of the base's encoding is spelled with
one character a token (the ids moved to where Unicode has no spaces), and the merges of those characters are the
merges of the tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.data.encoding import batched
from pipeline.data.tokenizers import encode_text, load_tokenizer, plain_text
from pipeline.errors import ConfigError, MismatchError

Merge = tuple[str, str]

FIRST = 0x10000  # the character of id 0: above the surrogates and every white space, with room for a million ids


def add_specials(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[str]) -> str:
    """Adds special tokens after the last id; returns a line on what was added and what was there already.

    Raises ConfigError for one that is an ordinary token: made special, it would no longer be read in texts.
    """
    there = set(tokenizer.all_special_tokens)
    there |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    vocab = tokenizer.get_vocab()
    new = [token for token in dict.fromkeys(tokens) if token not in there]
    for token in new:
        if token in vocab or not token.strip():
            what = "is an ordinary token of the tokenizer" if token in vocab else "is empty"
            raise ConfigError(
                f"the special token {token!r} {what}",
                where="tokenize.added_tokens",
                mend="name it as no text would, such as <|tool|>",
            )
    tokenizer.add_special_tokens({"extra_special_tokens": new}, replace_extra_special_tokens=False)
    old = [token for token in dict.fromkeys(tokens) if token in there]
    return f"{len(new)} special tokens added" + (f"; special already: {' '.join(old)}" if old else "")


def extend(
    tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], count: int, folder: Path
) -> PreTrainedTokenizerFast:
    """`tokenizer` with `count` merges learnt on `texts`, saved to `folder` and read from there.

    The new tokens have the ids after the last. Raises MismatchError for what is no byte-level BPE, ConfigError
    where the texts have fewer merges.
    """
    merges = learn_merges(tokenizer, texts, count)
    if len(merges) < count:
        raise ConfigError(
            f"the text makes only {len(merges):,} new tokens beside the tokenizer's own",
            where="tokenize.added_merges",
            mend=f"added_merges: {len(merges)} or less, or more text",
        )
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    state = with_merges(json.loads(path.read_text(encoding="utf-8")), merges)
    Tokenizer.from_str(json.dumps(state)).save(str(path))
    return load_tokenizer(folder)


# 1. Learn.


def learn_merges(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], count: int) -> list[Merge]:
    """At most `count` merges of the base's tokens, as pairs of strings of the vocabulary, the commonest first.

    A pair that makes what is a token already is left out, and what builds on it. MismatchError for what is no
    byte-level BPE.
    """
    check_byte_level(tokenizer)
    vocab = tokenizer.get_vocab()
    size = max(vocab.values()) + 1
    spelled = Tokenizer(models.BPE())
    spelled.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=size + count + count // 2 + 100,  # some are left out
        initial_alphabet=[chr(FIRST + index) for index in range(size)],
        show_progress=False,
    )
    spelled.train_from_iterator(spell(tokenizer, texts), trainer=trainer)
    pairs = json.loads(spelled.to_str())["model"]["merges"]
    return in_tokens(pairs, vocab, count)


def spell(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> Iterator[str]:
    """Each text with one character a token, a space between the words that no merge reaches across."""
    base = plain_text(tokenizer).prefixed
    for _, batch in batched((None, text) for text in texts):
        for encoding in base.encode_batch(batch, add_special_tokens=False):
            letters = np.array(encoding.ids, dtype=np.uint32) + np.uint32(FIRST)
            starts = np.flatnonzero(np.diff(np.array(encoding.word_ids, dtype=np.int64))) + 1
            yield np.insert(letters, starts, ord(" ")).astype("<u4").tobytes().decode("utf-32-le")


def in_tokens(pairs: Iterable[Sequence[str]], vocab: dict[str, int], count: int) -> list[Merge]:
    """The merges of spelled tokens as merges of the tokens' own strings, at most `count` that make new ones."""
    token_of = {chr(FIRST + index): token for token, index in vocab.items()}
    taken = set(vocab)
    merges: list[Merge] = []
    for left, right in pairs:
        if left not in token_of or right not in token_of:
            continue  # it builds on a merge that was left out
        merge = (token_of[left], token_of[right])
        made = "".join(merge)
        if made not in taken and len(merges) < count:
            token_of[left + right] = made
            taken.add(made)
            merges.append(merge)
    return merges


def check_byte_level(tokenizer: PreTrainedTokenizerFast) -> None:
    """MismatchError unless the tokenizer is a BPE whose letters are bytes, merged by a list of pairs alone."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model, found = state["model"], state["pre_tokenizer"]
    steps = found["pretokenizers"] if found and found["type"] == "Sequence" else [found]
    if model["type"] != "BPE":
        what = f"is a {model['type']} tokenizer"
    elif model["byte_fallback"] or not any(step and step["type"] == "ByteLevel" for step in steps):
        what = "is a BPE of characters, with bytes for the others at most"
    elif model["dropout"] or model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        what = "drops merges at random, or marks where its words begin or end"
    else:
        return
    raise MismatchError(
        f"merges can be added to a byte-level BPE alone, and this {what}",
        where=tokenizer.name_or_path,
        mend="leave out added_merges, or name a tokenizer in the manner of GPT-2, Llama 3, Qwen or SmolLM",
    )


# 2. Write.


def with_merges(state: dict[str, Any], merges: Sequence[Merge]) -> dict[str, Any]:
    """A parsed `tokenizer.json` with `merges` after its own, their tokens' ids after its last, rising.

    MismatchError where a special token would then be read in texts.
    """
    model = state["model"]
    # A reader gives the added tokens that `model.vocab` lacks the ids after its size, so all of them have to be in it.
    vocab = model["vocab"] | {token["content"]: token["id"] for token in state["added_tokens"]}
    words = Tokenizer.from_str(json.dumps(state)).pre_tokenizer.pre_tokenize_str
    for name in [token["content"] for token in state["added_tokens"] if token["special"]]:
        if model["ignore_merges"] and [word for word, _ in words(name)] == [name]:
            raise MismatchError(
                f"the special token {name!r} is one word, and this tokenizer looks up whole words (`ignore_merges`)",
                where="tokenize.added_merges",
                mend="name the token as no text would, such as <|tool|>, or leave out added_merges",
            )
    first = max(vocab.values()) + 1
    vocab |= {left + right: first + i for i, (left, right) in enumerate(merges)}
    return state | {"model": model | {"vocab": vocab, "merges": [*model["merges"], *map(list, merges)]}}


# 3. Compare: what a stage that gives a model the new tokens asks.


def is_extension(base: PreTrainedTokenizerFast, extended: PreTrainedTokenizerFast) -> bool:
    """Whether every id of `base` means the same token in `extended`, whose merges begin with those of `base`."""
    vocab: dict[str, int] = extended.get_vocab()
    old, new = (json.loads(each.backend_tokenizer.to_str())["model"].get("merges", []) for each in (base, extended))
    return all(vocab.get(token) == index for token, index in base.get_vocab().items()) and new[: len(old)] == old


def pieces(base: PreTrainedTokenizerFast, extended: PreTrainedTokenizerFast) -> dict[int, list[int]]:
    """Each id that `extended` has and `base` has not -> the ids of `base` its text is made of.

    [] for a special token, whose text is never read as one. A merged token is followed down its merges, since it
    need not be whole characters.
    """
    old, vocab = base.get_vocab(), extended.get_vocab()
    model = json.loads(extended.backend_tokenizer.to_str())["model"]
    parts_of = {left + right: (left, right) for left, right in reversed(model.get("merges", []))}

    def down(token: str) -> list[int]:
        if token in old:
            return [old[token]]
        if token not in parts_of:
            return encode_text(base, extended.convert_tokens_to_string([token]))
        left, right = parts_of[token]
        return down(left) + down(right)

    special = {index for index, token in extended.added_tokens_decoder.items() if token.special}
    new = sorted((index, token) for token, index in vocab.items() if token not in old)
    return {index: [] if index in special else down(token) for index, token in new}
