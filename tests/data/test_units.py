"""A corpus in units: nothing left out, nothing twice, in order, and a fault is named as in the whole file."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from pipeline.data import units
from pipeline.data.files import file_rows, lines_before, spans
from pipeline.data.sources import read_documents
from pipeline.data.units import Unit, cut, read
from pipeline.errors import ConfigError, DataError
from pipeline.recipe import DataEntry

ROWS = [{"text": f"{i}: " + "word ä " * (i % 7)} for i in range(120)] + [{"text": " "}]
LINES = [json.dumps(row) + "\n" for row in ROWS]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 500)


def cut_one(entry: DataEntry) -> list[Unit]:
    return cut([entry], 0.1, 0.1, lambda text: None)


def texts(found: list[Unit]) -> list[str]:
    return [document.text for unit in found for document in read(unit)]


def fill(folder: Path) -> None:
    """A file of each kind."""
    (folder / "a.jsonl").write_text("".join(LINES))
    (folder / "b.ndjson").write_text("\ufeff" + "\n".join(LINES) + LINES[0].rstrip("\n"))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress("".join(LINES).encode()))
    (folder / "d.json").write_text(json.dumps(ROWS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "e.parquet", row_group_size=10)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(ROWS[:0], pyarrow.schema([("text", "string")])), folder / "f.parquet"
    )
    for number in range(9):
        (folder / f"t{number}.txt").write_text(f"text {number} " * 20)


def test_the_units_hold_the_corpus_in_its_order(tmp_path: Path) -> None:
    fill(tmp_path)
    for source in (*sorted(tmp_path.iterdir()), tmp_path, tmp_path / "[bdt]*"):
        entry = DataEntry(source=str(source))
        assert texts(cut_one(entry)) == [document.text for document in read_documents(entry)], source
    found = cut_one(DataEntry(source=str(tmp_path)))
    names = ["".join(path.name[0] for path in unit.files) for unit in found]
    assert list(dict.fromkeys(names)) == ["a", "b", "c", "d", "e", "f", "tttt", "t"]
    parts = {name: names.count(name) for name in names}
    size = (tmp_path / "a.jsonl").stat().st_size
    assert parts["a"] == -(-size // 500)
    assert parts["e"] > 3
    assert (parts["c"], parts["d"]) == (1, 1)


@pytest.mark.parametrize("size", [1, 7, 40, 63, 64, 65, 1000, 10**6])
def test_every_line_is_in_one_part_wherever_the_cuts_fall(size: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(LINES))
    found = [row for span in spans(path, size) for row, _ in file_rows(path, span=span)]
    assert found == ROWS


def test_lines_before_a_part(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"ab\ncd\n\nef")
    assert [lines_before(path, start) for start in range(10)] == [0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


@pytest.mark.parametrize(
    ("bad", "what"),
    [('{"text": }\n', "not JSON"), ('{"body": "x"}\n', "field `text` is missing"), ("[1]\n", "a row is an object")],
)
def test_a_fault_in_a_part_is_named_by_its_line_in_the_file(bad: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for place in (0, 1, 57, 120):
        path.write_text("".join([*LINES[:place], bad, *LINES[place:]]))
        with pytest.raises(DataError, match=what) as caught:
            texts(cut_one(DataEntry(source=str(path))))
        with pytest.raises(DataError) as whole:
            list(read_documents(DataEntry(source=str(path))))
        assert caught.value.where == whole.value.where == f"{path}:{place + 1}"


def test_rows_of_a_parquet_part_are_counted_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*ROWS[:77], {"text": None}]), path, row_group_size=10)
    with pytest.raises(DataError, match="holds no text") as caught:
        texts(cut_one(DataEntry(source=str(path))))
    assert caught.value.where == f"{path}: row 78"


def test_a_limit_is_of_the_whole_source(tmp_path: Path) -> None:
    fill(tmp_path)
    found = cut_one(DataEntry(source=str(tmp_path), limit=130))
    assert len(found) == 1
    assert texts(found) == [row["text"] for row in (ROWS[:120] * 2)[:130]]


def test_what_is_built_in_is_a_unit_a_side() -> None:
    found = cut_one(DataEntry(source="arithmetic", limit=5))
    assert [unit.split for unit in found] == ["train", "held_out"]
    assert [len(list(read(unit))) for unit in found] == [5, 5]


def test_rows_of_the_hub_are_cut_by_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = datasets.Dataset.from_list(ROWS)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows)
    found = cut_one(DataEntry(source="hub:org/units"))
    assert len(found) > 3
    assert texts(found) == [row["text"] for row in ROWS[:120]]
    places = [document.where for unit in found for document in read(unit)]
    assert places == [f"hub:org/units train: row {i + 1}" for i in range(120)]
    assert len(cut_one(DataEntry(source="hub:org/units", limit=3))) == 1
    units.cached_rows.cache_clear()


def test_what_is_for_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(LINES))
    with pytest.raises(ConfigError, match="`deduplicate` is for rows"):
        cut_one(DataEntry(source=str(tmp_path / "a.jsonl"), deduplicate="exact"))
    for source, options in (("pydocs", {}), ("b.txt", {}), ("a.jsonl", {"format": "text"})):
        with pytest.raises(ConfigError, match="`max_bad_rows` is for rows, and this source has none"):
            cut_one(DataEntry(source=source, max_bad_rows=1, **options))


def test_what_a_unit_holds_is_known_without_its_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jsonl").write_text("".join(LINES))
    first, second = ([unit.content() for unit in cut_one(DataEntry(source=str(tmp_path / name)))] for name in "ab")
    assert first == second
    (tmp_path / "b" / "x.jsonl").write_text("".join(LINES[1:]))
    assert [unit.content() for unit in cut_one(DataEntry(source=str(tmp_path / "b")))] != first
