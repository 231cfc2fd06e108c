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


def test_dpo_variants(warm: Any):
    """From one sft model: every loss for every seed, measured on the same rows."""
    names = ("dpo", "ipo", "kto", "simpo")
    small = {"max_steps": 2, "eval_rows": 8, "drift_prompts": 4, "max_new_tokens": 4, "data.0.limit": 40}
    small |= {"per_device_train_batch_size": 4, "matrix.seed": "[0, 1]"}
    few = {"questions": 8, "documents": 4, "prompts": 4, "preference_rows": 16, "max_new_tokens": 8}
    changed = SMALL | dict.fromkeys(names, small) | {"eval": few}
    changed["pretrain"] = SMALL["pretrain"] | {"model.intermediate_size": 64, "eval_documents": 4}
    changes = [
        f"{stage}.{field}={value}" for stage, fields in changed.items() if stage not in ("ppo", "grpo")
        for field, value in fields.items()
    ]  # fmt: skip
    done = warm("run", "dpo-variants", *(word for change in changes for word in ("--set", change)))
    assert done.code == 0, done.stderr
    folder = Path(warm.folder) / "artifacts" / "dpo-variants"
    results = [json.loads(line) for line in (folder / "eval" / "results.jsonl").read_text().splitlines()]
    stages = {f"{name}@seed={seed}" for name in names for seed in (0, 1)}
    assert stages | {"sft"} == {row["model"] for row in results}
    manifests = [json.loads((folder / stage / "manifest.json").read_text()) for stage in sorted(stages)]
    assert len({each["inputs"]["init"][0]["fingerprint"] for each in manifests}) == 1
    assert all({"accuracy", "kl_per_token", "greedy_length"} <= each["metrics"].keys() for each in manifests)


def test_rounds(warm: Any):
    """Each round's policy is the last one's, and what it is trained on are its own answers."""
    small = {"max_steps": 2, "eval_rows": 8, "drift_prompts": 0}
    changed: dict[str, dict[str, Any]] = {name: SMALL[name] for name in ("tokenize", "sft")}
    changed["pretrain"] = SMALL["pretrain"] | {"model.intermediate_size": 64, "eval_documents": 4}
    changed["reward"] = {"max_steps": 2, "eval_rows": 8, "data.0.limit": 100, "demonstration_rows": 16}
    changed["offline"] = small | {"data.0.limit": 100}
    changed["repeat.stages.sample"] = {"prompts": 24, "response_length": 8, "min_margin": 0.0}
    changed["repeat.stages.online"] = small | {"data.1.limit": 100}
    changed["eval-rounds"] = {"questions": 8, "documents": 4, "prompts": 4, "max_new_tokens": 8}
    changes = [f"{stage}.{field}={value}" for stage, fields in changed.items() for field, value in fields.items()]
    done = warm("run", "rounds", *(word for change in changes for word in ("--set", change)))
    assert done.code == 0, done.stderr
    folder = Path(warm.folder) / "artifacts" / "demo"
    manifests = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/manifest.json")}
    for turn, start in ((1, "sft"), (2, "online@1"), (3, "online@2")):
        fingerprint = manifests[start]["fingerprint"]
        for name in ("sample", "online"):
            assert manifests[f"{name}@{turn}"]["inputs"]["init"][0]["fingerprint"] == fingerprint
        rows = [json.loads(line) for line in (folder / f"sample@{turn}" / "rows.jsonl").read_text().splitlines()]
        assert 0 < len(rows) <= 24
        assert all(row["score_chosen"] > row["score_rejected"] for row in rows)
    results = [json.loads(line) for line in (folder / "eval-rounds" / "results.jsonl").read_text().splitlines()]
    assert {row["model"] for row in results} >= {"sft", "offline", "online@1", "online@2", "online@3"}


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
