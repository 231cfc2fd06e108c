"""What a stage was trained on, by kind of stage, and what is said where it can't be had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from pipeline.artifacts import Store
from pipeline.data.samples import Packed, Shares, run_samples
from pipeline.data.shards import TokenFile
from pipeline.data.tokenizers import encode_text
from pipeline.evals import training_text
from pipeline.evals.training_text import Asked, Text, documents_read, nearest_rows
from tests.evals.lines import Line, put_manifest, put_shards


@pytest.fixture
def line(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Line:
    return Line(tmp_path, tokenizer)


def near(line: Line, artifact: Any, text: str = "sum of") -> Text:
    ids = encode_text(line.tokenizer, text)
    return nearest_rows(artifact, Asked(ids, [True] * len(ids), line.tokenizer, 3), line.store)


def test_preferences_say_which_side_it_was(line: Line):
    found = near(line, line.dpo)
    assert [(row.side, row.text, row.prompt) for row in found.rows] == [("chosen", "sum of numbers", "add")]
    assert near(line, line.dpo, "a file").rows[0].side == "rejected"


def test_ppo_points_at_the_rows_of_its_reward_model(line: Line):
    source = [{"source": str(line.store.root / "pairs.jsonl")}]
    reward = put_manifest(line.store, "reward", "reward-model", {}, source)
    ppo = put_manifest(line.store, "ppo", "causal-lm", {"init": [line.sft], "reward": [reward]})
    found = near(line, ppo)
    assert found.rows[0].text == "sum of numbers"
    assert found.notes == ["it learnt from its own answers; these are rows its reward model tiny/reward was trained on"]
    put_manifest(line.store, "reward", "reward-model", {}, source, fingerprint="another")
    assert "made again" in near(line, ppo).notes[1]
    alone = put_manifest(line.store, "ppo", "causal-lm", {"init": [line.sft], "reward": []})
    assert (near(line, alone).rows, near(line, alone).notes) == ([], ["it learnt from its own answers"])


def test_every_turn_that_was_trained_is_a_row(line: Line):
    turns = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "sum of two"},
        {"role": "user", "content": "then"},
        {"role": "assistant", "content": "sum of", "weight": 0},
        {"role": "user", "content": "last"},
        {"role": "assistant", "content": "sum of a list"},
    ]
    file = line.store.root / "rows.jsonl"
    file.write_text(json.dumps({"messages": turns}) + "\n")
    found = near(line, line.sft)
    assert sorted((row.prompt, row.text) for row in found.rows) == [("first", "sum of two"), ("last", "sum of a list")]


def test_what_is_missing_changed_or_unknown_is_said(line: Line):
    assert near(line, line.sft).notes == []
    (line.store.root / "rows.jsonl").unlink()
    (note,) = near(line, line.sft).notes
    assert note.endswith("rows.jsonl: no such file or folder")
    changed = json.loads((line.dpo.path / "manifest.json").read_text())
    changed["parts"]["data"] = {"data": ["0" * 64]}
    changed["metrics"] = {"epochs": 0.25}
    (line.dpo.path / "manifest.json").write_text(json.dumps(changed))
    notes = near(line, line.store.artifact("tiny", "dpo")).notes
    assert notes[0] == "of all its rows, of which it read 25%"
    assert notes[1].endswith("pairs.jsonl: changed since, and looked at as it is now")
    assert near(line, line.dpo, "open").notes == ["no row shares two tokens in a row with what it raised"]
    outside = line.store.resolve(str(line.sft.model))
    assert near(line, outside).notes == ["a model from outside: what it was trained on is not known"]
    (line.tokens.path / "train.ds.metadata").write_text("{}")
    (note,) = near(line, line.pretrain).notes
    assert note.startswith("tiny/tokenize: no readable metadata")


@pytest.mark.parametrize("packing", ["chunk", "best_fit"])
def test_the_documents_that_a_run_read_are_those_in_its_samples(
    packing: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
):
    """Document d is ten times the id d + 1: which were read is seen in the samples' tokens."""
    store = Store(tmp_path)
    tokens = put_shards(store, tokenizer, [[d + 1] * 10 for d in range(60)])
    pretrain = put_manifest(store, "pretrain", "causal-lm", {"tokens": [tokens]})
    config = {
        **{"context_length": 16, "packing": packing, "document_mask": False, "mixture": None, "max_epochs": None},
        **{"anneal": None, "max_steps": 3, "seed": 5, "per_device_train_batch_size": 2},
        **{"gradient_accumulation_steps": 2, "data": []},
    }
    manifest = json.loads((pretrain.path / "manifest.json").read_text()) | {"config": config}
    (pretrain.path / "manifest.json").write_text(json.dumps(manifest))
    pretrain, file = store.artifact("tiny", "pretrain"), TokenFile(tokens.path / "train.ds")
    samples = run_samples(file, Packed(16, packing), Shares(), 3, 4, 5)  # type: ignore[arg-type]
    rows = samples.order.take(range(12)).rows_BT
    seen = sorted({int(token) - 1 for token in rows.ravel()} - {-1})
    read = documents_read(pretrain, file)
    assert read is not None
    assert 5 < len(seen) < 60
    assert set(seen) <= set(read)
    assert len(set(read) - set(seen)) <= 12, "only those of which a sample has nothing but the separator"
    monkeypatch.setattr(training_text, "MOST_SAMPLES", 11)
    assert documents_read(pretrain, file) is None
    del manifest["config"]["packing"]
    (pretrain.path / "manifest.json").write_text(json.dumps(manifest))
    assert documents_read(store.artifact("tiny", "pretrain"), file) is None
