"""The recipes of docs/sample.md on a tiny model: sft and dpo take what sample and label write, round after round."""

from __future__ import annotations

import json

import pytest

from tests.conftest import Warm
from tests.stages.conftest import demonstration, make_model

RECIPE = """\
run: rounds
stages:
  repeat:
    times: 2
    carry:
      policy: {first: ./chat, then: dpo}
    stages:
      sample: {init: policy, data: rows.jsonl, reward: "./rewards.py:short", prompts: 24, num_generations: 3,
               response_length: 8, keep: pairs, unfinished: keep, bf16: false}
      dpo: {init: policy, data: [sample], max_steps: 2, held_out: 0.2, bf16: false}
  best: &sample
    stage: sample
    init: ./chat
    data: rows.jsonl
    reward: ./rewards.py:short
    prompts: 24
    num_generations: 3
    response_length: 8
    keep: best
    unfinished: keep
    bf16: false
  tuned: {stage: sft, init: ./chat, data: [best], max_steps: 2, held_out: 0.2, bf16: false}
  own: {<<: *sample, keep: reference, num_generations: 1}
  spin: &dpo {stage: dpo, init: ./chat, data: [own], max_steps: 2, held_out: 0.2, bf16: false}
  said: {<<: *sample, keep: all, num_generations: 2}
  label: {data: [said], judge: ./chat, constitution: rules.md, tie_margin: 0.01, bf16: false}
  rlaif: {<<: *dpo, data: [label]}
"""


@pytest.mark.slow
def test_rounds(warm: Warm):
    make_model(warm.folder / "parts", context=256).rename(warm.folder / "chat")
    warm.write("rows.jsonl", "".join(json.dumps(demonstration(index)) + "\n" for index in range(40)))
    warm.write("rules.md", "Short answers are better.\n")
    warm.write("rewards.py", "def short(prompts, responses, rows):\n    return [-float(len(r)) for r in responses]\n")
    warm.write("rounds.yaml", RECIPE)
    done = warm("run", "rounds.yaml")
    assert done.code == 0, done.stderr
    folder = warm.folder / "artifacts" / "rounds"
    read = {
        name: [json.loads(line) for line in (folder / name / "rows.jsonl").read_text().splitlines()]
        for name in ("sample@1", "sample@2", "best", "own", "said", "label")
    }
    assert all(len(row["chosen"]) < len(row["rejected"]) for row in read["sample@1"] + read["sample@2"])
    asked = [{json.dumps(row["prompt"]) for row in read[name]} for name in ("sample@1", "sample@2")]
    assert asked[0] != asked[1], "another seed, other prompts"
    own = {json.loads(line)["messages"][-1]["content"] for line in (warm.folder / "rows.jsonl").open()}
    assert {row["chosen"] for row in read["own"]} <= own
    assert all(row["preference"] in (0.5, 1.0) for row in read["label"])
    parents = json.loads((folder / "dpo@2" / "manifest.json").read_text())["inputs"]
    assert [each["reference"] for each in (*parents["init"], *parents["data"])] == ["rounds/dpo@1", "rounds/sample@2"]
    assert json.loads((folder / "label" / "manifest.json").read_text())["inputs"]["judge"]
    again = warm("run", "rounds.yaml", "--dry-run", "--json")
    assert {row["state"] for row in json.loads(again.stdout)} == {"stands"}
