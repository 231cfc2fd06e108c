"""A dataset of the hub, file by file from where it lies: the same rows, the same tokens, nothing kept."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from pipeline.data import units
from pipeline.data.sources import read_documents, read_options, read_source_rows
from pipeline.errors import ConfigError, MissingInputError
from pipeline.hashes import sha256
from pipeline.recipe import DataEntry
from pipeline.runtime import Runtime
from stages import tokenize
from tests.hub import hub

FILES = {f"{number:03}_00000": [f"{number}: row {row} of some text, Ä" for row in range(40)] for number in range(4)}
CARD = """\
---
configs:
- {config_name: default, data_files: [{split: train, path: "sample/*/000*"}]}
- {config_name: sample-10BT, data_files: [{split: train, path: "sample/10BT/*"}]}
---
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Laid out as FineWeb-Edu is."""
    folder = tmp_path / "web"
    (folder / "sample" / "10BT").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    for name, texts in FILES.items():
        table = pyarrow.table({"text": texts, "id": list(range(len(texts)))})
        pyarrow.parquet.write_table(table, folder / "sample" / "10BT" / f"{name}.parquet", row_group_size=15)
    return folder


@pytest.fixture
def on_disk(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`datasets`' own loader, pointed at the folder."""
    load = datasets.load_dataset

    def local(name: str, *rest: Any, revision: str | None, **more: Any) -> Any:
        return load(str(repository), *rest, cache_dir=str(tmp_path / "cache"), **more)

    monkeypatch.setattr(datasets, "load_dataset", local)
    units.cached_rows.cache_clear()
    yield
    units.cached_rows.cache_clear()


def texts_of(entry: DataEntry) -> list[str]:
    return [document.text for document in read_documents(entry)]


@pytest.mark.usefixtures("on_disk")
def test_files_are_units_and_hold_the_same_rows() -> None:
    entry = DataEntry(source="hub:org/web", name="sample-10BT", streaming=True)
    found = units.cut([entry], 0.1, 0.1, lambda text: None)
    assert [unit.span for unit in found] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    documents = [document for unit in found for document in units.read(unit)]
    assert [document.text for document in documents] == [text for texts in FILES.values() for text in texts]
    assert documents[41].where == "hub:org/web train: file 2, row 2"
    assert texts_of(entry) == texts_of(DataEntry(source="hub:org/web", name="sample-10BT"))

    (whole,) = units.cut([entry.model_copy(update={"limit": 90})], 0.1, 0.1, lambda text: None)
    assert [document.text for document in units.read(whole)] == [document.text for document in documents[:90]]


@pytest.mark.usefixtures("on_disk")
@pytest.mark.parametrize("streaming", [False, True])
def test_some_files_are_named(streaming: bool) -> None:
    for files, kept in (
        ("sample/10BT/00[12]_*.parquet", [1, 2]),
        (("sample/10BT/003_00000.parquet", "sample/10BT/000*"), [3, 0]),
    ):
        entry = DataEntry(source="hub:org/web", data_files=files, streaming=streaming)
        assert texts_of(entry) == [text for number in kept for text in FILES[f"{number:03}_00000"]]
    with pytest.raises(MissingInputError, match="the dataset cannot be had") as caught:
        texts_of(DataEntry(source="hub:org/web", data_files="sample/20BT/*", streaming=streaming))
    assert "`data_files:`" in caught.value.mend


def test_a_file_that_stops_coming_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        num_shards = 2

        def shard(self, num_shards: int, index: int) -> Iterator[dict[str, str]]:
            assert num_shards == 2
            yield {"text": f"file {index}"}
            if index == 1:
                raise ConnectionError("Server Disconnected")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Broken())
    rows = read_source_rows(DataEntry(source="hub:org/web", split="web", streaming=True))
    assert [next(rows), next(rows)] == [
        ({"text": "file 0"}, "hub:org/web web: file 1, row 1"),
        ({"text": "file 1"}, "hub:org/web web: file 2, row 1"),
    ]
    with pytest.raises(MissingInputError, match="can't be read after row 1: Server Disconnected") as caught:
        next(rows)
    assert caught.value.where == "hub:org/web web: file 2"


def test_what_can_not_be_streamed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a part of a split, which can't be streamed") as caught:
        texts_of(DataEntry(source="hub:org/web", split="train[:100]", streaming=True))
    assert "`data_files`" in caught.value.mend
    (tmp_path / "a.txt").write_text("x")
    for option in ({"streaming": True}, {"data_files": "a.txt"}):
        with pytest.raises(ConfigError, match=f"`{next(iter(option))}` is for datasets of the hub"):
            texts_of(DataEntry(source=str(tmp_path / "a.txt"), **option))


def test_how_rows_come_here_makes_nothing_stale() -> None:
    entry = DataEntry(source="hub:org/web", limit=3)
    assert read_options(entry) == read_options(entry.model_copy(update={"streaming": True})) == {"limit": 3}
    assert read_options(entry.model_copy(update={"data_files": "a/*"})) == {"limit": 3, "data_files": "a/*"}


@pytest.mark.slow
def test_tokens_of_a_stream_are_those_of_the_files(repository: Path, tmp_path: Path) -> None:
    """Through the real client, from a hub on this machine, by two processes; the files are read by one."""
    place = tmp_path / "run"
    place.mkdir()
    stage = (
        '{data: [{source: "hub:org/web", name: sample-10BT, streaming: true}], '
        "vocab_size: 270, held_out: 0.1, num_proc: 2}"
    )
    (place / "recipe.yaml").write_text(f"run: web\nseed: 0\nstages:\n  tokenize: {stage}\n")
    with hub(repository) as (address, asked):
        env = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-c", "from pipeline.cli import main; main()", "run", "recipe.yaml"]
        done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(asked) >= {f"{name}.parquet" for name in FILES}
    assert not [path for path in (tmp_path / "home").rglob("*") if path.suffix in (".arrow", ".parquet")]

    out = tmp_path / "files"
    out.mkdir()
    config = tokenize.TokenizeConfig(data=str(repository / "sample"), vocab_size=270, held_out=0.1, num_proc=1)
    tokenize.run(config, {"tokenizer": None}, out, Runtime.start(out, seed=0, threads=1, quiet=True))
    streamed = place / "artifacts" / "web" / "tokenize"
    for name in ("train.ds", "valid.ds", "model/tokenizer.json"):
        assert sha256(streamed / name) == sha256(out / name), name
