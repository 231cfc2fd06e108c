"""Bad rows of documents: counted over the whole source, named by their line in the file, whoever reads them."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from pipeline.data import passes, units
from pipeline.data.corpus import LeftOut, Sample, Survey
from pipeline.data.sources import is_few_documents, read_documents
from pipeline.data.units import cut, read
from pipeline.data.workers import Crew
from pipeline.errors import DataError
from pipeline.recipe import DataEntry

GOOD = [{"text": f"{i}: " + "word ä " * (i % 7)} for i in range(60)]
LINES = [json.dumps(row).encode() + b"\n" for row in GOOD]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 500)


@pytest.fixture(scope="module", params=[1, 2])
def crew(request: pytest.FixtureRequest) -> Iterator[Crew | None]:
    """None: everything is read here."""
    if request.param == 1:
        yield None
        return
    with Crew(2) as found:
        yield found


@pytest.fixture
def places(tmp_path: Path) -> list[str]:
    """Where the bad rows of the folder stand, in its order."""
    torn = list(LINES)
    for place, bad in ((60, b'{"text": "to'), (41, b"\xff\n"), (40, b'{"body": "x"}\n'), (3, b"[1]\n")):
        torn.insert(place, bad)
    (tmp_path / "a.jsonl").write_bytes(b"".join(torn))
    (tmp_path / "b.json").write_text(json.dumps([*GOOD[:5], 7, *GOOD[5:]]))
    rows = [*GOOD[:33], {"text": None}, *GOOD[33:]]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet", row_group_size=10)
    (tmp_path / "d.jsonl").write_bytes(b"".join([*LINES[:50], b'{"text": }\n', *LINES[50:]]))
    lines = [f"{tmp_path}/a.jsonl:{line}" for line in (4, 42, 44, 64)]
    return [*lines, f"{tmp_path}/b.json: row 6", f"{tmp_path}/c.parquet: row 34", f"{tmp_path}/d.jsonl:51"]


def looked_through(entry: DataEntry, crew: Crew | None, parts: int = 13) -> Survey:
    found = cut([entry], 0.1, 0.1, print)
    assert len(found) >= parts
    survey = Survey(Sample(1000), pieces=None)
    for _ in passes.look_through(found, survey, passes.Hands(crew, lambda size: None, lambda: None)):
        pass
    return survey


@pytest.mark.slow
def test_one_more_than_are_allowed_is_the_error_and_every_other_row_is_read(
    places: list[str], tmp_path: Path, crew: Crew | None
) -> None:
    for most, where in enumerate(places):
        with pytest.raises(DataError) as caught:
            looked_through(DataEntry(source=str(tmp_path), max_bad_rows=most), crew)
        assert caught.value.where == where, most
        assert caught.value.what.endswith(f" (bad row {most + 1}; max_bad_rows is {most})" if most else "not list")
    survey = looked_through(DataEntry(source=str(tmp_path), max_bad_rows=7), crew)
    assert survey.left_out == {0: LeftOut(7, places[0], "a row is an object with named fields, not list")}
    assert survey.train_documents + survey.held_out_documents == 4 * 60
    assert survey.bytes == 4 * sum(len(row["text"].encode()) for row in GOOD)


def test_the_first_is_named_by_its_line_in_the_file_wherever_its_part_begins(tmp_path: Path, crew: Crew | None) -> None:
    for place in (0, 17, 59):
        (tmp_path / "a.jsonl").write_bytes(b"".join([*LINES[:place], b"torn\n", *LINES[place:], b"torn\n"] + LINES * 2))
        survey = looked_through(DataEntry(source=str(tmp_path / "a.jsonl"), max_bad_rows=2), crew)
        assert survey.left_out[0][:2] == (2, f"{tmp_path}/a.jsonl:{place + 1}")


def test_sources_are_counted_each_by_itself(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_bytes(b"".join([*LINES, b"torn\n"]))
    entries = [DataEntry(source=str(tmp_path / f"{name}.jsonl"), max_bad_rows=1) for name in "ab"]
    survey = Survey(Sample(1000), pieces=None)
    for _ in passes.look_through(cut(entries, 0.1, 0.1, print), survey, passes.Hands(None, print, lambda: None)):
        pass
    what = "not JSON: Expecting value at column 1"
    assert survey.left_out == {n: LeftOut(1, f"{tmp_path}/{name}.jsonl:61", what) for n, name in enumerate("ab")}


def test_read_as_one_source_or_in_parts_the_texts_are_the_same(places: list[str], tmp_path: Path) -> None:
    for limit in (None, 70):
        entry = DataEntry(source=str(tmp_path), max_bad_rows=7, limit=limit)
        whole = [document.text for document in read_documents(entry)]
        assert whole == [row["text"] for row in GOOD * 4][:limit]
        assert [document.text for unit in cut([entry], 0.1, 0.1, print) for document in read(unit)] == whole
    with pytest.raises(DataError, match=r"row 3; max_bad_rows is 2\)") as caught:
        list(read_documents(DataEntry(source=str(tmp_path), max_bad_rows=2, limit=70)))
    assert caught.value.where == places[2]


def test_bad_rows_do_not_make_documents_many(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"".join([*LINES[:2], b"torn\n", b'{"body": "x"}\n', LINES[2]]))
    entry = DataEntry(source=str(tmp_path / "a.jsonl"), max_bad_rows=2)
    assert is_few_documents(entry, 4)
    assert not is_few_documents(entry, 3)


@pytest.mark.parametrize(
    ("streaming", "places"), [(False, ["row 8", "row 52"]), (True, ["file 1, row 8", "file 4, row 5"])]
)
def test_rows_of_the_hub_without_a_text_are_left_out(
    streaming: bool, places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """62 rows; streamed, four files of 16, 16, 15 and 15. Read here: a worker would open the dataset by its name."""
    import datasets

    rows = datasets.Dataset.from_list([*GOOD[:7], {"text": None}, *GOOD[7:50], {"text": None}, *GOOD[50:]])
    made = rows.to_iterable_dataset(num_shards=4) if streaming else rows
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: made)
    entry = DataEntry(source="hub:org/torn", max_bad_rows=2, streaming=streaming)
    survey = looked_through(entry, None, parts=4)
    what = "field `text` holds no text (the row has text)"
    assert survey.left_out == {0: LeftOut(2, f"hub:org/torn train: {places[0]}", what)}
    assert survey.bytes == sum(len(row["text"].encode()) for row in GOOD)
    assert len(list(read_documents(entry))) == 60
    with pytest.raises(DataError, match=r"bad row 2; max_bad_rows is 1") as caught:
        looked_through(entry.model_copy(update={"max_bad_rows": 1}), None, parts=4)
    assert caught.value.where == f"hub:org/torn train: {places[1]}"
    units.cached_rows.cache_clear()
