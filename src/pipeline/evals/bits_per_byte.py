"""Bits per byte of held-out text: how well the model compresses it, whatever its tokenizer.

    sum over documents of -log p(document's tokens) / (ln 2 * UTF-8 bytes of the documents)

Every document is scored whole: cut into windows of the model's length, the first behind the tokenizer's bos, the
others behind the last token of the window before. The end of a document is not scored, since it is no text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.shards import TokenFile
from pipeline.data.tokenizers import encode_text, load_tokenizer
from pipeline.evals import statistics
from pipeline.evals.likelihood import Request
from pipeline.evals.statistics import Estimate, PerItem
from pipeline.evals.subject import Subject
from pipeline.model.held_out import choose_documents

Item = dict[str, Any]


def held_out_texts(tokens: Path, documents: int) -> list[str]:
    """That many documents of a tokens artifact's `valid.ds`; the same draw as pretrain's own held-out figure."""
    file = TokenFile(tokens / "valid.ds")
    tokenizer = load_tokenizer(tokens / "model")
    texts = [tokenizer.decode(file.document(i)[:-1].tolist()) for i in choose_documents(file, documents)]
    return [str(text) for text in texts if text]


def score(subject: Subject, texts: Sequence[str]) -> list[Item]:
    """One item a document: its tokens, bytes and nats."""
    requests: list[Request] = []
    owners: list[int] = []
    items: list[Item] = []
    for number, text in enumerate(texts):
        ids = encode_text(subject.tokenizer, text)
        windows = _windows(subject.start_token, ids, subject.max_length)
        requests += windows
        owners += [number] * len(windows)
        words = len(re.split(r"\s+", text))
        items.append({"item": number, "tokens": len(ids), "bytes": len(text.encode()), "words": words})
    nats = np.bincount(owners, weights=-subject.log_likelihoods(requests), minlength=len(items))
    return [item | {"nats": round(float(value), 5)} for item, value in zip(items, nats, strict=True)]


def _windows(start: int, ids: Sequence[int], length: int) -> list[Request]:
    """The document in windows of `length` tokens, each behind the token before it."""
    before = [start, *ids]
    return [Request((before[i],), tuple(ids[i : i + length])) for i in range(0, len(ids), length)]


def figures(items: Sequence[Item], seed: int) -> dict[str, Estimate]:
    """bits_per_byte, over documents."""
    bits = [item["nats"] / math.log(2) for item in items]
    return {"bits_per_byte": statistics.ratio(bits, [item["bytes"] for item in items], seed)}


def perplexities(items: Sequence[Item], seed: int) -> dict[str, Estimate]:
    """bits_per_byte, and exp(nats a byte), exp(nats a word) as lm-eval counts words: split at white space.

    A lone text tells no interval.
    """
    found = figures(items, seed)
    for name, unit in (("byte_perplexity", "bytes"), ("word_perplexity", "words")):
        nats = statistics.ratio([item["nats"] for item in items], [item[unit] for item in items], seed)
        found[name] = Estimate(math.exp(nats.value), math.exp(nats.low), math.exp(nats.high), nats.n)
    if len(items) == 1:
        found = {name: replace(each, low=math.nan, high=math.nan) for name, each in found.items()}
    return found


def per_item(items: Sequence[Item]) -> PerItem:
    """Bits and bytes of every document."""
    return {"bits_per_byte": {item["item"]: (item["nats"] / math.log(2), item["bytes"]) for item in items}}
