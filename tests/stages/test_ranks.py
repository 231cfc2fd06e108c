"""pretrain over several gloo processes, whole (ddp) or in shards (fsdp): one process's figures, whatever the split.

The stage is pretrain behind a spy, which asserts inside every worker what the worker is to be, and can stop a run.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.model.compiling import can_compile

pytestmark = pytest.mark.slow

SPY = '''
import math
import torch
from torch.distributed.tensor import DTensor
from pipeline.errors import Stopped
from pipeline.model.decoding import Decoder
from pipeline.model.next_token import NextToken
from pipeline.model.optimizer_steps import OptimizerSteps
from pipeline.recipe import field
from stages import pretrain
from stages.pretrain import PretrainConfig

class SpyConfig(PretrainConfig):
    expected: str = field("", "none, ddp or fsdp", run_only=True)
    stop_at: int = field(0, "x", run_only=True)
    poisoned: int = field(0, "the step whose loss is nan on the last rank", run_only=True)
    stop_in: str = field("", "nats or token: the last or the first rank is asked to stop there, once", run_only=True)

INPUTS, KIND, SHARDS = pretrain.INPUTS, pretrain.KIND, pretrain.SHARDS
plain_step, plain_loss = OptimizerSteps.step, NextToken.loss_sum
plain_nats, plain_decode = NextToken.nats, Decoder.decode_one

def is_cut(tensor):
    return isinstance(tensor, DTensor) and tensor.to_local().numel() < tensor.numel()

def check(steps, expected):
    """The world, and what this worker holds of every parameter and moment."""
    world = 1 if expected == "none" else 2
    assert steps.runtime.world_size == world
    assert not torch.distributed.is_initialized() if world == 1 else torch.distributed.get_world_size() == 2
    parameters = list(steps.model.parameters())
    moments = [v for o in steps.optimizers for s in o.state.values() for v in s.values() if v.dim() > 0]
    assert len(moments) == 2 * len(parameters)
    for tensor in [*parameters, *moments]:
        assert is_cut(tensor) is (expected == "fsdp"), tensor
    return sum((t.to_local() if isinstance(t, DTensor) else t).numel() for t in parameters)

def run(config, inputs, out, runtime):
    def step(steps, number):
        def loss_sum(losses, *batch):
            nats, routing = plain_loss(losses, *batch)
            is_poisoned = number + 1 == config.poisoned and runtime.rank == runtime.world_size - 1
            return (nats * math.nan if is_poisoned else nats), routing
        NextToken.loss_sum = loss_sum
        plain_step(steps, number)
        (out / f"rank-{runtime.rank}").write_text(str(check(steps, config.expected)))
        if number + 1 == config.stop_at:
            runtime.halt.asked = Stopped
    def asked_on(rank):
        assert runtime.halt.asked is None, "it went on"
        runtime.halt.asked = Stopped if runtime.rank == rank else None
    def nats(losses, *batch):
        if config.stop_in == "nats":
            asked_on(runtime.world_size - 1)
        return plain_nats(losses, *batch)
    def decode_one(decoder, ids):
        if config.stop_in == "token":
            asked_on(0)
        plain_decode(decoder, ids)
    NextToken.nats, Decoder.decode_one = nats, decode_one
    OptimizerSteps.step = step
    return pretrain.run(config, inputs, out, runtime)
'''
RECIPE = """\
run: tiny
stages:
  tokenize: {data: corpus.jsonl, vocab_size: 512}
  pretrain:
    stage: ./spy.py
    model: {depth: 2, hidden_size: 32, num_attention_heads: 2, intermediate_size: 33}
    context_length: 32
    per_device_train_batch_size: 80
    max_steps: 20
    learning_rate: 0.01
    eval_documents: 20
    eval_steps: 10
    save_steps: 100
    logging_steps: 1
    sample_tokens: 6
    bf16: false
"""
WINDOWS = 1564
"""Samples of an epoch of the corpus: 20 steps of 80 or 84 cross its end, and it is a multiple of neither."""


class Ranks:
    """Runs of the recipe, kept by name."""

    def __init__(self, warm: Any) -> None:
        self.warm, self.folder = warm, warm.folder
        warm.write("spy.py", SPY)
        warm.write("ranks.yaml", RECIPE)

    def run(self, name: str, strategy: str, *fields: str) -> Any:
        """`--run name` under `strategy`: "none" is one process, else two."""
        root = self.folder / "artifacts"
        if not (root / name).exists():
            shutil.copytree(root / "tiny" / "tokenize", root / name / "tokenize")
        launch = () if strategy == "none" else ("--num-processes", "2", "--strategy", strategy)
        settings = [part for each in (f"expected={strategy}", *fields) for part in ("--set", f"pretrain.{each}")]
        return self.warm("pretrain", "ranks.yaml", "--run", name, *settings, *launch)

    def made(self, name: str, strategy: str, *fields: str) -> "Made":
        done = self.run(name, strategy, *fields)
        assert done.code == 0, done.stderr
        return Made(self.folder / "artifacts" / name / "pretrain")


class Made:
    """What a run left."""

    def __init__(self, path: Path) -> None:
        self.manifest = json.loads((path / "manifest.json").read_text())
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        self.steps = [line for line in lines if "loss" in line]
        self.evaluations = [line for line in lines if "bits_per_byte" in line]
        self.weights = load_file(path / "model" / "model.safetensors")
        self.held = [int((path / f"rank-{rank}").read_text()) for rank in range(self.manifest["processes"])]

    def figures(self, name: str) -> list[float]:
        return [line[name] for line in self.steps]


def distance(one: Made, other: Made) -> float:
    """Between their weights, relative, over all."""
    assert one.weights.keys() == other.weights.keys()
    apart = sum((one.weights[name] - other.weights[name]).square().sum() for name in one.weights)
    return math.sqrt(float(apart / sum(value.square().sum() for value in one.weights.values())))


@pytest.fixture
def ranks(warm: Any, tokenized: Path) -> Ranks:
    return Ranks(warm)


ACCUMULATED = ("per_device_train_batch_size=28", "gradient_accumulation_steps=3")
EXPERTS = ("model.architecture=qwen3_moe", "model.intermediate_size=32")
CASES = {
    "tied": (),
    "accumulated, untied": (*ACCUMULATED, "model.tie_word_embeddings=false"),
    "recomputed": ("gradient_checkpointing=true",),
    "experts": EXPERTS,
    "experts, accumulated": (*ACCUMULATED, *EXPERTS, "adam_epsilon=1e-3"),  # Adam without it makes steps of noise
}
"""Fields over the recipe's."""


@pytest.mark.parametrize(
    "case", ["tied", *(pytest.param(name, marks=pytest.mark.slow) for name in list(CASES)[1:])], ids=str
)
def test_two_processes_are_one_with_the_same_batch(ranks: Ranks, case: str):
    """Losses, gradients' norms, weights, bits per byte and samples; the corpus ends within the run."""
    fields = CASES[case]
    one = ranks.made("one", "none", *fields)
    epochs = one.manifest["metrics"]["epochs"]
    assert epochs * WINDOWS == pytest.approx(one.manifest["tokens"] / 32)
    assert epochs > 1
    for strategy in ("ddp", "fsdp"):
        two = ranks.made(strategy, strategy, *fields)
        assert (two.manifest["processes"], two.manifest["shards"]) == (2, strategy == "fsdp")
        assert two.manifest["fingerprint"] == one.manifest["fingerprint"]
        parameters = int(one.manifest["metrics"]["parameters"])
        assert sum(two.held) == parameters * (2 if strategy == "ddp" else 1)
        assert len(two.figures("loss")) == 20
        assert two.figures("loss") == pytest.approx(one.figures("loss"), abs=1e-4)
        assert two.figures("grad_norm") == pytest.approx(one.figures("grad_norm"), rel=1e-3)
        assert distance(one, two) < 1e-3
        assert [line["step"] for line in two.evaluations] == [10, 20]
        for ours, theirs in zip(two.evaluations, one.evaluations, strict=True):
            assert ours["bits_per_byte"] == pytest.approx(theirs["bits_per_byte"], abs=1e-4)
            assert (ours["sample_1"], ours["sample_2"]) == (theirs["sample_1"], theirs["sample_2"])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_from_one_process_to_two_and_back_to_one(ranks: Ranks, strategy: str):
    """Every part goes on from the step where the last was stopped; the end is the undisturbed run's. (At step 10, what
    goes on evaluates before it has trained.)"""
    straight = ranks.made("straight", "none")
    for processes, stop_at, resumed in (("none", 10, 0), (strategy, 15, 10)):
        stopped = ranks.run("moved", processes, f"stop_at={stop_at}")
        assert stopped.code == 75, stopped.stderr
        assert f"stopped at step {stop_at} and saved" in stopped.stderr
        assert (f"resumed at step {resumed}" in stopped.stderr) is (resumed > 0)
    moved = ranks.made("moved", "none")
    assert (moved.manifest["resumed_from"], moved.manifest["processes"]) == (15, 1)
    assert [line["step"] for line in moved.steps] == list(range(1, 21))
    assert moved.figures("loss") == pytest.approx(straight.figures("loss"), abs=1e-4)
    assert distance(straight, moved) < 1e-4
    assert moved.manifest["tokens"] == straight.manifest["tokens"] == 20 * 80 * 32


@pytest.mark.parametrize(
    ("strategy", "where"), [("ddp", "nats"), ("ddp", "token"), ("fsdp", "nats"), ("fsdp", "token")]
)
def test_a_stop_of_one_rank_in_an_evaluation_is_one_of_all(ranks: Ranks, strategy: str, where: str):
    """They leave together with a checkpoint of the evaluation's step, and measure when they go on."""
    calm = ranks.made("calm", strategy, "max_steps=12")
    stopped = ranks.run("asked", strategy, "max_steps=12", f"stop_in={where}")
    assert stopped.code == 75, stopped.stderr
    assert "stopped at step 10 and saved" in stopped.stderr
    gone_on = ranks.made("asked", strategy, "max_steps=12")
    assert gone_on.manifest["resumed_from"] == 10
    for name, value in calm.weights.items():
        assert torch.equal(gone_on.weights[name], value), name
    for one, other in zip(calm.evaluations, gone_on.evaluations, strict=True):
        assert (one["step"], one["bits_per_byte"], one["sample_1"]) == (
            other["step"], other["bits_per_byte"], other["sample_1"],
        )  # fmt: skip


@pytest.mark.slow
def test_a_checkpoint_in_shards_has_the_names_and_shapes_of_a_whole_one(ranks: Ranks):
    found = []
    for strategy in ("none", "fsdp"):
        stopped = ranks.run(strategy, strategy, "stop_at=3", "max_steps=20")
        assert stopped.code == 75, stopped.stderr
        (state,) = (ranks.folder / "artifacts" / strategy).glob(".pretrain.*/checkpoints/step-00000003")
        found.append((load_file(state / "state.safetensors"), json.loads((state / "whole.json").read_text())["state"]))
    (one, one_state), (two, two_state) = found
    assert {name: tensor.shape for name, tensor in one.items()} == {name: tensor.shape for name, tensor in two.items()}
    assert one_state == two_state
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_loss_that_is_not_finite_on_one_rank_is_stepped_over_on_all(ranks: Ranks, strategy: str):
    two = ranks.made("poisoned", strategy, "poisoned=4", "skip_nonfinite=1", "max_steps=6")
    assert [line.get("skipped_steps", 0) for line in two.steps] == [0, 0, 0, 1, 1, 1]
    assert [loss is None for loss in two.figures("loss")] == [False, False, False, True, False, False]
    assert all(tensor.isfinite().all() for tensor in two.weights.values())
    refused = ranks.run("refused", strategy, "poisoned=4", "max_steps=6", "save_steps=2")
    assert refused.code == 1
    assert "error: step 4 (documents " in refused.stderr
    assert "the loss is nan; the last checkpoint is of step 2" in refused.stderr
    allowed = ranks.made("refused", strategy, "poisoned=4", "max_steps=6", "save_steps=2", "skip_nonfinite=1")
    assert (allowed.manifest["resumed_from"], allowed.manifest["fingerprint"]) == (2, two.manifest["fingerprint"])
    assert distance(allowed, two) == 0
    assert allowed.figures("loss") == two.figures("loss")


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(), reason="no C++ compiler, or no Python headers: nothing can be compiled here")
def test_compiled_blocks_in_shards_are_plain_ones(ranks: Ranks):
    plain = ranks.made("plain", "fsdp", "max_steps=4", "torch_compile=false")
    done = ranks.run("compiled", "fsdp", "max_steps=4", "torch_compile=true")
    assert done.code == 0, done.stderr
    assert "compiled: 2 blocks of one static shape" in done.stderr
    compiled = Made(ranks.folder / "artifacts" / "compiled" / "pretrain")
    assert compiled.figures("loss") == pytest.approx(plain.figures("loss"), abs=1e-4)
    assert compiled.evaluations[-1]["bits_per_byte"] == pytest.approx(plain.evaluations[-1]["bits_per_byte"], abs=1e-4)


@pytest.mark.slow
def test_torchrun_starts_the_ranks_of_a_model_in_shards(ranks: Ranks):
    settings = ("--set", "pretrain.expected=fsdp", "--set", "pretrain.max_steps=2", "--strategy", "fsdp")
    done = ranks.warm.torchrun("pretrain", "ranks.yaml", *settings)
    assert done.code == 0, done.stderr
    made = Made(ranks.folder / "artifacts" / "tiny" / "pretrain")
    assert (made.manifest["processes"], made.manifest["shards"]) == (2, True)
    assert done.stderr.count("in 2 shards, 2 blocks gathered one by one") == 1


def test_one_process_keeps_the_model_whole_and_says_so(ranks: Ranks):
    done = ranks.warm("pretrain", "ranks.yaml", "--set", "pretrain.expected=none", "--set", "pretrain.max_steps=1",
                      "--num-processes", "1", "--strategy", "fsdp")  # fmt: skip
    assert done.code == 0, done.stderr
    assert "--strategy fsdp: one process keeps the model whole" in done.stderr
    assert Made(ranks.folder / "artifacts" / "tiny" / "pretrain").manifest["shards"] is False
