"""`repeat:` and `matrix:` over real stages: two rounds of dpo, then variants of it over seeds, compared by eval."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.evals.export import read_csv

DPO = "data: preferences.jsonl, max_steps: 4, per_device_train_batch_size: 4, bf16: false, eval_rows: 8"
RECIPE = f"""\
run: rounds
stages:
  repeat:
    times: 2
    carry:
      policy: {{first: ./model, then: dpo}}
    stages:
      dpo: {{init: policy, learning_rate: 1e-3, {DPO}}}
  wide:
    stage: dpo
    matrix: {{seed: [0, 1000], learning_rate: [1e-3, 1e-2]}}
    init: dpo@1
    {DPO.replace(", ", chr(10) + "    ")}
  eval:
    models: [dpo@*, wide]
    baseline: dpo@1
    tokens: null
    reward: null
    data: demonstrations.jsonl
    preferences: preferences.jsonl
    held_out: 0.2
    prompts: 8
    preference_rows: 16
    max_length: 96
    max_new_tokens: 8
    bf16: false
    matched_by: kl
"""
PLAIN = f"run: plain\nstages:\n  dpo: {{init: ./model, learning_rate: 1e-3, {DPO}}}\n"
ROUNDS = ["dpo@1", "dpo@2"]
MEMBERS = [f"wide@learning_rate={rate}@seed={seed}" for rate in ("0.001", "0.01") for seed in (0, 1000)]


@pytest.mark.slow
def test_two_rounds_and_a_matrix(warm: Any, model_folder: Path, preferences: Path, demonstrations: Path) -> None:
    shutil.copytree(model_folder, warm.folder / "model")
    shutil.copy2(preferences, warm.folder / "preferences.jsonl")
    shutil.copy2(demonstrations, warm.folder / "demonstrations.jsonl")
    warm.write("r.yaml", RECIPE)
    warm.write("plain.yaml", PLAIN)
    artifacts = warm.folder / "artifacts" / "rounds"

    def manifest(stage: str) -> dict[str, Any]:
        return dict(json.loads((artifacts / stage / "manifest.json").read_text()))

    # the first round is what a stage without rounds would be
    assert warm("run", "r.yaml", "--until", "dpo@1").code == 0
    states = json.loads(warm("status", "plain.yaml", "--json").stdout)["stages"]
    assert manifest("dpo@1")["fingerprint"] == states[0]["fingerprint"]

    # the rest goes on from it
    done = warm("run", "r.yaml")
    assert done.code == 0, done.stderr
    assert done.stderr.splitlines()[0].split()[:2] == ["dpo@1", "stands"]
    for stage, parent in (("dpo@2", "dpo@1"), *((member, "dpo@1") for member in MEMBERS)):
        (taken,) = manifest(stage)["inputs"]["init"]
        assert taken == {"reference": f"rounds/{parent}", "fingerprint": manifest(parent)["fingerprint"]}
    weights = {stage: manifest(stage)["files"]["model/model.safetensors"]["sha256"] for stage in (*ROUNDS, *MEMBERS)}
    assert weights.pop("dpo@2") == weights["wide@learning_rate=0.001@seed=1000"], "the same values and the same parent"
    assert len(set(weights.values())) == len(weights) == 5
    assert (manifest("dpo@1")["parts"]["config"].get("seed"), manifest("dpo@2")["parts"]["config"]["seed"]) == (
        None,
        1000,
    )

    # every model, means over seeds, differences of rounds and variants, and what is nearest in KL
    table = read_csv(artifacts / "eval" / "table.csv")
    variants = ["wide@learning_rate=0.001", "wide@learning_rate=0.01"]
    found = dict.fromkeys((line["kind"], line["model"], line["against"]) for line in table)
    assert [key for key in found if key[0] != "matched"] == [
        *(("model", name, "") for name in (*ROUNDS, *MEMBERS)),
        *(("mean", name, "") for name in variants),
        ("difference", "dpo@2", "dpo@1"),
        ("difference", variants[1], variants[0]),
    ]
    assert [key for key in found if key[0] == "matched"] == [("matched", name, "dpo@2") for name in variants]
    flops = {(line["kind"], line["model"]): line["flops"] for line in table}
    assert all(flops["model", name] == manifest(name)["flops"] > 0 for name in (*ROUNDS, *MEMBERS))
    for title in ("mean over seeds,", "difference,", "nearest in KL,"):
        assert title in done.stdout

    # nothing runs twice, and a third round leaves the two standing
    assert "nothing to do" in warm("run", "r.yaml").stdout
    third = json.loads(warm("run", "r.yaml", "--dry-run", "--json", "--set", "repeat.times=3").stdout)
    assert [row["stage"] for row in third if row["runs"]] == ["dpo@3", "eval"]
