"""Checkpoints: whole or ignored, pruned only after the next is whole, and metrics.jsonl cut back to them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoint import Checkpoints, load_optimizer, optimizer_tensors
from pipeline.errors import CheckpointError, MachineError
from pipeline.progress import Metrics


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return fresh(tmp_path)


def fresh(folder: Path, threads: int = 1, is_main: bool = True) -> Checkpoints:
    """What a process that starts anew has."""
    return Checkpoints(folder / "checkpoints", Metrics(folder / "metrics.jsonl", is_main), is_main, threads)


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_what_is_saved_comes_back(checkpoints: Checkpoints, tmp_path: Path):
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.randn(2).bfloat16()}
    checkpoints.save(40, tensors, {"epoch": 2, "lr": 0.1 + 0.2})
    found = fresh(tmp_path).latest()
    assert found is not None
    assert (found.step, found.state, found.threads) == (40, {"epoch": 2, "lr": 0.1 + 0.2}, 1)
    loaded = found.tensors()
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_a_state_that_json_turns_into_another_is_not_taken_for_damaged(checkpoints: Checkpoints, tmp_path: Path):
    checkpoints.save(1, {"a": torch.ones(1)}, {"rows": {9: (1, 2), 10: float("nan")}, "text": "é"})
    found = fresh(tmp_path).latest()
    assert found is not None
    assert found.state["rows"]["9"] == [1, 2]


def test_tensors_that_share_memory_or_are_views_are_saved(checkpoints: Checkpoints, tmp_path: Path):
    base = torch.arange(12.0).reshape(3, 4)
    checkpoints.save(1, {"base": base, "tied": base, "row": base[1], "turned": base.T}, {})
    found = fresh(tmp_path).latest()
    assert found is not None
    loaded = found.tensors()
    assert torch.equal(loaded["tied"], base)
    assert torch.equal(loaded["row"], base[1])
    assert torch.equal(loaded["turned"], base.T)


def test_one_that_is_written_behind_has_the_values_of_its_step(checkpoints: Checkpoints, tmp_path: Path):
    """The weights go on changing in place, and so does metrics.jsonl."""
    checkpoints.behind = True
    weights = torch.zeros(1_000_000)
    for step in range(1, 6):
        weights += 1
        checkpoints.metrics.log(step, loss=1.0)
        checkpoints.save(step, {"weights": weights, "tied": weights, "part": weights[:10]}, {"at": step})
        weights += 0.5
        checkpoints.metrics.log(step, loss=2.0)
    checkpoints.wait()
    assert steps(tmp_path) == ["step-00000004", "step-00000005"]
    found = fresh(tmp_path).latest()
    assert found is not None
    assert (found.step, found.state) == (5, {"at": 5})
    loaded = found.tensors()
    assert all(set(loaded[name].tolist()) == {7.0} for name in ("weights", "tied", "part"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines][-1] == (5, 1.0)


def test_what_goes_wrong_behind_is_raised_by_the_next_save(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    checkpoints.behind = True
    checkpoints.save(1, {"a": torch.ones(3)}, {})
    checkpoints.wait()

    def no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.pwrite", no_space)
        checkpoints.save(2, {"a": torch.ones(3)}, {})
        with pytest.raises(MachineError, match=r"could not be written: .*No space left"):
            checkpoints.save(3, {"a": torch.ones(3)}, {})
    newest = fresh(tmp_path).latest()
    assert newest is not None
    assert newest.step == 1
    checkpoints.save(3, {"a": torch.ones(3)}, {})
    checkpoints.wait()
    newest = fresh(tmp_path).latest()
    assert newest is not None
    assert newest.step == 3


def test_the_newest_two_are_kept(checkpoints: Checkpoints, tmp_path: Path):
    for step in (5, 10, 100):
        checkpoints.save(step, {"a": torch.tensor(step)}, {})
    assert steps(tmp_path) == ["step-00000010", "step-00000100"]
    newest = fresh(tmp_path).latest()
    assert newest is not None
    assert newest.tensors()["a"] == 100


def test_none_is_found_where_there_is_none(checkpoints: Checkpoints):
    assert checkpoints.latest() is None
    assert checkpoints.resumed_from == 0


@pytest.mark.parametrize("left", ["unmarked", "hidden", "a half-written marker"])
def test_what_is_half_written_is_ignored_and_removed(checkpoints: Checkpoints, tmp_path: Path, left: str):
    checkpoints.save(5, {"a": torch.tensor(5)}, {})
    checkpoints.save(10, {"a": torch.tensor(10)}, {})
    later = tmp_path / "checkpoints" / "step-00000010"
    if left == "unmarked":
        (later / "whole.json").unlink()
    elif left == "hidden":
        later.rename(later.with_name(".step-00000010"))
    else:
        (later / "whole.json").rename(later / ".whole.json.tmp")
    (later.parent / "stray").write_text("x")
    after = fresh(tmp_path)
    peeked = after.peek()
    assert peeked is not None
    assert peeked.step == 5
    assert len(steps(tmp_path)) == 3  # a look changes nothing
    newest = after.latest()
    assert newest is not None
    assert (newest.step, after.resumed_from) == (5, 5)
    assert steps(tmp_path) == ["step-00000005"]


def flip(file: Path) -> None:
    """One bit of the last byte."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit": (lambda path: flip(path / "state.safetensors"), "the bytes of state.safetensors have changed"),
    "cut short": (lambda path: os.truncate(path / "state.safetensors", 70), "state.safetensors has 70 of 80 bytes"),
    "gone": (lambda path: (path / "state.safetensors").unlink(), "state.safetensors is missing"),
    "its marker": (
        lambda path: (path / "whole.json").write_text((path / "whole.json").read_text().replace("0.125", "0.625")),
        "what whole.json says has changed",
    ),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_one_that_is_damaged_is_said_and_the_one_before_it_taken(checkpoints: Checkpoints, tmp_path: Path, how: str):
    damage, wrong = DAMAGE[how]
    for step in (5, 10):
        checkpoints.metrics.log(step, loss=1.0)
        checkpoints.save(step, {"a": torch.full((4,), float(step))}, {"rate": 0.125})
    damage(tmp_path / "checkpoints" / "step-00000010")
    said: list[str] = []
    after = fresh(tmp_path)
    after.say = said.append
    newest = after.latest()
    assert newest is not None
    assert (newest.step, newest.state, after.resumed_from) == (5, {"rate": 0.125}, 5)
    assert newest.tensors()["a"].tolist() == [5.0] * 4
    assert said == [f"the checkpoint of step 10 is damaged ({wrong}): the one before it is taken"]
    assert steps(tmp_path) == ["step-00000005"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    damage(tmp_path / "checkpoints" / "step-00000005")
    with pytest.raises(CheckpointError, match=f"damaged \\({wrong}\\), and there is no older one"):
        fresh(tmp_path).latest()
    assert steps(tmp_path) == ["step-00000005"]  # nothing is lost that somebody might mend


def test_an_older_one_goes_only_when_the_next_is_whole(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Killed at any system call of the third save, one of the first two or the third is whole, and loads."""

    class Died(BaseException):
        pass

    count = limit = 0

    def dying(original: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == limit:
                raise Died
            return original(*args, **options)

        return call

    found = []
    for limit in range(1, 100):  # noqa: B007
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        for step in (1, 2):
            fresh(tmp_path).save(step, {"a": torch.tensor(step)}, {"step": step})
        count = 0
        with monkeypatch.context() as patch:
            for name in ("open", "mkdir", "pwrite", "fsync", "rename", "replace", "unlink", "rmdir"):
                patch.setattr(os, name, dying(getattr(os, name)))
            try:
                fresh(tmp_path).save(3, {"a": torch.tensor(3)}, {"step": 3})
                break
            except Died:
                pass
        newest = fresh(tmp_path).latest()
        assert newest is not None
        assert newest.step >= 2
        assert newest.state["step"] == newest.step == newest.tensors()["a"]
        found.append(newest.step)
        fresh(tmp_path).save(4, {"a": torch.tensor(4)}, {})  # and the next save goes well
        assert "step-00000004" in steps(tmp_path)
    assert found == sorted(found)
    assert set(found) == {2, 3}


def test_metrics_are_cut_back_to_the_checkpoint(checkpoints: Checkpoints, tmp_path: Path):
    checkpoints.metrics.log(1, loss=3.0)
    checkpoints.save(1, {"a": torch.tensor(1)}, {})
    checkpoints.metrics.log(2, loss=2.0)
    checkpoints.metrics.log(3, loss=1.0)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    after = fresh(tmp_path)
    after.latest()
    after.metrics.log(2, loss=2.0)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 3.0), (2, 2.0)]
    assert lines[1]["time"] >= lines[0]["time"]


def test_metrics_begin_anew_where_there_is_no_checkpoint(tmp_path: Path):
    fresh(tmp_path).metrics.log(1, loss=3.0)
    fresh(tmp_path).latest()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_resumed_run_keeps_the_threads_it_began_with(checkpoints: Checkpoints, tmp_path: Path):
    fresh(tmp_path, threads=3).save(1, {"a": torch.tensor(1)}, {})
    newest = fresh(tmp_path, threads=1).latest()
    assert newest is not None
    assert newest.threads == 3


def test_only_rank_0_writes(tmp_path: Path):
    other = fresh(tmp_path, is_main=False)
    other.save(1, {"a": torch.tensor(1)}, {})
    other.metrics.log(1, loss=1.0)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_written_by_somebody_else_is_adopted(checkpoints: Checkpoints, tmp_path: Path):
    for step in (1, 2, 3):
        folder = tmp_path / "checkpoints" / f"checkpoint-{step}"
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "x").write_text(str(step))
        checkpoints.adopt(folder, step, {"rows": step})
    newest = fresh(tmp_path).latest()
    assert newest is not None
    assert (newest.step, newest.state, newest.path.name) == (3, {"rows": 3}, "checkpoint-3")
    assert steps(tmp_path) == ["checkpoint-2", "checkpoint-3"]


def test_a_marker_that_is_no_json_is_refused(checkpoints: Checkpoints, tmp_path: Path):
    checkpoints.save(1, {"a": torch.tensor(1)}, {})
    (tmp_path / "checkpoints" / "step-00000001" / "whole.json").write_text("{")
    with pytest.raises(CheckpointError, match="unreadable marker"):
        fresh(tmp_path).latest()


@pytest.mark.parametrize("kind", ["adamw", "muon", "sgd"])
def test_an_optimizer_goes_on_bit_for_bit(tmp_path: Path, kind: str):
    def build() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 3, bias=kind != "muon")
        if kind == "adamw":
            return layer, torch.optim.AdamW(layer.parameters(), lr=0.1, betas=(0.8, 0.9), fused=True)
        if kind == "muon":
            return layer, torch.optim.Muon(layer.parameters(), lr=0.1)
        return layer, torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)

    def step(layer: torch.nn.Linear, optimizer: torch.optim.Optimizer, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        layer(torch.randn(5, 4, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    straight, through = build(), build()
    for number in range(3):
        step(*straight, number)
        step(*through, number)
    tensors, state = optimizer_tensors(through[1], "o")
    weights = {f"w.{name}": value for name, value in through[0].named_parameters()}
    fresh(tmp_path).save(3, tensors | weights, {"optimizer": state})

    found = fresh(tmp_path).latest()
    assert found is not None
    layer, optimizer = build()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(found.tensors()[f"w.{name}"])
    load_optimizer(optimizer, "o", found.tensors(), found.state["optimizer"])
    for number in range(3, 6):
        step(*straight, number)
        step(layer, optimizer, number)
    assert torch.equal(straight[0].weight, layer.weight)
