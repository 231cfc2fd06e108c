"""Documents and rows from every kind of source, and the messages where something is wrong with one."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from pipeline.data.hub_rows import hub_name
from pipeline.data.sources import (
    copies,
    is_few_documents,
    labels,
    local_files,
    read_documents,
    read_source_rows,
    share,
    source_fingerprint,
)
from pipeline.errors import ConfigError, DataError, MissingInputError
from pipeline.hashes import sha256
from pipeline.recipe import DataEntry

ROWS = [{"text": "one ä"}, {"text": "two\r\n2"}, {"text": "three"}]


def texts(source: Path | str, **options: object) -> list[str]:
    return [document.text for document in read_documents(DataEntry(source=str(source), **options))]


def jsonl(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_all(folder: Path) -> list[str]:
    """The same three documents in every form that holds rows; the names of the files."""
    (folder / "a.jsonl").write_bytes(jsonl(ROWS))
    (folder / "b.ndjson").write_bytes(b"\xef\xbb\xbf" + jsonl(ROWS).replace(b"\n", b"\n\n"))
    (folder / "c.json").write_text(json.dumps(ROWS, indent=2))
    (folder / "d.json").write_bytes(jsonl(ROWS))
    (folder / "e.jsonl.gz").write_bytes(gzip.compress(jsonl(ROWS)))
    (folder / "f.jsonl.zst").write_bytes(zstandard.compress(jsonl(ROWS)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "g.parquet")
    return ["a.jsonl", "b.ndjson", "c.json", "d.json", "e.jsonl.gz", "f.jsonl.zst", "g.parquet"]


def test_every_form_of_rows_holds_the_same_documents(tmp_path: Path) -> None:
    for name in write_all(tmp_path):
        assert texts(tmp_path / name) == ["one ä", "two\r\n2", "three"], name
        assert texts(tmp_path / name, limit=2) == ["one ä", "two\r\n2"], name


def test_where_a_document_stands(tmp_path: Path) -> None:
    write_all(tmp_path)
    places = {
        name: [document.where for document in read_documents(DataEntry(source=str(tmp_path / name)))][1]
        for name in ("a.jsonl", "b.ndjson", "c.json", "g.parquet")
    }
    assert places == {
        "a.jsonl": f"{tmp_path}/a.jsonl:2",
        "b.ndjson": f"{tmp_path}/b.ndjson:3",
        "c.json": f"{tmp_path}/c.json: row 2",
        "g.parquet": f"{tmp_path}/g.parquet: row 2",
    }


def test_a_text_file_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    text = "Line one\r\nline two ä\n\n\nend"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + text.encode()))
    (tmp_path / "c.md.zst").write_bytes(zstandard.compress(text.encode()))
    assert texts(tmp_path) == [text, text, text]
    (tmp_path / "code.py").write_text("print()")
    assert len(texts(tmp_path)) == 3  # a folder's other files are let lie
    assert texts(tmp_path / "*.py", format="text") == ["print()"]
    with pytest.raises(ConfigError, match=r"a \.py file is none that llmpipe reads"):
        texts(tmp_path / "code.py")


def test_folders_and_globs_are_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a/10.txt", "a/9.txt", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(tmp_path) == ["a/10.txt", "a/9.txt", "b/2.txt", "c.txt"]
    assert texts(tmp_path / "**" / "[a1]*.txt") == ["a/10.txt"]
    assert texts(tmp_path / "*" / "*.txt") == ["a/10.txt", "a/9.txt", "b/2.txt"]


def test_empty_documents_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"text": ""}, {"text": " \n"}, {"text": "x"}]))
    (tmp_path / "b.txt").write_text("\n\n")
    assert texts(tmp_path) == ["x"]


def test_another_text_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"body": "x", "title": "y"}]))
    assert texts(tmp_path / "a.jsonl", text_field="body") == ["x"]
    with pytest.raises(DataError, match=r"field `text` is missing \(the row has body, title\)") as caught:
        texts(tmp_path / "a.jsonl")
    assert caught.value.where == f"{tmp_path}/a.jsonl:1"
    assert "text_field" in caught.value.mend
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "x"}\n{"text": 5}\n')
    with pytest.raises(DataError, match="field `text` holds no text") as caught:
        texts(tmp_path / "b.jsonl")
    assert caught.value.where == f"{tmp_path}/b.jsonl:2"


def test_what_is_not_there(tmp_path: Path) -> None:
    for source, reason in (
        (tmp_path / "none.txt", "no such file or folder"),
        (tmp_path / "*.jsonl", "no file in it that llmpipe reads"),
        (tmp_path, "no file in it that llmpipe reads"),
    ):
        with pytest.raises(MissingInputError, match=reason) as caught:
            texts(source)
        assert (caught.value.where, caught.value.exit_code) == (str(source), 2)


def test_few_documents_are_counted_without_reading_texts(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.txt").write_bytes(b"\xff")  # would be an error if it were read
    entry = DataEntry(source=str(tmp_path))
    assert is_few_documents(entry, 4)
    assert is_few_documents(entry.model_copy(update={"limit": 2}), 3)
    assert not is_few_documents(entry, 3)
    (tmp_path / "rows.jsonl").write_bytes(jsonl(ROWS))
    assert not is_few_documents(DataEntry(source=str(tmp_path / "rows.jsonl")), 3)
    assert not is_few_documents(DataEntry(source="pydocs"), 100)


def test_the_fingerprint_is_of_contents_not_places(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "x.jsonl").write_bytes(jsonl(ROWS))
    (tmp_path / "b" / "y.jsonl").write_bytes(jsonl(ROWS))
    first, second = (source_fingerprint(DataEntry(source=str(tmp_path / part)), sha256) for part in "ab")
    assert first == second == {"files": [[".jsonl", sha256(tmp_path / "a" / "x.jsonl")]]}
    (tmp_path / "b" / "y.jsonl").write_bytes(jsonl(ROWS[:2]))
    assert source_fingerprint(DataEntry(source=str(tmp_path / "b")), sha256) != first
    hub = source_fingerprint(DataEntry(source="hub:org/name@v1"), sha256)
    assert hub == {"hub": "org/name", "revision": "v1"}
    assert set(source_fingerprint(DataEntry(source="pydocs"), sha256)) == {"pydocs"}


def test_neither_torch_nor_datasets_is_needed_for_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS))
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from pipeline.data.sources import read_documents, source_fingerprint\n"
        "from pipeline.recipe import DataEntry\n"
        f"entry = DataEntry(source={str(tmp_path / 'a.jsonl')!r})\n"
        "print(len(list(read_documents(entry))), source_fingerprint(entry, lambda path: 'hash'))\n"
        "print(sorted({'torch', 'datasets', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert found.splitlines() == ["3 {'files': [['.jsonl', 'hash']]}", "[]"]


def test_a_hub_name_without_a_hub_says_what_to_do() -> None:
    with pytest.raises(MissingInputError, match="the dataset cannot be had") as caught:
        next(read_source_rows(DataEntry(source="hub:nobody/nothing-of-this-name")))
    assert caught.value.where == "hub:nobody/nothing-of-this-name"
    assert "local jsonl or parquet" in caught.value.mend
    assert caught.value.exit_code == 2


def test_hub_rows_come_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[object] = []

    def load(name: str, config: str | None, **more: object) -> datasets.Dataset:
        asked.append((name, config, more))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    entry = DataEntry(source="hub:org/name@abc", name="en", split="test", limit=2)
    assert [(d.text, d.where) for d in read_documents(entry)] == [
        ("one ä", "hub:org/name@abc test: row 1"),
        ("two\r\n2", "hub:org/name@abc test: row 2"),
    ]
    assert asked == [("org/name", "en", {"split": "test", "revision": "abc", "data_files": None, "streaming": False})]
    assert hub_name(DataEntry(source="hub:org/name", revision="r")) == ("org/name", "r")


def test_options_that_a_source_has_no_use_for_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    for option in ("split", "name", "revision"):
        with pytest.raises(ConfigError, match=f"`{option}` is for datasets of the hub"):
            texts(tmp_path / "a.txt", **{option: "x"})


def test_local_files_of_a_single_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    assert local_files(DataEntry(source=str(tmp_path / "a.txt"))) == [tmp_path / "a.txt"]


def test_share_is_the_head_of_blake2b() -> None:
    # blake2b(b"", digest_size=8) is e4a6a0577479b2b4 (computed with coreutils: b2sum -l 64 /dev/null)
    assert share("") == (0xE4A6A0577479B2B4 >> 11) / 2**53
    assert all(0 <= share(str(i)) < 1 for i in range(1000))


@pytest.mark.parametrize(
    ("source", "label"),
    [
        ("pydocs", "pydocs"),
        ("texts/web.jsonl.zst", "web"),
        ("books/", "books"),
        ("./books/*.txt", "books"),
        ("texts/**/part*.parquet", "texts"),
        ("*.txt", "*"),
        ("hub:org/fineweb-edu@main", "fineweb-edu"),
        ("/", "/"),
    ],
)
def test_a_source_has_a_short_name(source: str, label: str) -> None:
    assert labels([DataEntry(source=source)]) == [label]


def test_names_of_sources_are_told_apart() -> None:
    entries = [DataEntry(source=f"{letter}/data.jsonl") for letter in "abc"]
    assert labels([*entries, DataEntry(source="d.txt", label="mine")]) == ["data", "data-2", "data-3", "mine"]


def test_copies_by_weight() -> None:
    assert {copies(str(i), 2.0) for i in range(50)} == {2}
    half = [copies(str(i), 0.5) for i in range(2000)]
    assert set(half) == {0, 1}
    assert 900 < sum(half) < 1100  # standard deviation 22
