"""A person's labels: what is on disk after each key, after a kill, and what is no label."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.data.labels import append_label, key_of, mend_end, read_labels
from pipeline.errors import DataError

PROMPT = [{"role": "user", "content": "naïve?"}]


def test_every_label_is_a_line(tmp_path: Path):
    path = tmp_path / "labels.jsonl"
    append_label(path, PROMPT, "a", "b\n", "left")
    assert (
        path.read_text()
        == json.dumps({"prompt": PROMPT, "answers": ["a", "b\n"], "label": "left"}, ensure_ascii=False) + "\n"
    )
    append_label(path, PROMPT, "b", "c", "skip")
    append_label(path, PROMPT, "a", "b\n", "tie")
    assert read_labels(path) == {key_of(PROMPT, "a", "b\n"): "tie", key_of(PROMPT, "b", "c"): "skip"}


def test_half_a_line_is_dropped(tmp_path: Path):
    path = tmp_path / "labels.jsonl"
    mend_end(path)
    append_label(path, PROMPT, "a", "b", "left")
    whole = path.read_bytes()
    for kept in (b"", whole[:7]):
        path.write_bytes(whole + kept)
        mend_end(path)
        assert path.read_bytes() == whole
    path.write_bytes(b'{"prom')
    mend_end(path)
    assert read_labels(path) == {}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "answers": ["a", "b"], "label": "left"},
        {"prompt": PROMPT, "answers": ["a"], "label": "left"},
        {"prompt": PROMPT, "answers": ["a", None], "label": "left"},
        {"prompt": PROMPT, "answers": ["a", "b"], "label": "first"},
    ],
)
def test_what_is_no_label(tmp_path: Path, row: object):
    path = tmp_path / "labels.jsonl"
    append_label(path, PROMPT, "a", "b", "left")
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="no label") as caught:
        read_labels(path)
    assert caught.value.where.endswith("labels.jsonl:2")
