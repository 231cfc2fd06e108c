"""The recipes of docs/sample.md on a tiny model: sft and dpo take what sample and label write, round after round."""

from __future__ import annotations

import json

import pytest

from tests.conftest import Warm
from tests.stages.conftest import demonstration, make_model

RECIPE = """\
run: rounds
stages:
  sample: &sample
    init: ./chat
    data: rows.jsonl
    reward: ./rewards.py:short
    prompts: 24
    num_generations: 3
    response_length: 8
    keep: pairs
    unfinished: keep
    bf16: false
  dpo: &dpo {init: ./chat, data: [sample], max_steps: 2, held_out: 0.2, bf16: false}
  again: {<<: *sample, stage: sample, init: dpo, seed: 1}
  dpo-2: {<<: *dpo, stage: dpo, init: dpo, data: [again]}
  best: {<<: *sample, stage: sample, keep: best}
  tuned: {stage: sft, init: ./chat, data: [best], max_steps: 2, held_out: 0.2, bf16: false}
  own: {<<: *sample, stage: sample, keep: reference, num_generations: 1}
  spin: {<<: *dpo, stage: dpo, data: [own]}
  said: {<<: *sample, stage: sample, keep: all, num_generations: 2}
  label: {data: [said], judge: ./chat, constitution: rules.md, tie_margin: 0.01, bf16: false}
  rlaif: {<<: *dpo, stage: dpo, data: [label]}
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
        for name in ("sample", "again", "best", "own", "said", "label")
    }
    assert all(len(row["chosen"]) < len(row["rejected"]) for row in read["sample"] + read["again"])
    asked = [{json.dumps(row["prompt"]) for row in read[name]} for name in ("sample", "again")]
    assert asked[0] != asked[1], "another seed, other prompts"
    own = {json.loads(line)["messages"][-1]["content"] for line in (warm.folder / "rows.jsonl").open()}
    assert {row["chosen"] for row in read["own"]} <= own
    assert all(row["preference"] in (0.5, 1.0) for row in read["label"])
    parents = json.loads((folder / "dpo-2" / "manifest.json").read_text())["inputs"]
    assert [each["reference"] for each in (*parents["init"], *parents["data"])] == ["rounds/dpo", "rounds/again"]
    assert json.loads((folder / "label" / "manifest.json").read_text())["inputs"]["judge"]
    again = warm("run", "rounds.yaml", "--dry-run", "--json")
    assert {row["state"] for row in json.loads(again.stdout)} == {"stands"}
