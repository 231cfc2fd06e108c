"""Held-out bits per byte against a plain loop over documents with transformers' own loss."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from pipeline.data.shards import ShardWriter, TokenFile
from pipeline.model import held_out
from pipeline.model.held_out import bits_per_byte, choose_documents, continuations, padded, windows
from pipeline.model.losses import IGNORED
from pipeline.model.next_token import NextToken
from pipeline.model.presets import Shape, build_config

SEPARATOR, VOCAB, T = 0, 40, 8
LENGTHS = [1, 7, 8, 9, 16, 17, 30, 2, 5, 0]
"""Of the documents, without their separators: shorter and longer than a window, and just as long."""


@pytest.fixture
def valid(tmp_path: Path) -> TokenFile:
    generator = np.random.default_rng(0)
    with ShardWriter(tmp_path / "valid.ds", VOCAB, SEPARATOR, "hash") as shard:
        for index, length in enumerate(LENGTHS):
            shard.append(generator.integers(1, VOCAB, length).tolist(), 3 * length + index)
    return TokenFile(tmp_path / "valid.ds")


@pytest.fixture
def model() -> LlamaForCausalLM:
    config = build_config(
        "llama", Shape(depth=2, width=16, heads=2, kv_heads=2, mlp_width=32, context=T, vocab=VOCAB, tied=True), {}
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def naive(model: LlamaForCausalLM, valid: TokenFile, documents: list[int]) -> float:
    """Document by document, window by window: transformers' mean loss times its targets."""
    nats, size = 0.0, 0
    for index in documents:
        ids = [SEPARATOR, *valid.document(index)[:-1].tolist()]
        for start in range(0, len(ids) - 1, T):
            row = torch.tensor([ids[start : start + T + 1]])
            loss = model(input_ids=row, labels=row).loss
            nats += loss.item() * (row.shape[1] - 1)
        size += int(valid.document_bytes[index])
    return nats / math.log(2) / size


@pytest.mark.parametrize("tokens_a_batch", [1, 20, 8192])
@pytest.mark.parametrize("documents", [3, 100])
def test_it_is_the_plain_loops_figure(
    model: LlamaForCausalLM,
    valid: TokenFile,
    documents: int,
    tokens_a_batch: int,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(held_out, "TOKENS_A_BATCH", tokens_a_batch)
    found = bits_per_byte(NextToken(model), valid, T, documents)
    assert found == pytest.approx(naive(model, valid, choose_documents(valid, documents)), rel=1e-5)


def test_a_uniform_model_needs_the_logarithm_of_its_vocabulary(model: LlamaForCausalLM, valid: TokenFile):
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    found = bits_per_byte(NextToken(model), valid, T, 100)
    size = sum(3 * length + index for index, length in enumerate(LENGTHS))
    assert found == pytest.approx(math.log2(VOCAB) * sum(LENGTHS) / size, rel=1e-5)


def test_windows_score_every_token_once_and_the_separator_never():
    document = np.array([11, 12, 13, 14, 15, SEPARATOR])
    assert [row.tolist() for row in windows(document, SEPARATOR, 2)] == [[0, 11, 12], [12, 13, 14], [14, 15]]
    assert [row.tolist() for row in windows(document, SEPARATOR, 5)] == [[0, 11, 12, 13, 14, 15]]
    assert windows(np.array([SEPARATOR]), SEPARATOR, 5) == []


def test_padding_is_on_the_right_and_not_scored():
    inputs, targets = padded([np.array([0, 11]), np.array([0, 21, 22])])
    assert inputs.tolist() == [[0, 0], [0, 21]]
    assert targets.tolist() == [[11, IGNORED], [21, 22]]


def test_the_same_documents_are_chosen_for_every_model(valid: TokenFile):
    assert choose_documents(valid, 4) == choose_documents(valid, 9)[:4]
    assert sorted(choose_documents(valid, 100)) == list(range(len(LENGTHS)))


def test_samples_go_on_greedily_from_prompts_or_from_held_out_beginnings(made: Path):
    tokens = made / "artifacts" / "tiny" / "tokenize"
    folder = made / "artifacts" / "tiny" / "pretrain" / "model"
    trained, tokenizer = AutoModelForCausalLM.from_pretrained(folder).train(), AutoTokenizer.from_pretrained(folder)
    valid = TokenFile(tokens / "valid.ds")
    texts = continuations(trained, tokenizer, valid, ("ka lo", "mi"), 6, 32)
    assert trained.training
    for prompt, text in zip(("ka lo", "mi"), texts, strict=True):
        ids = [valid.metadata.separator_id, *tokenizer(prompt).input_ids]
        theirs = trained.eval().generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0]
        assert text == tokenizer.decode(theirs, skip_special_tokens=True)
    beginnings = continuations(trained, tokenizer, valid, None, 6, 32)
    for index, text in zip(choose_documents(valid, 2), beginnings, strict=True):
        assert text.startswith(tokenizer.decode(valid.document(index)[:12]))
    assert continuations(trained, tokenizer, valid, None, 0, 32) == []


def test_a_sample_ends_at_the_separator(made: Path, monkeypatch: pytest.MonkeyPatch):
    """Generation goes on behind it, as it must where ranks share a model: that is cut off."""
    folder = made / "artifacts" / "tiny" / "pretrain" / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    valid = TokenFile(made / "artifacts" / "tiny" / "tokenize" / "valid.ds")
    written = [*tokenizer(" mi").input_ids, valid.metadata.separator_id, *tokenizer(" ru").input_ids]
    asked: list[object] = []

    def generate(*_: object, stop_ids: list[int], **__: object) -> SimpleNamespace:
        asked.append(stop_ids)
        return SimpleNamespace(responses=lambda: [written])

    monkeypatch.setattr(held_out, "generate", generate)
    assert continuations(model, tokenizer, valid, ("ka lo",), 6, 32) == ["ka lo mi"]
    assert asked == [[]]
