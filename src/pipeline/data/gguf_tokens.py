"""A Hugging Face tokenizer as a GGUF file's metadata has it: byte-level BPE, in llama.cpp's words.

A GGUF holds tokens, merges and the name of the way text is cut before merging (`tokenizer.ggml.pre`), which llama.cpp
knows by heart. A tokenizer that is cut in a way without such a name would make other tokens there: it is refused.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {WORDS + r"\p{N}" + REST: "qwen2", WORDS + r"\p{N}{1,3}" + REST: "llama-bpe"}
"""Pattern -> its name in llama.cpp: of one digit and of up to three."""
DIGITS = [{"type": "Digits", "individual_digits": True}]

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""llama.cpp's types of tokens."""


@dataclass(frozen=True)
class Vocabulary:
    """Tokens in the order of their ids, the type of each, the merges, and the name of how text is cut."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre: str


def vocabulary(folder: Path, rows: int) -> Vocabulary:
    """The tokenizer in a model's folder, filled up to the `rows` of its embedding. ConfigError for another kind."""
    file = folder / "tokenizer.json"
    if not file.exists():
        raise ConfigError("no tokenizer.json, which a GGUF's tokenizer is made from", where=str(folder))
    whole: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    model = whole["model"]
    decoder = (whole.get("decoder") or {}).get("type")
    if model["type"] != "BPE" or decoder != "ByteLevel":
        what = f"a {model['type']} tokenizer with the decoder {decoder}, and byte-level BPE alone can be written"
        raise ConfigError(what, where=str(file), mend="--to hf, and llama.cpp's own converter")
    ids = dict(model["vocab"]) | {each["content"]: each["id"] for each in whole["added_tokens"]}
    names = {number: token for token, number in ids.items()}
    if max(names) >= rows:
        raise ConfigError(f"the tokenizer has {max(names) + 1:,} tokens, the model {rows:,}", where=str(folder))
    added = {each["id"]: CONTROL if each["special"] else USER_DEFINED for each in whole["added_tokens"]}
    tokens = [names.get(number, f"[PAD{number}]") for number in range(rows)]
    types = [added.get(number, NORMAL if number in names else UNUSED) for number in range(rows)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return Vocabulary(tokens, types, merges, split_name(whole) if merges else "gpt-2")


def split_name(whole: dict[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer.json cuts text; ConfigError where it has none."""
    first = whole.get("pre_tokenizer") or {}
    steps = first.get("pretokenizers", [first])
    plain = [{key: value for key, value in step.items() if key not in ("trim_offsets", "invert")} for step in steps]
    gpt2 = [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]
    bytes_alone = [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]
    normalizer = (whole.get("normalizer") or {}).get("type")
    found = ""
    if plain == gpt2:
        found = "gpt-2"
    elif plain == DIGITS + gpt2:
        found = "smollm"
    elif len(plain) == 2 and plain[1:] == bytes_alone and plain[0].get("type") == "Split":
        pattern = str(plain[0]["pattern"].get("Regex", "")).replace("{1,1}", "")
        found = SPLITS.get(pattern, "") if plain[0].get("behavior") == "Isolated" else ""
    if not found or normalizer not in (None, "NFC"):
        raise ConfigError(
            "llama.cpp has no name for how this tokenizer cuts text before merging",
            where="tokenizer.json",
            mend="tokenize with split: gpt4 and digits: 1 or 3 (the default is 1); --to hf for this one",
        )
    return found


def plain_template(template: str) -> str:
    """A chat template without its `generation` marks, which say what is trained and which llama.cpp need not know; an
    empty comment takes the place of each, with the same trimming of the space around it."""
    return re.sub(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}", r"{#\1\2#}", template)
