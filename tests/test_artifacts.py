"""The store: published whole or not at all, whatever dies in between; locks, hashes, names."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import artifacts
from pipeline.artifacts import Store, changed_files, content_hash, read_artifact
from pipeline.errors import ArtifactError, ConfigError, MachineError, MissingInputError
from pipeline.hashes import sha256, template_hash, tokenizer_hash


def quiet(who: str) -> None:
    pytest.fail(f"waited for {who}")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "artifacts")


def work(store: Store, stage: str, text: str) -> Path:
    """A finished partial folder whose content and fingerprint are `text`."""
    partial = store.partial("run", stage, text * 16)
    (partial / "model").mkdir(exist_ok=True)
    (partial / "model" / "weights").write_text(text)
    (partial / "metrics.jsonl").write_text("{}\n")
    (partial / "checkpoints" / "step-1").mkdir(parents=True, exist_ok=True)
    (partial / "checkpoints" / "step-1" / "state").write_text("big")
    return partial


def manifest(text: str) -> dict[str, Any]:
    return {"stage": "sft", "kind": "causal-lm", "fingerprint": text * 16, "parts": {}}


def publish(store: Store, stage: str, text: str) -> None:
    store.publish(work(store, stage, text), "run", stage, manifest(text))


def content(store: Store, stage: str) -> str:
    return (store.artifact("run", stage).model / "weights").read_text()


def names(store: Store) -> set[str]:
    return {path.name for path in (store.root / "run").iterdir() if not path.name.endswith(".lock")}


def test_what_is_published_reads_back(store: Store):
    publish(store, "sft", "a")
    artifact = store.artifact("run", "sft")
    assert (artifact.reference, artifact.kind, artifact.stage) == ("run/sft", "causal-lm", "sft")
    assert artifact.fingerprint == "a" * 16
    assert artifact.model == store.root / "run" / "sft" / "model"
    listed = artifact.manifest["files"]
    assert list(listed) == ["metrics.jsonl", "model/weights"]
    # sha256sum of the letter a
    assert listed["model/weights"] == {
        "sha256": "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb",
        "bytes": 1,
    }
    assert changed_files(artifact) == []
    assert not (artifact.path / "checkpoints").exists()
    assert names(store) == {"sft"}


def test_publishing_again_replaces_the_whole(store: Store):
    publish(store, "sft", "a")
    (store.root / "run" / "sft" / "left-over").write_text("x")
    publish(store, "sft", "b")
    assert content(store, "sft") == "b"
    assert not (store.root / "run" / "sft" / "left-over").exists()
    assert names(store) == {"sft"}


class Died(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


STEPS = ((os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree"), (json, "dump"))


def die_at(monkeypatch: pytest.MonkeyPatch, number: int, *, after: bool) -> Iterator[int]:
    """Die before or after the system call of this number; yields how many there were."""
    count = 0

    def counted(original: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == number and not after:
                raise Died
            result = original(*args, **options)
            if count == number:
                raise Died
            return result

        return call

    with monkeypatch.context() as patch:
        for module, name in STEPS:
            patch.setattr(module, name, counted(getattr(module, name)))
        yield count
    yield count


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("before", [None, "a"])
def test_a_publication_cut_off_anywhere_leaves_a_whole_artifact(
    store: Store, monkeypatch: pytest.MonkeyPatch, before: str | None, after: bool
):
    published = kept = 0
    for number in range(1, 100):
        shutil.rmtree(store.root, ignore_errors=True)
        if before:
            publish(store, "sft", before)
        partial = work(store, "sft", "b")
        dying = die_at(monkeypatch, number, after=after)
        next(dying)
        try:
            store.publish(partial, "run", "sft", manifest("b"))
            next(dying)
            break
        except Died:
            next(dying)
        with store.hold("run", "sft", quiet):
            found = store.find("run", "sft")
            assert found is not None or before is None
            if found is not None:
                assert changed_files(found) == []
                assert content(store, "sft") == found.fingerprint[0]
                assert not (found.path / "checkpoints").exists()
            if found is not None and found.fingerprint == "b" * 16:
                published += 1
                assert names(store) == {"sft"}
            else:  # the stage's folder waits to be resumed, its checkpoints in it
                kept += 1
                assert (partial / "checkpoints" / "step-1" / "state").exists()
                publish(store, "sft", "b")
        assert changed_files(store.artifact("run", "sft")) == []
        assert content(store, "sft") == "b"
        assert names(store) == {"sft"}
    assert kept > 5  # died before the manifest stood
    assert published > 2  # died after it


def test_a_stage_whose_name_begins_like_anothers_is_left_alone(store: Store):
    publish(store, "dpo", "a")
    other = work(store, "dpo.ipo", "b")
    artifacts.write_json(other / "manifest.json", {**manifest("b"), "schema_version": 1, "files": {}})
    aside = store.root / "run" / ".dpo.ipo.cccccccccccccccc.old"
    aside.mkdir()
    with store.hold("run", "dpo", quiet):
        pass
    publish(store, "dpo", "d")
    assert content(store, "dpo") == "d"
    assert names(store) == {"dpo", other.name, aside.name}
    with store.hold("run", "dpo.ipo", quiet):
        assert content(store, "dpo.ipo") == "b"


HOLDER = """
import sys, time
from pathlib import Path
from pipeline.artifacts import Store
with Store(Path(sys.argv[1])).hold("run", "sft", print):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_lock_is_waited_for_and_freed_by_its_holders_death(store: Store):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(store.root)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    waited: list[str] = []
    entered = threading.Event()

    def wait() -> None:
        with store.hold("run", "sft", waited.append):
            entered.set()

    waiter = threading.Thread(target=wait)
    waiter.start()
    time.sleep(0.5)
    assert not entered.is_set()
    assert waited == [f"process {holder.pid} on {os.uname().nodename}"] == [store.holder("run", "sft")]
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    waiter.join(timeout=60)
    assert entered.is_set()


def test_a_stage_has_a_holder_while_it_is_held(store: Store):
    assert store.holder("run", "sft") is None  # nothing is there, and nothing is made
    assert not store.root.exists()
    with store.hold("run", "sft", quiet):
        assert store.holder("run", "sft") == f"process {os.getpid()} on {os.uname().nodename}"
        assert store.holder("run", "dpo") is None
    assert store.holder("run", "sft") is None  # what it wrote still lies in the lock
    (store.root / "run" / ".sft.lock").chmod(0o444)
    assert store.holder("run", "sft") is None


def test_the_newest_working_folder_is_the_one_begun_last(store: Store):
    first, second = work(store, "sft", "a"), work(store, "sft", "b")
    for place, folder in enumerate((second, first)):  # it goes on in the first: nothing but its config is new
        (folder / "config.yaml").write_text("")
        os.utime(folder / "config.yaml", (1e9 + place,) * 2)
        os.utime(folder, (1e9 - place,) * 2)
    assert store.unfinished("run", "sft") == first


def test_other_stages_are_not_waited_for(store: Store):
    with store.hold("run", "sft", quiet), store.hold("run", "dpo", quiet), store.hold("other", "sft", quiet):
        pass


OUTSIDE = [
    "../x",
    "..",
    ".",
    "",
    "a/b",
    "/etc",
    ".hidden",
    "a\n",
    "a b",
    "-a",
    "@1",
    "a@",
    "a@@1",
    "a@/",
    "a@..=/",
    "x" * 65,
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_cannot_leave_the_root(store: Store, name: str):
    for run, stage in ((name, "sft"), ("run", name)):
        with pytest.raises(ConfigError, match="is no name of a run or stage"):
            store.folder(run, stage)


def test_names_that_are_allowed(store: Store):
    for name in ("a", "7", "dpo-ipo", "v1.2_x", "x" * 64):
        assert store.folder(name, name) == store.root / name / name


def test_references(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    publish(store, "sft", "a")
    monkeypatch.chdir(tmp_path)
    assert store.resolve("run/sft").fingerprint == "a" * 16
    assert store.resolve("./artifacts/run/sft").fingerprint == "a" * 16
    with pytest.raises(ConfigError, match="is no reference"):
        store.resolve("sft")
    with pytest.raises(ArtifactError, match="no artifact run/dpo"):
        store.resolve("run/dpo")
    with pytest.raises(ConfigError, match="is no name"):
        store.resolve("run/../sft")
    with pytest.raises(MissingInputError, match="neither in the local cache nor to be had"):
        store.resolve("hub:no-such-org/no-such-model")


def test_a_model_from_outside_counts_by_its_content(store: Store, tmp_path: Path):
    for name, weights in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
        (tmp_path / name / "weights").write_text(weights)
    a, b, c = (store.resolve(str(tmp_path / name)) for name in "abc")
    assert (a.kind, a.stage, a.model) == ("causal-lm", "", tmp_path / "a")
    assert a.fingerprint == b.fingerprint != c.fingerprint


def test_changed_and_missing_bytes_are_found(store: Store):
    publish(store, "sft", "a")
    artifact = store.artifact("run", "sft")
    (artifact.model / "weights").write_text("z")
    (artifact.path / "metrics.jsonl").unlink()
    assert changed_files(artifact) == ["metrics.jsonl: missing", "model/weights: bytes changed"]


def test_a_broken_manifest_is_refused(store: Store):
    publish(store, "sft", "a")
    path = store.root / "run" / "sft" / "manifest.json"
    path.write_text("{")
    with pytest.raises(ArtifactError, match="broken manifest"):
        store.find("run", "sft")
    path.write_text('{"schema_version": 2}')
    with pytest.raises(ArtifactError, match="written by a newer llmpipe"):
        read_artifact(path.parent, "run/sft")


def test_blessing_goes_on_the_record(store: Store):
    publish(store, "sft", "a")
    blessed = store.bless(store.artifact("run", "sft"), "other", "sft.seed 0 → 1")
    (record,) = blessed.manifest["blessed"]
    assert (record["fingerprint"], record["why"]) == ("other", "sft.seed 0 → 1")
    assert store.artifact("run", "sft").manifest["blessed"] == [record]
    assert store.artifact("run", "sft").fingerprint == "a" * 16


@pytest.fixture
def big(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is large and old enough for its hash to be remembered."""
    monkeypatch.setenv("LLMPIPE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "big"
    path.write_bytes(b"x" * 100_000)
    os.utime(path, ns=(0, 10**18))
    return path


def notes(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_hash_is_remembered_by_inode_time_and_size(big: Path, tmp_path: Path):
    first = sha256(big)
    (note,) = notes(tmp_path)
    note.write_text("remembered")
    assert sha256(big) == "remembered"
    assert sha256(big, cached=False) == first  # which reads the bytes, and notes them again
    assert sha256(big) == first
    note.write_text("remembered")

    big.rename(tmp_path / "moved")
    assert sha256(tmp_path / "moved") == "remembered"
    shutil.copy2(tmp_path / "moved", big)  # the same bytes and time in another inode
    assert sha256(big) == first
    (tmp_path / "moved").write_bytes(b"y" * 100_000)  # another time
    assert sha256(tmp_path / "moved") not in (first, "remembered")
    os.utime(big, ns=(0, 10**18 + 1))
    assert sha256(big) == first
    assert len(notes(tmp_path)) == 3  # the fresh one is not yet remembered


def test_a_file_that_has_just_changed_is_not_remembered(big: Path, tmp_path: Path):
    big.write_bytes(b"z" * 100_000)
    sha256(big)
    assert notes(tmp_path) == []


def test_content_is_hashed_by_names_and_bytes_and_not_by_place(tmp_path: Path):
    for folder in ("a", "b"):
        (tmp_path / folder / "deep").mkdir(parents=True)
        (tmp_path / folder / "deep" / "x").write_text("1")
    assert content_hash(tmp_path / "a") == content_hash(tmp_path / "b")
    (tmp_path / "b" / "deep" / "x").rename(tmp_path / "b" / "deep" / "y")
    assert content_hash(tmp_path / "a") != content_hash(tmp_path / "b")


def test_a_tokenizers_hash_is_of_what_decides_the_tokens(tmp_path: Path):
    def folder(name: str, **parts: Any) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1}}, **parts}))
        return tmp_path / name

    plain = tokenizer_hash(folder("plain"))
    assert tokenizer_hash(folder("padded", padding={"length": 3}, truncation={"max": 1})) == plain
    assert tokenizer_hash(folder("swapped", model={"vocab": {"b": 1, "a": 0}})) == plain
    assert tokenizer_hash(folder("other", model={"vocab": {"a": 1, "b": 0}})) != plain
    assert tokenizer_hash(folder("added", added_tokens=[{"id": 2, "content": "<x>"}])) != plain
    assert tokenizer_hash(tmp_path) == ""


def test_a_templates_hash_is_of_its_text_wherever_it_stands(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ x }}")
    (tmp_path / "b" / "tokenizer_config.json").write_text('{"chat_template": "{{ x }}"}')
    assert template_hash(tmp_path / "a") == template_hash(tmp_path / "b") != ""
    assert template_hash(tmp_path) == ""


def test_a_full_disk_is_seen_ahead(tmp_path: Path):
    artifacts.need_disk(tmp_path, 1, "this")
    with pytest.raises(MachineError, match=r"this needs 1,000,000,000,000 MB of disk"):
        artifacts.need_disk(tmp_path, 10**18, "this")


def test_json_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    artifacts.write_json(tmp_path / "x", {"a": 1})
    dying = die_at(monkeypatch, 2, after=False)  # the dump is done, nothing is synced
    next(dying)
    with pytest.raises(Died):
        artifacts.write_json(tmp_path / "x", {"a": 2})
    next(dying)
    assert json.loads((tmp_path / "x").read_text()) == {"a": 1}


def test_garbage_is_what_nobody_works_in(store: Store):
    publish(store, "sft", "a")
    given_up = work(store, "sft", "b")
    at_work = work(store, "dpo", "c")
    with store.hold("run", "dpo", quiet):
        found = store.garbage()
    assert [(path, size) for path, size, _ in found] == [(given_up, 1 + 3 + 3)]
    assert {path for path, _, _ in store.garbage()} == {given_up, at_work}
