"""Recipes that ship, run small: their graph, not their figures."""

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

SMALL = {
    "tokenize": {"data.0.limit": 2000, "vocab_size": 300},
    "pretrain": {"model.depth": 1, "model.hidden_size": 32, "model.num_attention_heads": 2, "max_steps": 6},
    "sft": {"max_steps": 4, "eval_rows": 16, "data.0.limit": 400},
    "ppo": {"total_episodes": 32, "batch_size": 16, "response_length": 8},
    "grpo": {"total_episodes": 32, "batch_size": 16, "response_length": 8},
    "eval": {"prompts": 12, "max_new_tokens": 8},
}


def test_arithmetic(warm: Any):
    """Offline and without a file: both policies are measured on the same held-out problems as their start."""
    changes = [f"{stage}.{name}={value}" for stage, fields in SMALL.items() for name, value in fields.items()]
    done = warm("run", "arithmetic", *(word for change in changes for word in ("--set", change)))
    assert done.code == 0, done.stderr
    folder = Path(warm.folder) / "artifacts" / "arithmetic" / "eval"
    results = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    metrics = {model: {row["metric"] for row in results if row["model"] == model} for model in ("sft", "ppo", "grpo")}
    assert metrics["sft"] == {"accuracy", "length", "ended"}
    assert metrics["ppo"] == metrics["grpo"] == {"accuracy", "difference", "length", "ended"}
    assert {row["n"] for row in results} == {12}
    items = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    asked = {model: [item["prompt"] for item in items if item["model"] == model] for model in metrics}
    assert asked["sft"] == asked["ppo"] == asked["grpo"]
    shown = json.loads((folder.parent / "grpo" / "manifest.json").read_text())
    assert shown["metrics"]["reward"] == pytest.approx(0.0, abs=0.5)  # an untrained model is right by chance at most
