"""recipes, eject, config: what ships with llmpipe, and what a recipe may hold."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli import completion
from pipeline.cli.options import (
    ArtifactsOption,
    JsonOption,
    RecipeArgument,
    RunOption,
    SetOption,
)


def recipes(json: JsonOption = False) -> None:
    """The recipes that ship with llmpipe, with what each needs and takes."""
    from pipeline.cli.show import list_recipes

    list_recipes(as_json=json)


def eject(
    stage: Annotated[
        str, typer.Argument(help="the stage to copy: tokenize, pretrain, sft, …", autocompletion=completion.types)
    ],
    to: Annotated[Path, typer.Option("--to", help="folder, best the recipe's own")] = Path("."),
    force: Annotated[bool, typer.Option("--force", help="overwrite the file that is there")] = False,
    json: JsonOption = False,
) -> None:
    """Copy a stage's file beside the recipe, as the place to start changing it."""
    from pipeline.cli.show import eject_stage

    eject_stage(stage, to, force=force, as_json=json)


def config_show(
    recipe: RecipeArgument = "demo",
    run: RunOption = None,
    artifacts: ArtifactsOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Every value of the recipe and where it came from."""
    from pipeline.cli.session import open_session
    from pipeline.cli.show import show_config

    show_config(open_session(recipe, run=run, artifacts=artifacts, overrides=set_ or []), as_json=json)


def config_schema(json: JsonOption = True) -> None:
    """JSON Schema of a recipe, for editors: JSON in any case."""
    from pipeline.cli.show import show_schema

    show_schema()
