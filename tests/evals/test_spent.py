"""What a model goes back to: FLOPs each stage once, and what of a task stands in what it was trained on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pipeline.artifacts import Artifact, read_artifact
from pipeline.evals.contamination import note
from pipeline.evals.own_tasks import read_own
from pipeline.evals.spent import lineage, spent_on
from pipeline.evaluation_config import Task


def made(
    root: Path, name: str, flops: float, parents: dict[str, list[str]], data: list[Path] | None = None
) -> Artifact:
    folder = root / "run" / name
    folder.mkdir(parents=True)
    manifest: dict[str, Any] = {"schema_version": 1, "kind": "causal-lm", "fingerprint": f"of {name}", "flops": flops}
    manifest["inputs"] = {
        role: [{"reference": each, "fingerprint": f"of {each.rpartition('/')[2]}"} for each in refs]
        for role, refs in parents.items()
    }
    manifest["config"] = {"data": [{"source": str(path)} for path in data or ()]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return read_artifact(folder, f"run/{name}")


def test_flops_of_all_that_a_model_goes_back_to_each_once(tmp_path: Path) -> None:
    """tokenize (none) → pretrain 100 → sft 10 → reward 5 and sample 3 (by sft), ppo 7 takes all: 125."""
    made(tmp_path, "tokenize", 0.0, {})
    made(tmp_path, "pretrain", 100.0, {"tokens": ["run/tokenize"]})
    made(tmp_path, "sft", 10.0, {"init": ["run/pretrain"]})
    made(tmp_path, "reward", 5.0, {"init": ["run/sft"]})
    made(tmp_path, "sample", 3.0, {"init": ["run/sft"], "reward": ["run/reward"]})
    ppo = made(tmp_path, "ppo", 7.0, {"init": ["run/sft"], "reward": ["run/reward"], "data": ["run/sample"]})
    found = spent_on(ppo)
    assert (found.own, found.cumulative) == (7.0, 125.0)
    outside = made(tmp_path, "tuned", 4.0, {"init": ["hub:org/name"], "other": ["/somewhere/model"]})
    assert spent_on(outside).cumulative == 4.0
    assert math.isnan(spent_on(made(tmp_path, "none", 0.0, {})).cumulative)


def test_an_ancestor_that_is_gone_or_was_made_anew_is_not_known(tmp_path: Path) -> None:
    lost = made(tmp_path, "sft", 10.0, {"init": ["run/pretrain"]})
    assert math.isnan(spent_on(lost).cumulative)
    assert spent_on(lost).own == 10.0
    made(tmp_path, "pretrain", 100.0, {})
    assert spent_on(lost).cumulative == 110.0
    file = tmp_path / "run/pretrain/manifest.json"
    file.write_text(file.read_text().replace("of pretrain", "of another"))
    assert math.isnan(spent_on(lost).cumulative)
    kept = json.loads(file.read_text()) | {"blessed": [{"fingerprint": "of pretrain"}]}
    file.write_text(json.dumps(kept))
    assert spent_on(lost).cumulative == 110.0
    assert len(lineage(lost)[0]) == 2


def test_rows_that_a_model_was_trained_on_are_said(tmp_path: Path) -> None:
    """Of four questions one is a training row's, one's choice shares 13 words with a text; what is gone is let be."""
    long = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    questions = [("Is it so?", "no"), ("And this?", f"so {long}."), ("New?", "a"), ("Newer?", "b")]
    rows = [{"question": q, "choices": [c, "yes"], "answer": 0} for q, c in questions]
    data, chats, text = (tmp_path / name for name in ("mine.jsonl", "chats.jsonl", "corpus.txt"))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chats.write_text(json.dumps({"messages": [{"role": "user", "content": " is it  SO?"}]}) + "\n")
    text.write_text(f"He counts {long} and so on.\n")
    made(tmp_path, "tokenize", 0.0, {}, [text, tmp_path / "gone.txt"])
    sft = made(tmp_path, "sft", 1.0, {"init": ["run/tokenize"]}, [chats])
    said: list[str] = []
    own = read_own(Task(task="mine", data=data), lambda line: None)
    found = note([own], [sft, sft], said.append)
    assert found == [
        {"task": "mine", "stage": "run/sft", "source": "chats.jsonl", "seen": 1, "of": 4},
        {"task": "mine", "stage": "run/tokenize", "source": "corpus.txt", "seen": 1, "of": 4},
    ]
    assert said == [
        "mine: 1 of 4 rows stand in what run/sft was trained on (chats.jsonl)",
        "mine: 1 of 4 rows stand in what run/tokenize was trained on (corpus.txt)",
    ]
    assert note([], [sft], said.append) == []
