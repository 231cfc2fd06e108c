"""The recipe that `llmpipe init` writes: stages for what there is, every value with a word on why."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifacts import Artifact

if TYPE_CHECKING:
    from pipeline.data.looking import Rows, Text


DEFAULT_OUT = "recipe.yaml"
HIGHEST = 2
"""Folders up that a path in a recipe goes; what lies further off is written whole."""


@dataclass(frozen=True)
class Asked:
    """What the user named: absolute paths, a reference, hours of work, where the recipe goes."""

    data: Path | None
    chats: Path | None
    preferences: Path | None
    base: str | None
    hours: float
    out: Path
    artifacts: Path

    @property
    def run(self) -> str:
        """The run's name: the file's where it has one of its own, else that of the data, the base or the rows, so that
        two recipes of the usual name share no run."""
        base = self.base.removeprefix("hub:").partition("@")[0] if self.base else ""
        base = Path(base).name if base.startswith("/") else base
        rows = self.chats or self.preferences
        names = [self.data.stem if self.data else "", base, rows.stem if rows else ""]
        if self.out.name != DEFAULT_OUT:
            names = [self.out.stem, *names]
        legal = (re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:64] for name in names)
        return next((name for name in legal if name), "mine")


@dataclass(frozen=True)
class Found:
    """What lies there."""

    sources: list[str]
    text: Text | None
    chats: Rows | None
    preferences: Rows | None
    base: Artifact | None
    bytes_a_token: float
    vocab: int

    @property
    def row_lengths(self) -> list[list[int]]:
        """Tokens of the rows, about, the template's included; by kind."""
        kinds = [rows for rows in (self.chats, self.preferences) if rows is not None]
        return [
            [round((a + b) / self.bytes_a_token) + 24 for a, b in zip(rows.prompts, rows.answers, strict=True)]
            for rows in kinds
        ]


@dataclass
class Stages:
    """Stage -> field -> value, and a word on a field where there is one to say."""

    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    why: dict[tuple[str, str], str] = field(default_factory=dict)

    def set(self, stage: str, name: str, value: Any, why: str = "") -> None:
        """A field of a stage, and why it has this value."""
        self.values.setdefault(stage, {})[name] = value
        if why:
            self.why[stage, name] = why


def render(stages: Stages, run: str, head: list[str], out: Path) -> str:
    """The file's text; paths below its folder are written from there."""
    lines = [*(f"# {line}".rstrip() for line in head), f"run: {run}", "seed: 0", "stages:"]
    for stage, fields in stages.values.items():
        own = stages.why.get((stage, ""))
        lines += [f"  {stage}:", *([f"    # {own}"] if own else [])]
        for name, value in fields.items():
            why = stages.why.get((stage, name))
            lines.append(f"    {name}: {_written(value, out.parent)}" + (f"  # {why}" if why else ""))
    return "\n".join(lines) + "\n"


def _written(value: Any, folder: Path) -> str:
    """A value in YAML's flow style."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_written(each, folder)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_written(each, folder) for each in value) + "]"
    if isinstance(value, str):
        return _text(shown_path(value, folder))
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def _text(value: str) -> str:
    is_plain = value.replace("/", "").replace("-", "").replace("_", "").replace(".", "").isalnum()
    return value if is_plain and value[0].isalpha() | (value[0] in "./") else json.dumps(value, ensure_ascii=False)


def shown_path(value: str, folder: Path) -> str:
    """An absolute path below `folder` as `./…`, one beside it as `../…`; anything else as it is."""
    if not value.startswith("/"):
        return value
    relative = os.path.relpath(value, folder)
    ups = Path(relative).parts.count("..")
    if not ups:
        return f".{os.sep}{relative}"
    return relative if ups <= HIGHEST and len(Path(os.path.commonpath([value, folder])).parts) > 1 else value


def left_over(sources: Path, others: list[Path]) -> Iterator[str]:
    """What of a folder is text: the folder, or what is in it but for `others`, which hold rows."""
    if not any(other.is_relative_to(sources) for other in others):
        yield str(sources)
        return
    for path in sorted(sources.iterdir()):
        if path not in others and not path.name.startswith("."):
            yield from left_over(path, others) if path.is_dir() else [str(path)]
