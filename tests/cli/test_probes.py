"""What doctor runs: right numbers pass, wrong ones and failures are told."""

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.cli import doctor as examination
from pipeline.cli import probes
from pipeline.cli.probes import Check
from pipeline.errors import MachineError

CPU = torch.device("cpu")


def test_versions_are_held_against_what_is_asked_for_and_what_was_tested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    there = {"alpha": "2.0", "beta-x": "1.5+cpu"}
    monkeypatch.setattr(metadata, "requires", lambda name: ["alpha>=1,<3", "Beta_X>=1", 'gamma>=1; extra == "gpu"'])
    monkeypatch.setattr(metadata, "version", lambda name: there[name.lower().replace("_", "-")])
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("# tested\nalpha==2.0\nbeta_x==1.5\n")
    assert list(probes.software(constraints)) == [Check("versions", "ok", "2 required packages as tested")]
    there["beta-x"] = "1.6"
    (found,) = probes.software(constraints)
    assert found.found == "not the tested ones: Beta_X 1.6 (tested: 1.5)"
    there["alpha"] = "3.1"
    found, _ = probes.software(constraints)
    assert (found.state, found.mend) == ("broken", 'pip install "alpha<3,>=1"')


def test_a_package_that_is_not_there_is_broken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metadata, "requires", lambda name: ["no-such-package-anywhere>=1"])
    found, _ = probes.software(None)
    assert (found.name, found.state, found.found) == ("no-such-package-anywhere", "broken", "not installed")


def test_attention_is_compared_and_not_believed(monkeypatch: pytest.MonkeyPatch):
    good = probes.run("sdpa", lambda: probes._attention(CPU), "broken", "mend")
    assert good.state == "ok"
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, is_causal: real(q, k, v))
    bad = probes.run("sdpa", lambda: probes._attention(CPU), "broken", "mend")
    assert bad.state == "broken"
    assert "its numbers are off by" in bad.found


def test_places_that_cannot_be_written_are_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    assert [check.state for check in probes.places(tmp_path / "not" / "yet")][1] == "ok"
    monkeypatch.setattr(probes.tempfile, "NamedTemporaryFile", refuse)
    found = list(probes.places(tmp_path))[1]
    assert (found.state, found.found) == ("broken", f"{tmp_path}: Permission denied")


def test_a_file_system_without_blocks_is_no_disk():
    disk = next(iter(probes.places(Path("/proc/foo"))))
    assert (disk.state, disk.found) == ("broken", "/proc is no disk")
    assert "gc" not in disk.mend


def test_threads_that_the_environment_holds_back_are_slow(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(probes.os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert next(iter(probes.processor())) == Check("cores", "slow", "2, torch uses 1", "unset OMP_NUM_THREADS")
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert next(iter(probes.processor())) == Check("cores", "ok", "2, torch uses 1")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert next(iter(probes.processor())).state == "ok"


def test_only_what_is_required_and_broken_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    well = [Check("a", "ok", "1"), Check("b", "slow", "2"), Check("c", "missing", "3", "pip install c")]
    monkeypatch.setattr(examination, "examine", lambda artifacts: iter(well))
    examination.doctor(Path(), as_json=False)
    assert "1 well, 1 slow, 1 not here, which nothing requires, 0 broken" in capsys.readouterr().out
    monkeypatch.setattr(examination, "examine", lambda artifacts: iter([*well, Check("d", "broken", "4", "do this")]))
    with pytest.raises(MachineError, match="d: 4") as caught:
        examination.doctor(Path(), as_json=True)
    assert (caught.value.exit_code, caught.value.mend) == (1, "do this")
    assert json.loads(capsys.readouterr().out)["checks"][2]["mend"] == "pip install c"


@pytest.mark.slow
def test_the_whole_examination(warm: Any):
    done = warm("doctor", "--json")
    assert done.code == 0, done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert {"python", "versions", "disk", "memory", "cores", "products", "sdpa", "torch.compile"} <= checks.keys()
    assert checks["sdpa"]["state"] == checks["artifacts"]["state"] == "ok"
