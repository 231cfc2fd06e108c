"""Randomness that is derived, threads, and what a stage finds in its runtime."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import Interrupted, MachineError, Stopped
from pipeline.runtime import Runtime, bf16_pays, default_threads, derive_seed, join_ranks, numbered
from tests.ranks import run_script


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    return Runtime.start(tmp_path, seed=3, threads=1, quiet=True)


def test_a_seed_is_a_pure_function_of_its_keys():
    assert derive_seed(0, "data", 5) == derive_seed(0, "data", 5)
    keys = [
        (0, "data", 5),
        (0, "data", 6),
        (1, "data", 5),
        (0, "model", 5),
        ("0", "data", 5),
        (0, "data5"),
        (0, "data"),
    ]
    seeds = {derive_seed(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    # blake2b of "int:0\x1fstr:model", eight bytes (b2sum -l 64), halved: another value would change every trained model
    assert derive_seed(0, "model") == 7250982863315377352


def test_generators_come_from_the_stages_seed_and_the_keys(runtime: Runtime, tmp_path: Path):
    def draw(runtime: Runtime, *keys: int | str) -> list[float]:
        return torch.rand(3, generator=runtime.generator(*keys)).tolist()

    first = draw(runtime, "rollout", 1)
    torch.rand(100)
    assert draw(runtime, "rollout", 1) == first
    assert draw(runtime, "rollout", 2) != first
    assert draw(Runtime.start(tmp_path, seed=4, threads=1), "rollout", 1) != first


def test_threads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert (default_threads(1), default_threads(2), default_threads(16)) == (8, 4, 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert (default_threads(1), default_threads(2)) == (3, 3)


def test_a_resumed_stage_takes_the_threads_it_began_with(runtime: Runtime, tmp_path: Path):
    runtime.checkpoints.save(1, {"a": torch.tensor(1)}, {})
    assert runtime.checkpoints.threads == 1
    again = Runtime.start(tmp_path, seed=3, threads=2)
    assert (again.threads, again.checkpoints.threads, torch.get_num_threads()) == (1, 1, 1)


def test_what_an_earlier_try_without_a_checkpoint_wrote_is_dropped(runtime: Runtime, tmp_path: Path):
    runtime.metrics.log(1, loss=1.0)
    Runtime.start(tmp_path, seed=3, threads=1)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_fewer_processes_than_asked_for_are_refused(tmp_path: Path):
    with pytest.raises(MachineError, match="2 processes were asked for and 1 came up"):
        Runtime.start(tmp_path, seed=0, threads=1, world_size=2)


@pytest.mark.slow
def test_ranks_wait_for_one_that_works_alone_for_hours():
    """Of a real process group; torch's own patience is half an hour, and ten minutes with GPUs."""
    script = """
import torch
from pipeline.runtime import join_ranks
join_ranks()
group = torch.distributed.distributed_c10d._get_default_group()
print(group._get_backend(torch.device("cpu")).options._timeout.days)
torch.distributed.destroy_process_group()
"""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    told = {**os.environ, **place, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([sys.executable, "-c", script], env=told, capture_output=True, text=True, check=True)
    assert done.stdout == "30\n"


def test_a_gpu_without_bf16_products_trains_in_fp32(monkeypatch: pytest.MonkeyPatch):
    """torch says that it has bf16 where it imitates it; asked not to count that, it says what an A100 or a T4 has."""
    for is_real in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, is_real=is_real: (
            including_emulation or is_real
        ))  # fmt: skip
        assert bf16_pays(torch.device("cuda")) is is_real


def test_a_lone_gpu_gets_its_number(monkeypatch: pytest.MonkeyPatch):
    """accelerate calls it `cuda`, which `torch.cuda.set_device` refuses."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert numbered(torch.device("cuda")) == torch.device("cuda", 2)
    assert numbered(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert numbered(torch.device("cpu")) == torch.device("cpu")


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(MachineError, match="3 processes and 2 GPUs") as caught:
        join_ranks()
    assert caught.value.mend == "--num-processes 2"


@pytest.mark.parametrize("kind", [Stopped, Interrupted])
def test_stopping(runtime: Runtime, kind: type[Stopped] | type[Interrupted]):
    assert not runtime.stop_requested()
    runtime.check_stop()
    runtime.halt.asked = kind
    assert runtime.stop_requested()
    with pytest.raises(kind, match="before anything was saved"):
        runtime.check_stop()
    with pytest.raises(kind, match="stopped at step 1,234 and saved"):
        runtime.stop(1234)


def test_only_rank_0_speaks(runtime: Runtime, capsys: pytest.CaptureFixture[str]):
    runtime.quiet = False
    runtime.say("hello")
    runtime.rank = 1
    runtime.say("and I")
    with runtime.progress("train", 3) as bar:
        bar.advance(3)
    found = capsys.readouterr()
    assert (found.out, found.err) == ("", "  hello\n")


PATIENT = """
import sys, tempfile
from datetime import timedelta
from pathlib import Path
import torch
from pipeline.runtime import Runtime
from tests.ranks import one_and_two

def work(world):
    Runtime.start(Path(tempfile.mkdtemp()), seed=0, threads=1, world_size=world, quiet=True)
    if world > 1:
        found = torch.distributed.group.WORLD._get_backend(torch.device("cpu")).options._timeout
        assert found > timedelta(days=7), found

sys.exit(not one_and_two(work, int(sys.argv[1])))
"""


@pytest.mark.slow
def test_ranks_wait_for_rank_0_for_days(warm: Any):
    """That is how long a large corpus takes; torch's own patience is half an hour."""
    run_script(warm, PATIENT)
