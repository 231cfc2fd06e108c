"""What an evaluation writes: results.jsonl, one figure a line, and samples.jsonl, one item a line. Needs no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Result:
    """One figure of one model: its value, its 95 % interval, the number of items behind it. NaN where undefined."""

    model: str
    fingerprint: str
    task: str
    metric: str
    value: float
    low: float
    high: float
    n: int


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line; a number that is not finite is written as null."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            finite = {key: None if _is_not_finite(value) else value for key, value in row.items()}
            file.write(json.dumps(finite, ensure_ascii=False, allow_nan=False) + "\n")


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
