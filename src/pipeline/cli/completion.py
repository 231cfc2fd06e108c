"""What the shell offers for a half-written word: recipes, stages, artifacts. Nothing heavy is imported, and whatever
cannot be read offers nothing, since an error would be written into the user's line."""

from __future__ import annotations

import os
from pathlib import Path

import typer

from pipeline.artifacts import MANIFEST
from pipeline.cli.session import artifacts_root
from pipeline.cli.stages import STAGES, find_recipe, first_comment, shipped_recipes
from pipeline.errors import PipelineError

Offer = list[tuple[str, str]]
"""(word, what is said of it where the shell shows such)."""


def recipes(incomplete: str) -> Offer:
    """Recipes that ship with llmpipe, and YAML files and folders that begin so."""
    shipped = [(name, first_comment(path)) for name, path in shipped_recipes().items() if name.startswith(incomplete)]
    folder, begin = os.path.split(incomplete)
    entries = sorted(os.scandir(folder or "."), key=lambda entry: entry.name) if Path(folder or ".").is_dir() else []
    files = [
        (os.path.join(folder, entry.name) + ("/" if entry.is_dir() else ""), "")
        for entry in entries
        if entry.name.startswith(begin) and (entry.name[0] != "." or begin.startswith("."))
        if entry.is_dir() or entry.name.endswith((".yaml", ".yml"))
    ]
    return shipped + files


def stages(ctx: typer.Context, incomplete: str) -> Offer:
    """The stages of the recipe that stands on the line (the demo's where none does)."""
    from pipeline.reading import read_recipe
    from pipeline.unroll import unroll

    try:
        document = unroll(read_recipe(find_recipe(_named(ctx)), ()))
    except PipelineError:
        return []
    found = {
        name: str((fields or {}).get("stage", name))
        for name, fields in dict(document.values.get("stages") or {}).items()
    }
    return [(name, STAGES.get(kind, kind)) for name, kind in found.items() if name.startswith(incomplete)]


def _named(ctx: typer.Context) -> str:
    """The recipe on the line. Words before a half-written option are not parsed yet: they are looked at here."""
    line = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or ""
    found = [word for word in line.split() if word.endswith((".yaml", ".yml")) or word in shipped_recipes()]
    return found[0] if found else str(ctx.params.get("recipe") or "demo")


def types(incomplete: str) -> Offer:
    """The stages there are."""
    return [(name, does) for name, does in STAGES.items() if name.startswith(incomplete)]


def references(ctx: typer.Context, incomplete: str) -> Offer:
    """Artifacts as run/stage; nothing for a path, which the shell completes itself."""
    if incomplete.startswith((".", "/")):
        return []
    given = ctx.params.get("artifacts")
    root = artifacts_root(Path(given) if given else None)
    found = [path.parent for path in sorted(root.glob(f"*/*/{MANIFEST}")) if not path.parent.name.startswith(".")]
    words = [f"{folder.parent.name}/{folder.name}" for folder in found]
    return [(word, "") for word in words if word.startswith(incomplete)]


def runs(ctx: typer.Context, incomplete: str) -> Offer:
    """Runs that have an artifact."""
    found = dict.fromkeys(word.partition("/")[0] for word, _ in references(ctx, ""))
    return [(run, "") for run in found if run.startswith(incomplete)]


def recipes_or_references(ctx: typer.Context, incomplete: str) -> Offer:
    """What `status`, `sample` and `label` take."""
    return references(ctx, incomplete) + recipes(incomplete)
