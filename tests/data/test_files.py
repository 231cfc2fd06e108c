"""Files that are broken, cut off or packed in pieces: what is read, and how a fault is named."""

import gzip
import json
from pathlib import Path

import pytest
import zstandard

from pipeline.data.files import file_rows, kind, open_bytes, read_text
from pipeline.errors import DataError

ROWS = [{"text": "one ä"}, {"text": "two"}, {"text": "three"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


BROKEN = {
    "a.jsonl": (b'{"text": "x"}\n{"text": \n', ":2", "not JSON: Expecting value at column"),
    "b.jsonl": (b'{"text": "x"}\n"just text"\n', ":2", "a row is an object with named fields, not str"),
    "d.json": (b'[{"text": "x"},\n{"text" "y"}]', ":2", "not JSON: Expecting ':' delimiter at column 9"),
    "e.jsonl": (b'{"text": "x"}\n{"text": "\xff"}\n', ":2", "not UTF-8"),
    "f.txt": (b"first\nsecond \xe4\n", "f.txt", "not UTF-8 in line 2 (byte 13)"),
    "g.parquet": (b"PAR1 no, not at all", "g.parquet", "not a parquet file"),
    "h.jsonl.gz": (b"not gzip", "h.jsonl.gz", "cannot be decompressed"),
    "i.txt.zst": (b"not zst", "i.txt.zst", "cannot be decompressed"),
    "k.txt.zst": (zstandard.compress(bytes(range(256)) * 999)[:-1], "k.txt.zst", "the file ends in the middle"),
    "j.txt.gz": (gzip.compress(b"x" * 9999)[:-12], "j.txt.gz", "cannot be decompressed"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_with_its_line(name: str, tmp_path: Path) -> None:
    content, place, reason = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    path = tmp_path / name
    with pytest.raises(DataError) as caught:
        _ = read_text(path) if ".txt" in name else list(file_rows(path))
    assert caught.value.where.endswith(place)
    assert reason in caught.value.what


def test_a_zst_file_of_several_frames_is_read_to_its_end(tmp_path: Path) -> None:
    halves = ["ä" * 500_000, "b\n" * 300_000]
    (tmp_path / "a.txt.zst").write_bytes(b"".join(zstandard.compress(half.encode()) for half in halves))
    assert read_text(tmp_path / "a.txt.zst") == "".join(halves)
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(LINES) * 2)
    assert [row for row, _ in file_rows(tmp_path / "b.jsonl.zst")] == ROWS * 2
    with open_bytes(tmp_path / "b.jsonl.zst") as file:
        assert file.read() == LINES * 2


def test_the_kind_of_a_file_is_its_suffix_without_the_packing() -> None:
    assert [kind(Path(name)) for name in ("a.JSONL", "b.json.gz", "c.d.txt.zst", "README")] == [
        ".jsonl",
        ".json",
        ".txt",
        "",
    ]
