"""`llmpipe plan`: figures by hand, what fits, what is said where nothing can be told."""

import itertools
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.artifacts import Store
from pipeline.cli.session import open_session
from pipeline.data.formats import read_rows
from pipeline.data.tokenizers import train_bytes
from pipeline.errors import ConfigError
from pipeline.hardware import Device, known_device, measure_device, peak_flops
from pipeline.lineage import survey
from pipeline.model.memory import Load, memory_of
from pipeline.model.presets import build_model, shape_of
from pipeline.plan.lengths import mean_length, si
from pipeline.plan.planner import Planner
from pipeline.plan.site import Estimate
from pipeline.plan.speed import Probe, Work, flops_of_step, timed, usual_share
from pipeline.recipe import DataEntry

CPU = Device("2 CPU cores", "cpu", 1, 24 * 2**30, 4e11, bf16=True)
H100 = Device("an H100", "cuda", 1, 80 * 2**30, 8e14, bf16=True)


def planned(
    recipe: Path, device: Device = CPU, *overrides: str, processes: int = 1, shards: bool = False
) -> dict[str, Estimate]:
    session = open_session(str(recipe), artifacts=recipe.parent / "artifacts", overrides=overrides)
    planner = Planner(session.recipe, session.store, device, processes, shards)
    return {name: planner.estimate(each) for name, each in survey(session.recipe, session.store).items()}


ROAD = """\
run: road
stages:
  tokenize: {data: text.txt, vocab_size: 1000}
  pretrain: {model: {depth: 2, hidden_size: 64}, context_length: 128, max_steps: 50, optimizer: muon}
  sft: {data: rows.jsonl, max_steps: 10, per_device_train_batch_size: 4, held_out: 0.0}
  reward: {data: pairs.jsonl, per_device_train_batch_size: 4, num_train_epochs: 2.0, held_out: 0.0}
  ppo: {total_episodes: 128, response_length: 16, held_out: 0.0}
  dpo: {init: sft, data: pairs.jsonl, max_steps: 5, per_device_train_batch_size: 4, held_out: 0.0}
  simpo: {stage: dpo, objective: simpo, init: sft, data: pairs.jsonl, max_steps: 5, held_out: 0.0}
  kto: {stage: dpo, objective: kto, init: sft, data: pairs.jsonl, max_steps: 5, held_out: 0.0}
  eval: {models: [pretrain, sft, dpo], data: rows.jsonl, preferences: pairs.jsonl, held_out: 0.25, prompts: 5}
"""


@pytest.fixture
def road(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("x" * 70_000)
    row = {"prompt": "a" * 35, "completion": "b" * 70}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row | {"prompt": f"{i:035}"}) + "\n" for i in range(40)))
    pair = {"chosen": "b" * 70, "rejected": "c" * 35}
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({"prompt": f"{i:035}", **pair}) + "\n" for i in range(40)))
    (tmp_path / "road.yaml").write_text(ROAD)
    return tmp_path / "road.yaml"


@pytest.mark.slow
def test_ppo_counts_what_scores(road: Path) -> None:
    """Decode, policy, reference, critic, an update of two models; a forward for each model of the reward or judge."""
    (road.parent / "rules.md").write_text("Be kind.")
    one = planned(road)["ppo"]
    assert one.flops is not None
    for reward, forwards in (
        ("[{function: exact}]", 4),
        ("[{model: reward}]", 5),
        ("[{models: [reward, reward-b]}]", 6),
        ("[{models: [reward-c]}]", 7),
        (f"[{{model: reward}}, {{judge: pretrain, constitution: {road.parent / 'rules.md'}}}]", 6),
    ):
        text = ROAD + "  reward-b: {stage: reward, data: pairs.jsonl, max_steps: 2}\n"
        text += "  reward-c: {stage: reward, data: pairs.jsonl, max_steps: 2, ensemble: 3}\n"
        (road.parent / "terms.yaml").write_text(text)
        found = planned(road.parent / "terms.yaml", CPU, f"ppo.reward={reward}")["ppo"]
        assert found.flops == pytest.approx(one.flops * (forwards / 3 + 2) / (5 / 3 + 2))
        assert (found.peak > one.peak) == (forwards > 5)


@pytest.mark.slow
def test_ppo_without_a_critic_and_with_adapters(road: Path) -> None:
    """GRPO: no critic's forward, update, weights; adapters: two thirds of an update, one model beside the policy."""
    ppo = planned(road)["ppo"]
    grpo = planned(road, CPU, "ppo.algorithm=grpo")["ppo"]
    lora = planned(road, CPU, "ppo.peft={r: 4}")["ppo"]
    assert ppo.flops is not None
    assert grpo.flops == pytest.approx(ppo.flops * (4 / 3 + 1) / (5 / 3 + 2))
    assert lora.flops == pytest.approx(ppo.flops * (5 / 3 + 2 * 2 / 3) / (5 / 3 + 2))
    parts = [dict(each.memory) for each in (ppo, grpo, lora)]
    total = ppo.parameters
    assert total is not None
    assert [part["weights"] for part in parts] == [4 * total * 4, 4 * total * 3, 4 * total * 2]
    assert parts[1]["optimizer"] == parts[0]["optimizer"] / 2
    assert parts[2]["optimizer"] < 0.5 * parts[0]["optimizer"]


@pytest.mark.slow
def test_ppo_with_fewer_models_on_the_device(road: Path) -> None:
    """One trunk for policy and critic; the reference and the reward model away, one of them back at a time."""
    card = replace(CPU, name="a card", kind="cuda")

    def copies(device: Device, *settings: str) -> float:
        found = planned(road, device, *settings)["ppo"]
        assert found.parameters is not None
        return dict(found.memory)["weights"] / (4 * found.parameters)

    function = "ppo.reward=[{function: exact}]"
    assert copies(CPU, function, "ppo.peft={r: 4}") == 2
    assert copies(CPU, function, "ppo.peft={r: 4}", "ppo.shared_trunk=true") == 1
    assert copies(CPU, "ppo.peft={r: 4}", "ppo.shared_trunk=true") == 2  # and the reward model
    assert copies(CPU, "ppo.peft={r: 4}", "ppo.shared_trunk=true", "reward.peft={r: 4}") == 1  # that is adapters
    assert [copies(device, "ppo.offload=true") for device in (CPU, card)] == [4, 3]
    assert copies(card, "ppo.offload=true", "ppo.algorithm=grpo") == 2


@pytest.mark.slow
def test_every_stage_by_hand(road: Path) -> None:
    """Two blocks 64 wide, V 1000: N, tokens, FLOPs and seconds worked out here."""
    found = planned(road)
    block = 4 * 64 * 64 + 3 * 64 * 192 + 2 * 64
    total = 2 * block + 64 + 1000 * 64
    assert found["pretrain"].parameters == total
    assert found["pretrain"].tokens == 50 * 8 * 128
    a_token = 6 * total + 12 * 2 * 64 * 128
    assert found["pretrain"].flops == 50 * 8 * 128 * a_token
    assert found["pretrain"].seconds == pytest.approx(2 + 50 * 8 * 128 * a_token / (0.3 * 4e11))
    assert found["tokenize"].tokens == 20_000
    row = 35 / 3.5 + 70 / 3.5 + 16  # bytes a token, eight tokens more a message
    assert found["sft"].tokens == pytest.approx(10 * 4 * row)
    pair = (row + 35 / 3.5 + 35 / 3.5 + 16) / 2
    assert found["reward"].tokens == pytest.approx(20 * 4 * 2 * pair)  # 2 epochs of 40 pairs, 4 a step
    assert found["dpo"].tokens == pytest.approx(5 * 4 * 2 * pair)
    per_token = {name: found[name].flops / found[name].tokens for name in ("reward", "dpo", "simpo", "kto")}  # type: ignore[operator]
    assert per_token["simpo"] - per_token["reward"] == pytest.approx(6 * 64 * 1000)  # the head, which a reward lacks
    assert per_token["dpo"] / per_token["simpo"] == pytest.approx(4 / 3)  # the reference's forward
    long = planned(road, CPU, "dpo.max_steps=40")["dpo"]  # four epochs of 40 pairs, which the reference reads once
    assert long.flops / long.tokens / per_token["simpo"] == pytest.approx(1 + 1 / 12)  # type: ignore[operator]
    assert per_token["kto"] / per_token["simpo"] == pytest.approx(2)  # own row, and three forwards
    assert found["kto"].tokens == pytest.approx(5 * 8 * pair)
    assert found["ppo"].tokens == pytest.approx(128 * (35 / 3.5 + 8 + 16))
    assert found["pretrain"].loss is None, "the law says nothing of so small a model"
    more = planned(road, CPU, 'tokenize.added_tokens=["<|a|>", "<|b|>"]')
    assert more["pretrain"].parameters == total + 2 * 64
    assert planned(road, CPU, "tokenize.algorithm=bytes")["pretrain"].parameters == total - (1000 - 260) * 64


@pytest.mark.slow
def test_the_disk_of_tokenize_by_hand(road: Path) -> None:
    """Ids of two bytes up to 65,536 tokens and of four above; of the hub what pretrain reads; of packed text thrice."""
    assert planned(road)["tokenize"].disk == pytest.approx(1.1 * 20_000 * 2)
    assert planned(road, CPU, "tokenize.vocab_size=70000")["tokenize"].disk == pytest.approx(1.1 * 20_000 * 4)
    hub = 'tokenize.data=["hub:some/text"]'
    found = planned(road, CPU, hub)["tokenize"]
    assert found.tokens == 50 * 8 * 128
    assert found.disk == pytest.approx(1.1 * 50 * 8 * 128 * 2)
    assert "as if hub:some/text held the 51.2 k tokens that pretrain reads" in found.notes[0]
    assert "nothing with `streaming: true`" in found.notes[0]
    streamed = planned(road, CPU, 'tokenize.data=[{"source": "hub:some/text", "streaming": true}]')["tokenize"]
    assert (streamed.disk, "streaming" in streamed.notes[0]) == (found.disk, False)
    shutil.copy(road.parent / "text.txt", road.parent / "text.txt.gz")
    assert (
        planned(road, CPU, f"tokenize.data={road.parent}/text.txt.gz", "tokenize.num_proc=4")["tokenize"].tokens
        == 60_000
    )


def test_text_by_the_tokens_of_another_run(trained: Path) -> None:
    """A recipe that takes another run's model counts its rows by the bytes a token of that run's shards."""
    path = trained.parent / "after.yaml"
    path.write_text("run: after\nstages:\n  sft: {init: tiny/pretrain, data: rows.jsonl, held_out: 0.0}\n")
    (trained.parent / "rows.jsonl").write_text(json.dumps({"prompt": "a" * 350, "completion": "b" * 700}) + "\n")
    held = json.loads((trained.parent / "artifacts" / "tiny" / "tokenize" / "manifest.json").read_text())["metrics"]
    bytes_a_token = held["train_bytes"] / held["train_tokens"]
    assert abs(bytes_a_token - 3.5) > 0.1
    found = planned(path, CPU, "sft.per_device_train_batch_size=1", "sft.max_steps=1", "sft.max_length=4096")["sft"]
    assert found.tokens == pytest.approx(1050 / bytes_a_token + 16)
    elsewhere = trained.parent / "elsewhere.yaml"
    elsewhere.write_text(f"run: elsewhere\nstages:\n  sft: {{init: {trained.parent}/m, data: rows.jsonl}}\n")
    shutil.copytree(trained.parent / "artifacts" / "tiny" / "pretrain" / "model", trained.parent / "m")
    session = open_session(str(elsewhere), artifacts=trained.parent / "none")
    sites = [Planner(session.recipe, session.store, CPU, 1, bytes_a_token=told).site for told in (None, 4.5)]
    assert [site.bytes_a_token() for site in sites] == [3.5, 4.5]


@pytest.mark.slow
def test_sample_by_hand(road: Path) -> None:
    """Prompts once, answers in full; a reward model reads both again for every answer. Its rows are not there yet."""
    more = "  sample: {reward: reward, prompts: 30, response_length: 16, keep: pairs}\n"
    more += "  again: {stage: dpo, init: sft, data: [sample]}\n"
    path = road.parent / "rounds.yaml"
    path.write_text(ROAD + more)
    found = planned(path)
    prompt, total = 35 / 3.5 + 8, found["pretrain"].parameters
    assert total is not None
    assert found["sample"].tokens == pytest.approx(30 * (prompt + 4 * 16))
    a_token = (6 * total + 12 * 2 * 64 * 34) / 3
    assert found["sample"].flops == pytest.approx((30 * (prompt + 64) + 120 * (prompt + 16)) * a_token)
    plain = planned(path, CPU, "sample.reward=null", "sample.keep=all")["sample"]
    assert plain.flops == pytest.approx(30 * (prompt + 64) * a_token)
    assert found["sample"].memory["weights"] == 2 * plain.memory["weights"] == 8 * total
    assert found["sample"].memory["cache"] == 64 * 34 * 2 * 2 * 64 * 4
    assert found["again"].notes == ("not estimated: its rows are written by sample, which has not run",)


@pytest.mark.slow
def test_eval_by_hand(road: Path) -> None:
    """Rows of 35 + 70 bytes, pairs of 35 + 70 and 35 + 35: what each model reads, and 5 prompts answered twice."""
    rows, pairs = (
        read_rows([DataEntry(source=str(road.parent / name))], "prompt", split="held_out", held_out=0.25)
        for name in ("rows.jsonl", "pairs.jsonl")
    )
    assert len(rows) >= 5
    found = planned(road)
    total = found["pretrain"].parameters
    assert total is not None
    text = 0.1 * 70_000 / 3.5  # the last tenth of the one document
    pair = ((35 + 70) + (35 + 35)) / 2 / 3.5 + 16
    answer = 5 * (35 / 3.5 + 8 + 70 / 3.5 + 1)
    sides = 2 * len(pairs) * pair
    read = 3 * text + 2 * sides + answer + (sides + 2 * 2 * answer)  # dpo's KL; the reward model, which prices both
    assert found["eval"].tokens == pytest.approx(read + 2 * 2 * 5 * 96)
    texts_of_1024 = 2 * total + 4 * 2 * 64 * 1024
    assert found["eval"].work[0].flops == pytest.approx(text * texts_of_1024)
    assert [work.how for work in found["eval"].work] == [*["read"] * 3, "write", *["read"] * 3, "write", "read", "read"]
    alone = planned(road, CPU, "eval.models=[pretrain]", "eval.reward=null", "eval.baseline=null")["eval"]
    assert alone.tokens == pytest.approx(text)
    some = planned(road, CPU, f"eval.tasks=[greedy, {road.parent}/rows.jsonl]", "eval.match=exact")["eval"]
    assert some.tokens == pytest.approx(2 * 5 * 96 + 2 * answer)
    assert "not counted: rows" in some.notes


def test_eval_of_another_runs_tokens(trained: Path) -> None:
    """No stage of the recipe makes them: their manifest says how long the held-out documents are."""
    path = trained.parent / "elsewhere.yaml"
    stage = "{models: [tiny/pretrain], tokens: tiny/tokenize, tasks: [bits_per_byte], documents: 3}"
    path.write_text(f"run: elsewhere\nstages:\n  eval: {stage}\n")
    held = json.loads((trained.parent / "artifacts" / "tiny" / "tokenize" / "manifest.json").read_text())["metrics"]
    assert held["valid_documents"] > 3
    assert planned(path)["eval"].tokens == pytest.approx(3 * held["valid_tokens"] / held["valid_documents"])


def test_revisions_are_in_the_plan(road: Path) -> None:
    """Two rounds of 30 x 4 answers: prompt and answer are read twice, a principle and a critique beside them."""
    (road.parent / "rules.md").write_text("- " + "r" * 35 + "\n")
    path = road.parent / "revised.yaml"
    path.write_text(ROAD + "  sample: {prompts: 30, response_length: 16}\n")
    plain = planned(path)["sample"]
    revised = planned(
        path, CPU, "sample.revisions=2", f"sample.constitution={road.parent}/rules.md", "sample.critique_length=20"
    )["sample"]
    prompt, total = 35 / 3.5 + 8, plain.parameters
    assert plain.tokens is not None
    assert plain.flops is not None
    assert total is not None
    written, read = 30 * 4 * 2 * (20 + 16), 30 * 4 * 2 * (2 * (prompt + 16) + 10 + 20)
    assert revised.tokens == pytest.approx(plain.tokens + written + read)
    a_token = 2 * total + 4 * 2 * 64 * 64  # 18 + 16 + 20 + 10 tokens long
    assert revised.flops == pytest.approx(plain.flops + (written + read) * a_token)


KEPT = 2 * (34 * 64 + 8 * 192 + 4 + 2 * 4) + 2 * 4 * 64 + 4 + 8
"""Bytes a position that a Llama of two blocks, 64 wide with one head and an MLP of 192, keeps under autocast. A block:
the inputs of q, k, v, gate and up in bf16 (5 D), q, k, v and the attention's output (4 D), what goes into both norms
and what their first half makes of it in fp32 (4 D), gate, up, their product and its activation (4 F); the attention's
logarithms and two roots. Last norm: 2 D in fp32 and a root; the token's id."""


def test_memory_by_part_by_hand() -> None:
    model = build_model("llama", shape_of({"depth": 2, "hidden_size": 64}, 128, 1000), {})
    total = sum(parameter.numel() for parameter in model.parameters())
    load = Load(8, 128, total, 8.0, bf16=True, checkpointing=False, logits=1024)
    found = memory_of(model, load)
    assert found == {
        "weights": 4 * total,
        "gradients": 4 * total,
        "optimizer": 8 * total,
        "bf16 copies": 2 * total,
        "activations": 8 * 128 * KEPT,
        "logits": 10 * 1024 * 1000,
        "head's gradient": 4 * 1000 * 64,
    }
    recomputed = memory_of(model, replace(load, checkpointing=True))["activations"]
    assert recomputed == 8 * 128 * (KEPT / 2 + 4 * 64 * 2)
    compiled = memory_of(model, replace(load, compiled=True))["activations"]
    assert compiled == pytest.approx(2 / 3 * 8 * 128 * KEPT)
    assert memory_of(model, replace(load, bf16=False))["bf16 copies"] == 0

    block = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    at_once = total - 2 * block + block  # what no block owns, and one block
    cut = memory_of(model, replace(load, shards=4, others=100))
    assert (cut["weights"], cut["gradients"], cut["optimizer"]) == (total + 400, total, 2 * total)
    assert (cut["gathered"], cut["bf16 copies"]) == (8 * at_once, 2 * total)
    assert memory_of(model, replace(load, shards=4, checkpointing=True))["bf16 copies"] == 2 * at_once


def test_memory_of_a_cpu_is_that_of_its_fullest_moment() -> None:
    """fp32, two blocks 64 wide, an MLP of 192: a forward's end or the gradients, beside a copy for a checkpoint; what
    lies unused is half of the blocks below 32 MiB."""
    model = build_model("llama", shape_of({"depth": 2, "hidden_size": 64}, 128, 1000), {})
    total = sum(parameter.numel() for parameter in model.parameters())
    load = Load(8, 128, total, 8.0, bf16=False, checkpointing=False, logits=1024, on_cpu=True, libraries=1e6)
    activations = memory_of(model, replace(load, on_cpu=False))["activations"]
    found = memory_of(model, load)
    assert found == {
        "libraries": 1e6,
        "weights": 4 * total,
        "optimizer": 8 * total,
        "activations": activations,
        "logits": 12 * 1024 * 1000,
        "head's gradient": 2 * 4 * 1000 * 64,
        "unused heap": pytest.approx(0.5 * activations),
    }
    assert memory_of(model, replace(load, accumulates=True)) == {**found, "gradients": 4 * total}
    one = memory_of(model, replace(load, rows=1, length=2, logits=0, copies=True))
    assert one == {
        **{name: found[name] for name in ("libraries", "weights", "optimizer")},
        "gradients": 4 * total,
        "checkpoint": 12 * total,
    }
    other = memory_of(model, replace(load, logit=16.0))  # TRL's: the head's gradient is autograd's
    assert (other["logits"], other["head's gradient"]) == (16 * 1024 * 1000, 4 * 1000 * 64)
    many = memory_of(model, replace(load, rows=512))  # 48 MiB a tensor of the MLP, four a block
    mapped = 2 * 4 * 512 * 128 * 192 * 4
    assert many["unused heap"] == pytest.approx(0.5 * (many["activations"] - mapped))


@pytest.mark.slow
def test_what_a_stage_of_a_cpu_counts(road: Path) -> None:
    """Two chunks of logits and more are three at a time; of rows to train on the answers' share has logits; pretrain
    copies its checkpoints, where it saves before the end."""
    cpu = replace(CPU, bf16=False)
    plain = planned(road, cpu)
    total = plain["pretrain"].parameters
    assert total is not None
    assert plain["pretrain"].memory["logits"] == 12 * 512 * 1000
    assert planned(road, cpu, "pretrain.per_device_train_batch_size=4")["pretrain"].memory["logits"] == 8 * 512 * 1000
    tiny = ("pretrain.per_device_train_batch_size=1", "pretrain.context_length=8")
    saves = planned(road, cpu, *tiny, "pretrain.save_steps=9")
    assert saves["pretrain"].memory["checkpoint"] == (4 + 4) * total  # Muon's one moment
    answers = 70 / (35 + 70)
    row = 2 * round(35 / 3.5 + 70 / 3.5 + 16)
    assert plain["sft"].memory["logits"] == pytest.approx(16 * 1000 * 4 * row * answers)
    pair = (70 + 35) / (2 * 35 + 70 + 35)
    longest = round(2 * ((35 + 70) / 3.5 + 16 + (35 + 35) / 3.5 + 16) / 2)
    assert plain["dpo"].memory["logits"] == pytest.approx(16 * 1000 * 4 * 2 * longest * pair)


BIG = """\
run: big
stages:
  tokenize: {data: text.txt, vocab_size: 32000}
  pretrain:
    model: {size: 1b}
    context_length: 2048
    per_device_train_batch_size: 64
    max_steps: 1000
"""


@pytest.mark.slow
def test_what_would_fit_fits_with_the_same_global_batch(road: Path) -> None:
    """1.1 B on 80 GiB: not with 64 rows a micro-step; the advice, followed, fits."""
    recipe = road.with_name("big.yaml")
    recipe.write_text(BIG)
    found = planned(recipe, H100)["pretrain"]
    assert found.peak > H100.memory
    assert "does not fit in 80 GiB" in found.notes
    advice = found.notes[-1]
    assert advice.startswith("would fit with --set pretrain.per_device_train_batch_size=")
    overrides = [word for word in advice.split() if "=" in word]
    mended = planned(recipe, H100, *overrides)["pretrain"]
    assert mended.peak <= H100.memory
    assert (mended.tokens, mended.flops) == (found.tokens, found.flops)
    assert "does not fit in 80 GiB" not in mended.notes
    assert found.loss == pytest.approx(
        1.8172 + 482.01 / 1.04e9**0.3478 + 2085.43 / (1000 * 64 * 2048) ** 0.3658, abs=0.01
    )

    small = replace(H100, memory=24 * 2**30)
    assert "gradient_checkpointing=true" in planned(recipe, small)["pretrain"].notes[-1]
    assert "a smaller model" in planned(recipe, replace(H100, memory=8 * 2**30))["pretrain"].notes[-1]


@pytest.mark.slow
def test_a_process_has_the_rows_that_the_stage_gives_it(road: Path) -> None:
    """64 rows x 8 micro-steps over 8 processes: each has a whole micro-step of 64 rows; 8 x 64 are 8 rows of it."""
    recipe = road.with_name("big.yaml")
    recipe.write_text(BIG)
    block = 34 * 2048 + 8 * 8192 + 4 * 32 + 2 * 4
    row = 2048 * (16 * block + 2 * 4 * 2048 + 4 + 8)  # as in KEPT, of 32 heads
    for rows, steps, here in ((64, 1, 8), (64, 8, 64), (8, 64, 8), (16, 4, 2)):
        given = (f"pretrain.per_device_train_batch_size={rows}", f"pretrain.gradient_accumulation_steps={steps}")
        found = planned(recipe, H100, *given, processes=8)["pretrain"]
        assert found.memory["activations"] == here * row, (rows, steps)
    uneven = planned(recipe, H100, "pretrain.per_device_train_batch_size=4", processes=8)["pretrain"]
    assert "8 processes cannot share 4 rows" in uneven.notes[0]
    uneven = planned(road, CPU, "ppo.batch_size=64", processes=3)["ppo"]
    assert "a batch of 64 is not divisible by 3 processes" in uneven.notes[0], "as the stage itself would say"
    assert "ppo.batch_size=66" in uneven.notes[0]
    assert planned(road, CPU, "sft.per_device_train_batch_size=8", processes=4)["sft"].work[0].rows == 2
    for batch, processes, here in ((64, 1, 16), (64, 8, 8), (16, 8, 2)):
        ppo = planned(road, CPU, f"ppo.batch_size={batch}", processes=processes)["ppo"]
        assert ppo.work[2].rows == here, "a forward's responses are not shared, but no more than the process's own"


@pytest.mark.slow
def test_shards_over_the_processes_are_advised_where_they_fit(road: Path) -> None:
    """8 B over eight processes of 80 GiB: 16 bytes a parameter are too much for one, an eighth of them is not."""
    recipe = road.with_name("huge.yaml")
    recipe.write_text(BIG.replace("size: 1b", "size: 8b").replace("batch_size: 64", "batch_size: 8"))
    alone = planned(recipe, H100)["pretrain"]
    assert "a smaller model" in alone.notes[-1]
    found = planned(recipe, H100, processes=8)["pretrain"]
    assert found.notes[-1] == "would fit with --strategy fsdp"
    cut = planned(recipe, H100, processes=8, shards=True)["pretrain"]
    assert cut.peak <= H100.memory < found.peak
    assert "does not fit" not in " ".join(cut.notes)


@pytest.mark.slow
def test_a_base_fits_a_small_card_as_the_plan_says(road: Path) -> None:
    """110 M with LoRA, frozen weights in fp32, bf16, four bits: on a card that holds just so much, that is the advice,
    and taken literally it fits."""
    recipe = road.with_name("tuned.yaml")
    text = BIG.replace("1b", "124m").replace("batch_size: 64", "batch_size: 1")
    sft = "  sft: {data: rows.jsonl, held_out: 0.0, max_length: 64, per_device_train_batch_size: 1}\n"
    recipe.write_text(text + sft)

    def tuned(device: Device, *overrides: str) -> Estimate:
        session = open_session(str(recipe), artifacts=road.parent / "artifacts", overrides=overrides)
        standing = survey(session.recipe, session.store)["sft"]
        return Planner(session.recipe, session.store, device, 1).estimate(standing)

    lora = "--set sft.gradient_checkpointing=true --set sft.peft={}"
    for more, weight in (("", 4.0), (" --set sft.dtype=bfloat16", 2.0), (" --set sft.load_in_4bit=true", 1.3)):
        overrides = [part for part in f"{lora}{more}".split() if "=" in part]
        fitting = tuned(H100, *overrides)
        assert fitting.parameters is not None
        assert fitting.memory["weights"] <= weight * fitting.parameters
        card = replace(H100, memory=1.01 * fitting.peak / 0.9)
        assert tuned(card).notes[-1] == f"would fit with {lora}{more}"
        assert not any("does not fit" in note for note in tuned(card, *overrides).notes)


@pytest.mark.slow
def test_adapters_and_a_teacher_are_in_the_plan(road: Path) -> None:
    """Going on from a base with LoRA: two thirds of the FLOPs and the adapters' moments; a teacher's forward beside."""
    plain = planned(road)["pretrain"]
    base = road.with_name("base.yaml")
    text = road.read_text()
    base.write_text(text.replace("  pretrain:", "  base: {stage: pretrain, model: {depth: 2}}\n  pretrain:", 1))
    adapted = planned(base, CPU, "pretrain.init=base", "pretrain.peft={r: 4}")["pretrain"]
    whole = planned(base, CPU, "pretrain.init=base")["pretrain"]
    assert adapted.flops == pytest.approx(2 / 3 * whole.flops)
    assert adapted.memory["optimizer"] < 0.2 * whole.memory["optimizer"]
    taught = planned(base, CPU, "pretrain.teacher=base")["pretrain"]
    teacher = planned(base)["base"].parameters
    assert taught.flops == pytest.approx(plain.flops + 2 * teacher * taught.tokens)
    assert taught.memory["weights"] == plain.memory["weights"] + 2 * teacher  # in bf16
    alone, beside = (planned(base, CPU, *given)["sft"] for given in ((), ("sft.teacher=base",)))
    assert beside.flops == pytest.approx(alone.flops + 2 * teacher * alone.tokens)
    assert beside.memory["weights"] == alone.memory["weights"] + 2 * teacher


@pytest.mark.slow
def test_the_last_blocks_and_four_bits_are_in_the_plan(road: Path) -> None:
    """One block of two, the norm behind it (the head is the embedding, which stays); linear layers in 0.516 bytes."""
    whole, last, small = (
        planned(road, H100, *given)["sft"]
        for given in ((), ("sft.train_last_layers=1",), ("sft.peft={r: 4}", "sft.load_in_4bit=true"))
    )
    linear = 4 * 64 * 64 + 3 * 64 * 192
    block, total = linear + 2 * 64, 2 * (linear + 2 * 64) + 64 + 1000 * 64
    assert whole.parameters == last.parameters == total
    assert last.memory["gradients"] == 4 * (block + 64)
    assert last.memory["optimizer"] == 8 * (block + 64)
    assert last.memory["activations"] == whole.memory["activations"] / 2
    assert last.flops / whole.flops == pytest.approx((1 + 2 * (block + 64) / total) / 3)  # type: ignore[operator]
    assert small.memory["weights"] == pytest.approx(4 * (total - 2 * linear) + 0.516 * 2 * linear)


@pytest.mark.slow
def test_label_by_hand(road: Path) -> None:
    """40 pairs of 70 and 35 bytes to prompts of 35: both sides through a reward model; by a judge in both orders."""
    more = "  label: {data: pairs.jsonl, reward: reward}\n"
    path = road.parent / "labelled.yaml"
    path.write_text(ROAD + more)
    found = planned(path)
    total = found["pretrain"].parameters
    assert total is not None
    assert found["label"].tokens == pytest.approx(40 * (35 + 70 + 35 + 35) / 3.5)
    a_token = 2 * total + 4 * 2 * 64 * 25
    assert found["label"].flops == pytest.approx(found["label"].tokens * a_token)
    assert found["label"].memory == {"weights": 4 * total}
    (road.parent / "rules.txt").write_text("r" * 70)
    path.write_text(ROAD + "  label: {data: pairs.jsonl, judge: sft, constitution: rules.txt}\n")
    assert planned(path)["label"].tokens == pytest.approx(40 * 2 * (35 + 70 + 35 + 70) / 3.5)
    person = "  label: {data: pairs.jsonl, labels: rules.txt}\n"
    path.write_text(ROAD + person)
    assert planned(path)["label"].notes[0].startswith("not estimated: no model of ours labels the 40 pairs")


def test_what_ran_here_sets_the_speed(trained: Path) -> None:
    """A stage that took long enough to count: its FLOPs over its seconds, whatever the product does."""
    manifest = trained.parent / "artifacts" / "tiny" / "pretrain" / "manifest.json"
    held = json.loads(manifest.read_text())
    session = open_session(str(trained), artifacts=trained.parent / "artifacts")
    planner = Planner(session.recipe, session.store, CPU, 1)
    assert planner.rate("pretrain")[0] == 0.3 * 4e11, "a second is all start and end"
    manifest.write_text(json.dumps({**held, "seconds": 100.0, "flops": 5e12}))
    rate, source = planner.rate("pretrain")
    assert rate == 5e10
    assert "1 pretrain here before (12% of" in source
    assert Planner(session.recipe, session.store, H100, 1).rate("pretrain")[0] == 0.3 * 8e14
    assert Planner(session.recipe, session.store, H100, 1).rate("pretrain", is_compiled=True)[0] == 0.4 * 8e14
    assert planner.rate("pretrain", cost=4 * 5e12 / held["tokens"])[0] == 5e10
    assert planner.rate("pretrain", cost=4.1 * 5e12 / held["tokens"])[0] == 0.3 * 4e11, "a model of another size"
    assert planner.rate("pretrain", cost=5e12 / held["tokens"] / 4.1)[0] == 0.3 * 4e11
    named = Planner(session.recipe, session.store, replace(CPU, is_here=False), 1)
    assert named.rate("pretrain") == (0.3 * 4e11, "at 30% of the maker's peak"), "what ran here says nothing of it"

    manifest.write_text(json.dumps({**held, "seconds": 100.0, "flops": 5e12, "device": H100.name}))
    assert Planner(session.recipe, session.store, H100, 1).rate("pretrain")[0] == 5e10, "a GPU goes by its name"
    other = replace(H100, name="an A100")
    assert Planner(session.recipe, session.store, other, 1).rate("pretrain")[0] == 0.3 * 8e14


@pytest.mark.slow
def test_the_command_prints_every_stage_and_as_json(road: Path, warm: Any) -> None:
    shown = warm("plan", road, "--budget", "1e19")
    assert shown.code == 0, shown.stderr
    for word in ("tokenize", "pretrain", "sft", "reward", "ppo", "dpo", "eval", "to run", "GiB a process"):
        assert word in shown.stdout
    assert "best for 1e+19 FLOPs" in shown.stdout
    assert "262 M parameters on 6.36 B tokens" in shown.stdout
    printed = json.loads(warm("plan", road, "--json", "--on", "h100").stdout)
    assert [each["stage"] for each in printed["stages"]] == [
        line.split(":")[0].strip() for line in ROAD.split("\n")[2:11]
    ]
    assert printed["stages"][1]["peak"] == pytest.approx(sum(printed["stages"][1]["memory"].values()))
    assert not (road.parent / "artifacts").exists(), "a plan makes nothing"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget", "8 days"], "--budget 8 days: no budget"),
        (["--budget", "0h"], "--budget 0h: no budget"),
        (["--fit", "a/pretrain"], "no artifact a/pretrain"),
    ],
)
def test_what_is_no_budget_and_no_run_is_refused(road: Path, warm: Any, words: list[str], message: str) -> None:
    refused = warm("plan", road, *words, "--on", "h100")  # nothing to measure
    assert refused.code != 0
    assert message in refused.stderr


@pytest.mark.slow
def test_a_fit_wants_three_models_from_scratch(trained: Path, warm: Any) -> None:
    refused = warm("plan", trained, "--on", "h100", "--fit", "tiny", "--fit", "tiny/pretrain")
    assert refused.code == 2
    assert "--fit has 2 runs" in refused.stderr
    refused = warm("plan", trained, "--on", "h100", "--fit", "tiny/tokenize")
    assert "not a model pretrained from scratch" in refused.stderr
    refused = warm("plan", trained, "--on", "h100", *["--fit", "tiny"] * 3)
    assert "3 runs, of which fewer than three differ" in refused.stderr
    store = trained.parent / "artifacts"
    held = json.loads((store / "tiny" / "pretrain" / "manifest.json").read_text())
    for name, steps in (("a", 1), ("b", 2), ("c", 3), ("d", 4)):
        shutil.copytree(store / "tiny" / "pretrain", store / name / "pretrain")
        metrics = held["metrics"] | {"bits_per_byte": 3 + 1 / steps}
        made = held | {"run": name, "tokens": steps * held["tokens"], "metrics": metrics}
        (store / name / "pretrain" / "manifest.json").write_text(json.dumps(made))
    named = [word for name in "abcd" for word in ("--fit", name)]
    refused = warm("plan", trained, "--on", "h100", *named)
    assert "all runs have as many parameters" in refused.stderr
    made["inputs"]["tokens"][0]["fingerprint"] = "another"
    (store / "d" / "pretrain" / "manifest.json").write_text(json.dumps(made))
    refused = warm("plan", trained, "--on", "h100", *named)
    assert "c and d are of other tokens" in refused.stderr


def test_units_and_lengths() -> None:
    assert [si(value) for value in (12.0, 4_262_144, 1.2358e9, 9.9e17)] == ["12", "4.26 M", "1.24 B", "990 P"]
    messages = [{"role": "user", "content": "ä" * 10}, {"role": "assistant", "content": "b" * 15}]
    assert mean_length([{"messages": messages}], 3.5) == 20 / 3.5 + 15 / 3.5 + 16


@pytest.mark.slow
def test_the_device_is_measured() -> None:
    found = measure_device(0.05)
    assert found.flops_per_second > 1e8
    assert found.memory > 2**28


def test_a_device_as_a_process_has_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two processes share a CPU's memory and cores; a container has what it is allowed; a Mac's GPU is one."""
    monkeypatch.setattr("pipeline.hardware.product_rate", lambda device, size, bf16, seconds: 1e12)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    limit = tmp_path / "memory.max"
    monkeypatch.setattr("pipeline.hardware.LIMITS", (limit,))
    threads = torch.get_num_threads()
    try:
        whole, half = measure_device(), measure_device(processes=2)
        limit.write_text("1073741824\n")
        assert measure_device().memory == 2**30
        limit.write_text("max\n")
        assert measure_device().memory == whole.memory == 2 * half.memory
        assert half.name.split()[0] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    monkeypatch.setattr("torch.mps.recommended_max_memory", lambda: 12 * 2**30)
    mac = measure_device()
    assert (mac.kind, mac.memory, mac.bf16) == ("mps", 12 * 2**30, False)
    assert usual_share(mac, "train", True) == 0.3


def test_what_utilisation_is_measured_against(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured on a CPU, the maker's number on a GPU that is known."""
    assert peak_flops("cpu", False) > 1e8
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert peak_flops("cuda", True) == 989e12


def test_a_device_that_is_not_here() -> None:
    eight = known_device("h100x8")
    assert (eight.count, eight.memory, eight.flops_per_second) == (8, 80 * 2**30, 989e12)
    assert known_device("4090").count == 1
    for name in ("h1000", "h100x0", "h100xl"):
        with pytest.raises(ConfigError, match=f"--on {name}: not known"):
            known_device(name)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "hours", "count"), [("gpt2-124m", 0.75, 124.4e6), ("llama-1b", 18.9, 1.2358e9)])
def test_the_large_recipes_fit_eight_gpus(recipe: str, hours: float, count: float, tmp_path: Path) -> None:
    """40 % of the peak of eight H100: 6 N D and attention are 8.6e18 and 2.15e20 FLOPs."""
    session = open_session(recipe, artifacts=tmp_path)
    planner = Planner(session.recipe, session.store, known_device("h100x8"), 8)
    found = planner.estimate(survey(session.recipe, session.store)["pretrain"])
    assert found.parameters == pytest.approx(count, rel=1e-3)
    assert found.peak < 80 * 2**30
    assert found.seconds == pytest.approx(hours * 3600, rel=0.03)


def test_a_batch_far_above_the_step_laws_is_said(tmp_path: Path) -> None:
    """512 × 1,024 tokens a step for 100 steps: 0.58 · 52,428,800^0.571 are 14,836; for 19,000 steps 297,000."""
    said = []
    for steps in (100, 19_000):
        session = open_session("gpt2-124m", artifacts=tmp_path, overrides=[f"pretrain.max_steps={steps}"])
        planner = Planner(session.recipe, session.store, known_device("h100x8"), 8)
        notes = planner.estimate(survey(session.recipe, session.store)["pretrain"]).notes
        said.append([note for note in notes if "step law" in note])
    line = "524,288 tokens a step are many for a run of 52,428,800: the step law takes 14,836, and more steps"
    assert said == [[line], []]


def test_a_probe_measures_what_the_formula_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by a second at each look: a step takes one, an update too."""
    model = build_model("llama", shape_of({"depth": 2, "hidden_size": 64}, 128, 1000), {}).to("meta")
    total, attention = 2 * (4 * 64 * 64 + 3 * 64 * 192 + 2 * 64) + 64 + 1000 * 64, 2 * 64
    train = Work("train", model, 0.0, 4, 16, bf16=False)
    assert flops_of_step(train, 4) == 4 * 16 * (6 * total + 12 * attention * 16)
    assert flops_of_step(replace(train, head=0.0), 4) == flops_of_step(train, 4) - 4 * 16 * 6 * 64 * 1000
    assert flops_of_step(replace(train, how="write"), 4) == pytest.approx(4 * (2 * total + 4 * attention * 16))
    ticks = itertools.count()
    monkeypatch.setattr("pipeline.plan.speed.time.monotonic", lambda: float(next(ticks)))
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 9.0, 9.0))
    probe = Probe(CPU)
    assert probe.rate(train) == flops_of_step(train, 4) / 2
    for how in ("read", "write"):
        assert probe.rate(replace(train, how=how)) == pytest.approx(flops_of_step(replace(train, how=how), 4))
    assert probe.rate(replace(train, head=0.0, optimizer="muon")) == flops_of_step(replace(train, head=0.0), 4) / 2
    looks = next(ticks)
    assert probe.rate(train) == flops_of_step(train, 4) / 2
    assert next(ticks) == looks + 1, "measured once"
    for other in (replace(CPU, is_here=False), H100, replace(CPU, flops_per_second=1e4), replace(CPU, memory=1e6)):
        assert Probe(other).rate(train) is None


def test_a_step_is_timed_after_a_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first takes never counts; three steps at least, nine at most."""
    now = [0.0]
    monkeypatch.setattr("pipeline.plan.speed.time.monotonic", lambda: now[0])
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 9.0, 9.0))

    def steps(*seconds: float) -> tuple[float, list[float]]:
        left = list(seconds)

        def step() -> None:
            now[0] += left.pop(0)

        return timed(step), left

    for seconds, found, left in (
        ((9.0, 0.4, 0.2, 0.3, 0.1), 0.2, 1),
        ((9.0, *[0.04] * 6), 0.04, 2),
        ((9.0, *[0.01] * 12), 0.01, 3),
    ):
        best, rest = steps(*seconds)
        assert (best, len(rest)) == (pytest.approx(found), left)


def test_on_a_busy_machine_one_thread_bounds_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock a step takes 30 seconds, in one thread's processor time 2: 2 where others work, 30 where none do."""
    now, spent, threads = [0.0], [0.0], []

    def step() -> None:
        now[0], spent[0] = now[0] + 30, spent[0] + 2
        threads.append(torch.get_num_threads())

    monkeypatch.setattr("pipeline.plan.speed.time.monotonic", lambda: now[0])
    monkeypatch.setattr("pipeline.plan.speed.time.process_time", lambda: spent[0])
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    before = torch.get_num_threads()
    for load, found in ((2.5, 2.0), (1.5, 30.0)):
        monkeypatch.setattr("os.getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert timed(step) == found
    assert threads == [before] * 4 + [1, 1] + [before] * 4
    assert torch.get_num_threads() == before


def test_an_empty_store_has_nothing_to_say(tmp_path: Path) -> None:
    from pipeline.plan.planner import artifacts_of

    assert list(artifacts_of(Store(tmp_path / "none"))) == []


ADDED = ("tokenize.added_merges=40", 'tokenize.added_tokens=["<|tool|>", "<|pad|>"]')  # the second is there already


@pytest.mark.slow
def test_the_vocabulary_of_a_given_tokenizer(road: Path) -> None:
    """From a folder that holds nothing but a tokenizer, and through another tokenize stage."""
    train_bytes().save_pretrained(road.parent / "bytes")  # 256 bytes and 4 specials
    base = planned(road)["pretrain"].parameters
    assert base is not None
    given = planned(road, CPU, f"tokenize.tokenizer={road.parent}/bytes", *ADDED)
    assert given["pretrain"].parameters == base - 1000 * 64 + (260 + 1 + 40) * 64
    road.write_text(ROAD.replace("vocab_size: 1000", "tokenizer: other, added_merges: 7"))
    with road.open("a") as file:
        file.write("  other: {stage: tokenize, data: text.txt, tokenizer: ./bytes, added_tokens: [<a>]}\n")
    assert planned(road)["pretrain"].parameters == base - 1000 * 64 + (260 + 1 + 7) * 64
    (road.parent / "bytes" / "tokenizer.json").write_text("{}")
    assert "not estimated: " in planned(road)["pretrain"].notes[0]
