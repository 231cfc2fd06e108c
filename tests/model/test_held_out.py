"""Held-out bits per byte against a plain loop over documents with transformers' own loss."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
def naive(model: LlamaForCausalLM, valid: TokenFile, documents: list[int], length: int = T) -> float:
    """Document by document, window by window: transformers' mean loss times its targets."""
    nats, size = 0.0, 0
    for index in documents:
        ids = [SEPARATOR, *valid.document(index)[:-1].tolist()]
        for start in range(0, len(ids) - 1, length):
            row = torch.tensor([ids[start : start + length + 1]])
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


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_batch_is_of_so_many_tokens_with_its_padding(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many short rows before some long ones: none of these is dealt out at the short ones' number."""
    monkeypatch.setattr(held_out, "TOKENS_A_BATCH", 100)
    rows = [np.zeros(length) for length in [2] * 70 + [3] * 5 + [60] * 4 + [99, 100, 101, 300]]
    batches, left = [], rows
    while left:
        count = held_out.rows_at_once(left, ranks)
        batches.append(left[:count])
        left = left[count:]
    assert [row for batch in batches for row in batch] == rows
    for batch in batches:
        shares = [batch[rank::ranks] for rank in range(ranks)]
        assert all(len(share) <= 1 or len(share) * len(batch[-1]) <= 100 for share in shares)
    sizes = [len(batch) for batch in batches]
    assert sizes == {1: [50, 25, *[1] * 8], 2: [70, 4, 2, 2, 2, 2, 1], 3: [75, 3, 3, 2]}[ranks]


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


STAGE = """
import json
import torch
from pathlib import Path
from pipeline.data.shards import TokenFile
from pipeline.data.tokenizers import load_tokenizer
from pipeline.model import held_out
from pipeline.model.build import load_causal_lm
from pipeline.model.compiling import blocks_of
from pipeline.model.next_token import NextToken
from pipeline.model.sharding import shard
from pipeline.recipe import StageConfig, field

class LookConfig(StageConfig):
    made: str = field(..., "x")
    tokens_a_batch: int = field(..., "x")

INPUTS, KIND, SHARDS = {}, "rows", True
plain_nats, plain_generate = NextToken.nats, held_out.generate

def run(config, inputs, out, runtime):
    held_out.TOKENS_A_BATCH = config.tokens_a_batch
    scored, generated = [], []
    def nats(losses, inputs_BT, targets_BT):
        found = plain_nats(losses, inputs_BT, targets_BT)
        scored.append([len(targets_BT), int((targets_BT != -100).sum()), float(found.sum())])
        return found
    def generate(*given, **settings):
        generated.append(1)
        return plain_generate(*given, **settings)
    NextToken.nats, held_out.generate = nats, generate
    folder = Path(config.made)
    model, valid = load_causal_lm(folder / "pretrain" / "model"), TokenFile(folder / "tokenize" / "valid.ds")
    losses = NextToken(model)
    if runtime.shards:
        shard(losses, blocks_of(model), runtime.device, 2, evaluates="nats")
    look = held_out.HeldOut(
        losses, valid, load_tokenizer(folder / "pretrain" / "model"), lambda: torch.autocast("cpu", enabled=False),
        held_out.Ranks(runtime.rank, runtime.world_size), length=31, documents=5, prompts=("ka lo",), sample_tokens=4,
    )
    bits, samples = look.look()
    found = {"bits": bits, "scored": scored, "samples": samples, "generated": len(generated)}
    (out / f"rank-{runtime.rank}.json").write_text(json.dumps(found))
    return {}
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("tokens_a_batch", [32, 8192])
def test_two_ranks_share_the_rows_and_have_the_figure_of_one(
    warm: Any, made: Path, tmp_path: Path, strategy: str, tokens_a_batch: int
):
    """An odd number of rows: the second rank has no part of the last batch of two, and runs it empty."""
    folder = made / "artifacts" / "tiny"
    (tmp_path / "look.py").write_text(STAGE)
    fields = f"made: {folder}, tokens_a_batch: {tokens_a_batch}"
    (tmp_path / "r.yaml").write_text(f"run: two\nstages:\n  it: {{stage: ./look.py, {fields}}}\n")
    done = warm("run", "r.yaml", "--num-processes", "2", "--strategy", strategy)
    assert done.code == 0, done.stderr
    ranks = [json.loads((tmp_path / f"artifacts/two/it/rank-{rank}.json").read_text()) for rank in (0, 1)]

    model = AutoModelForCausalLM.from_pretrained(folder / "pretrain" / "model").eval()
    valid = TokenFile(folder / "tokenize" / "valid.ds")
    chosen = choose_documents(valid, 5)
    sizes = [len(row) - 1 for index in chosen for row in windows(valid.document(index), SEPARATOR, 31)]
    expected = naive(model, valid, chosen, 31)
    assert len(sizes) % 2 == 1
    assert [found["bits"] for found in ranks] == pytest.approx([expected, expected], rel=1e-5)
    assert len(ranks[0]["scored"]) == len(ranks[1]["scored"])
    rows = [sum(count for count, _, _ in found["scored"]) for found in ranks]
    nats = [sum(nats for _, _, nats in found["scored"]) for found in ranks]
    targets = [sum(targets for _, targets, _ in found["scored"]) for found in ranks]
    if tokens_a_batch == 32:  # one row a rank and batch, in order of their lengths; then the empty one
        assert rows == [(len(sizes) + 1) // 2] * 2
        assert targets == [sum(sorted(sizes)[0::2]), sum(sorted(sizes)[1::2]) + min(sizes)]
        assert ranks[1]["scored"][-1][:2] == [1, min(sizes)]
        nats[1] -= ranks[1]["scored"][-1][2]
    else:
        assert (len(ranks[0]["scored"]), rows) == (1, [len(sizes) // 2 + 1, len(sizes) // 2])
        assert sum(targets) == sum(sizes)
    size = sum(int(valid.document_bytes[index]) for index in chosen)
    assert sum(nats) / math.log(2) / size == pytest.approx(expected, rel=1e-5)
    assert min(nats) > 0.4 * sum(nats)
    assert [found["generated"] for found in ranks] == ([1, 0] if strategy == "ddp" else [1, 1])
    assert ranks[0]["samples"]["sample_1"].startswith("ka lo")
    assert ranks[1]["samples"] == ({} if strategy == "ddp" else ranks[0]["samples"])
