"""dpo's own losses: kto, orpo, simpo, cpo, ties and margins, beside TRL's trainers and the papers; what is refused."""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from pydantic import ValidationError
from safetensors.torch import load_file
from trl import KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

from pipeline import preference_trainer
from pipeline.data.chat import encode_messages, encode_prompt
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import ConfigError, DataError, Stopped
from pipeline.model.build import load_causal_lm
from pipeline.preference_trainer import mismatched, tokens_only_read
from pipeline.recipe import DataEntry, PeftConfig
from pipeline.schedule import Schedule, schedule
from stages import dpo
from tests.ranks import run_script

pytestmark = pytest.mark.slow

OBJECTIVES = ("kto", "orpo", "simpo", "cpo")
Config = Callable[..., dpo.DPOConfig]
Ids = dict[str, list[int]]


@pytest.fixture
def config(small_run: dict[str, Any], preferences: Path) -> Config:
    """A small run; keywords change fields."""

    def make(**changed: Any) -> dpo.DPOConfig:
        values = small_run | {"data": (DataEntry(source=str(preferences)),), "drift_prompts": 4, "max_new_tokens": 8}
        return dpo.DPOConfig(**(values | changed))

    return make


def pairs(tokenizer: Any, preferences: Path) -> list[Ids]:
    """The pairs as ids, made here."""
    rows = []
    for line in preferences.read_text().splitlines():
        row = json.loads(line)
        prompt = encode_prompt(tokenizer, row["prompt"])
        ids = {
            side: encode_messages(tokenizer, [*row["prompt"], *row[side]]).input_ids for side in ("chosen", "rejected")
        }
        rows.append({"prompt_ids": prompt} | {f"{side}_ids": each[len(prompt) :] for side, each in ids.items()})
    return rows


def order_of(rows: list[Ids], settings: dpo.DPOConfig, here: Any) -> list[list[int]]:
    """Which rows stand in each step."""
    lengths = [
        sum(len(ids) + len(row["prompt_ids"]) for name, ids in row.items() if "prompt" not in name) for row in rows
    ]
    plan = schedule(lengths, settings, here)
    return plan.order.reshape(plan.steps, plan.batch).tolist()


def raw_arguments(folder: Path, **own: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "max_steps": 3, "learning_rate": 1e-3,
        "per_device_train_batch_size": 4, "report_to": "none", "save_strategy": "no", "logging_steps": 1,
        "gradient_checkpointing": False, "max_grad_norm": 1e9, "disable_tqdm": True, **own,
    }  # fmt: skip


def logged(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def losses_of(settings: dpo.DPOConfig, init: Any, runtime: Any, lines: Any, name: str) -> list[float]:
    out, here = runtime(name)
    dpo.run(settings, {"init": init}, out, here)
    return [line["loss"] for line in lines(out) if "loss" in line]


THREE = {"max_steps": 3, "held_out": 0.0, "warmup_steps": 0.0, "max_grad_norm": 1e9}
ANSWER = [{"role": "assistant", "content": "b"}]
SAMPLE = {"prompt": [{"role": "user", "content": "a"}], "completion": ANSWER, "label": True}


def test_kto_is_trls_where_a_step_is_one_batch(
    init: Any, runtime: Any, config: Config, lines: Any, preferences: Path, tmp_path: Path
) -> None:
    settings = config(**THREE, objective="kto", desirable_weight=1.5, undesirable_weight=0.5, beta=0.3)
    ours = losses_of(settings, init, runtime, lines, "ours")
    assert max(line["kl"] for line in lines(tmp_path / "ours") if "kl" in line) > 0.01, "it is at work"
    tokenizer = load_tokenizer(init.model)
    rows: list[dict[str, Any]] = [
        {"prompt_ids": row["prompt_ids"], "completion_ids": row[f"{side}_ids"], "label": side == "chosen"}
        for row in pairs(tokenizer, preferences)
        for side in ("chosen", "rejected")
    ]
    order = order_of([{k: v for k, v in row.items() if k != "label"} for row in rows], settings, runtime("order")[1])
    placed = []
    for step in order:
        for place, own in enumerate(step):
            others = [step[(place - back) % 4] for back in (1, 2, 3)]
            other = next(number for number in others if number // 2 != own // 2)  # two answers a prompt
            placed.append(rows[own] | {"KL_completion_ids": rows[other]["completion_ids"]})
    raw = KTOTrainer(
        model=load_causal_lm(init.model),
        ref_model=load_causal_lm(init.model),
        args=KTOConfig(**raw_arguments(tmp_path / "raw"), desirable_weight=1.5, undesirable_weight=0.5, beta=0.3),
        train_dataset=Dataset.from_list([SAMPLE] * 2),
        processing_class=tokenizer,
    )
    raw.train_dataset = Dataset.from_list(placed)
    raw.train()
    theirs = logged(raw)
    assert len(ours) == 3
    assert ours == pytest.approx(theirs, abs=1e-6)
    assert len({round(loss, 4) for loss in ours}) == 3


@pytest.mark.parametrize(("objective", "kind"), [("cpo", "sigmoid"), ("simpo", "simpo")])
def test_cpo_and_simpo_are_trls_where_a_step_is_one_batch(
    init: Any, runtime: Any, config: Config, lines: Any, preferences: Path, tmp_path: Path, objective: str, kind: str
) -> None:
    """With the likelihood of the chosen answers in both."""
    numbers = {"beta": 0.7, "cpo_alpha": 0.4}
    gamma = {"simpo_gamma": 0.3} if objective == "simpo" else {}
    settings = config(**THREE, objective=objective, **numbers, **gamma)
    ours = losses_of(settings, init, runtime, lines, "ours")
    assert not (tmp_path / "ours" / "reference.safetensors").exists()
    tokenizer = load_tokenizer(init.model)
    rows = pairs(tokenizer, preferences)
    order = order_of(rows, settings, runtime("order")[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        raw = CPOTrainer(
            model=load_causal_lm(init.model),
            args=CPOConfig(**raw_arguments(tmp_path / "raw", loss_type=kind, **numbers, **gamma), max_length=96),
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
            processing_class=tokenizer,
        )
    raw.train_dataset = Dataset.from_list([as_cpo(rows[number]) for step in order for number in step])
    raw.args.train_sampling_strategy = "sequential"
    raw.train()
    assert ours == pytest.approx(logged(raw), abs=2e-6 * max(ours))


def as_cpo(row: Ids) -> dict[str, list[int]]:
    """What TRL's CPO makes of a row, of our tokens."""
    found = {"prompt_input_ids": row["prompt_ids"], "prompt_attention_mask": [1] * len(row["prompt_ids"])}
    for side in ("chosen", "rejected"):
        ids = row["prompt_ids"] + row[f"{side}_ids"]
        found[f"{side}_input_ids"], found[f"{side}_attention_mask"] = ids, [1] * len(ids)
        found[f"{side}_labels"] = [-100] * len(row["prompt_ids"]) + row[f"{side}_ids"]
    return found


def log_ps(model: Any, row: Ids) -> tuple[torch.Tensor, torch.Tensor]:
    """log p of both answers, one row at a time, no padding."""
    found = []
    for side in ("chosen_ids", "rejected_ids"):
        logits = model(torch.tensor([row["prompt_ids"] + row[side]])).logits[0, len(row["prompt_ids"]) - 1 : -1]
        found.append(-F.cross_entropy(logits, torch.tensor(row[side]), reduction="sum"))
    return found[0], found[1]


def test_orpo_is_the_papers(init: Any, runtime: Any, config: Config, lines: Any, preferences: Path) -> None:
    """Mean loss of the chosen answers' tokens, and 0.25 of the odds ratio's, one row at a time."""
    settings = config(**THREE | {"max_steps": 1}, objective="orpo", beta=0.25)
    ours = losses_of(settings, init, runtime, lines, "ours")
    rows = pairs(load_tokenizer(init.model), preferences)
    model = load_causal_lm(init.model)
    nats, tokens, ratio = 0.0, 0, 0.0
    step = order_of(rows, settings, runtime("order")[1])[0]
    with torch.no_grad():
        for row in (rows[number] for number in step):
            log_p = log_ps(model, row)
            p, q = (
                (each / len(row[side])).exp().double()
                for each, side in zip(log_p, ("chosen_ids", "rejected_ids"), strict=True)
            )
            ratio -= float(torch.log(torch.sigmoid(torch.log((p / (1 - p)) / (q / (1 - q))))))
            nats, tokens = nats - float(log_p[0]), tokens + len(row["chosen_ids"])
    assert ours == pytest.approx([nats / tokens + 0.25 * ratio / 4], abs=1e-5)


def test_ties_smoothing_and_margins_in_the_step(
    init: Any, runtime: Any, config: Config, lines: Any, preferences: Path, tmp_path: Path
) -> None:
    """Second step of dpo with rows of probability 0.5, 0.8 and 1, against a loop over rows."""
    rows = [json.loads(line) for line in preferences.read_text().splitlines()]
    said = [(0.5, 0.8, 1.0)[number % 3] for number in range(len(rows))]
    path = tmp_path / "unsure.jsonl"
    path.write_text(
        "".join(json.dumps(r | {"preference": p, "margin": 3 * p}) + "\n" for r, p in zip(rows, said, strict=True))
    )
    settings = config(**THREE, data=(DataEntry(source=str(path)),), label_smoothing=0.1, margin_weight=0.5)
    ours = losses_of(settings, init, runtime, lines, "unsure")
    ids = pairs(load_tokenizer(init.model), preferences)
    policy, reference = load_causal_lm(init.model), load_causal_lm(init.model)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)
    naive = []
    for number, step in enumerate(order_of(ids, settings, runtime("order")[1])):
        total = torch.zeros(())
        for row in step:
            now = log_ps(policy, ids[row])
            with torch.no_grad():
                was = log_ps(reference, ids[row])
            reward = 0.1 * ((now[0] - was[0]) - (now[1] - was[1]))
            sure = 0.9 * said[row] + 0.1 * (1 - said[row])
            offset = 0.5 * 3 * said[row]
            total = total - sure * F.logsigmoid(reward - offset) - (1 - sure) * F.logsigmoid(-reward - offset)
        (total / 4).backward()
        naive.append(float(total.detach()) / 4)
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - number / 3)
        optimizer.step()
        optimizer.zero_grad()
    assert ours == pytest.approx(naive, abs=2e-6)


@pytest.mark.slow
def test_our_dpo_step_is_trls(
    init: Any, runtime: Any, config: Config, lines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain DPO through our own loss is TRL's to the last figures, for each loss that there is in both."""
    plain = dpo._objective
    for kind in dpo.PAIRWISE:
        settings = config(**THREE, loss_type=kind)
        theirs = losses_of(settings, init, runtime, lines, f"trl-{kind}")
        with monkeypatch.context() as patch:
            patch.setattr(dpo, "_objective", lambda config, rows: plain(config, [{"preference": 0.5}]))
            ours = losses_of(settings, init, runtime, lines, f"own-{kind}")
        assert ours == pytest.approx(theirs, abs=1e-6 * max(theirs))


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_how_a_step_is_cut_does_not_change_it(
    init: Any, runtime: Any, config: Config, lines: Any, objective: str
) -> None:
    """Eight rows at once, four and four, and one at a time: the same weights and figures after three steps."""
    weights, losses, rewards = [], [], []
    for rows, micro_steps in ((8, 1), (4, 2), (1, 8)):
        settings = config(
            **THREE | {"max_grad_norm": 1.0},
            objective=objective,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=micro_steps,
            trainer={"adam_epsilon": 1e-3},  # AdamW without it makes steps of noise
        )
        out, here = runtime(f"{rows}")
        dpo.run(settings, {"init": init}, out, here)
        weights.append(load_file(out / "model" / "model.safetensors"))
        trained = [line for line in lines(out) if "loss" in line]
        losses.append([line["loss"] for line in trained])
        rewards.append(
            [{key: line[key] for key in line if key.startswith(("rewards/", "logps/", "entropy"))} for line in trained]
        )
    for cut in (1, 2):
        assert losses[0] == pytest.approx(losses[cut], abs=1e-6 * max(losses[0]))
        for whole, parts in zip(rewards[0], rewards[cut], strict=True):
            assert parts == pytest.approx(whole, abs=2e-5)
        for name, value in weights[0].items():
            torch.testing.assert_close(weights[cut][name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_it_learns_moves_all_and_is_measured(
    init: Any, runtime: Any, config: Config, lines: Any, objective: str
) -> None:
    out, here = runtime("learns")
    settings = config(objective=objective, max_steps=40, learning_rate=3e-3, save_steps=100, eval_steps=20)
    figures = dpo.run(settings, {"init": init}, out, here)
    assert figures["accuracy"] > 0.9
    assert figures["margin"] > 0.1
    assert figures["kl_per_token"] > 0.01
    assert {"greedy_length", "greedy_length_start", "greedy_ended", "reward_length_correlation"} <= figures.keys()
    assert ("separation" in figures) == (objective == "kto")
    found = lines(out)
    assert [line["step"] for line in found if "kl_per_token" in line] == [20, 40]
    known = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "entropy"}
    assert known <= found[0].keys()
    assert found[-2]["loss"] < found[0]["loss"]
    assert (out / "reference.safetensors").exists() == (objective == "kto")
    before, after = (load_file(folder / "model.safetensors") for folder in (init.model, out / "model"))
    assert all(not torch.equal(before[name], after[name]) for name in before), "every parameter moves"


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_stopped_it_goes_on_to_the_same_bits(
    init: Any, runtime: Any, config: Config, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With adapters and their dropout; the evaluation after the second step touches no random number."""
    settings = config(objective=objective, peft=PeftConfig(r=2, lora_dropout=0.1), eval_steps=2)
    out, here = runtime("undisturbed")
    dpo.run(settings, {"init": init}, out, here)
    stopped, here = runtime("stopped")
    steps = iter(range(100))
    monkeypatch.setattr(here, "stop_requested", lambda: next(steps) == 3)
    with pytest.raises(Stopped):
        dpo.run(settings, {"init": init}, stopped, here)
    stopped, here = runtime("stopped")
    dpo.run(settings, {"init": init}, stopped, here)
    assert here.checkpoints.resumed_from == 3
    weights = "model/model.safetensors"
    assert (stopped / weights).read_bytes() == (out / weights).read_bytes()
    before, after = (load_file(folder / "model.safetensors") for folder in (init.model, out / "model"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.endswith("proj.weight")}, "what is frozen stays"
    silent, here = runtime("silent")
    dpo.run(settings.model_copy(update={"eval_steps": 0}), {"init": init}, silent, here)
    assert (silent / weights).read_bytes() == (out / weights).read_bytes(), "evaluations change nothing"


@pytest.mark.parametrize("asked", ["before", "during"])
def test_a_stop_that_meets_an_evaluation_saves(
    init: Any, runtime: Any, config: Config, lines: Any, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    """Asked for before the evaluation after step 2 or in it (twice: also when it is made up for), it leaves that to who
    goes on."""
    settings = config(eval_steps=2, save_steps=100, max_steps=5)
    calm, here = runtime("calm")
    dpo.run(settings, {"init": init}, calm, here)
    out, here = runtime(asked)
    steps = iter(range(1, 100))
    requested, measured = here.stop_requested, preference_trainer.while_training

    def at_step_two() -> bool:
        here.halt.asked = Stopped if next(steps) == 2 else here.halt.asked
        return bool(requested())

    def in_evaluation(*arguments: Any) -> dict[str, float]:
        here.halt.asked = Stopped
        measured(*arguments)
        raise AssertionError("it ran to its end")

    if asked == "before":
        monkeypatch.setattr(here, "stop_requested", at_step_two)
    else:
        monkeypatch.setattr(preference_trainer, "while_training", in_evaluation)
    for again in range(2 if asked == "during" else 1):
        if again:
            out, here = runtime(asked)
        with pytest.raises(Stopped, match="stopped at step 2 and saved"):
            dpo.run(settings, {"init": init}, out, here)
        assert not [line for line in lines(out) if "kl_per_token" in line]
    monkeypatch.undo()
    out, here = runtime(asked)
    assert here.checkpoints.latest().step == 2
    dpo.run(settings, {"init": init}, out, here)

    def measured_lines(folder: Any) -> list[dict[str, float]]:
        found = [line for line in lines(folder) if "kl_per_token" in line]
        return [{name: value for name, value in line.items() if name != "time"} for line in found]

    assert [line["step"] for line in measured_lines(out)] == [2, 4, 5]
    assert measured_lines(out) == measured_lines(calm)


def test_the_reference_is_the_model_without_its_adapters(
    init: Any, runtime: Any, config: Config, preferences: Path
) -> None:
    """Adapters that are no longer zero don't reach the reference."""
    settings = config(peft=PeftConfig(r=2), held_out=0.0)
    out, here = runtime("adapters")
    tokenizer = load_tokenizer(init.model)
    rows: list[Any] = pairs(tokenizer, preferences)
    plan = schedule([1] * len(rows), settings, here)
    trainer = dpo._trainer(settings, None, load_causal_lm(init.model), rows, tokenizer, plan, out, here)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    batch = trainer.data_collator(rows[:1])
    with torch.no_grad():
        chosen, rejected = trainer.compute_ref_log_probs(trainer.model, batch)
        plain, moved = (log_ps(model, rows[0]) for model in (load_causal_lm(init.model), trainer.model))
    assert [float(chosen), float(rejected)] == pytest.approx([float(each) for each in plain], abs=1e-4)
    assert abs(float(moved[0]) - float(chosen)) > 0.1


@pytest.mark.slow
def test_kto_takes_lone_answers(init: Any, runtime: Any, config: Config, preferences: Path, tmp_path: Path) -> None:
    """Rows with a label give the run that the pairs give which they were; what has no partner is measured too."""
    path = tmp_path / "lone.jsonl"
    with path.open("w") as file:
        for line in preferences.read_text().splitlines():
            row = json.loads(line)
            for side in ("chosen", "rejected"):
                lone = {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
                file.write(json.dumps(lone) + "\n")
    figures = []
    for name, source in (("pairs", preferences), ("lone", path)):
        out, here = runtime(name)
        figures.append(
            dpo.run(config(objective="kto", data=(DataEntry(source=str(source)),)), {"init": init}, out, here)
        )
    kinds = ("accuracy/", "length_only/")
    assert figures[1] == {name: value for name, value in figures[0].items() if not name.startswith(kinds)}
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if ("cat" in line) == ('"label": true' in line)))
    out, here = runtime("partnerless")
    found = dpo.run(config(objective="kto", data=(DataEntry(source=str(path)),)), {"init": init}, out, here)
    assert 0 <= found["separation"] <= 1
    assert found["kl_per_token"] > 0
    assert "accuracy" not in found


def test_mismatched_answers_are_the_steps_own(runtime: Any, config: Config) -> None:
    rows: list[Any] = [{"prompt_ids": [number], "chosen_ids": [10 + number]} for number in range(5)]
    plan = schedule(
        [1] * 5, config(max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2), runtime("x")[1]
    )
    placed, read = mismatched(rows, plan, 9)
    assert read.order.tolist() == list(range(12))
    assert [row["prompt_ids"][0] for row in placed] == plan.order.tolist()
    for start in (0, 4, 8):
        step = placed[start : start + 4]
        for place, row in enumerate(step):
            before = [step[place - back] for back in (1, 2, 3)]
            other = next(each for each in before if each["prompt_ids"] != row["prompt_ids"])
            assert row["rejected_ids"] == other["chosen_ids"]
    assert "rejected_ids" not in rows[0]


def test_mismatched_answers_are_to_another_prompt_and_fit() -> None:
    """Two steps of three: of two answers to one prompt and a row that is met again, and of one prompt alone."""
    rows: list[Any] = [
        {"prompt_ids": [1, 1], "chosen_ids": [10]},
        {"prompt_ids": [1, 1], "chosen_ids": [11]},
        {"prompt_ids": [2], "chosen_ids": [12, 13, 14]},
    ]
    plan = Schedule(3, np.array([2, 0, 1, 0, 1, 0]), np.array([9, 18]))
    placed, _ = mismatched(rows, plan, 4)
    assert [(row["rejected_ids"], row["is_mismatched"]) for row in placed] == [
        ([11], True), ([12, 13], True), ([12, 13], True),  # cut to the two tokens that a prompt of two leaves
        ([10], False), ([11], False), ([10], False),
    ]  # fmt: skip


def test_what_is_only_read_is_counted(init: Any, runtime: Any, config: Config) -> None:
    """The reference's forward is a third of a training step's FLOPs, over the same rows."""
    found = {}
    for objective in ("dpo", "cpo"):
        out, here = runtime(objective)
        settings = config(**THREE | {"max_steps": 1}, objective=objective)
        found[objective] = dpo.run(settings, {"init": init}, out, here)["flops"]
    assert found["dpo"] / found["cpo"] == pytest.approx(4 / 3)
    rows: list[Any] = [
        {"prompt_ids": [1] * 5, "chosen_ids": [2] * 3, "rejected_ids": [3] * 2},  # 8 + 7
        {"prompt_ids": [1] * 4, "chosen_ids": [2], "rejected_ids": [3] * 6},  # 5 + 10
        {"prompt_ids": [1] * 90, "chosen_ids": [2], "rejected_ids": [3]},
    ]
    plan = Schedule(2, np.array([0, 1, 1, 0]), np.array([30, 60]))
    counted = {objective: tokens_only_read(rows, plan, objective) for objective in ("dpo", "kto", "orpo")}  # type: ignore[arg-type]
    assert counted == {"dpo": 15 + 15, "kto": 15 + 15 + 2 * (7 + 10), "orpo": 0}


def test_rows_without_another_prompt_are_no_part_of_the_kl(
    init: Any, runtime: Any, config: Config, lines: Any, preferences: Path, tmp_path: Path
) -> None:
    """z of a step is the mean over its mismatched pairs alone; without any it is 0."""
    line = json.loads(preferences.read_text().splitlines()[0])
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(line) + "\n")
    data = (DataEntry(source=str(path)),)
    settings = config(**THREE | {"max_steps": 1}, objective="kto", data=data, per_device_train_batch_size=2)
    losses_of(settings, init, runtime, lines, "one prompt")
    assert [each["kl"] for each in lines(tmp_path / "one prompt") if "kl" in each] == [0.0]
    tokenizer = load_tokenizer(init.model)
    rows = [
        {"prompt_ids": row["prompt_ids"], "chosen_ids": row["chosen_ids"], "rejected_ids": row["rejected_ids"][:1],
         "label": True, "is_mismatched": place == 1, "ref_chosen_logps": 0.0, "ref_rejected_logps": -100.0 - place}
        for place, row in enumerate(pairs(tokenizer, preferences)[:2])
    ]  # fmt: skip
    out, here = runtime("measured")
    trainer = dpo._trainer(
        settings, dpo._objective(settings, []), load_causal_lm(init.model), rows, tokenizer,
        schedule([1] * 2, settings, here), out, here,
    )  # fmt: skip
    found = trainer._measured([trainer.data_collator(rows[:1]), trainer.data_collator(rows[1:])]).kl
    with torch.no_grad():
        log_p = log_ps(load_causal_lm(init.model), rows[1])[1]
    assert float(found) == pytest.approx(float(log_p) + 101.0, abs=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective": "kto", "label_smoothing": 0.1}, "label_smoothing does not count with objective kto"),
        ({"objective": "simpo", "loss_type": "ipo"}, "loss_type does not count with objective simpo"),
        ({"simpo_gamma": 0.5}, "simpo_gamma does not count with objective dpo"),
        ({"objective": "orpo", "cpo_alpha": 0.5}, "cpo_alpha does not count with objective orpo"),
        ({"desirable_weight": 2.0}, "desirable_weight does not count with objective dpo"),
        ({"label_smoothing": 0.1, "loss_type": "nca_pair"}, "label_smoothing is of sigmoid, hinge"),
        ({"label_smoothing": 0.1, "loss_type": ["sigmoid", "robust"]}, "not for both"),
        ({"margin_weight": 1.0, "loss_type": "ipo"}, "margin_weight is of the losses sigmoid"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": (1.0,)}, "1 loss_weights for 2 losses"),
        ({"eval_steps": 5, "held_out": 0.0}, "eval_steps measures held-out rows, and held_out: 0 keeps none"),
        ({"trainer": {"discopop_tau": 0.1}}, "trainer.discopop_tau is of loss_type discopop"),
        ({"trainer": {"discopop_tau": 0.1}, "objective": "kto"}, "trainer.discopop_tau is of loss_type discopop"),
        ({"trainer": {"precompute_ref_batch_size": 2}}, "the reference reads the very batches that are trained on"),
        ({"trainer": {"label_smoothing_factor": 0.1}}, "ignore it: the stage's field is `label_smoothing`"),
    ],
)
def test_fields_that_would_not_count_are_refused(config: Config, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**fields)


def test_fields_beside_what_reads_them_are_taken(config: Config) -> None:
    assert config(trainer={"discopop_tau": 0.1}, loss_type=["sigmoid", "discopop"]).trainer == {"discopop_tau": 0.1}
    assert config(eval_steps=5).eval_steps == 5


def test_what_an_objective_sets_can_be_set(config: Config) -> None:
    assert (config(objective="simpo").beta, config(objective="simpo").simpo_gamma) == (2.0, 1.0)
    assert (config(objective="simpo", beta=3.0).beta, config(objective="cpo").cpo_alpha) == (3.0, 1.0)
    assert (config().beta, config(objective="kto").beta, config(objective="cpo", cpo_alpha=0.0).cpo_alpha) == (
        0.1,
        0.1,
        0.0,
    )


def test_ties_and_options_that_a_loss_cannot_take_are_refused(
    init: Any, runtime: Any, config: Config, preferences: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in preferences.read_text().splitlines()]
    path = tmp_path / "ties.jsonl"
    path.write_text("".join(json.dumps(row | {"preference": 0.5}) + "\n" for row in rows))
    ties = {"data": (DataEntry(source=str(path)),)}
    out, here = runtime("refused")
    with pytest.raises(DataError, match=r"ties or uncertain .* and sigmoid, robust takes none"):
        dpo.run(config(**ties, loss_type=["sigmoid", "robust"], held_out=0.0), {"init": init}, out, here)
    with pytest.raises(ConfigError, match="`ld_alpha` is of TRL's own losses"):
        dpo.run(config(**ties, trainer={"ld_alpha": 0.5}), {"init": init}, out, here)
    with pytest.raises(DataError, match="margin_weight multiplies a row's `margin`, and no row has one"):
        dpo.run(config(margin_weight=0.5), {"init": init}, out, here)
    with pytest.raises(ConfigError, match="kto takes its KL from other rows of the step"):
        dpo.run(config(objective="kto", per_device_train_batch_size=1), {"init": init}, out, here)
    with pytest.raises(ConfigError, match="no train row in this source"):
        dpo.run(config(**ties, objective="kto"), {"init": init}, out, here)


def test_lengths_of_ties_teach_nothing(config: Config) -> None:
    """Three pairs whose longer answer is the better one; ten ties say the opposite, and their sides mean nothing."""

    def row(good: int, bad: int, preference: float) -> dict[str, Any]:
        sides = {side: [{"role": "assistant", "content": "x" * n}] for side, n in (("chosen", good), ("rejected", bad))}
        return {"prompt": [{"role": "user", "content": "a"}], **sides, "preference": preference}

    sure, ties = [row(9, 2, 1.0)] * 3, [row(2, 9, 0.5)] * 10
    settings = config(held_out=0.0)
    short, long = dpo._held_out(settings, sure + ties).length_only([2, 9]).tolist()
    # one added to each count of two bins: (0 + 1) / 5 against (3 + 1) / 5
    assert (short, long) == pytest.approx((math.log(1 / 4), math.log(4)))


RANKS = """
import json, sys
from pathlib import Path
from pipeline.artifacts import outside_model
from pipeline.recipe import DataEntry
from pipeline.runtime import Runtime
from stages import dpo
from tests.ranks import one_and_two
import pipeline.trainer, pipeline.preference_trainer, pipeline.evals.implicit_reward

def work(world, name, fields):
    out = root / f"{name}-{world}"
    out.mkdir(exist_ok=True)
    runtime = Runtime.start(out, seed=0, threads=1, world_size=world, quiet=True)
    config = dpo.DPOConfig(data=(DataEntry(source=rows),), max_steps=3, per_device_train_batch_size=4,
                           gradient_accumulation_steps=1, learning_rate=1e-3, bf16=False, held_out=0.1, eval_rows=8,
                           drift_prompts=2, eval_steps=2, logging_steps=1, trainer={"adam_epsilon": 1e-3}, **fields)
    figures = dpo.run(config, {"init": outside_model(Path(model))}, out, runtime)
    if runtime.is_main:
        (out / "figures.json").write_text(json.dumps(figures))

root, model, rows, cases = Path(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
for name, fields in cases.items():
    if not one_and_two(lambda world: work(world, name, fields), int(sys.argv[-1])):
        sys.exit(name)
"""
CASES: dict[str, dict[str, Any]] = {
    **{objective: {"objective": objective} for objective in ("dpo", "kto", "orpo")},
    "smoothed": {"label_smoothing": 0.1},
}


@pytest.mark.slow
def test_two_processes_give_what_one_gives(
    warm: Any, model_folder: Path, preferences: Path, lines: Any, tmp_path: Path
) -> None:
    """The same rows a step, split over two gloo ranks: weights to 1e-6, losses, and what is measured."""
    run_script(warm, RANKS, tmp_path, model_folder, preferences, json.dumps(CASES))
    for name in CASES:
        one, two = (tmp_path / f"{name}-{world}" for world in (1, 2))
        theirs, ours = (load_file(out / "model" / "model.safetensors") for out in (one, two))
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-6)
        assert len(lines(one)) == len(lines(two)) == 5
        for line, other in zip(lines(one), lines(two), strict=True):
            assert line.keys() == other.keys()
            for key in line.keys() - {"time", "seconds", "tokens_per_second", "mfu", "num_tokens"}:
                assert other[key] == pytest.approx(line[key], abs=2e-4), (name, key)
