"""What every command on a recipe shares: the recipe, the store, and how to launch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.artifacts import Store
from pipeline.cli.stages import find_recipe, load_stage
from pipeline.graph import Recipe, build
from pipeline.launch import Launch
from pipeline.reading import Document, assign_to, from_environment, read_recipe
from pipeline.unroll import unroll


@dataclass(frozen=True)
class Session:
    """A recipe over a store."""

    recipe: Recipe
    document: Document
    store: Store
    launch: Launch
    named: str
    """The recipe as the user named it, for the commands that are suggested."""

    @property
    def shown_recipe(self) -> str:
        """` RECIPE` for a suggested command, nothing for the default."""
        return "" if self.named == "demo" else f" {self.named}"


def artifacts_root(artifacts: Path | None) -> Path:
    """--artifacts, else LLMPIPE_ARTIFACTS, else ./artifacts."""
    return artifacts or Path(os.environ.get("LLMPIPE_ARTIFACTS") or "artifacts")


def open_session(
    recipe: str,
    *,
    run: str | None = None,
    artifacts: Path | None = None,
    overrides: Sequence[str] = (),
    launch: Launch | None = None,
) -> Session:
    """Read and validate the recipe; raises RecipeError or MissingInputError before anything heavy loads."""
    document = unroll(read_recipe(find_recipe(recipe), overrides))
    if run is not None:
        document.values["run"] = run
        document.places["run",] = f"--run {run}"
    store = Store(artifacts_root(artifacts))
    built = build(document, load_stage, store)
    return Session(built, document, store, replace(launch or Launch(), tracks=built.tracks), recipe)


def open_stages(
    stages: Mapping[str, Mapping[str, Any]],
    *,
    run: str,
    store: Store,
    named: str,
    overrides: Mapping[str, Sequence[str]] | None = None,
    launch: Launch | None = None,
) -> Session:
    """Stages that a command makes up, as a recipe that no file holds; paths start at the current folder.

    `overrides`: stage -> `field=value` of `--set`; those of `LLMPIPE_SET` are laid over the same stages before them.
    """
    values: dict[str, Any] = {"run": run, "stages": {name: dict(fields) for name, fields in stages.items()}}
    document = Document("the command line", Path.cwd(), values)
    for name, own in (overrides or {}).items():
        given = [(each, f"LLMPIPE_SET {each}") for each in from_environment()] + [
            (each, f"--set {each}") for each in own
        ]
        for each, where in given:
            assign_to(document, ("stages", name), each, where)
    return Session(build(document, load_stage, store), document, store, launch or Launch(), named)
