"""What pretrain draws and how it is packed: mixtures, second phases, whole documents, documents apart."""

import hashlib
import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.artifacts import Artifact
from pipeline.data.packing import cut
from pipeline.data.shards import TokenFile
from pipeline.errors import ConfigError
from pipeline.runtime import Runtime
from stages import pretrain, tokenize
from stages.pretrain import Anneal, ModelConfig, PretrainConfig
from stages.tokenize import TokenizeConfig

pytestmark = pytest.mark.slow


@pytest.fixture
def small() -> dict[str, Any]:
    """Over the common fields: so many samples a step, and no texts."""
    return {"per_device_train_batch_size": 4, "sample_tokens": 0}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Artifact:
    """Shards of two sources that share no word: an invented language, and sums."""
    folder = tmp_path_factory.mktemp("mixed")
    draw = random.Random(0)
    pairs = [[(draw.randrange(100), draw.randrange(100)) for _ in range(20 + i % 40)] for i in range(400)]
    sums = [" ".join(f"{a}+{b}={a + b}" for a, b in row) for row in pairs]
    (folder / "sums.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in sums))
    config = TokenizeConfig(data=[str(corpus), str(folder / "sums.jsonl")], vocab_size=400)
    out = folder / "tokenize"
    out.mkdir()
    tokenize.run(config, {"tokenizer": None}, out, Runtime.start(out, seed=0, threads=1, quiet=True))
    return Artifact("mixed/tokenize", out, "tokens", "mixed", {"stage": "tokenize"})


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_mixture_is_drawn_as_asked_and_what_it_leaves_out_is_not_learnt(train: Any, mixed: Artifact, tmp_path: Path):
    """40 steps of 4 samples of 32 tokens: 5,120, of which three quarters and one; then of one source alone."""
    both = train(mixed, tmp_path / "both", max_steps=40, mixture={"corpus": 1, "sums": 3})
    assert (both["drawn_tokens/corpus"], both["drawn_tokens/sums"]) == (1280, 3840)
    file = TokenFile(mixed.path / "train.ds")
    assert [source.label for source in file.metadata.sources] == ["corpus", "sums"]
    windows = [(source.tokens - 1) // 32 for source in file.metadata.sources]
    assert both["epochs/sums"] == 120 / windows[1]
    assert both["epochs"] == pytest.approx(160 / sum(windows))
    alone = train(mixed, tmp_path / "alone", max_steps=40, mixture={"sums": 1})
    assert "drawn_tokens/corpus" not in alone
    assert alone["bits_per_byte/corpus"] > 1.2 * both["bits_per_byte/corpus"]
    assert alone["bits_per_byte/sums"] < 1.1 * both["bits_per_byte/sums"]


def test_the_weights_of_the_data_are_the_mixture_unless_one_is_set(train: Any, mixed: Artifact, tmp_path: Path):
    metadata = mixed.path / "train.ds.metadata"
    written = metadata.read_text()
    found = json.loads(written)
    found["sources"][0]["weight"] = 2.0
    try:
        metadata.write_text(json.dumps(found))
        drawn = train(mixed, tmp_path / "out", max_steps=40)
    finally:
        metadata.write_text(written)
    words, sums = (source["tokens"] * source["weight"] for source in found["sources"])
    assert drawn["drawn_tokens/corpus"] == pytest.approx(5120 * words / (words + sums), abs=32)


def test_a_source_is_read_no_oftener_than_its_cap(train: Any, mixed: Artifact, tmp_path: Path):
    file = TokenFile(mixed.path / "train.ds")
    one = (file.metadata.sources[0].tokens - 1) // 32
    steps = one // 16  # 2 × one samples: half of them of each source, were it not for the cap
    fields = {"max_steps": steps, "per_device_train_batch_size": 32}
    found = train(mixed, tmp_path / "out", mixture={"corpus": 1, "sums": 1}, max_epochs={"corpus": 0.25}, **fields)
    assert found["epochs/corpus"] == pytest.approx(0.25, abs=1 / one)
    assert found["drawn_tokens/corpus"] + found["drawn_tokens/sums"] == steps * 32 * 32
    with pytest.raises(
        ConfigError, match=r"takes 4,000 samples and the sources have [\d,]+ of them \(corpus [\d,]+, sums"
    ):
        train(mixed, tmp_path / "few", max_steps=1000, mixture={"corpus": 1, "sums": 1}, max_epochs=0.5)
    with pytest.raises(ConfigError, match="no source `sum`; did you mean `sums`"):
        train(mixed, tmp_path / "typo", mixture={"sum": 1})
    with pytest.raises(ConfigError, match="no source `sum`; did you mean `sums`"):
        train(mixed, tmp_path / "typo", mixture={"sums": 1}, max_epochs={"sum": 1})


def test_a_second_phase_is_gone_on_with_to_the_same_bits(
    train: Any, mixed: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Ten steps of the first source, ten of the second; killed after the 8th and the 16th."""
    from pipeline.checkpoint import Checkpoints

    fields = {
        "max_steps": 20,
        "mixture": {"corpus": 1.0},
        "anneal": Anneal(share=0.5, mixture={"sums": 1.0}),
        "save_steps": 8,
        "packing": "best_fit",
        "document_mask": True,
    }
    straight = train(mixed, tmp_path / "straight", **fields)
    assert straight["epochs/corpus"] > 0 < straight["epochs/sums"]
    written = Checkpoints.save

    def save_and_die(self: Checkpoints, *arguments: Any) -> None:
        written(self, *arguments)
        raise KeyboardInterrupt

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "save", save_and_die)
            with pytest.raises(KeyboardInterrupt):
                train(mixed, tmp_path / "cut", **fields)
    assert train(mixed, tmp_path / "cut", **fields) == straight
    name = "model/model.safetensors"
    assert sha(tmp_path / "cut" / name) == sha(tmp_path / "straight" / name)
    found = losses(tmp_path / "straight")
    assert found[10] > found[9] + 0.5  # the other language


def nats_alone(model: Any, ids: list[int]) -> float:
    """−Σ ln p of all but the first, by transformers' own loss on this row alone."""
    row = torch.tensor([ids])
    with torch.no_grad():
        return float(model(row, labels=row).loss) * (len(ids) - 1)


LENGTH = 32


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory, corpus: Path, base: Artifact) -> Artifact:
    """Shards of the corpus' 110 shortest documents, in the base's tokens."""
    folder = tmp_path_factory.mktemp("short")
    lines = sorted(corpus.read_text().splitlines(keepends=True), key=len)
    (folder / "short.jsonl").write_text("".join(lines[:110]))
    out = folder / "tokenize"
    out.mkdir()
    config = TokenizeConfig(data=[str(folder / "short.jsonl")], tokenizer="tiny/pretrain")
    tokenize.run(config, {"tokenizer": base}, out, Runtime.start(out, seed=0, threads=1, quiet=True))
    return Artifact("short/tokenize", out, "tokens", "short", {"stage": "tokenize"})


@pytest.fixture(scope="module")
def nats_of_each_alone(short: Artifact, base: Artifact) -> float:
    """Over all documents, cut where they are longer than LENGTH."""
    file = TokenFile(short.path / "train.ds")
    model = AutoModelForCausalLM.from_pretrained(base.model).eval()
    starts, lengths = cut(file.ends.astype("int64"), LENGTH)
    separator = file.metadata.separator_id
    total = 0.0
    for start, size in zip(starts.tolist(), lengths.tolist(), strict=True):
        lead = int(file.tokens[start - 1]) if start else separator
        total += nats_alone(model, [lead, *file.tokens[start : start + size].tolist()])
    return total


@pytest.mark.parametrize("packing", ["best_fit", "document"])
def test_the_loss_of_whole_documents_is_that_of_each_alone(
    train: Any, packing: str, short: Artifact, base: Artifact, nats_of_each_alone: float, tmp_path: Path
):
    """One step over a whole epoch, at the rate of nothing: the mean over every document, each on its own."""
    file = TokenFile(short.path / "train.ds")
    config = PretrainConfig(context_length=LENGTH, packing=packing, document_mask=True)
    samples = pretrain._samples(config, file)
    fields = {"packing": packing, "document_mask": True, "context_length": LENGTH, "per_device_train_batch_size": 1}
    train(short, tmp_path / "out", base, max_steps=1, gradient_accumulation_steps=samples.order.count, **fields)
    assert losses(tmp_path / "out")[0] == pytest.approx(nats_of_each_alone / len(file), rel=1e-5)
    assert samples.epochs(samples.order.count) == 1


def test_documents_of_a_window_do_not_see_each_other(train: Any, tokens: Artifact, base: Artifact, tmp_path: Path):
    """The loss of windows with the mask is that of their parts between separators, and not that without it."""
    file = TokenFile(tokens.path / "train.ds")
    model = AutoModelForCausalLM.from_pretrained(base.model).eval()
    fields = {"context_length": 32, "per_device_train_batch_size": 64, "max_steps": 1}
    samples = pretrain._samples(PretrainConfig(**fields), file)
    total = 0.0
    for row in samples.order.take(range(64)).rows_BT.tolist():
        begins = [0, *[t for t in range(1, 32) if row[t] == file.metadata.separator_id], 32]
        total += sum(nats_alone(model, row[a : b + 1]) for a, b in itertools.pairwise(begins) if b > a)
    train(tokens, tmp_path / "apart", base, document_mask=True, **fields)
    train(tokens, tmp_path / "together", base, **fields)
    assert losses(tmp_path / "apart")[0] == pytest.approx(total / (64 * 32), rel=1e-5)
    assert losses(tmp_path / "together")[0] != pytest.approx(total / (64 * 32), rel=1e-4)


def test_shares_are_of_tokens_however_full_a_source_s_samples_are(mixed: Artifact):
    """One document a sample: those of sums are shorter, and come the oftener for it."""
    file = TokenFile(mixed.path / "train.ds")
    config = PretrainConfig(context_length=128, packing="document", max_steps=50, mixture={"corpus": 0.5, "sums": 0.5})
    samples = pretrain._samples(config, file)
    drawn = {each.label: each.tokens for each in samples.drawn(400)}
    assert drawn["sums"] / sum(drawn.values()) == pytest.approx(0.5, abs=0.03)
    by_size = pretrain._samples(config.model_copy(update={"mixture": None, "max_epochs": 1000.0}), file)
    sizes = [source.tokens for source in file.metadata.sources]
    drawn = {each.label: each.tokens for each in by_size.drawn(400)}
    assert drawn["corpus"] / sum(drawn.values()) == pytest.approx(sizes[0] / sum(sizes), abs=0.03)


@pytest.mark.parametrize(("steps", "share", "what"), [(4, 0.1, "none"), (2, 0.9, "all")])
def test_a_second_phase_of_no_step_or_all_is_refused(mixed: Artifact, steps: int, share: float, what: str):
    anneal = Anneal(share=share, mixture={"sums": 1.0})
    config = PretrainConfig(context_length=32, max_steps=steps, anneal=anneal)
    with pytest.raises(ConfigError, match=f"the last {share:.0%} of {steps} steps is {what} of them"):
        pretrain._samples(config, TokenFile(mixed.path / "train.ds"))


def test_a_cap_on_a_source_that_is_not_drawn_is_no_fault(mixed: Artifact):
    file = TokenFile(mixed.path / "train.ds")
    config = PretrainConfig(context_length=32, max_steps=3, mixture={"sums": 1.0}, max_epochs={"corpus": 2.0})
    assert [each.label for each in pretrain._samples(config, file).drawn(24)] == ["sums"]


@pytest.mark.parametrize("fields", [{"mixture": {"sums": -1}}, {"mixture": {"sums": math.inf}}, {"max_epochs": -2}])
def test_shares_and_caps_are_sensible_numbers(fields: dict[str, Any]):
    with pytest.raises(ValueError, match=r"greater than|finite"):
        PretrainConfig(**fields)


def test_experts_do_not_go_with_smaller_micro_steps(train: Any, mixed: Artifact, tmp_path: Path):
    experts = ModelConfig(architecture="qwen3_moe", depth=1, hidden_size=32, num_attention_heads=2)
    with pytest.raises(ConfigError, match="experts are balanced over a micro-step's rows"):
        train(mixed, tmp_path / "out", model=experts, auto_find_batch_size=True, max_steps=1)


def test_a_family_that_looks_across_documents_is_refused(train: Any, mixed: Artifact, tmp_path: Path):
    bloom = ModelConfig(architecture="bloom", config={"hidden_size": 32, "n_layer": 1, "n_head": 2})
    with pytest.raises(ConfigError, match="BloomForCausalLM does not keep the documents of a sample apart"):
        train(mixed, tmp_path / "out", model=bloom, document_mask=True)
