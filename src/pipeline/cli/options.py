"""The flags and arguments that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli import completion

RecipeArgument = Annotated[
    str,
    typer.Argument(
        help="a recipe's path, or the name of one that ships with llmpipe", autocompletion=completion.recipes
    ),
]
ReferenceArgument = Annotated[
    str,
    typer.Argument(help="a model: run/stage, ./folder or hub:org/name", autocompletion=completion.references),
]
RunOption = Annotated[
    str | None,
    typer.Option("--run", help="name of the run, in place of the recipe's", autocompletion=completion.runs),
]
ArtifactsOption = Annotated[
    Path | None,
    typer.Option("--artifacts", help="root of the artifacts", show_default="LLMPIPE_ARTIFACTS, or ./artifacts"),
]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="stage.field=value, as often as needed")]
ForceOption = Annotated[bool, typer.Option("--force", help="run again what stands")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="say what would be done and why, and do nothing")]
JsonOption = Annotated[bool, typer.Option("--json", help="results as JSON on stdout")]
KeepOption = Annotated[
    list[str] | None,
    typer.Option("--keep", help="let this stale stage stand as it is, on its record", autocompletion=completion.stages),
]
ProcessesOption = Annotated[
    int | None, typer.Option("--num-processes", help="processes a stage; one a GPU, else one, unless set")
]
StrategyOption = Annotated[str, typer.Option("--strategy", help="auto, single, ddp or fsdp (pretrain)")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="no progress on stderr")]
DataOption = Annotated[
    list[str] | None, typer.Option("--data", help="prompts; those the model was trained on unless given")
]
AsOption = Annotated[str | None, typer.Option("--as", help="name of what is made, in its run")]
StageOption = Annotated[
    str | None,
    typer.Option(
        "--stage", help="which stage of this type, where a recipe has several", autocompletion=completion.stages
    ),
]
SystemOption = Annotated[str | None, typer.Option("--system", help="system message")]
LongestOption = Annotated[int, typer.Option("--max-new-tokens", help="longest answer, in tokens", min=1)]
