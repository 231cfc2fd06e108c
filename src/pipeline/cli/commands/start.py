"""init, doctor: before the first run."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli import completion
from pipeline.cli.options import ArtifactsOption, JsonOption


def init(
    data: Annotated[Path | None, typer.Option("--data", help="text: a folder or a file")] = None,
    chats: Annotated[Path | None, typer.Option("--chats", help="rows to teach answering")] = None,
    preferences: Annotated[Path | None, typer.Option("--preferences", help="rows with a better and a worse answer")] = (
        None
    ),
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            help="a model to start from: run/stage, ./folder or hub:org/name",
            autocompletion=completion.references,
        ),
    ] = None,
    hours: Annotated[float, typer.Option("--hours", help="hours of work that the recipe is for")] = 1.0,
    out: Annotated[Path, typer.Option("--out", help="the recipe to write")] = Path("recipe.yaml"),
    force: Annotated[bool, typer.Option("--force", help="overwrite the recipe that is there")] = False,
    artifacts: ArtifactsOption = None,
    json: JsonOption = False,
) -> None:
    """Look at the data and the hardware, and write a recipe that fits both."""
    from pipeline.cli.init import init as write
    from pipeline.cli.init_recipe import Asked
    from pipeline.cli.session import artifacts_root

    asked = Asked(
        data=_whole(data),
        chats=_whole(chats),
        preferences=_whole(preferences),
        base=str(_whole(Path(base))) if base and base.startswith(("./", "../", "/")) else base,
        hours=hours,
        out=_absolute(out),
        artifacts=artifacts_root(artifacts),
    )
    write(asked, force=force, as_json=json)


def _whole(path: Path | None) -> Path | None:
    return None if path is None else _absolute(path)


def _absolute(path: Path) -> Path:
    """Without `..`, which a recipe's own paths could not be counted from; links stay what they are called."""
    path = path.expanduser()
    return path.resolve() if ".." in path.parts else path.absolute()


def doctor(artifacts: ArtifactsOption = None, json: JsonOption = False) -> None:
    """What is here, what will be slow, what is missing, and the command that mends it."""
    from pipeline.cli.doctor import doctor as examine
    from pipeline.cli.session import artifacts_root

    examine(artifacts_root(artifacts), as_json=json)
