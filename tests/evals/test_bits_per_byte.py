"""Bits per byte against transformers' own loss, and against pretrain's own figure."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from pipeline.data.shards import ShardWriter, TokenFile
from pipeline.data.tokenizers import encode_text
from pipeline.evals import bits_per_byte
from pipeline.evals.subject import Subject
from pipeline.model import held_out
from pipeline.model.next_token import NextToken

TEXTS = ["return the sum of two numbers", "naïve été 日本", "open the door and close it " * 12, "a"]


def hugging_face_nats(subject: Subject, text: str) -> float:
    """Sum over windows of 64 of the model's own mean loss times its targets."""
    ids = [subject.tokenizer.bos_token_id, *encode_text(subject.tokenizer, text)]
    total = 0.0
    for start in range(0, len(ids) - 1, subject.max_length):
        window = torch.tensor([ids[start : start + subject.max_length + 1]])
        with torch.inference_mode():
            total += float(subject.model(input_ids=window, labels=window).loss) * (window.shape[1] - 1)
    return total


def test_equal_to_transformers_loss(base_subject: Subject) -> None:
    items = bits_per_byte.score(base_subject, TEXTS)
    nats = [hugging_face_nats(base_subject, text) for text in TEXTS]
    assert [item["nats"] for item in items] == pytest.approx(nats, rel=1e-5)
    assert [item["bytes"] for item in items] == [29, 19, 324, 1]
    assert len(encode_text(base_subject.tokenizer, TEXTS[2])) > base_subject.max_length  # more than one window
    found = bits_per_byte.figures(items, 0)["bits_per_byte"]
    assert found.value == pytest.approx(sum(nats) / math.log(2) / 373, rel=1e-5)
    assert found.n == 4


def test_by_hand() -> None:
    """16 bits over 8 bytes; documents of 1 and 3 bits a byte."""
    items = [{"nats": 4 * math.log(2), "bytes": 4}, {"nats": 12 * math.log(2), "bytes": 4}]
    found = bits_per_byte.figures(items, 0)["bits_per_byte"]
    assert (found.value, found.low, found.high) == (pytest.approx(2), pytest.approx(1), pytest.approx(3))


def test_independent_of_the_batch(base_subject: Subject) -> None:
    whole = [item["nats"] for item in bits_per_byte.score(base_subject, TEXTS)]
    single = [item["nats"] for item in bits_per_byte.score(replace(base_subject, token_budget=1), TEXTS)]
    assert single == pytest.approx(whole, rel=1e-6)


def test_the_figure_pretrain_gives(base_subject: Subject, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "model")
    assert tokenizer.bos_token_id is not None
    with ShardWriter(tmp_path / "valid.ds", len(tokenizer), tokenizer.bos_token_id, "") as shard:
        for text in TEXTS:
            shard.append(encode_text(tokenizer, text), len(text.encode()))
    texts = bits_per_byte.held_out_texts(tmp_path, 3)
    assert len(texts) == 3
    assert set(texts) < set(TEXTS)
    found = bits_per_byte.figures(bits_per_byte.score(base_subject, texts), 0)["bits_per_byte"].value
    file = TokenFile(tmp_path / "valid.ds")
    theirs = held_out.bits_per_byte(NextToken(base_subject.model), file, base_subject.max_length, 3)
    assert found == pytest.approx(theirs, rel=1e-4)
