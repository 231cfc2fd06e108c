"""An adapter's folder where a model is asked for: every stage does with it what it does with the merged model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from pipeline.adapted import adapted_model
from pipeline.artifacts import Store, content_hash, outside_model
from pipeline.errors import MismatchError, MissingInputError
from pipeline.hashes import digest
from pipeline.model.adapters import lora
from pipeline.model.build import load_causal_lm
from pipeline.model.merging import MERGED, merged_inputs
from pipeline.recipe import PeftConfig
from pipeline.roles import input_of
from tests.stages.conftest import demonstration, make_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`base/model`, and `adapter` on it."""
    base = make_model(tmp_path / "base")
    adapted = get_peft_model(load_causal_lm(base), lora(PeftConfig(r=4), "CAUSAL_LM"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=generator)
    adapted.peft_config["default"].base_model_name_or_path = "../base/model"
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path


def test_it_counts_with_its_base(folder: Path):
    adapter, base = folder / "adapter", folder / "base" / "model"
    found = adapted_model(adapter)
    assert found == input_of(Store(folder / "artifacts"), str(adapter), "causal-lm")
    assert found.fingerprint == digest(["adapter", content_hash(adapter), outside_model(base).fingerprint])
    assert (found.reference, found.model.resolve(), found.adapter) == (str(adapter), base.resolve(), adapter)
    before = torch.random.get_rng_state()
    made = merged_inputs({"init": found, "models": [found], "judge": None}, folder / "work", True, lambda: None)
    assert torch.equal(torch.random.get_rng_state(), before), "no random number is taken"
    assert made["init"] == made["models"][0]
    assert made["init"].model == folder / "work" / MERGED / found.fingerprint[:16]
    assert (made["init"].adapter, made["init"].fingerprint, made["judge"]) == (None, found.fingerprint, None)
    assert made["init"].tokenizer_hash == found.tokenizer_hash != ""
    (base / "config.json").write_text((base / "config.json").read_text() + "\n")
    assert adapted_model(adapter).fingerprint != found.fingerprint


def test_what_is_refused(folder: Path):
    adapter = folder / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())

    def says(**changes: Any) -> None:
        (adapter / "adapter_config.json").write_text(json.dumps(config | changes))

    for changes, kind, message in (
        ({"base_model_name_or_path": "org/name"}, MissingInputError, "an adapter whose base, 'org/name', is no folder"),
        ({"base_model_name_or_path": None}, MissingInputError, "an adapter that names no base"),
        ({"task_type": "SEQ_CLS"}, MismatchError, "of the kind SEQ_CLS on a causal-lm"),
    ):
        says(**changes)
        with pytest.raises(kind, match=message) as caught:
            adapted_model(adapter)
        if kind is MissingInputError:
            assert caught.value.mend.startswith(f"llmpipe export {adapter} --to merged --base REF --out ")
    says()
    shutil.copy(folder / "base/model/tokenizer.json", adapter)
    assert adapted_model(adapter).adapter == adapter, "a copy of the base's"
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(MismatchError, match="another tokenizer or chat template") as caught:
        adapted_model(adapter)
    assert caught.value.mend.startswith(f"llmpipe export {adapter} --to merged --out ")
    with pytest.raises(MissingInputError, match="an adapter without the model it stands on"):
        input_of(Store(folder / "artifacts"), str(adapter), "reward-model")


RECIPE = """\
run: {run}
stages:
  sft: {{init: {init}, data: rows.jsonl, max_steps: 2, bf16: false}}
  reward: {{init: {init}, data: pairs.jsonl, demonstrations: rows.jsonl, max_steps: 2, bf16: false}}
  dpo: {{init: {init}, data: pairs.jsonl, max_steps: 2, bf16: false}}
  ppo: {{init: {init}, reward: './rewards.py:short', data: rows.jsonl, total_episodes: 8,
         per_device_train_batch_size: 4, response_length: 4, bf16: false}}
  sample: {{init: {init}, data: rows.jsonl, prompts: 3, num_generations: 2, response_length: 4, unfinished: keep,
            bf16: false}}
  eval: {{models: [{init}], tasks: [preference_accuracy], data: pairs.jsonl, preferences: pairs.jsonl}}
"""


@pytest.mark.slow
def test_every_stage_does_what_it_does_with_the_merged_model(folder: Path, warm: Any) -> None:
    assert folder == warm.folder
    warm.write("rows.jsonl", "".join(json.dumps(demonstration(index)) + "\n" for index in range(40)))
    pairs = [{"prompt": f"what {i}", "chosen": f"it is {i}", "rejected": f"no {i} at all"} for i in range(40)]
    warm.write("pairs.jsonl", "".join(json.dumps(pair) + "\n" for pair in pairs))
    warm.write("rewards.py", "def short(prompts, responses, rows):\n    return [-float(len(r)) for r in responses]\n")
    made = warm("export", "./adapter", "--to", "merged", "--out", "merged")
    assert made.code == 0, made.stderr
    for run in ("adapter", "merged"):
        warm.write(f"{run}.yaml", RECIPE.format(run=run, init=f"./{run}"))
        done = warm("run", f"{run}.yaml")
        assert done.code == 0, done.stderr
    root = warm.folder / "artifacts"
    for stage in ("sft", "reward", "dpo", "ppo"):
        one, two = ((root / run / stage / "model/model.safetensors").read_bytes() for run in ("adapter", "merged"))
        assert one == two, stage
    one, two = ((root / run / "sample/rows.jsonl").read_bytes() for run in ("adapter", "merged"))
    assert one == two
    manifest = json.loads((root / "adapter/sft/manifest.json").read_text())
    parent = adapted_model(warm.folder / "adapter")
    assert manifest["inputs"]["init"] == [{"reference": parent.reference, "fingerprint": parent.fingerprint}]
    assert not [name for name in manifest["files"] if MERGED in name]
    assert not list(root.rglob(MERGED))
    again = warm("run", "adapter.yaml")
    assert again.stderr.count("stands (made") == 6, again.stderr
    said = [warm("chat", f"./{name}", "-p", "what 1", "--max-new-tokens", 8).stdout for name in ("adapter", "merged")]
    assert said[0] == said[1]
    plan = warm("plan", "adapter.yaml")
    assert plan.code == 0, plan.stderr
    small = [part for each in ("prompts=2", "response_length=4", "unfinished=keep") for part in ("--set", each)]
    answers = warm("sample", "./adapter", "--data", "rows.jsonl", *small)
    assert answers.code == 0, answers.stderr
    assert "Warning" not in answers.stderr
