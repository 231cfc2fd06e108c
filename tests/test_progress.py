"""metrics.jsonl, plain lines, clocks and the wish to stop."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import progress
from pipeline.errors import Interrupted, Stopped
from pipeline.progress import Metrics, Stop, bar, clock, figure


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Time:
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    found = Time()
    monkeypatch.setattr(progress, "time", found)
    return found


def test_a_line_has_step_time_tokens_and_figures(tmp_path: Path, time: Time):
    metrics = Metrics(tmp_path / "m.jsonl")
    time.now += 2.5
    metrics.log(1, 640, loss=2.0, name="x", none=None)
    time.now += 1
    metrics.log(2, loss=float("nan"), other=float("inf"))
    assert lines(tmp_path / "m.jsonl") == [
        {"step": 1, "time": 2.5, "tokens": 640, "loss": 2.0, "name": "x", "none": None},
        {"step": 2, "time": 3.5, "tokens": 640, "loss": None, "other": None},
    ]
    assert metrics.tokens == 640


def test_the_clock_goes_on_after_a_cut(tmp_path: Path, time: Time):
    metrics = Metrics(tmp_path / "m.jsonl")
    metrics.log(1)
    length = metrics.sync()
    assert length == (tmp_path / "m.jsonl").stat().st_size
    metrics.log(2)
    time.now += 50
    metrics.cut(length, 12.0)
    time.now += 3
    metrics.log(2)
    assert [(line["step"], line["time"]) for line in lines(tmp_path / "m.jsonl")] == [(1, 0.0), (2, 15.0)]


def test_nothing_is_written_by_other_ranks(tmp_path: Path):
    metrics = Metrics(tmp_path / "m.jsonl", is_main=False)
    metrics.log(1, 5, loss=1.0)
    assert (metrics.sync(), metrics.tokens) == (0, 5)
    metrics.cut(0, 0.0)
    assert list(tmp_path.iterdir()) == []


def test_plain_lines_come_every_five_seconds_with_figures_and_what_is_left(
    time: Time, capsys: pytest.CaptureFixture[str]
):
    with bar("train", 100, "steps", quiet=False) as shown:
        for step in range(1, 31):
            time.now += 0.5
            shown.advance(1, loss=3.0 / step, lr=1e-4, tokens=12345.0)
        time.now += 60
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.splitlines() == [
        "  train  10/100 steps  loss 0.3  lr 1.0e-04  tokens 12.3k  ETA 45.0 s",
        "  train  20/100 steps  loss 0.15  lr 1.0e-04  tokens 12.3k  ETA 40.0 s",
        "  train  30/100 steps  loss 0.1  lr 1.0e-04  tokens 12.3k  ETA 35.0 s",
        "  train  30/100 steps  done in 1:15",
    ]


def test_a_resumed_phase_counts_its_speed_from_where_it_began(time: Time, capsys: pytest.CaptureFixture[str]):
    with bar("train", 100, "steps", quiet=False) as shown:
        shown.start_at(80)
        time.now += 10
        shown.advance(10)
    assert capsys.readouterr().err.splitlines()[0].split("  ")[-1] == "ETA 10.0 s"


def test_a_phase_of_unknown_length(time: Time, capsys: pytest.CaptureFixture[str]):
    with bar("read", None, "documents", quiet=False) as shown:
        time.now += 10
        shown.advance(1234)
    assert capsys.readouterr().err.splitlines() == [
        "  read  1,234 documents  ",
        "  read  1,234 documents  done in 10.0 s",
    ]


def test_a_quiet_bar_says_nothing(time: Time, capsys: pytest.CaptureFixture[str]):
    with bar("train", 10, "steps", quiet=True) as shown:
        time.now += 60
        shown.advance()
    assert shown.done == 1
    assert capsys.readouterr().err == ""


def test_a_phase_that_fails_is_not_called_done(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ValueError, match="x"), bar("train", 10, "steps", quiet=False):
        raise ValueError("x")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (8.23, "8.2 s"),
        (59.9, "59.9 s"),
        (60, "1:00"),
        (185.4, "3:05"),
        (3723, "1:02:03"),
        (36000, "10:00:00"),
    ],
)
def test_clock(seconds: float, text: str):
    assert clock(seconds) == text


def test_counts_are_written_in_full():
    found = [figure(value) for value in (4096.0, 16384.0, 2152601.0, 4.170312, 2.39e13, -12345.6)]
    assert found == ["4096", "16,384", "2,152,601", "4.17", "2.39e+13", "-12,346"]
    assert figure(4.170312, 6) == "4.17031"


@pytest.fixture
def stop() -> Iterator[Stop]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    found = Stop()
    found.listen()
    yield found
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGTERM, Stopped), (signal.SIGINT, Interrupted)])
def test_a_signal_is_a_wish_and_tears_nothing(stop: Stop, number: signal.Signals, kind: type[Exception]):
    assert stop.asked is None
    os.kill(os.getpid(), number)
    assert stop.asked is kind


def test_a_second_interrupt_kills_unless_it_is_the_first_ones_echo(
    stop: Stop, time: Time, monkeypatch: pytest.MonkeyPatch
):
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    os.kill(os.getpid(), signal.SIGINT)
    time.now += 0.5
    os.kill(os.getpid(), signal.SIGINT)
    assert codes == []
    time.now += 1.5
    os.kill(os.getpid(), signal.SIGINT)
    assert codes == [130]
