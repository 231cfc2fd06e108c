"""Pretraining on a CUDA device of fake tensors: no two devices are mixed, and the host never waits for the device.

No GPU is needed, and none is replaced: fake tensors have shapes, dtypes and devices, and no numbers. See `fake_cuda`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.model.compiling import can_compile
from tests.fake_cuda import build_guard

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_compile(), reason="no C++ compiler: the device cannot be registered"),
]

PROGRAM = """
import ctypes, json, sys, tempfile, traceback
from pathlib import Path
ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
import numpy as np
import torch
from tests.fake_cuda import fake_cuda
from pipeline.checkpoint import Checkpoints, load_optimizer, optimizer_tensors
from pipeline.data.packing import Batch, Windows
from pipeline.model.build import evaluating, initialise, recompute_activations
from pipeline.model.distillation import Teacher
from pipeline.model.generation import Sampling, draw_uniforms, generate_batch
from pipeline.model import next_token
from pipeline.model.next_token import NextToken
from pipeline.model.presets import build_model, shape_of
from pipeline.progress import Metrics
from pipeline.runtime import Runtime
from stages import pretrain
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorDeviceMismatchError

LENGTH, CUDA = 16, torch.device("cuda", 0)
has_plain_head, next_token.has_plain_head = next_token.has_plain_head, lambda model: True  # it compares numbers

def built(name):
    given = {"depth": 2, "hidden_size": 32, "num_attention_heads": 2}
    with torch.device("cuda"):
        model = build_model(name, shape_of(given, LENGTH, 64), {})
    initialise(model, torch.Generator().manual_seed(0))
    return model

class Apart(Windows):
    def take(self, positions):
        rows = super().take(positions).rows_BT
        half = np.arange(LENGTH) % (LENGTH // 2)
        target = np.ones((len(rows), LENGTH), dtype=bool)
        return Batch(rows, target, np.repeat(half[None], len(rows), axis=0))

def steps_of(model, order, teacher=None, **fields):
    folder = Path(tempfile.mkdtemp())
    metrics = Metrics(folder / "metrics.jsonl", is_main=True)
    runtime = Runtime(device=CUDA, rank=0, world_size=1, seed=0, bf16=True, threads=1, metrics=metrics,
                      checkpoints=Checkpoints(folder / "checkpoints", metrics), quiet=True)
    config = pretrain.PretrainConfig(context_length=LENGTH, per_device_train_batch_size=4, max_steps=5,
                                     gradient_accumulation_steps=2, **fields)
    return pretrain._steps(config, NextToken(model, teacher), order, runtime)

def train(name, kind=Windows, taught=False, **fields):
    teacher = Teacher(built("llama").requires_grad_(False), 0.5, 1.0) if taught else None
    model = built(name)
    steps = steps_of(model, kind(np.random.default_rng(0).integers(0, 64, 2000), LENGTH, 0), teacher, **fields)
    waits.clear()
    try:
        for step in range(2):
            steps.step(step)
    finally:
        steps.micro_steps.close()
    assert all(parameter.device == CUDA for parameter in model.parameters())
    return steps

def save_and_load():
    steps = train("llama", optimizer="muon")
    for optimizer in steps.optimizers:
        tensors, state = optimizer_tensors(optimizer, "o")
        assert all(tensor.device.type == "cpu" for tensor in held(tensors).values())
        load_optimizer(optimizer, "o", held(tensors), state)
        own = [value for each in optimizer.state.values() for value in each.values() if torch.is_tensor(value)]
        assert own and all(value.device == CUDA for value in own)
        optimizer.step()

def held(tensors):
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}

def write():
    model = built("llama").eval()
    with torch.no_grad(), evaluating(model), torch.autocast("cuda", dtype=torch.bfloat16):
        uniforms = draw_uniforms(2, 1, torch.Generator().manual_seed(0))
        for sampling in (Sampling(0.0), Sampling(), Sampling(top_k=3, top_p=0.5)):
            drawn = None if sampling.temperature == 0 else uniforms
            generate_batch(model, [[1, 2, 3], [4, 5]], [0, 1], max_new_tokens=1, stop_ids=[0], stop_strings=None,
                           pad_id=0, sampling=sampling, uniforms_BT=drawn)

def look_at_the_head():
    try:
        has_plain_head(built("llama"))
    except DataDependentOutputException as error:
        assert "allclose" in str(error), error  # its last operation
        return
    raise AssertionError("it compares numbers")

def read_a_number():
    steps = train("llama")
    steps.verdicts.figures()

def mix():
    built("llama")(torch.zeros(1, 4, dtype=torch.long))

def copy_and_wait():
    waits.clear()
    torch.ones(4).to(CUDA)

def skip_nonfinite():
    train("llama", skip_nonfinite=1)

PROGRAMS = {
    **{name: (lambda name=name: train(name)) for name in ("gpt2", "llama", "mistral", "qwen3", "gemma3", "qwen3_moe")},
    "muon": lambda: train("llama", optimizer="muon"),
    "recomputed": lambda: train("gemma3", gradient_checkpointing=True),
    "taught": lambda: train("llama", taught=True),
    "apart": lambda: train("llama", kind=Apart),
    "fp32": lambda: train("llama", bf16=False),
    "saved": save_and_load,
    "written": write,
    "head": look_at_the_head,
    "a number is read": read_a_number,
    "devices are mixed": mix,
    "a copy is waited for": copy_and_wait,
    "a step is judged": skip_nonfinite,
}
for what, program in PROGRAMS.items():
    waits = []
    try:
        with fake_cuda(waits):
            program()
        error = ""
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
        traceback.print_exc()
    print(json.dumps([what, error, waits]), flush=True)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, list[str]]]:
    """What each program ended with, "" where it ran, and the places at which the host would have waited for a copy."""
    guard = build_guard(tmp_path_factory.mktemp("guard"))
    told = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])}
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(guard)], env=told, capture_output=True, text=True)
    lines: list[Any] = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stderr)
    return {what: (error, waits) for what, error, waits in lines}


@pytest.mark.parametrize("preset", ["gpt2", "llama", "mistral", "qwen3", "gemma3", "qwen3_moe"])
def test_a_preset_steps_without_waiting(found: dict[str, tuple[str, list[str]]], preset: str) -> None:
    """Two optimiser steps of two micro-steps in bf16: forward, loss, backward, clipping, fused AdamW."""
    assert found[preset] == ("", [])


@pytest.mark.parametrize("way", ["muon", "recomputed", "taught", "apart", "fp32"])
def test_so_do_other_ways_to_train(found: dict[str, tuple[str, list[str]]], way: str) -> None:
    assert found[way] == ("", [])


def test_moments_come_back_to_the_device(found: dict[str, tuple[str, list[str]]]) -> None:
    """From a checkpoint, whose tensors are the host's: AdamW's with its count of steps, and Muon's."""
    assert found["saved"][0] == ""


@pytest.mark.parametrize("what", ["written", "head"])
def test_samples_and_the_trial_of_the_head_mix_no_devices(found: dict[str, tuple[str, list[str]]], what: str) -> None:
    """A token greedily and drawn, for rows of two lengths; and what finds out whether the head is plain."""
    assert found[what][0] == ""


def test_the_device_finds_what_it_is_there_to_find(found: dict[str, tuple[str, list[str]]]) -> None:
    """A number that is read (by an interval's figures; by a step that may be stepped over), tensors of two devices, a
    copy that is waited for."""
    assert "DataDependentOutputException" in found["a number is read"][0]
    assert "DataDependentOutputException" in found["a step is judged"][0]
    assert "FakeTensorDeviceMismatchError" in found["devices are mixed"][0]
    assert found["a copy is waited for"] == ("", ["elsewhere"])
