"""Text into ids in bulk: in several processes, and through tiktoken where it gives `tokenizer.json`'s own ids.

tiktoken encodes a byte-level BPE five times as fast as `tokenizers`. It is used where the tokenizer has
nothing that tiktoken lacks (no normaliser, a known pre-tokenisation, merges in the order of their ids) and,
on a sample of the user's own text, every document comes out the same; a text with a byte that is no token goes
the slow way by itself. Imports neither torch nor transformers, so that a worker process starts in a third of a
second.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import tiktoken
from tokenizers import Tokenizer

from pipeline.data.workers import Crew, Tell, in_order, result_of

Ids = npt.NDArray[np.uint32]
Tag = TypeVar("Tag")

# The pre-tokenisation of `ByteLevel(use_regex=True)`, as published with GPT-2.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# The same after `Digits(individual_digits=True)`, which cuts out every numeric character and leaves the text between
# two of them to itself: spaces before a number are as at a text's end. `tokenizers` asks Rust what is numeric, which
# knows 13 characters more than the `\p{N}` of either regex engine (a test walks through all characters).
NUMERIC = r"\p{N}\x{11de0}-\x{11de9}\x{16ff4}-\x{16ff6}"
DIGITS_PATTERN = rf"[{NUMERIC}]|'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?[^\s\p{{L}}{NUMERIC}]+|\s+(?![^\s{NUMERIC}])|\s+"

# tiktoken's regex engine runs out of stack somewhere above 700,000 characters of white space in a row.
MANY_SPACES = re.compile(r"\s{50000}")

BATCH_CHARACTERS = 1 << 20
BYTES_WORTH_A_PROCESS = 32_000_000

# What a sample of ordinary text may lack.
ODD_TEXTS = (
    "<|endoftext|><|im_start|>user\n<|im_end|><|pad|>",
    "  two  spaces\tand\ttabs \r\n\r\n \n  x",
    "0 12  345\n\n6789 1e-5 ½ ٣٤ x1y22z \U00011de0\U00011de1\U00016ff4 5",
    "I'll WE'RE don't it’s naïve Ünïcödé 中文字 日本語 кириллица 🙂👩‍👩‍👧 \u200b\ufeff\u00a0.",
    "if (a[0]->b != NULL) { return *c++; } // ~~~ ### ===\n\n\n",
    "\x00\x04\x07\x7f\u0378\U00040000\U0010ffff" + "a" * 3000 + " " * 3000,
)


def byte_of_letter() -> dict[str, int]:
    """The letter that a byte-level tokenizer writes for each byte (GPT-2's table), inverted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def pattern_of(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """The regex that a `tokenizer.json`'s pre-tokenisation amounts to, None where it is not one regex."""
    steps = [pre_tokenizer] if pre_tokenizer and pre_tokenizer["type"] != "Sequence" else []
    if pre_tokenizer and pre_tokenizer["type"] == "Sequence":
        steps = pre_tokenizer["pretokenizers"]
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    if len(steps) == 1:
        return GPT2_PATTERN if steps[0]["use_regex"] else None
    first = steps[0]
    if len(steps) == 2 and first["type"] == "Digits" and first["individual_digits"] and steps[1]["use_regex"]:
        return DIGITS_PATTERN
    if len(steps) > 2 or steps[1]["use_regex"] or first["type"] != "Split" or first["invert"]:
        return None
    return first["pattern"].get("Regex") if first["behavior"] == "Isolated" else None


def as_tiktoken(state: dict[str, Any]) -> tiktoken.Encoding | None:
    """The parsed `tokenizer.json` as a tiktoken encoding of plain text, None where tiktoken lacks something.

    tiktoken merges by the rank of the token a pair makes, HF by the order of its list: the same thing where
    that list makes tokens of rising ids. tiktoken needs all 256 bytes: one that the vocabulary lacks (HF leaves
    it out of the ids) gets an id from `first_free_id` on, so that a text with such an id is known.
    """
    model, pattern = state["model"], pattern_of(state["pre_tokenizer"])
    if model["type"] != "BPE" or pattern is None or state["normalizer"] is not None:
        return None
    if model["dropout"] or model["unk_token"] or model["byte_fallback"] or model["continuing_subword_prefix"]:
        return None
    if model["end_of_word_suffix"] or any(not token["special"] for token in state["added_tokens"]):
        return None
    specials = {token["content"] for token in state["added_tokens"]}
    letters = byte_of_letter()
    vocab = {token: index for token, index in model["vocab"].items() if token not in specials}
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    made = [model["vocab"].get("".join(pair)) for pair in merges]
    if None in made or any(a >= b for a, b in itertools.pairwise(made)):
        return None
    used = {letter for token in vocab for letter in token}
    if not used <= letters.keys() & vocab.keys():
        return None
    ranks = {bytes(letters[letter] for letter in token): index for token, index in vocab.items()}
    missing = [byte for letter, byte in letters.items() if letter not in vocab]
    ranks |= {bytes([byte]): index for index, byte in enumerate(missing, first_free_id(state))}
    return tiktoken.Encoding("llmpipe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def first_free_id(state: dict[str, Any]) -> int:
    """The id after the last one of a parsed `tokenizer.json`."""
    taken: list[int] = [*state["model"]["vocab"].values(), *(token["id"] for token in state["added_tokens"])]
    return 1 + max(taken)


class BulkEncoder:
    """Encodes texts as text (special strings are letters, nothing is added) with the tokenizer of a folder.

    `use_tiktoken` is what `choose` found out; workers are told.
    """

    def __init__(self, folder: Path, use_tiktoken: bool) -> None:
        state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        state["truncation"] = state["padding"] = None
        self.folder = folder
        self.slow = Tokenizer.from_str(json.dumps(state))
        self.slow.encode_special_tokens = True
        self.fast = as_tiktoken(state) if use_tiktoken else None
        self.first_free_id = first_free_id(state) if self.fast is not None else 0

    @property
    def how(self) -> tuple[Path, bool]:
        """What another process makes the same encoder of."""
        return self.folder, self.fast is not None

    def encode(self, texts: list[str]) -> list[Ids]:
        """The ids of each text."""
        if self.fast is None:
            found = self.slow.encode_batch_fast(texts, add_special_tokens=False)
            return [np.array(encoding.ids, dtype=np.uint32) for encoding in found]
        return [self.encode_one(self.fast, text) for text in texts]

    def encode_one(self, fast: tiktoken.Encoding, text: str) -> Ids:
        """The ids of one text, by the slow way where the fast one would break or has a byte that is no token."""
        if not (len(text) > 50_000 and MANY_SPACES.search(text)):
            ids = np.array(fast.encode_ordinary(text), dtype=np.uint32)
            if ids.max(initial=0) < self.first_free_id:
                return ids
        return np.array(self.slow.encode(text, add_special_tokens=False).ids, dtype=np.uint32)


def choose(folder: Path, sample: Iterable[str]) -> tuple[BulkEncoder, str]:
    """The fastest encoder that agrees with `tokenizer.json` on all of `sample`, and a line on the choice."""
    encoder = BulkEncoder(folder, use_tiktoken=True)
    if encoder.fast is None:
        return encoder, "encoding with tokenizers: tiktoken has no form of this tokenizer"
    texts = [*ODD_TEXTS, *sample]
    for text, slow in zip(texts, encoder.slow.encode_batch_fast(texts, add_special_tokens=False), strict=True):
        if encoder.encode_one(encoder.fast, text).tolist() != slow.ids:
            reason = f"tiktoken differs from tokenizer.json on {text[:40]!r}"
            return BulkEncoder(folder, use_tiktoken=False), f"encoding with tokenizers: {reason}"
    return encoder, f"encoding with tiktoken: the same ids as tokenizer.json on {len(texts):,} texts"


def encode_all(tagged: Iterable[tuple[Tag, str]], encoder: BulkEncoder, processes: int) -> Iterator[tuple[Tag, Ids]]:
    """The ids of each text beside its tag, in order; the result does not depend on `processes`.

    A bounded number of batches is under way, so that memory does not grow with the corpus. MachineError where a
    process ends before its work does.
    """
    if processes == 1:
        yield from encode_here(tagged, encoder)
        return
    with Crew(processes) as crew:
        yield from encode_by(crew, tagged, encoder, lambda: None)


def encode_here(tagged: Iterable[tuple[Tag, str]], encoder: BulkEncoder) -> Iterator[tuple[Tag, Ids]]:
    """`encode_all` in this process."""
    for tags, texts in batched(tagged):
        yield from zip(tags, encoder.encode(texts), strict=True)


def encode_by(
    crew: Crew, tagged: Iterable[tuple[Tag, str]], encoder: BulkEncoder, look_up: Callable[[], None]
) -> Iterator[tuple[Tag, Ids]]:
    """`encode_all` by workers that are there; `look_up` is called while they are waited for."""

    def submit(batch: tuple[list[Tag], list[str]]) -> Future[list[Ids]]:
        return crew.submit(lambda _: None, encode_texts, *encoder.how, batch[1])

    for (tags, _), ids in in_order(batched(tagged), submit, 2 * crew.count):
        yield from zip(tags, result_of(ids, look_up), strict=True)


def encode_texts(folder: Path, use_tiktoken: bool, texts: list[str], tell: Tell) -> list[Ids]:
    """What a worker is called for: the ids of each text."""
    return encoder_of(folder, use_tiktoken).encode(texts)


@functools.lru_cache(maxsize=1)
def encoder_of(folder: Path, use_tiktoken: bool) -> BulkEncoder:
    """An encoder, made once in a process."""
    return BulkEncoder(folder, use_tiktoken)


def batched(tagged: Iterable[tuple[Tag, str]]) -> Iterator[tuple[list[Tag], list[str]]]:
    """Tags and texts in batches of about a million characters."""
    tags: list[Tag] = []
    texts: list[str] = []
    size = 0
    for tag, text in tagged:
        tags.append(tag)
        texts.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield tags, texts
            tags, texts, size = [], [], 0
    if texts:
        yield tags, texts


def bytes_per_token(encoder: BulkEncoder, texts: list[str]) -> float:
    """UTF-8 bytes of these texts for each of their tokens."""
    tokens = sum(len(ids) for ids in encoder.encode(texts))
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts) / tokens


def processes_for(text_bytes: int) -> int:
    """How many processes pay: one for each 32 MB, up to the cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, text_bytes // BYTES_WORTH_A_PROCESS))
