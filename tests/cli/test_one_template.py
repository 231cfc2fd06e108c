"""One chat template from data to serving: what sft is given is what reward, dpo, ppo and chat write and read with."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifacts import read_artifact
from pipeline.cli.conversation import load
from pipeline.data.tokenizers import CHATML, load_tokenizer
from pipeline.hashes import template_hash

TEMPLATE = CHATML.replace("message['role'] + '\\n'", "message['role'] + ': '").replace("assistant\\n'", "assistant: '")
RECIPE = """
  sft: {{data: rows.jsonl, max_steps: 2, held_out: 0, bf16: false, chat_template: {template}}}
  reward: {{data: pairs.jsonl, max_steps: 2, held_out: 0, bf16: false}}
  dpo: {{init: sft, data: pairs.jsonl, max_steps: 2, held_out: 0, bf16: false}}
  ppo: {{total_episodes: 8, batch_size: 8, per_device_train_batch_size: 8, response_length: 8, held_out: 0,
        eval_steps: 0}}
"""


@pytest.mark.slow
def test_from_data_to_serving(made: Path, tmp_path: Path, warm: Any) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    rows = [{"prompt": f"ka {i}", "completion": "lo mi " * (1 + i % 3)} for i in range(16)]
    pairs = [{"prompt": f"ka {i}", "chosen": "lo mi", "rejected": "ru"} for i in range(16)]
    for name, each in (("rows", rows), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(recipe.read_text().rstrip() + RECIPE.format(template=json.dumps(TEMPLATE)))
    ran = warm("run", recipe)
    assert ran.code == 0, ran.stderr

    made_here = {
        name: read_artifact(tmp_path / "artifacts" / "tiny" / name, name)
        for name in ("pretrain", "sft", "reward", "dpo", "ppo")
    }
    hashes = {name: each.manifest["template_hash"] for name, each in made_here.items()}
    assert hashes["sft"] == hashes["reward"] == hashes["dpo"] == hashes["ppo"] != hashes["pretrain"]
    for name, artifact in made_here.items():
        assert hashes[name] == template_hash(artifact.model)
        if name != "pretrain":
            assert load_tokenizer(artifact.model).chat_template == TEMPLATE

    shown = json.loads(warm("preview", recipe, "ppo", "-n", "1", "--json").stdout)
    tokenizer = load_tokenizer(made_here["ppo"].model)
    assert tokenizer.decode(shown[0]["ids"]) == "<|im_start|>user: ka 0<|im_end|>\n<|im_start|>assistant: "
    conversation = load(made_here["ppo"], "tiny/ppo", None, 0.0, 4, 0)
    assert conversation.encode("ka 0") == shown[0]["ids"]
    sft = json.loads(warm("preview", recipe, "sft", "-n", "1", "--json").stdout)
    assert sft[0]["ids"][: len(shown[0]["ids"])] == shown[0]["ids"]
