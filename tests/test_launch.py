"""One stage as one process or many: exits, signals in any phase, ranks, and what a failing stage says.

The stages here are a user's own file, which does in a moment what a test needs.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline import forking
from pipeline.artifacts import Store
from pipeline.errors import ConfigError
from pipeline.forking import ChildFailed
from pipeline.launch import Launch

ACT = """
import os, signal, time
from pipeline.errors import DataError
from pipeline.recipe import Ref, StageConfig, field
class ActConfig(StageConfig):
    init: Ref | None = field(None, "x")
    does: str = field("nothing", "x")
INPUTS = {"init": "rows"}
KIND = "rows"
def run(config, inputs, out, runtime):
    (out / "at-work").write_text(str(os.getpid()))
    if config.does == "fail" or config.does == "fail in one" and runtime.rank == 1:
        raise DataError("no messages", where="rows.jsonl:17", mend="name the field")
    if config.does == "fail in all":
        runtime.barrier()
        try:
            raise DataError("no messages", where="rows.jsonl:17", mend="name the field")
        except DataError:
            runtime.barrier()
            raise
    if config.does == "crash":
        {}["key"]
    if config.does == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    while config.does == "wait" or config.does == "fail in one":
        runtime.check_stop()
        time.sleep(0.01)
    while config.does == "end when asked" and runtime.halt.asked is None:
        time.sleep(0.01)
    if config.does == "sum":
        import torch
        share = torch.tensor([1.0 + runtime.rank])
        torch.distributed.all_reduce(share)
        (out / f"rank-{runtime.rank}").write_text(f"{share.item()} {runtime.generator('x').initial_seed()}")
    runtime.say(f"rank {runtime.rank} of {runtime.world_size} speaks")
    runtime.metrics.log(1, 5, loss=1.0)
    return {"world": float(runtime.world_size)}
"""
RECIPE = """\
run: acts
stages:
  first: {stage: ./act.py}
  second: {stage: ./act.py, init: first}
"""


@pytest.fixture
def acts(tmp_path: Path) -> Path:
    (tmp_path / "act.py").write_text(ACT)
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path / "artifacts" / "acts"


def do(what: str, stage: str = "first") -> tuple[str, ...]:
    return ("run", "r.yaml", "--set", f"{stage}.does={what}")


def begun(acts: Path, stage: str = "first") -> Path | None:
    return next(iter(acts.glob(f".{stage}.*.partial/at-work")), None)


def test_a_stage_is_run_and_recorded(warm: Any, acts: Path):
    done = warm("run", "r.yaml")
    assert done.code == 0, done.stderr
    assert done.stderr.count("rank 0 of 1 speaks") == 2
    manifest = json.loads((acts / "second" / "manifest.json").read_text())
    first = json.loads((acts / "first" / "manifest.json").read_text())
    assert manifest["inputs"] == {"init": [{"reference": "acts/first", "fingerprint": first["fingerprint"]}]}
    expected = {"stage": "./act.py", "name": "second", "run": "acts", "kind": "rows", "resumed_from": 0, "tokens": 5}
    assert {key: manifest[key] for key in expected} == expected
    assert (manifest["metrics"], manifest["processes"], manifest["threads"]) == ({"world": 1.0}, 1, 1)
    assert manifest["versions"]["python"] == sys.version.split()[0]
    assert {"torch", "transformers", "accelerate"} <= manifest["versions"].keys()
    assert set(manifest["files"]) == {"at-work", "config.yaml", "metrics.jsonl"}
    assert (acts / "second" / "config.yaml").read_text() == "does: nothing\ninit: first\nseed: 0\n"


def test_a_failing_stage_says_what_where_and_the_mend(warm: Any, acts: Path):
    done = warm(*do("fail"))
    assert done.code == 1
    assert "error: rows.jsonl:17: no messages\n  mend: name the field\n" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (acts / "first").exists()
    assert begun(acts, "second") is None


@pytest.mark.slow
def test_a_fault_names_its_line_and_shows_the_rest_when_asked(warm: Any, acts: Path):
    done = warm(*do("crash"))
    line = 1 + ACT[: ACT.index('{}["key"]')].count("\n")
    assert done.code == 1
    assert f"error: KeyError: 'key'\n  at {acts.parents[1]}/act.py:{line}\n" in done.stderr
    assert "LLMPIPE_DEBUG=1" in done.stderr
    assert "Traceback" not in done.stderr
    debugged = warm(*do("crash"), env={"LLMPIPE_DEBUG": "1"})
    assert debugged.code == 1
    assert "Traceback (most recent call last)" in debugged.stderr


def test_a_killed_stage_is_told_with_the_way_on(warm: Any, acts: Path):
    done = warm(*do("die"))
    assert done.code == 1
    assert "was killed by SIGKILL\n  mend: run the same command again" in done.stderr


SIGNALS = [(signal.SIGTERM, 75), (signal.SIGINT, 130)]


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_stops_a_stage_that_looks(warm: Any, acts: Path, number: int, code: int, group: bool):
    at_work = warm.start(*do("wait"))
    at_work.wait_for(lambda: begun(acts) is not None)
    at_work.signal(number, group=group)
    done = at_work.wait()
    assert done.code == code
    assert "stopped before anything was saved\n  mend: run the same command again\n" in done.stderr
    assert "error" not in done.stderr
    assert not (acts / "first").exists()
    assert begun(acts) is not None


@pytest.mark.slow
@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_nothing_follows_a_stage_that_heard_too_late(warm: Any, acts: Path, number: int, code: int, group: bool):
    at_work = warm.start(*do("end when asked"))
    at_work.wait_for(lambda: begun(acts) is not None)
    at_work.signal(number, group=group)
    done = at_work.wait()
    assert done.code == code
    assert "stopped after the stage was done" in done.stderr
    assert (acts / "first" / "manifest.json").exists()
    assert begun(acts, "second") is None
    again = warm(*do("end when asked"))
    assert again.code == 0
    assert "first   stands" in again.stderr
    assert "second  runs\n" in again.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_while_torch_is_imported(cli: Any, acts: Path, number: int, code: int):
    """A cold process, stopped as soon as it says that the stage runs, which is before its heavy imports."""
    command = [sys.executable, "-m", "pipeline", *do("wait")]
    at_work = subprocess.Popen(command, cwd=cli.folder, stderr=subprocess.PIPE, text=True)
    assert at_work.stderr is not None
    assert at_work.stderr.readline() == "first   runs\n"
    time.sleep(0.3)
    at_work.send_signal(number)
    said = at_work.stderr.read()
    assert at_work.wait(timeout=120) == code
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_signal_while_waiting_for_another_process(warm: Any, acts: Path):
    told: list[str] = []
    with Store(acts.parent).hold("acts", "first", told.append):
        waiting = warm.start("run", "r.yaml")
        waiting.wait_for(lambda: "waiting for" in waiting.stderr())
        assert f"waiting for process {os.getpid()} on " in waiting.stderr()
        waiting.signal(signal.SIGTERM)
        assert waiting.wait().code == 75
    assert warm("run", "r.yaml").code == 0
    assert told == []


@pytest.mark.slow
def test_the_stage_ends_with_its_launcher(warm: Any, acts: Path):
    at_work = warm.start(*do("wait"))
    at_work.wait_for(lambda: begun(acts) is not None)
    at_work.signal(signal.SIGKILL)
    at_work.wait()
    done = warm("run", "r.yaml")  # the stage's process holds the lock too: it has ended when this one gets it
    assert done.code == 0, done.stderr


def test_two_processes_are_two_ranks_and_one_voice(warm: Any, acts: Path):
    done = warm("run", "r.yaml", "--num-processes", "2", "--until", "first", "--set", "first.does=sum")
    assert done.code == 0, done.stderr
    shares = [(acts / "first" / f"rank-{rank}").read_text().split() for rank in (0, 1)]
    assert [share[0] for share in shares] == ["3.0", "3.0"]
    assert shares[0][1] == shares[1][1]  # a generator that names no rank is the same on all
    assert done.stderr.count("speaks") == 1
    assert done.stderr.count("runs") == 1
    assert "rank 0 of 2 speaks" in done.stderr
    assert len((acts / "first" / "metrics.jsonl").read_text().splitlines()) == 1
    assert json.loads((acts / "first" / "manifest.json").read_text())["processes"] == 2


@pytest.mark.parametrize("where", ["one", "all"])
def test_failing_ranks_end_all_with_one_message(warm: Any, acts: Path, where: str):
    done = warm(*do(f"fail in {where}"), "--num-processes", "2")
    assert done.code == 1
    assert done.stderr.count("error: ") == 1
    assert "no messages" in done.stderr
    assert "SIGKILL" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_stops_all_ranks(warm: Any, acts: Path, number: int, code: int):
    at_work = warm.start(*do("wait"), "--num-processes", "2")
    at_work.wait_for(lambda: begun(acts) is not None)
    time.sleep(0.2)
    at_work.signal(number)
    done = at_work.wait()
    assert done.code == code
    assert done.stderr.count("stopped before anything was saved") == 1


@pytest.mark.slow
def test_torchrun_starts_the_ranks_from_outside(cli: Any, acts: Path):
    for attempt in (1, 2):
        done = cli.torchrun("run", "r.yaml", "--set", "first.does=sum")
        assert done.code == 0, done.stderr
        assert done.stdout.count("next ") == done.stdout.count("llmpipe status r.yaml") == 1
        if attempt == 1:
            assert done.stderr.count("speaks") == 2  # rank 0, in either stage
            assert (acts / "first" / "rank-1").read_text().split()[0] == "3.0"
        else:
            assert "nothing to do: all first, second stand" in done.stdout


@pytest.mark.parametrize(
    ("processes", "strategy", "what"),
    [
        (0, "auto", "--num-processes is at least 1"),
        (2, "single", "--strategy single is one process"),
        (None, "fsdp3", "--strategy is one of auto, single, ddp, fsdp"),
    ],
)
def test_launches_that_make_no_sense(processes: int | None, strategy: str, what: str):
    with pytest.raises(ConfigError, match=what):
        Launch(processes, strategy)


def test_one_process_is_the_plain_case():
    assert (Launch().processes(), Launch(strategy="single").processes(), Launch(3).processes()) == (1, 1, 3)


@pytest.mark.slow
def test_with_a_gpu_nothing_opens_cuda_before_the_fork(tmp_path: Path):
    """peft imports bitsandbytes where it is installed, which looks at the GPUs; without one it is imported once for all
    stages."""
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes" / "__init__.py").touch()
    script = """
import sys
from pathlib import Path
from pipeline import launch
from stages import sft
for has_gpu in (True, False):
    launch.has_gpu = lambda: has_gpu
    launch._preload(Path(sft.__file__))
    print("pipeline.runtime" in sys.modules, "bitsandbytes" in sys.modules)
"""
    path = os.pathsep.join([*filter(None, sys.path), str(tmp_path)])
    told = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", script], env=told, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "True", "True"]


@pytest.mark.parametrize("has_gpu", [True, False])
def test_a_stage_that_could_not_open_cuda_says_so(
    has_gpu: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """And does not train on the CPU instead. Without a GPU there is nothing to open."""
    monkeypatch.setattr(forking, "has_gpu", lambda: has_gpu)
    monkeypatch.setattr("torch.cuda._is_in_bad_fork", lambda: True)
    if not has_gpu:
        forking.fork(lambda rank: None, 1)
        return
    with pytest.raises(ChildFailed):
        forking.fork(lambda rank: None, 1)
    assert "CUDA was opened before the stage's process began" in capfd.readouterr().err
