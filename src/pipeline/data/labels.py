"""A person's labels: a jsonl file that grows by a line at each key pressed, on disk before the next pair is shown.

    {"prompt": [message, …], "answers": ["left", "right"], "label": "left" | "right" | "tie" | "skip"}

The two answers stand as they were shown. Needs no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pipeline.data.files import file_rows
from pipeline.data.messages import Message
from pipeline.errors import DataError

Label = Literal["left", "right", "tie", "skip"]
CHANCES: dict[str, float] = {"left": 1.0, "right": 0.0, "tie": 0.5}
"""That the left one is better, by a person's label; a skip says nothing."""
Key = tuple[str, str, str]


def key_of(prompt: Sequence[Message], left: str, right: str) -> Key:
    """What a label is of; the same with its sides turned round is another key."""
    return (json.dumps(list(prompt), sort_keys=True), left, right)


def append_label(path: Path, prompt: Sequence[Message], left: str, right: str, label: Label) -> None:
    """One more line, on disk when this returns."""
    row = {"prompt": list(prompt), "answers": [left, right], "label": label}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def mend_end(path: Path) -> None:
    """Drop the piece of a line that a kill in the middle of a write has left at the end of the file."""
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)


def read_labels(path: Path) -> dict[Key, Label]:
    """What was said of each pair, in the order it was said. DataError (file and line) for a line that is no label."""
    found: dict[Key, Label] = {}
    for row, where in file_rows(path) if path.stat().st_size else ():
        if not _is_label(row):
            mend = '{"prompt": […], "answers": [left, right], "label": "left", "right", "tie" or "skip"}'
            raise DataError("no label", where=where, mend=mend)
        found[key_of(row["prompt"], *row["answers"])] = row["label"]
    return found


def _is_label(row: dict[str, Any]) -> bool:
    answers = row.get("answers")
    return (
        isinstance(row.get("prompt"), list)
        and isinstance(answers, list)
        and len(answers) == 2
        and all(isinstance(answer, str) for answer in answers)
        and row.get("label") in (*CHANCES, "skip")
    )
