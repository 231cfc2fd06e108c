"""Why a stage stopped, kept in its working folder for `llmpipe status` and the report until it goes on."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.artifacts import now, write_json
from pipeline.errors import Halt, PipelineError

FILE = "failed.json"
LONGEST = 2000


@dataclass(frozen=True)
class Failure:
    """What a stage ended with."""

    error: str
    """As it was told: what, where and the mend."""
    time: str
    """ISO 8601, UTC."""

    @property
    def line(self) -> str:
        """Its first line."""
        return self.error.partition("\n")[0]


@contextmanager
def noted(folder: Path) -> Iterator[None]:
    """What ends the work in `folder` is written down there and raised on. Of several ranks the first to fail is kept;
    being asked to stop is no failure."""
    try:
        yield
    except Halt:
        raise
    except Exception as error:
        told = str(error) if isinstance(error, PipelineError) else f"{type(error).__name__}: {error}"
        if not (folder / FILE).exists():
            with contextlib.suppress(OSError):  # a full disk: what failed is what is told
                write_json(folder / FILE, {"error": told[:LONGEST], "time": now()})
        raise


def forget(folder: Path) -> None:
    """The stage goes on."""
    (folder / FILE).unlink(missing_ok=True)


def read(folder: Path) -> Failure | None:
    """What the work in `folder` ended with, or None. A process that was killed has left nothing."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return Failure(found["error"], found["time"])
