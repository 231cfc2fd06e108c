"""run, the stages one by one, and what is known of a recipe's graph or a run: status, plan, report, gc."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli import completion
from pipeline.cli.options import (
    ArtifactsOption,
    DryRunOption,
    ForceOption,
    JsonOption,
    KeepOption,
    ProcessesOption,
    QuietOption,
    RecipeArgument,
    RunOption,
    SetOption,
    StageOption,
    StrategyOption,
)


def run(
    recipe: RecipeArgument = "demo",
    until: Annotated[
        str | None,
        typer.Option("--until", help="stop after this stage and what it needs", autocompletion=completion.stages),
    ] = None,
    run: RunOption = None,
    artifacts: ArtifactsOption = None,
    set_: SetOption = None,
    keep: KeepOption = None,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    num_processes: ProcessesOption = None,
    strategy: StrategyOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Run the recipe's graph, skipping what stands."""
    from pipeline.cli.run import run_graph
    from pipeline.cli.session import open_session
    from pipeline.launch import Launch

    launch = Launch(num_processes, strategy, quiet)
    session = open_session(recipe, run=run, artifacts=artifacts, overrides=set_ or [], launch=launch)
    run_graph(session, until=until, keep=keep or [], force=force, dry_run=dry_run, as_json=json)


def stage_command(name: str) -> Callable[..., None]:
    """The command of one stage of a recipe."""

    def command(
        recipe: RecipeArgument = "demo",
        only: StageOption = None,
        run: RunOption = None,
        artifacts: ArtifactsOption = None,
        set_: SetOption = None,
        keep: KeepOption = None,
        force: ForceOption = False,
        dry_run: DryRunOption = False,
        json: JsonOption = False,
        num_processes: ProcessesOption = None,
        strategy: StrategyOption = "auto",
        quiet: QuietOption = False,
    ) -> None:
        from pipeline.cli.run import run_one
        from pipeline.cli.session import open_session
        from pipeline.launch import Launch

        launch = Launch(num_processes, strategy, quiet)
        session = open_session(recipe, run=run, artifacts=artifacts, overrides=set_ or [], launch=launch)
        run_one(session, name, only, keep=keep or [], force=force, dry_run=dry_run, as_json=json)

    return command


def status(
    target: Annotated[
        str,
        typer.Argument(help="a recipe, or one artifact as run/stage", autocompletion=completion.recipes_or_references),
    ] = "demo",
    verify: Annotated[bool, typer.Option("--verify", help="read every byte again and compare the hashes")] = False,
    run: RunOption = None,
    artifacts: ArtifactsOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """What stands, what is stale and why, and the next command."""
    from pipeline.cli.status import show_artifact, show_recipe

    if "/" in target and not target.endswith((".yaml", ".yml")) and not target.startswith((".", "/")):
        show_artifact(target, artifacts, verify=verify, as_json=json)
    else:
        show_recipe(target, run, artifacts, set_ or [], verify=verify, as_json=json)


def plan(
    recipe: RecipeArgument = "demo",
    budget: Annotated[
        str | None, typer.Option("--budget", help="8h, 20eur or 1e19 (FLOPs): the best model and tokens for it")
    ] = None,
    price: Annotated[float, typer.Option("--price", help="euros an hour and device")] = 2.5,
    on: Annotated[
        str | None, typer.Option("--on", help="a device that is not here: h100, h200x8, a100, 4090, …")
    ] = None,
    fit: Annotated[
        list[str] | None,
        typer.Option(
            "--fit",
            help="run/stage of a pretrained model, or a run; three or more",
            autocompletion=completion.references,
        ),
    ] = None,
    run: RunOption = None,
    artifacts: ArtifactsOption = None,
    set_: SetOption = None,
    num_processes: ProcessesOption = None,
    strategy: StrategyOption = "auto",
    json: JsonOption = False,
) -> None:
    """What the recipe will take: parameters, tokens, FLOPs, memory, disk, time, and what would fit."""
    from pipeline.cli.plan import show_plan
    from pipeline.cli.session import open_session
    from pipeline.launch import Launch

    session = open_session(
        recipe, run=run, artifacts=artifacts, overrides=set_ or [], launch=Launch(num_processes, strategy, quiet=True)
    )
    show_plan(session, budget=budget, price=price, on=on, fit=fit or [], as_json=json)


def gc(
    artifacts: ArtifactsOption = None,
    dry_run: DryRunOption = False,
    older_than: Annotated[
        float, typer.Option("--older-than", help="leave unfinished stages younger than this, in hours")
    ] = 24.0,
    json: JsonOption = False,
) -> None:
    """Delete what no run uses: unfinished stages that were given up, replaced artifacts."""
    from pipeline.cli.status import collect_garbage

    collect_garbage(artifacts, dry_run=dry_run, older_than=older_than, as_json=json)


def report(
    run: Annotated[
        str, typer.Argument(help="a run of the artifacts, or its folder as ./path", autocompletion=completion.runs)
    ],
    other: Annotated[
        str | None, typer.Argument(help="a second run, to be compared with the first", autocompletion=completion.runs)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="file to write", show_default="report.html in the run's folder")
    ] = None,
    price: Annotated[
        float | None,
        typer.Option("--price", help="euros an hour and device", show_default="2.5 of a GPU, none of a CPU", min=0),
    ] = None,
    artifacts: ArtifactsOption = None,
    json: JsonOption = False,
) -> None:
    """One HTML page of a run: graph, results, curves, answers, and how to make it again. Of two runs: what differs."""
    from pipeline.cli.report import write_report
    from pipeline.cli.session import artifacts_root

    write_report(artifacts_root(artifacts), run, other, out=out, price=price, as_json=json)
