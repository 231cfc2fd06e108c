"""Losses that a refactoring must not move: short fp32 runs against what is written in tests/golden/pretrain.json.

A change that is meant to move them writes them anew, and says so in the changelog:

    LLMPIPE_WRITE_GOLDEN=1 python -m pytest tests/stages/test_golden.py
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifacts import Artifact, Store
from pipeline.runtime import Runtime
from stages import pretrain
from stages.pretrain import ModelConfig, PretrainConfig

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parents[1] / "golden" / "pretrain.json"
TINY = {"depth": 2, "hidden_size": 32, "num_attention_heads": 2}
RUNS: dict[str, dict[str, Any]] = {
    "adamw": {"learning_rate": 0.01},
    "by the rule": {},
    "muon": {"optimizer": "muon", "learning_rate": 0.006, "embedding_learning_rate": 0.06},
    "accumulated": {"learning_rate": 0.01, "gradient_accumulation_steps": 3, "lr_scheduler_type": "wsd"},
    "gpt2": {"learning_rate": 0.003, "model": ModelConfig(architecture="gpt2", **TINY)},
    "experts": {"learning_rate": 0.006, "model": ModelConfig(architecture="qwen3_moe", **TINY)},
    "whole documents apart": {"learning_rate": 0.01, "packing": "best_fit", "document_mask": True},
}


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_where_they_were(name: str, made: Path, tmp_path: Path):
    """To a thousandth, which other processors stay within; Muon's iteration is in bf16 and has five."""
    tokens = Store(made / "artifacts").artifact("tiny", "tokenize")
    found = losses(tokens, tmp_path, RUNS[name])
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("LLMPIPE_WRITE_GOLDEN") == "1":
        golden[name] = [round(loss, 5) for loss in found]
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    assert len(found) == 12
    assert found == pytest.approx(golden[name], rel=5e-3 if name == "muon" else 1e-3)


def losses(tokens: Artifact, out: Path, fields: dict[str, Any]) -> list[float]:
    given = {
        "model": ModelConfig(**TINY),
        "context_length": 32,
        "per_device_train_batch_size": 4,
        "max_steps": 12,
        "logging_steps": 1,
        "eval_documents": 5,
        "sample_tokens": 0,
        "bf16": False,
    }
    config = PretrainConfig(**{**given, **fields})
    runtime = Runtime.start(out, seed=config.seed, threads=1, quiet=True)
    pretrain.run(config, {"tokens": tokens}, out, runtime)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]
