"""Why a stage stopped: told, and kept in its working folder for `llmpipe status` and the report until it goes on."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.artifacts import now, write_json
from pipeline.errors import Halt, MachineError, PipelineError

FILE = "failed.json"
LONGEST = 2000
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OUT_OF_MEMORY = ("out of memory", "can't allocate memory")


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
    """What ends the work in `folder` is written down there and raised on, a full disk or memory, which may show
    anywhere, as a MachineError. Of several ranks the first to fail is kept; being asked to stop is no failure."""
    try:
        yield
    except Halt:
        raise
    except PipelineError as error:
        _write(folder, str(error))
        raise
    except Exception as error:
        lacks = _what_the_machine_lacks(error)
        _write(folder, str(lacks or f"{type(error).__name__}: {error}"))
        if lacks is not None:
            raise lacks from error
        raise


def _write(folder: Path, told: str) -> None:
    if not (folder / FILE).exists():
        with contextlib.suppress(OSError):  # a full disk: what failed is what is told
            write_json(folder / FILE, {"error": told[:LONGEST], "time": now()})


def _what_the_machine_lacks(error: Exception) -> MachineError | None:
    """The libraries tell a full disk or memory in classes of their own, so their words count too."""
    words = (str(error).strip() or type(error).__name__).splitlines()[0]
    if (isinstance(error, OSError) and error.errno in FULL) or "No space left on device" in words:
        mend = "free some (`llmpipe gc`), and run the same command again: it goes on from its last checkpoint"
        return MachineError(f"the disk is full: {words}", mend=mend)
    if isinstance(error, MemoryError) or any(sign in words for sign in OUT_OF_MEMORY):
        return MachineError(f"out of memory: {words}", mend="a smaller batch; `llmpipe plan` says what fits")
    return None


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


def say_error(error: BaseException) -> None:
    """The error as a user reads it: what, where, the mend; a traceback only with LLMPIPE_DEBUG=1."""
    if os.environ.get("LLMPIPE_DEBUG") == "1":
        traceback.print_exception(error)
        return
    if isinstance(error, Halt):
        print(f"{error}", file=sys.stderr)
    elif isinstance(error, PipelineError):
        print(f"error: {error}", file=sys.stderr)
    else:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        print(
            f"error: {type(error).__name__}: {error}\n  at {frame.filename}:{frame.lineno}\n"
            "  mend: this is a fault of llmpipe or of a file of yours; LLMPIPE_DEBUG=1 shows the whole story",
            file=sys.stderr,
        )
    sys.stderr.flush()
