"""The tokenize stage broken off: what is kept, what is dropped, and the same bytes in the end."""

import hashlib
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pipeline.data import begun, encoding, passes, units, workers
from pipeline.data.corpus import Piece
from pipeline.data.files import Bad
from pipeline.data.shards import ShardWriter, TokenFile
from pipeline.errors import DataError, MachineError, Stopped
from pipeline.runtime import Runtime
from stages import tokenize

WORDS = ["king", "speaks", "water", "stone", "bread", "rain", "falls", "house", "<|im_end|>", "Ä", "42"]


def write(path: Path, count: int, seed: int = 0) -> Path:
    draw = random.Random(seed)
    texts = [f"{i}: " + " ".join(draw.choices(WORDS, k=draw.randrange(20, 90))) + ".\n" for i in range(count)]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def data_in(folder: Path) -> list[str]:
    """Two sources: 300 documents in one file that is cut, 300 in six files. About 240 kB, 32 units of 8,000."""
    for number in range(6):
        write(folder / "many" / f"{number}.jsonl", 50, seed=number)
    return [str(write(folder / "one.jsonl", 300, seed=9)), str(folder / "many")]


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """The sources of `data_in`, of the test's own."""
    return data_in(tmp_path)


def make_small(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "fsync", lambda descriptor: None)
    patch.setattr(units, "UNIT_BYTES", 8_000)
    patch.setattr(begun, "SECONDS_BETWEEN_SAVES", 0.0)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small units, every one of them saved; a disk that is waited for makes it slow, and a kill leaves it as it is."""
    make_small(monkeypatch)


class Calm(NamedTuple):
    """What a run of the sources makes that nothing disturbs."""

    hashes: dict[str, str]
    figures: dict[str, float]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Calm:
    """By one process."""
    folder = tmp_path_factory.mktemp("calm")
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        figures = run(folder / "out", data_in(folder), num_proc=1)
    return Calm(hashes(folder / "out"), figures)


def run(out: Path, data: object, stop: bool = False, **options: object) -> dict[str, float]:
    out.mkdir(exist_ok=True)
    config = tokenize.TokenizeConfig(data=data, **{"vocab_size": 300, "sample_bytes": 40_000, **options})
    runtime = Runtime.start(out, seed=0, threads=1)
    runtime.halt.asked = Stopped if stop else None
    return tokenize.run(config, {"tokenizer": None}, out, runtime)


def torn(folder: Path, data: list[str]) -> list[dict[str, object]]:
    """The same data with three bad rows in each of the sources, which two of them in all may have."""
    (folder / "many").mkdir(parents=True)
    many = sorted(Path(data[1]).iterdir())
    lines = {path: path.read_text().splitlines(keepends=True) for path in (Path(data[0]), *many)}
    lines[Path(data[0])].insert(300, '{"text": "torn')
    lines[Path(data[0])].insert(150, '{"body": "Ä"}\n')
    lines[Path(data[0])].insert(149, "[]\n")
    for path, bad in zip(many[1::2], ('{"text": null}\n', '{"te\n', '\n{"text": 7}\n'), strict=True):
        lines[path].insert(20, bad)
    for path, found in lines.items():
        (folder / path.relative_to(Path(data[0]).parent)).write_text("".join(found))
    return [{"source": str(folder / Path(source).name), "max_bad_rows": 3} for source in data]


def hashes(out: Path) -> dict[str, str]:
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name != "metrics.jsonl"]
    names = {path: path.relative_to(out) for path in files}
    return {
        str(name): hashlib.sha256(path.read_bytes()).hexdigest()
        for path, name in names.items()
        if name.parts[0] != "checkpoints"
    }


class Broken(Exception):
    """As a kill, but for what a process leaves unwritten."""


def broken_off(monkeypatch: pytest.MonkeyPatch, name: str, after: int, out: Path, data: object) -> None:
    """A run that ends in the call `after` of a function of `Begun`, before that does anything."""
    whole, calls = getattr(begun.Begun, name), [0]

    def counted(*args: object) -> object:
        calls[0] += 1
        if calls[0] == after:
            raise Broken
        return whole(*args)

    with monkeypatch.context() as patch:
        patch.setattr(begun.Begun, name, counted)
        with pytest.raises(Broken):
            run(out, data)


@pytest.mark.slow
def test_what_is_kept_is_said_and_the_bytes_are_the_same(
    data: list[str], calm: Calm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = calm.figures
    out = tmp_path / "out"
    broken_off(monkeypatch, "looked_through", 10, out, data)
    log = out / "checkpoints" / "survey.jsonl"
    assert len(log.read_text().splitlines()) == 9
    log.write_text(log.read_text() + '{"counts": [1, 2')  # torn
    capsys.readouterr()
    broken_off(monkeypatch, "save_model", 1, out, data)
    said = capsys.readouterr().err
    assert "kept: 9 of 32 parts of the data had been read" in said
    assert not (out / "model").exists()
    broken_off(monkeypatch, "save_written", 200, out, data)
    assert "kept: 32 of 32 parts" in capsys.readouterr().err
    mark = json.loads((out / "checkpoints" / "written.json").read_text())
    assert sum(source["documents"] for side in passes.SIDES for source in mark[side]) == 199
    resumed = run(out, data)
    said = capsys.readouterr().err
    assert "kept: the tokenizer" in said
    assert "of text had been encoded" in said
    assert hashes(out) == calm.hashes
    assert {name: value for name, value in resumed.items() if name != "mb_per_second"} == {
        name: value for name, value in figures.items() if name != "mb_per_second"
    }


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["", ".index", ".bytes"])
def test_a_torn_write_behind_what_was_saved_is_dropped_and_a_lost_one_begins_anew(
    suffix: str,
    data: list[str],
    calm: Calm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    broken_off(monkeypatch, "save_written", 100, out, data)
    torn = out / f"train.ds{suffix}"
    saved = torn.stat().st_size
    with torn.open("ab") as file:
        file.write(b"\x07\x00\x09")
    with torn.open("rb") as file:
        before = file.read(saved)
    run(out, data)
    assert hashes(out) == calm.hashes
    assert torn.read_bytes()[:saved] == before

    out = tmp_path / "lost"
    broken_off(monkeypatch, "save_written", 100, out, data)
    torn = out / f"train.ds{suffix}"
    torn.write_bytes(torn.read_bytes()[:100])
    capsys.readouterr()
    run(out, data)
    assert f"encoding begins anew: {torn}: the file has 100 bytes" in capsys.readouterr().err
    assert hashes(out) == calm.hashes


@pytest.mark.slow
def test_other_data_begins_anew(
    data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    broken_off(monkeypatch, "save_written", 100, out, data)
    write(tmp_path / "many" / "3.jsonl", 51, seed=3)
    capsys.readouterr()
    run(out, data)
    assert "begun anew: the data or the libraries are others" in capsys.readouterr().err
    run(tmp_path / "calm", data)
    assert hashes(out) == hashes(tmp_path / "calm")


@pytest.mark.slow
def test_data_that_change_between_the_passes_are_refused(
    data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a file of the same size: nothing but what is in it tells."""
    out = tmp_path / "out"
    broken_off(monkeypatch, "save_written", 1, out, data)
    changed = tmp_path / "many" / "3.jsonl"
    lines = changed.read_text().splitlines(keepends=True)
    text = lines[0].replace("\\u00c4", "kings.", 1)
    assert text != lines[0]
    assert len(text) == len(lines[0])
    changed.write_text(text + "".join(lines[1:]))
    with pytest.raises(DataError, match="was changed while it was read") as caught:
        run(out, data)
    assert str(changed) in caught.value.where
    run(out, data)
    run(tmp_path / "calm", data)
    assert hashes(out) == hashes(tmp_path / "calm")


@pytest.mark.slow
def test_workers_that_read_for_themselves_write_the_same_and_one_that_is_killed_loses_nothing_that_was_saved(
    data: list[str], calm: Calm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(encoding, "processes_for", lambda text_bytes: 2)
    run(tmp_path / "out", data)
    assert hashes(tmp_path / "out") == calm.hashes
    out = tmp_path / "killed"
    crews: list[workers.Crew] = []
    whole, calls = ShardWriter.take, [0]

    class Watched(workers.Crew):
        def __init__(self, count: int) -> None:
            super().__init__(count)
            crews.append(self)

    def take(writer: ShardWriter, shard: TokenFile, source: int) -> None:
        calls[0] += 1
        if calls[0] == 20:
            crews[1].workers[0].process.kill()
        whole(writer, shard, source)

    with monkeypatch.context() as patch:
        patch.setattr(workers, "Crew", Watched)
        patch.setattr(ShardWriter, "take", take)
        with pytest.raises(MachineError, match="was ended by SIGKILL"):
            run(out, data)
    assert 20 <= calls[0] < 64
    capsys.readouterr()
    run(out, data, num_proc=1)
    assert "of text had been encoded" in capsys.readouterr().err
    assert hashes(out) == calm.hashes


def test_a_stop_in_the_middle_is_saved(
    data: list[str], calm: Calm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing but the stop saves: the time for it has not come."""
    monkeypatch.setattr(begun, "SECONDS_BETWEEN_SAVES", 1e9)
    out = tmp_path / "out"
    done = [0]
    whole = passes.append

    def stopping(found: Iterator[Piece], *args: object) -> Iterator[None]:
        for each in whole(found, *args):
            done[0] += 1
            if done[0] == 333:
                raise Stopped("asked")
            yield each

    with monkeypatch.context() as patch:
        patch.setattr(passes, "append", stopping)
        with pytest.raises(Stopped):
            run(out, data)
    mark = json.loads((out / "checkpoints" / "written.json").read_text())
    assert sum(source["documents"] for side in passes.SIDES for source in mark[side]) == 333
    with pytest.raises(Stopped, match="what is done is kept"):
        run(out, data, stop=True)
    run(out, data)
    assert hashes(out) == calm.hashes


@pytest.mark.slow
def test_bad_rows_are_left_out_in_both_readings_under_any_processes_and_after_a_kill(
    data: list[str], calm: Calm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bytes are those of the data without them."""
    figures = calm.figures
    assert "bad_rows" not in figures
    bad = torn(tmp_path / "torn", data)
    out = tmp_path / "out"
    broken_off(monkeypatch, "looked_through", 20, out, bad)
    broken_off(monkeypatch, "save_written", 300, out, bad)
    capsys.readouterr()
    figures = figures | {"bad_rows": 6.0, "mb_per_second": 0.0}
    assert run(out, bad) | {"mb_per_second": 0.0} == figures
    said = capsys.readouterr().err
    assert (
        f"{tmp_path}/torn/one.jsonl: 3 bad rows are left out, the first at {tmp_path}/torn/one.jsonl:150: a row" in said
    )
    assert f"{tmp_path}/torn/many: 3 bad rows are left out, the first at {tmp_path}/torn/many/1.jsonl:21: field" in said
    assert hashes(out) == calm.hashes
    monkeypatch.setattr(encoding, "processes_for", lambda text_bytes: 2)
    assert run(tmp_path / "two", bad) | {"mb_per_second": 0.0} == figures
    assert hashes(tmp_path / "two") == calm.hashes


def test_a_small_corpus_is_read_once_and_nothing_of_it_is_saved(
    data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(begun, "SECONDS_BETWEEN_SAVES", 20.0)
    read: list[units.Unit] = []
    whole = passes.pieces

    def counted(unit: units.Unit, bad: Bad) -> Iterator[Piece]:
        read.append(unit)
        return whole(unit, bad)

    monkeypatch.setattr(passes, "pieces", counted)
    run(tmp_path / "out", data, sample_bytes=1_000_000)
    assert len(read) == 32
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["begun.json"]


KILLS = """
import json, os, random, signal, sys, time
from pathlib import Path
import transformers
from pipeline.data import begun, encoding, passes, tokenizers, units, workers
from pipeline.runtime import Runtime
from stages import tokenize

data, root, seed = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
units.UNIT_BYTES, begun.SECONDS_BETWEEN_SAVES, encoding.BYTES_WORTH_A_PROCESS = 8_000, 0.0, 10_000
encoding.processes_for, os.fsync = lambda size: 2, lambda descriptor: None
draw = random.Random(seed)

def start(out, processes, dies=None, after=1):
    out.mkdir(exist_ok=True)
    pid = os.fork()
    if pid == 0:
        if dies:
            whole, calls = getattr(begun.Begun, dies), [0]
            def deadly(*args):
                calls[0] += 1
                if calls[0] == after:
                    os.kill(os.getpid(), signal.SIGKILL)
                found = whole(*args)
                return found
            setattr(begun.Begun, dies, deadly)
        config = tokenize.TokenizeConfig(data=data, vocab_size=300, sample_bytes=40_000, num_proc=processes)
        runtime = Runtime.start(out, seed=0, threads=1, quiet=True)
        tokenize.run(config, {"tokenizer": None}, out, runtime)
        (root / "resumed_from").write_text(str(runtime.checkpoints.resumed_from))
        os._exit(0)
    return pid

def kept(out):
    log, mark = out / "checkpoints" / "survey.jsonl", out / "checkpoints" / "written.json"
    units = len(log.read_bytes().splitlines()) if log.exists() else 0
    documents = 0
    if mark.exists():
        documents = sum(s["documents"] for side in passes.SIDES for s in json.loads(mark.read_text())[side])
    return [units, (out / "model").exists(), documents]

assert os.waitpid(start(root / "calm", 1), 0)[1] == 0
found = []
for name, processes in {"one": (1, 1, 1, 1), "two": (2, 2, 2, 2), "up": (1, 2, 1, 2), "down": (2, 1, 2, 1)}.items():
    out, states = root / name, []
    for dies, last, count in zip(("looked_through", "save_model", "save_written"), (20, 1, 15), processes):
        _, status = os.waitpid(start(out, count, dies, draw.randrange(1, last + 1)), 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, (name, dies, status)
        states.append(kept(out))
    pid = start(out, processes[-1])  # and once at a moment of nobody's choosing
    time.sleep(draw.uniform(0, 0.5))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    states.append(kept(out))
    assert os.waitpid(start(out, processes[-1]), 0)[1] == 0
    found.append([name, states, int((root / "resumed_from").read_text())])
print(json.dumps(found))
"""


@pytest.mark.slow
def test_killed_in_every_phase_it_ends_with_the_same_bytes_under_any_processes(
    warm: Any, data: list[str], calm: Calm, tmp_path: Path
) -> None:
    """With bad rows to leave out, whose bytes are those of the data without them."""
    bad = torn(tmp_path / "torn", data)
    seed = random.SystemRandom().randrange(1000)
    said = warm.script(KILLS, json.dumps(bad), tmp_path, seed)
    assert len(calm.hashes) == 11
    assert hashes(tmp_path / "calm") == calm.hashes
    for name, states, resumed_from in json.loads(said.splitlines()[-1]):
        reading, training, encoding_, anywhere = states
        assert reading[0] < 32, (seed, name)
        assert reading[1:] == [False, 0]
        assert training == [32, False, 0], (seed, name)
        assert encoding_[:2] == [32, True], (seed, name)
        assert anywhere[2] >= encoding_[2], (seed, name)
        assert resumed_from == 32 + anywhere[2], (seed, name)
        assert hashes(tmp_path / name) == calm.hashes, (seed, name)
