"""Where a command may write: looked at before it works."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.errors import ConfigError


def check_out(path: Path, flag: str = "--out", *, name: str = "") -> None:
    """ConfigError where nothing can be made at `path`: a file is on the way, or a folder is not the user's to write to.
    `name`: what a file would be called in a folder that is there; without one a folder is no error."""
    if name and path.is_dir():
        raise ConfigError("a folder is there", where=f"{flag} {path}", mend=f"{flag} {path / name}")
    above = next(each for each in path.absolute().parents if each.exists())
    mend = f"{flag} in a folder that is yours"
    if not above.is_dir():
        raise ConfigError(f"{above} is a file, no folder", where=f"{flag} {path}", mend=mend)
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"{above} is not to be written to", where=f"{flag} {path}", mend=mend)


def make_parent(path: Path, flag: str = "--out") -> None:
    """Make the folders above `path`; ConfigError where the system makes none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"no folder can be made here: {error.strerror or error}"
        raise ConfigError(what, where=f"{flag} {path}", mend=f"{flag} in a folder that is yours") from error
