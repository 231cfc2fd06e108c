"""sample, label, preview: rows that a model makes, that a person makes, and that a stage reads."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli import completion
from pipeline.cli.options import (
    ArtifactsOption,
    AsOption,
    DataOption,
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

ComparedArgument = Annotated[
    str,
    typer.Argument(
        help="a model or rows (run/stage, ./folder or hub:org/name), or a recipe",
        autocompletion=completion.recipes_or_references,
    ),
]
OtherArgument = Annotated[
    str | None,
    typer.Argument(help="a second one, to be compared with the first", autocompletion=completion.references),
]


def sample(
    target: Annotated[
        str,
        typer.Argument(
            help="a model (run/stage, ./folder or hub:org/name), or a recipe",
            autocompletion=completion.recipes_or_references,
        ),
    ],
    data: DataOption = None,
    reward: Annotated[
        str | None,
        typer.Option(
            "--reward",
            help="what scores the answers: run/stage, or ./rewards.py:exact",
            autocompletion=completion.references,
        ),
    ] = None,
    as_: AsOption = None,
    only: StageOption = None,
    run: RunOption = None,
    artifacts: ArtifactsOption = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="field=value; of a recipe stage.field=value, as often as needed")
    ] = None,
    keep: KeepOption = None,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    num_processes: ProcessesOption = None,
    strategy: StrategyOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Let a model answer prompts, score the answers, and make rows of those that are kept."""
    from pipeline.artifacts import Store
    from pipeline.cli.run import run_one
    from pipeline.cli.sample import is_recipe, sample_reference
    from pipeline.cli.session import artifacts_root, open_session
    from pipeline.launch import Launch

    launch = Launch(num_processes, strategy, quiet)
    run_it = partial(run_one, keep=keep or [], force=force, dry_run=dry_run, as_json=json)
    if is_recipe(target):
        session = open_session(target, run=run, artifacts=artifacts, overrides=set_ or [], launch=launch)
        run_it(session, "sample", only)
        return
    store = Store(artifacts_root(artifacts))
    sample_reference(
        target,
        store,
        data=data or [],
        reward=reward,
        run=run,
        name=as_,
        overrides=set_ or [],
        launch=launch,
        run_one=run_it,
    )


def label(
    target: ComparedArgument,
    other: OtherArgument = None,
    data: DataOption = None,
    prompts: Annotated[int, typer.Option("--prompts", help="of a model: how many it answers", min=1)] = 50,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="of a model's answers", min=0)] = 1.0,
    response_length: Annotated[
        int, typer.Option("--response-length", help="of a model's answers, tokens", min=1)
    ] = 128,
    unfinished: Annotated[str, typer.Option("--unfinished", help="leave_out or keep: answers that did not end")] = (
        "leave_out"
    ),
    all_pairs: Annotated[bool, typer.Option("--all-pairs", help="all pairs of a prompt's answers, not one")] = False,
    seed: Annotated[int, typer.Option("--seed", help="of the answers, of which pair is shown, and of the sides")] = 0,
    labels: Annotated[Path | None, typer.Option("--labels", help="the file that grows by every label")] = None,
    as_: AsOption = None,
    only: StageOption = None,
    run: RunOption = None,
    artifacts: ArtifactsOption = None,
    set_: SetOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
    num_processes: ProcessesOption = None,
    quiet: QuietOption = False,
) -> None:
    """Say which of two answers is better, blind; of a recipe, its label stage."""
    from pipeline.artifacts import Store
    from pipeline.cli.label import label_references
    from pipeline.cli.run import run_one
    from pipeline.cli.sample import is_recipe
    from pipeline.cli.session import artifacts_root, open_session
    from pipeline.launch import Launch

    launch = Launch(num_processes, quiet=quiet)
    if is_recipe(target):
        session = open_session(target, run=run, artifacts=artifacts, overrides=set_ or [], launch=launch)
        run_one(session, "label", only, keep=[], force=force, dry_run=False, as_json=json)
        return
    label_references(
        [target, other] if other else [target],
        Store(artifacts_root(artifacts)),
        data=data or [],
        fields={
            "prompts": prompts,
            "temperature": temperature,
            "response_length": response_length,
            "unfinished": unfinished,
        },
        pairs="all" if all_pairs else "one",
        seed=seed,
        labels=labels,
        run=run,
        name=as_,
        overrides=set_ or [],
        launch=launch,
        as_json=json,
    )


def preview(
    recipe: RecipeArgument,
    stage: Annotated[str, typer.Argument(help="a stage of the recipe", autocompletion=completion.stages)],
    rows: Annotated[int, typer.Option("--rows", "-n", help="how many", min=1)] = 3,
    ids: Annotated[bool, typer.Option("--ids", help="print each token's id behind it")] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="count instead: rows, lengths, what is there twice or measured on")
    ] = False,
    run: RunOption = None,
    artifacts: ArtifactsOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Rows of a stage as tokens, what is trained in green; or what all its rows are like."""
    from pipeline.cli.preview import show_rows
    from pipeline.cli.session import open_session
    from pipeline.cli.survey import show_survey

    session = open_session(recipe, run=run, artifacts=artifacts, overrides=set_ or [])
    if stats:
        show_survey(session, stage, as_json=json)
        return
    show_rows(session, stage, rows=rows, ids=ids, as_json=json)
