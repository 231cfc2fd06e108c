"""reward: the Bradley-Terry step, the scale of the scores, what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import RewardConfig as Arguments
from trl import RewardTrainer

from pipeline.artifacts import outside_model
from pipeline.data.chat import encode_messages, stop_token_id
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import ConfigError, DataError, Stopped
from pipeline.evals.reward_accuracy import rewards
from pipeline.model.build import load_causal_lm
from pipeline.model.reward import build_reward_model, load_reward_model, reward_model_on, stands_on
from pipeline.recipe import DataEntry, PeftConfig
from pipeline.runtime import derive_seed
from pipeline.schedule import schedule
from stages import reward


@pytest.fixture
def config(small_run: dict[str, Any], preferences: Path, demonstrations: Path) -> Any:
    """A small run; keywords change fields."""

    def make(**changed: Any) -> reward.RewardConfig:
        values = small_run | {
            "data": (DataEntry(source=str(preferences)),),
            "demonstrations": (DataEntry(source=str(demonstrations)),),
        }
        return reward.RewardConfig(**(values | changed))

    return make


def pairs(tokenizer: Any, preferences: Path, held_out: Any = None) -> list[dict[str, list[int]]]:
    """The training rows as ids, made here: prompt, answer, stop token."""
    rows = []
    for line in preferences.read_text().splitlines():
        row = json.loads(line)
        ids = [encode_messages(tokenizer, [*row["prompt"], *row[side]]).input_ids for side in ("chosen", "rejected")]
        rows.append({"chosen_ids": ids[0], "rejected_ids": ids[1]})
    return rows


@pytest.mark.slow
def test_the_step_is_trls_and_the_equation(
    init: Any, runtime: Any, config: Any, lines: Any, preferences: Path, tmp_path: Path
) -> None:
    """Logged losses of three steps against raw RewardTrainer and against pairs scored one by one, without padding."""
    settings = config(max_steps=3, held_out=0.0, warmup_steps=0.0, max_grad_norm=1e9)
    out, here = runtime("ours")
    reward.run(settings, {"init": init}, out, here)
    ours = [line["loss"] for line in lines(out) if "loss" in line]

    tokenizer = load_tokenizer(init.model)
    rows = pairs(tokenizer, preferences)
    assert all(ids[-1] == stop_token_id(tokenizer) for row in rows for ids in row.values())
    plan = schedule([len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows], settings, here)
    batches = [[rows[i] for i in step] for step in plan.order.reshape(3, 4).tolist()]

    def start() -> Any:
        return build_reward_model(init.model, tokenizer.pad_token_id, derive_seed(0, "reward head"))

    raw = RewardTrainer(
        model=start(),
        args=Arguments(
            output_dir=str(tmp_path / "raw"), use_cpu=True, bf16=False, max_steps=3, learning_rate=1e-3,
            per_device_train_batch_size=4, train_sampling_strategy="sequential", report_to="none", save_strategy="no",
            logging_steps=1, gradient_checkpointing=False, max_grad_norm=1e9, disable_tqdm=True,
            center_rewards_coefficient=0.01,
        ),
        train_dataset=Dataset.from_list([row for batch in batches for row in batch]),
        processing_class=tokenizer,
    )  # fmt: skip
    raw.train()
    trls = [line["loss"] for line in raw.state.log_history if "loss" in line]

    model = start()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    naive = []
    for step, batch in enumerate(batches):
        chosen, rejected = (
            torch.cat(
                [model.score(model.model(torch.tensor([row[side]])).last_hidden_state[:, -1])[0] for row in batch]
            )
            for side in ("chosen_ids", "rejected_ids")
        )
        loss = (-F.logsigmoid(chosen - rejected) + 0.01 * (chosen + rejected) ** 2).mean()
        loss.backward()
        naive.append(loss.item())
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / 3)
        optimizer.step()
        optimizer.zero_grad()
    assert ours == pytest.approx(trls, abs=1e-6)
    assert ours == pytest.approx(naive, abs=2e-6)


def test_demonstrations_score_mean_0_and_deviation_1(
    init: Any, runtime: Any, config: Any, demonstrations: Path
) -> None:
    out, here = runtime("scale")
    figures = reward.run(config(held_out=0.0), {"init": init}, out, here)
    here.bf16 = False
    model = load_reward_model(outside_model(out / "model"), here)
    tokenizer = load_tokenizer(out / "model")
    texts = [
        encode_messages(tokenizer, json.loads(line)["messages"]).input_ids
        for line in demonstrations.read_text().splitlines()
    ]
    scores = np.array(rewards(model, texts, token_budget=512, tick=lambda: None))
    assert scores.mean() == pytest.approx(0, abs=1e-4)
    assert scores.std() == pytest.approx(1, abs=1e-3)
    assert figures["std"] > 0
    assert (model.suffix_ids, model.mean) == ((stop_token_id(tokenizer),), figures["mean"])


def test_wrong_demonstrations_are_refused_before_a_step(
    init: Any, runtime: Any, config: Any, preferences: Path
) -> None:
    out, here = runtime("wrong")
    with pytest.raises(ConfigError, match="demonstrations are needed here"):
        reward.run(config(demonstrations=(DataEntry(source=str(preferences)),)), {"init": init}, out, here)
    assert not (out / "metrics.jsonl").exists(), "a step was taken first"


@pytest.mark.slow
def test_it_learns_by_kind_and_every_parameter_moves(init: Any, runtime: Any, config: Any) -> None:
    out, here = runtime("learns")
    figures = reward.run(config(max_steps=60, learning_rate=5e-3, save_steps=100), {"init": init}, out, here)
    assert figures["accuracy"] == 1.0
    assert {"accuracy/other", "accuracy/caps", "length_only", "length_only/other"} <= figures.keys()
    here.bf16 = False
    after = load_reward_model(outside_model(out / "model"), here).model
    before = build_reward_model(init.model, after.config.pad_token_id, derive_seed(0, "reward head"))
    for (name, new), old in zip(after.named_parameters(), before.parameters(), strict=True):
        assert not torch.equal(new, old), f"{name} did not move"


@pytest.mark.slow
def test_pad_equal_to_eos_trains_the_same_model(
    init: Any, tmp_path: Path, runtime: Any, config: Any, lines: Any
) -> None:
    same = tmp_path / "same"
    shutil.copytree(init.model, same)
    settings = json.loads((same / "tokenizer_config.json").read_text())
    (same / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": settings["eos_token"]}))
    losses = []
    for name, start in (("own", init), ("eos", outside_model(same))):
        out, here = runtime(name)
        reward.run(config(), {"init": start}, out, here)
        losses.append([line["loss"] for line in lines(out) if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.slow
def test_lora_trains_the_head_too_and_is_merged(init: Any, runtime: Any, config: Any, tmp_path: Path) -> None:
    out, here = runtime("lora")
    reward.run(config(peft=PeftConfig(r=2)), {"init": init}, out, here)
    here.bf16 = False
    reward_model = load_reward_model(outside_model(out / "model"), here)
    after = reward_model.model
    before = build_reward_model(init.model, after.config.pad_token_id, derive_seed(0, "reward head"))
    assert after.state_dict().keys() == before.state_dict().keys()
    assert not torch.equal(after.score.weight, before.score.weight)
    # The adapters are kept beside the merged weights: on the model they were trained on they say the same.
    written = outside_model(out / "model")
    assert stands_on(written, init)
    assert not stands_on(written, written)
    assert str(tmp_path) not in (out / "model" / "adapter" / "adapter_config.json").read_text()
    policy = get_peft_model(load_causal_lm(init.model), LoraConfig(task_type="CAUSAL_LM", r=3))
    on_trunk = reward_model_on(policy, written, "reward", bf16=False)
    ids_BT, lengths_B = torch.tensor([[5, 6, 7, 8], [9, 5, 0, 0]]), torch.tensor([4, 2])
    torch.testing.assert_close(on_trunk.raw(ids_BT, lengths_B), reward_model.raw(ids_BT, lengths_B))


def test_without_adapters_none_are_kept(init: Any, runtime: Any, config: Any) -> None:
    out, here = runtime("whole")
    reward.run(config(max_steps=1), {"init": init}, out, here)
    assert not (out / "model" / "adapter").exists()
    assert "adapter_base" not in json.loads((out / "model" / "reward.json").read_text())


@pytest.mark.slow
def test_stopped_it_goes_on_to_the_same_bits(
    init: Any, runtime: Any, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, here = runtime("undisturbed")
    reward.run(config(), {"init": init}, out, here)
    stopped, here = runtime("stopped")
    steps = iter(range(100))
    monkeypatch.setattr(here, "stop_requested", lambda: next(steps) == 2)
    with pytest.raises(Stopped):
        reward.run(config(), {"init": init}, stopped, here)
    stopped, here = runtime("stopped")
    reward.run(config(), {"init": init}, stopped, here)
    assert here.checkpoints.resumed_from == 3
    for name in ("model.safetensors", "reward.json"):
        assert (stopped / "model" / name).read_bytes() == (out / "model" / name).read_bytes()


def test_refusals_and_long_pairs(init: Any, runtime: Any, tmp_path: Path, config: Any) -> None:
    question = [{"role": "user", "content": "What does the cat say?"}]
    rows = tmp_path / "rows.jsonl"
    good = {"prompt": question, "chosen": "meow", "rejected": "woof"}
    rows.write_text(json.dumps(good) + "\n" + json.dumps(good | {"rejected": "woof " * 90}) + "\n")
    entry = (DataEntry(source=str(rows)),)
    out, here = runtime("long")
    figures = reward.run(config(data=entry, held_out=0.0, max_steps=1), {"init": init}, out, here)
    assert figures["rows"] == 1
    out, here = runtime("same")
    rows.write_text(json.dumps(good | {"rejected": "meow"}) + "\n")
    with pytest.raises(DataError, match="chosen and rejected are the same"):
        reward.run(config(data=entry, held_out=0.0), {"init": init}, out, here)
