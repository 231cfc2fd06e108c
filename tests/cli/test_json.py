"""Every command has --json, and what it writes on stdout is one JSON value."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command

from pipeline.cli.app import app


def commands() -> Iterator[tuple[str, Any]]:
    """(name, command) of every command, those of groups too."""
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        for inner, each in getattr(command, "commands", {"": command}).items():
            yield f"{name} {inner}".strip(), each


@pytest.mark.parametrize(("name", "command"), [*commands()], ids=[name for name, _ in commands()])
def test_a_command_has_json(name: str, command: Any):
    assert "--json" in [option for parameter in command.params for option in parameter.opts], name


QUICK = (
    "run tiny.yaml", "pretrain tiny.yaml --dry-run", "status tiny.yaml", "status tiny/pretrain", "plan tiny.yaml",
    "gc --dry-run", "recipes", "eject dpo", "config show tiny.yaml", "config schema", "preview tiny.yaml pretrain",
    "export tiny/pretrain --to hf --out exported",
)  # fmt: skip


@pytest.mark.slow
def test_what_is_written_is_json(warm: Any, trained: Any):
    for line in QUICK:
        done = warm(*line.split(" "), "--json")
        assert done.code == 0, (line, done.stderr)
        json.loads(done.stdout)
