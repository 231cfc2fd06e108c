"""Going on from a base, learning from a teacher, filling in the middle: what each run learns, keeps and resumes."""

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.artifacts import Artifact, outside_model
from pipeline.data.infilling import NAMES
from pipeline.data.shards import TokenFile
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import ArtifactError, ConfigError, MismatchError
from pipeline.model.held_out import bits_by_source
from pipeline.model.next_token import NextToken
from pipeline.model.unfinished import load_unfinished
from pipeline.recipe import PeftConfig
from pipeline.runtime import Runtime
from stages import tokenize
from stages.pretrain import ModelConfig
from stages.tokenize import TokenizeConfig

pytestmark = pytest.mark.slow

WORDS = "garden window bright purple jungle yellow village horizon quick judge wizard boxing".split()  # noqa: SIM905


@pytest.fixture
def small() -> dict[str, Any]:
    """Over the common fields: a rate for what has been learnt, so many samples a step, and no texts."""
    return {"learning_rate": 0.003, "per_device_train_batch_size": 4, "sample_tokens": 0}


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory, base: Artifact, corpus: Path) -> Artifact:
    """The base's text and another one, in its tokens and 40 more, with the marks of filling in."""
    folder = tmp_path_factory.mktemp("extended")
    draw = random.Random(0)
    texts = [" ".join(draw.choice(WORDS) for _ in range(40)) for _ in range(300)]
    (folder / "words.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = TokenizeConfig(
        data=[str(corpus), str(folder / "words.jsonl")],
        tokenizer="tiny/pretrain",
        added_merges=40,
        added_tokens=NAMES[0],
    )
    out = folder / "tokenize"
    out.mkdir()
    tokenize.run(config, {"tokenizer": base}, out, Runtime.start(out, seed=0, threads=1, quiet=True))
    return Artifact("extended/tokenize", out, "tokens", "extended", {"stage": "tokenize"})


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def sha(out: Path) -> str:
    return hashlib.sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest()


def stop_after_a_save(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.checkpoint import Checkpoints

    written = Checkpoints.save

    def save(self: Checkpoints, *arguments: Any) -> None:
        written(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", save)


@pytest.mark.parametrize("peft", [None, PeftConfig(r=4)], ids=["all weights", "lora"])
def test_a_base_learns_new_text_in_an_extended_vocabulary(
    train: Any,
    extended: Artifact,
    base: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    peft: PeftConfig | None,
):
    """Mostly new words, some of the old text replayed: the new are learnt, the old are known as before, and a killed
    run ends with the same bits and the same table."""
    fields = {"max_steps": 60, "save_steps": 25, "mixture": {"words": 0.7, "corpus": 0.3}, "peft": peft}
    fields |= {"learning_rate": 0.02} if peft else {}
    found = train(extended, tmp_path / "out", init=base, **fields)
    before = {label: found[f"before/bits_per_byte/{label}"] for label in ("corpus", "words")}
    assert found["bits_per_byte/words"] < 0.7 * before["words"]
    assert found["bits_per_byte/corpus"] < before["corpus"] + 0.15
    own = load_tokenizer(base.model)
    valid = TokenFile(extended.path / "valid.ds")
    model = AutoModelForCausalLM.from_pretrained(base.model).eval()
    tokenizer = load_tokenizer(extended.model)
    words = valid.document(valid.documents_of(1)[0])
    assert len(own(tokenizer.decode(words[:-1])).input_ids) > 1.5 * len(words)  # measured in its own tokens, not these
    first = lines(tmp_path / "out")[0]
    assert first["step"] == 0
    assert before == {label: first[f"bits_per_byte/{label}"] for label in before}
    corpus = nats_of(model, own, tokenizer, valid, valid.documents_of(0))
    assert before["corpus"] == pytest.approx(corpus, rel=1e-5)
    said = capsys.readouterr().err
    assert "43 new tokens: rows for them from those of their parts" in said
    assert "bits per byte, held out  before   after\n" in said
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").eval()
    assert loaded.config.vocab_size == len(tokenizer) == len(own) + 43
    again = bits_by_source(NextToken(loaded), valid, 32, 20)
    assert again["bits_per_byte/words"] == pytest.approx(found["bits_per_byte/words"], rel=1e-4)
    if peft is not None:
        frozen = (
            load_file(base.model / "model.safetensors"),
            load_file(tmp_path / "out" / "model" / "model.safetensors"),
        )
        assert set(frozen[0]) == set(frozen[1])
        name = "model.layers.0.input_layernorm.weight"
        assert torch.equal(frozen[0][name], frozen[1][name])

    with monkeypatch.context() as patch:
        stop_after_a_save(patch)
        with pytest.raises(KeyboardInterrupt):
            train(extended, tmp_path / "cut", init=base, **fields)
    if peft is not None:
        with pytest.raises(ArtifactError, match="holds adapters alone"):
            load_unfinished(tmp_path / "cut", torch.float32)
    assert train(extended, tmp_path / "cut", init=base, **fields) == found
    assert sha(tmp_path / "cut") == sha(tmp_path / "out")


def nats_of(model: Any, own: Any, tokenizer: Any, valid: TokenFile, documents: range) -> float:
    """Bits a byte over all these documents in the model's own tokens, window by window, by transformers' own loss."""
    from pipeline.model.held_out import choose_documents

    nats, size = 0.0, 0
    chosen = [documents[i - documents.start] for i in choose_documents(valid, 20, 0)]
    for index in chosen:
        ids = [valid.metadata.separator_id, *own(tokenizer.decode(valid.document(index)[:-1])).input_ids]
        for start in range(0, len(ids) - 1, 32):
            row = torch.tensor([ids[start : start + 33]])
            with torch.no_grad():
                nats += float(F.cross_entropy(model(row[:, :-1]).logits[0], row[0, 1:], reduction="sum"))
        size += int(valid.document_bytes[index])
    return nats / size / 0.6931471805599453


def test_dropout_is_resumed_to_the_same_bits(
    train: Any, tokens: Artifact, base: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fields = {"max_steps": 6, "save_steps": 2, "peft": PeftConfig(r=4, lora_dropout=0.3)}
    train(tokens, tmp_path / "whole", init=base, **fields)
    for _ in range(2):
        with monkeypatch.context() as patch:
            stop_after_a_save(patch)
            with pytest.raises(KeyboardInterrupt):
                train(tokens, tmp_path / "cut", init=base, **fields)
    train(tokens, tmp_path / "cut", init=base, **fields)
    assert sha(tmp_path / "cut") == sha(tmp_path / "whole")
    train(tokens, tmp_path / "dry", init=base, **{**fields, "peft": PeftConfig(r=4)})
    assert sha(tmp_path / "dry") != sha(tmp_path / "whole")


def test_a_step_of_adapters_counts_for_two_thirds(train: Any, tokens: Artifact, base: Artifact, tmp_path: Path):
    """In the utilisation as in the run's FLOPs: frozen weights have no gradient of their own."""
    found = train(tokens, tmp_path / "out", init=base, max_steps=2, peft=PeftConfig(r=4))
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "mfu" in row][-1]
    assert last["flops_per_second"] / last["tokens_per_second"] == pytest.approx(found["flops"] / last["tokens"])


def test_a_base_is_measured_behind_its_own_separator(train: Any, tmp_path: Path, base: Artifact, corpus: Path):
    """The base ends documents with a token of another name than the one that is added to it."""
    folder = tmp_path / "base"
    shutil.copytree(base.model, folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("<|endoftext|>", "</s>").replace("<|im_end|>", "<|over|>"))
    other = outside_model(folder)
    config = TokenizeConfig(data=[str(corpus)], tokenizer=str(folder), added_tokens=("<|endoftext|>",))
    out = tmp_path / "tokenize"
    out.mkdir()
    tokenize.run(config, {"tokenizer": other}, out, Runtime.start(out, seed=0, threads=1, quiet=True))
    tokens = Artifact("other/tokenize", out, "tokens", "other", {"stage": "tokenize"})
    assert TokenFile(out / "valid.ds").metadata.separator_id == 512 > len(load_tokenizer(folder)) - 1
    found = train(tokens, tmp_path / "out", init=other, max_steps=2)
    assert 0.5 < found["before/bits_per_byte/corpus"] < 2


def test_adapters_need_a_base(train: Any, tokens: Artifact, tmp_path: Path):
    with pytest.raises(ConfigError, match="adapters need a base model"):
        train(tokens, tmp_path / "out", peft=PeftConfig())


def test_a_student_learns_from_its_teacher(
    train: Any, tokens: Artifact, base: Artifact, tmp_path: Path, monkeypatch: Any
):
    """With the teacher alone to learn from, the divergence falls; resumed, the same bits."""
    fields = {
        "max_steps": 40,
        "save_steps": 15,
        "distill_alpha": 1.0,
        "distill_temperature": 2.0,
        "learning_rate": 0.01,
    }
    found = train(tokens, tmp_path / "out", teacher=base, **fields)
    rows = [line for line in lines(tmp_path / "out") if "loss" in line]
    assert all(row["loss"] == pytest.approx(row["teacher_kl"], rel=1e-5) for row in rows)
    assert rows[-1]["teacher_kl"] < 0.5 * rows[0]["teacher_kl"]
    assert found["bits_per_byte"] < 0.9 * NEW
    with monkeypatch.context() as patch:
        stop_after_a_save(patch)
        with pytest.raises(KeyboardInterrupt):
            train(tokens, tmp_path / "cut", teacher=base, **fields)
    train(tokens, tmp_path / "cut", teacher=base, **fields)
    assert sha(tmp_path / "cut") == sha(tmp_path / "out")


NEW = 4.0
"""Bits a byte of a new model of the tiny run, about: 512 tokens of 2.2 bytes."""


def test_the_first_loss_of_a_student_is_the_mix_that_was_asked_for(
    train: Any, tokens: Artifact, base: Artifact, tmp_path: Path
):
    train(tokens, tmp_path / "out", teacher=base, max_steps=1, distill_alpha=0.3, init=base)
    (row,) = [line for line in lines(tmp_path / "out") if "loss" in line]
    assert row["teacher_kl"] == pytest.approx(0, abs=1e-4)
    assert row["loss"] == pytest.approx(0.7 * row["cross_entropy"], rel=1e-4)


@pytest.mark.parametrize("padded", ["student", "teacher"])
def test_a_padded_vocabulary_on_either_side_is_no_matter(
    train: Any, tokens: Artifact, base: Artifact, tmp_path: Path, padded: str
):
    """Rows beyond the tokenizer's: the divergence from itself is still nothing."""
    model = AutoModelForCausalLM.from_pretrained(base.model)
    model.resize_token_embeddings(544)
    shutil.copytree(base.model, tmp_path / "padded", ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(tmp_path / "padded")
    wide = outside_model(tmp_path / "padded")
    given = {"init": wide, "teacher": base} if padded == "student" else {"init": base, "teacher": wide}
    train(tokens, tmp_path / "out", max_steps=1, **given)
    (row,) = [line for line in lines(tmp_path / "out") if "loss" in line]
    assert row["teacher_kl"] == pytest.approx(0, abs=1e-4)


def test_a_teacher_that_looks_across_documents_is_refused(train: Any, tokens: Artifact, tmp_path: Path):
    bloom = ModelConfig(architecture="bloom", config={"hidden_size": 32, "n_layer": 1, "n_head": 2})
    train(tokens, tmp_path / "bloom", model=bloom, max_steps=1)
    shutil.copy(tokens.model / "tokenizer.json", tmp_path / "bloom" / "model")
    teacher = outside_model(tmp_path / "bloom" / "model")
    with pytest.raises(ConfigError, match="BloomForCausalLM does not keep the documents of a sample apart"):
        train(tokens, tmp_path / "out", teacher=teacher, document_mask=True)


def test_a_teacher_of_other_tokens_is_refused(train: Any, extended: Artifact, base: Artifact, tmp_path: Path):
    with pytest.raises(MismatchError, match="the shards are of another tokenizer than"):
        train(extended, tmp_path / "out", teacher=base)


def test_filling_in_the_middle_is_learnt_and_resumed(
    train: Any, extended: Artifact, base: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """After it, the mark of the middle follows a suffix; without it, it never does."""
    fields = {"max_steps": 60, "save_steps": 25, "fim_rate": 0.9, "fim_spm_rate": 0.0, "learning_rate": 0.01}
    train(extended, tmp_path / "fim", init=base, **fields)
    train(extended, tmp_path / "plain", init=base, **{**fields, "fim_rate": 0.0})
    tokenizer = load_tokenizer(extended.model)
    prefix, suffix, middle = (tokenizer.convert_tokens_to_ids(name) for name in NAMES[0])
    text = tokenizer.decode(TokenFile(extended.path / "valid.ds").document(0)[:12])
    row = torch.tensor([[0, prefix, *tokenizer(text).input_ids, suffix]])
    share = {}
    for name in ("fim", "plain"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").eval()
        with torch.no_grad():
            share[name] = model(row).logits[0, 1].softmax(-1)[[prefix, suffix, middle]].sum().item()
            opening = model(row[:, :1]).logits[0, -1].softmax(-1)[prefix].item()
        share[f"{name}, opening"] = opening
    assert share["fim, opening"] > 20 * share["plain, opening"]
    with monkeypatch.context() as patch:
        stop_after_a_save(patch)
        with pytest.raises(KeyboardInterrupt):
            train(extended, tmp_path / "cut", init=base, **fields)
    train(extended, tmp_path / "cut", init=base, **fields)
    assert sha(tmp_path / "cut") == sha(tmp_path / "fim")
    with pytest.raises(ConfigError, match="fit no row"):
        train(extended, tmp_path / "fit", init=base, packing="best_fit", **fields)
