"""Load what a user's own file holds: a stage, a reward function, a model class."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.errors import ConfigError, MissingInputError


def load_file(path: Path) -> ModuleType:
    """The module in the file; modules beside it can be imported. ConfigError says at which line it fails."""
    if not path.exists():
        raise MissingInputError("no such file", where=str(path))
    name = f"user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        line = getattr(error, "lineno", None) or _line_in(error, path)
        raise ConfigError(f"does not load: {type(error).__name__}: {error}", where=f"{path}:{line}") from error
    return module


def load_member(reference: str) -> Any:
    """What `/folder/rewards.py:exact` names."""
    file, _, name = reference.rpartition(":")
    module = load_file(Path(file))
    if name not in vars(module):
        raise ConfigError(f"defines no `{name}`", where=file)
    return vars(module)[name]


def _line_in(error: BaseException, path: Path) -> int:
    """The last line of `path` in the error's traceback."""
    line, trace = 1, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
