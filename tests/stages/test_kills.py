"""The stages on TRL's trainers, killed with SIGKILL at random and while a checkpoint is written: the same bits."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

KILLS = """
import json, os, random, signal, sys, time
from pathlib import Path
import pipeline.trainer, pipeline.data.chat, pipeline.evals.likelihood, pipeline.model.build
import pipeline.model.trained_positions, pipeline.preference_trainer, pipeline.evals.implicit_reward
from pipeline.artifacts import outside_model
from pipeline.checkpoint import Checkpoints
from pipeline.recipe import DataEntry
from pipeline.runtime import Runtime
from importlib import import_module

name, model, rows, root, seed = sys.argv[1:6]
name, _, objective = name.partition(":")
stage = import_module(f"stages.{name}")
make = {"sft": "SFTConfig", "reward": "RewardConfig", "dpo": "DPOConfig"}[name]
data, own = (DataEntry(source=rows),), {} if name == "sft" else {"optimizer": "muon"}
own |= {"objective": objective, "eval_steps": 10} if objective else {}
if rows.endswith("lists.jsonl"):
    own |= {"ensemble": 2, "max_length": 64}
config = getattr(stage, make)(data=data, learning_rate=1e-3, per_device_train_batch_size=4, max_steps=48, save_steps=4,
                              logging_steps=2, held_out=0.1, eval_rows=8, **own)

def start(out, dies_saving=None):
    out.mkdir(exist_ok=True)
    pid = os.fork()
    if pid == 0:
        if dies_saving is not None:  # the Trainer's folder is there, one file of it torn, the marker not yet
            def adopt(self, path, step, state):
                if step < dies_saving:
                    return whole(self, path, step, state)
                (path / "optimizer.pt").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            whole, Checkpoints.adopt = Checkpoints.adopt, adopt
        runtime = Runtime.start(out, seed=0, threads=1, quiet=True)
        stage.run(config, {"init": outside_model(Path(model))}, out, runtime)
        (out / "resumed_from").write_text(str(runtime.checkpoints.resumed_from))
        os._exit(0)
    return pid

def ended(pid):
    done, status = os.waitpid(pid, os.WNOHANG)
    return bool(done)

def half_saved(out):
    return [p for p in (out / "checkpoints").glob("checkpoint-*") if not (p / "whole.json").exists()]

def saved(out):
    return max([int(p.parent.name.split("-")[1]) for p in (out / "checkpoints").glob("checkpoint-*/whole.json")] or [0])

calm, killed = Path(root, "calm"), Path(root, "killed")
os.waitpid(start(calm), 0)
draw = random.Random(int(seed))
targets = [draw.randrange(*span) for span in ((4, 9), (13, 21), (25, 33))]  # steps that are whole by then
kills, half = 0, 0
while not (killed / "resumed_from").exists():
    in_a_save = kills == 1
    pid = start(killed, targets[kills] if in_a_save else None)
    while not ended(pid):
        if kills < 3 and not in_a_save and saved(killed) >= targets[kills]:
            time.sleep(draw.uniform(0, 0.05))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            break
        time.sleep(0.001)
    if kills < 3:
        kills += 1
        half += bool(half_saved(killed))
print(json.dumps({"kills": kills, "half": half, "resumed_from": int((killed / "resumed_from").read_text())}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward", "reward on lists", "dpo", "dpo:kto", "dpo:orpo"])
def test_killed_at_random_and_in_the_middle_of_a_save_it_ends_with_the_same_bits(
    warm: Any, stage: str, model_folder: Path, demonstrations: Path, preferences: Path, lists: Path, tmp_path: Path
) -> None:
    seed = int.from_bytes(os.urandom(2))
    rows = {"sft": demonstrations, "reward on lists": lists}.get(stage, preferences)
    name = stage.partition(" ")[0]
    found = json.loads(warm.script(KILLS, name, model_folder, rows, tmp_path, seed).splitlines()[-1])
    assert found["kills"] == 3, found
    assert found["half"] >= 1, f"seed {seed}: no kill hit a save: {found}"
    assert found["resumed_from"] > 0, found
    for folder in ("model", "member-1") if stage == "reward on lists" else ("model",):
        calm, killed = (
            hashlib.sha256((tmp_path / each / folder / "model.safetensors").read_bytes()).hexdigest()
            for each in ("calm", "killed")
        )
        assert killed == calm, f"seed {seed}: {found}"
