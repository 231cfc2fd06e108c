"""The recipe `overoptimise`, tiny: its stages run by its name from any folder, the rows of one are data of others."""

import json
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.cli.stages import recipes_folder
from pipeline.rl.best_of_n import kl_bound

TINY = {
    "tokenize": ["data=./corpus.jsonl", "vocab_size=400"],
    "pretrain": ["model.hidden_size=32", "model.num_attention_heads=2", "context_length=64", "max_steps=4"],
    "sft": ["data=./rows.jsonl", "max_steps=2", "eval_rows=4"],
    "label": ["pairs=24", "response_length=8"],
    "reward": ["max_steps=2", "eval_rows=4", "demonstration_rows=16"],
    "ppo": ["total_episodes=16", "batch_size=8", "response_length=8", "eval_steps=1", "eval_prompts=4"],
    "dpo": ["max_steps=2", "eval_rows=4"],
    "frontier": ["prompts=4", "samples=8", "answers=2", "best_of=[1,4]", "response_length=8", "held_out=0.3"],
}
HELD_OUT = ("sft", "reward", "ppo", "dpo")


def overrides() -> list[str]:
    """`--set` of every stage, by the kind that its name begins with."""
    recipe = YAML(typ="safe", pure=True).load((recipes_folder() / "overoptimise.yaml").read_text())
    found = []
    for name in recipe["stages"]:
        kind = name.partition("-")[0]
        values = TINY[kind] + (["held_out=0.3"] if kind in HELD_OUT else [])
        found += [part for value in values for part in ("--set", f"{name}.{value}")]
    return found


@pytest.mark.slow
def test_the_whole_graph(warm: Any, tiny: Path):
    words = [row.split()[:6] for row in (tiny.parent / "corpus.jsonl").read_text().splitlines()[:120]]
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"say {number}"},
                {"role": "assistant", "content": " ".join(said[1:])},
            ]
        }
        for number, said in enumerate(words)
    ]
    (warm.folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    done = warm("run", "overoptimise", *overrides())
    assert done.code == 0, done.stderr
    artifacts = warm.folder / "artifacts" / "overoptimise"
    label = json.loads((artifacts / "label-0" / "manifest.json").read_text())
    reward = json.loads((artifacts / "reward-0" / "manifest.json").read_text())
    assert reward["inputs"]["data"] == [{"reference": "overoptimise/label-0", "fingerprint": label["fingerprint"]}]
    points = [json.loads(line) for line in (artifacts / "frontier" / "frontier.jsonl").read_text().splitlines()]
    of_best = [point for point in points if point["curve"] == "best of n by ensemble"]
    assert [(point["at"], point["kl_bound"]) for point in of_best] == [(1, 0.0), (4, kl_bound(4))]
    assert [point["at"] for point in points if point["curve"] == "ppo-0"] == [1, 2, ""]
    again = warm("run", "overoptimise", *overrides(), "--dry-run", "--json")
    assert {row["state"] for row in json.loads(again.stdout)} == {"stands"}
