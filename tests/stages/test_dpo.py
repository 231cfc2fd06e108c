"""dpo: TRL's losses on our tokens, a reference computed once, what is measured and refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from pydantic import ValidationError
from trl import DPOConfig as Arguments
from trl import DPOTrainer

from pipeline.data.chat import encode_messages, encode_prompt, stop_token_id
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import ConfigError, DataError, Stopped
from pipeline.model.build import load_causal_lm
from pipeline.preference_trainer import tokens_of
from pipeline.recipe import DataEntry, PeftConfig
from pipeline.schedule import schedule
from stages import dpo


@pytest.fixture
def config(small_run: dict[str, Any], preferences: Path) -> Any:
    """A small run; keywords change fields."""

    def make(**changed: Any) -> dpo.DPOConfig:
        values = small_run | {
            "data": (DataEntry(source=str(preferences)),),
        }
        return dpo.DPOConfig(**(values | changed))

    return make


def encoded(tokenizer: Any, preferences: Path) -> list[dict[str, list[int]]]:
    """The rows as ids, made here."""
    rows = []
    for line in preferences.read_text().splitlines():
        row = json.loads(line)
        prompt = encode_prompt(tokenizer, row["prompt"])
        ids = [encode_messages(tokenizer, [*row["prompt"], *row[side]]).input_ids for side in ("chosen", "rejected")]
        assert all(side[: len(prompt)] == prompt and side[-1] == stop_token_id(tokenizer) for side in ids)
        chosen, rejected = (side[len(prompt) :] for side in ids)
        rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return rows


def log_p(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """log p(answer | prompt), one row, no padding."""
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return -F.cross_entropy(logits, torch.tensor(answer), reduction="sum")


def losses(name: str, chosen: torch.Tensor, rejected: torch.Tensor, lengths: tuple[int, int]) -> torch.Tensor:
    """The papers' losses of log-ratios at beta 0.1."""
    margin = 0.1 * (chosen - rejected)
    if name == "sigmoid":  # Rafailov et al. 2023, equation 7
        return -F.logsigmoid(margin)
    if name == "hinge":  # Zhao et al. 2023, equation 10
        return F.relu(1 - margin)
    assert name == "ipo"  # Azar et al. 2023, equation 17, a token
    return (chosen / lengths[0] - rejected / lengths[1] - 1 / (2 * 0.1)) ** 2


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo"])
def test_the_step_is_trls_and_the_equation(
    init: Any, runtime: Any, config: Any, lines: Any, preferences: Path, tmp_path: Path, loss: str
) -> None:
    """Logged losses of three steps, against raw DPOTrainer with a second model as reference, and against the papers."""
    settings = config(max_steps=3, held_out=0.0, warmup_steps=0.0, max_grad_norm=1e9, loss_type=(loss,))
    out, here = runtime("ours")
    dpo.run(settings, {"init": init}, out, here)
    ours = [line["loss"] for line in lines(out) if "loss" in line]

    tokenizer = load_tokenizer(init.model)
    rows = encoded(tokenizer, preferences)
    plan = schedule([tokens_of(row) for row in rows], settings, here)
    batches = [[rows[i] for i in step] for step in plan.order.reshape(3, 4).tolist()]

    message = [{"role": "user", "content": "a"}]
    answers = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    raw = DPOTrainer(
        model=load_causal_lm(init.model),
        ref_model=load_causal_lm(init.model),
        args=Arguments(
            output_dir=str(tmp_path / "raw"), use_cpu=True, bf16=False, max_steps=3, learning_rate=1e-3,
            per_device_train_batch_size=4, train_sampling_strategy="sequential", report_to="none", save_strategy="no",
            logging_steps=1, gradient_checkpointing=False, max_grad_norm=1e9, disable_tqdm=True, loss_type=[loss],
        ),
        train_dataset=Dataset.from_list([{"prompt": message, **answers}]),
        processing_class=tokenizer,
    )  # fmt: skip
    raw.train_dataset = Dataset.from_list([row for batch in batches for row in batch])
    raw.train()
    trls = [line["loss"] for line in raw.state.log_history if "loss" in line]

    policy, reference = load_causal_lm(init.model), load_causal_lm(init.model)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)
    naive = []
    for step, batch in enumerate(batches):
        total = torch.zeros(())
        for row in batch:
            ratios = []
            for side in ("chosen_ids", "rejected_ids"):
                with torch.no_grad():
                    before = log_p(reference, row["prompt_ids"], row[side])
                ratios.append(log_p(policy, row["prompt_ids"], row[side]) - before)
            total = total + losses(loss, *ratios, (len(row["chosen_ids"]), len(row["rejected_ids"])))
        (total / 4).backward()
        naive.append(float(total.detach()) / 4)
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / 3)
        optimizer.step()
        optimizer.zero_grad()
    scale = max(naive)
    assert ours == pytest.approx(trls, abs=1e-6 * scale)
    assert ours == pytest.approx(naive, abs=2e-6 * scale)
    assert ours[0] == pytest.approx({"sigmoid": 0.693147, "hinge": 1.0, "ipo": 25.0}[loss], abs=1e-4)


@pytest.mark.slow
def test_it_learns_and_says_what_it_cost(init: Any, runtime: Any, config: Any, lines: Any) -> None:
    out, here = runtime("learns")
    figures = dpo.run(config(max_steps=60, learning_rate=3e-3, save_steps=100), {"init": init}, out, here)
    assert figures["accuracy"] == 1.0
    assert {"accuracy/other", "accuracy/caps", "length_only", "length_only/caps"} <= figures.keys()
    assert figures["margin"] > 0.1
    assert figures["kl_per_token"] > 0.01
    logged = lines(out)[0]
    assert {"rewards/margins", "rewards/accuracies", "logps/chosen", "grad_norm"} <= logged.keys()
    before, after = (dict(load_causal_lm(folder).named_parameters()) for folder in (init.model, out / "model"))
    assert all(not torch.equal(before[name], after[name]) for name in before), "every parameter moves"


@pytest.mark.slow
def test_kl_of_a_model_from_itself_is_zero(init: Any, runtime: Any, config: Any) -> None:
    out, here = runtime("still")
    figures = dpo.run(config(max_steps=1, learning_rate=1e-30), {"init": init}, out, here)
    assert figures["kl_per_token"] == pytest.approx(0, abs=1e-9)
    assert figures["margin"] == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
def test_lora_has_the_init_as_reference_and_is_merged(init: Any, runtime: Any, config: Any, lines: Any) -> None:
    out, here = runtime("lora")
    dpo.run(config(peft=PeftConfig(r=2)), {"init": init}, out, here)
    assert lines(out)[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert not list((out / "model").glob("adapter*"))
    before, after = (dict(load_causal_lm(folder).named_parameters()) for folder in (init.model, out / "model"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.endswith("proj.weight")}


@pytest.mark.slow
def test_stopped_it_goes_on_to_the_same_bits_from_the_kept_reference(
    init: Any, runtime: Any, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, here = runtime("undisturbed")
    dpo.run(config(), {"init": init}, out, here)
    stopped, here = runtime("stopped")
    steps = iter(range(100))
    monkeypatch.setattr(here, "stop_requested", lambda: next(steps) == 2)
    with pytest.raises(Stopped):
        dpo.run(config(), {"init": init}, stopped, here)
    kept = (stopped / "reference.safetensors").read_bytes()
    stopped, here = runtime("stopped")
    monkeypatch.setattr("pipeline.trainer.over_ranks", lambda *_: pytest.fail("computed again"))
    dpo.run(config(), {"init": init}, stopped, here)
    assert here.checkpoints.resumed_from == 3
    assert (stopped / "reference.safetensors").read_bytes() == kept
    weights = "model/model.safetensors"
    assert (stopped / weights).read_bytes() == (out / weights).read_bytes()


@pytest.mark.slow
def test_equal_sides_and_unknown_losses_are_refused(init: Any, runtime: Any, tmp_path: Path, config: Any) -> None:
    rows = tmp_path / "rows.jsonl"
    question = [{"role": "user", "content": "What does the cat say?"}]
    rows.write_text(json.dumps({"prompt": question, "chosen": "meow", "rejected": "meow"}) + "\n")
    out, here = runtime("same")
    with pytest.raises(DataError, match="chosen and rejected are the same"):
        dpo.run(config(data=(DataEntry(source=str(rows)),), held_out=0.0), {"init": init}, out, here)
    with pytest.raises(ValidationError, match="loss_type"):
        config(loss_type=("sigmoidal",))
    out, here = runtime("exo")
    with pytest.raises(ConfigError, match="TRL refuses this: Label smoothing must be greater"):
        dpo.run(config(loss_type="exo_pair"), {"init": init}, out, here)
