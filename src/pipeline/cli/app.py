"""Every command and its flags. Bodies live in the modules beside this one and are imported when they run."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="llmpipe",
    help="From a folder of text to an aligned chat model: tokenize, pretrain, sft, reward, ppo, dpo, eval.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(help="Look at a recipe's values and at what a recipe may hold.", no_args_is_help=True)
app.add_typer(config_app, name="config")

RecipeArgument = Annotated[str, typer.Argument(help="a recipe's path, or the name of one that ships with llmpipe")]
RunOption = Annotated[str | None, typer.Option("--run", help="name of the run, in place of the recipe's")]
ArtifactsOption = Annotated[
    Path | None, typer.Option("--artifacts", help="root of the artifacts [env LLMPIPE_ARTIFACTS; default ./artifacts]")
]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="stage.field=value, as often as needed")]
ForceOption = Annotated[bool, typer.Option("--force", help="run again what stands")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="say what would be done and why, and do nothing")]
JsonOption = Annotated[bool, typer.Option("--json", help="results as JSON on stdout")]
KeepOption = Annotated[
    list[str] | None, typer.Option("--keep", help="let this stale stage stand as it is, on its record")
]
ProcessesOption = Annotated[
    int | None, typer.Option("--num-processes", help="processes a stage; one a GPU, else one, unless set")
]
StrategyOption = Annotated[str, typer.Option("--strategy", help="auto, single, ddp or fsdp (pretrain)")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="no progress on stderr")]


@app.command()
def run(
    recipe: RecipeArgument = "demo",
    until: Annotated[str | None, typer.Option("--until", help="stop after this stage and what it needs")] = None,
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


def _add_stage_command(name: str, help_text: str) -> None:
    @app.command(name, help=f"{help_text[0].upper()}{help_text[1:]}: one stage of the recipe.")
    def stage_command(
        recipe: RecipeArgument = "demo",
        only: Annotated[
            str | None, typer.Option("--stage", help="which stage of this type, where the recipe has several")
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
        from pipeline.cli.run import run_one
        from pipeline.cli.session import open_session
        from pipeline.launch import Launch

        launch = Launch(num_processes, strategy, quiet)
        session = open_session(recipe, run=run, artifacts=artifacts, overrides=set_ or [], launch=launch)
        run_one(session, name, only, keep=keep or [], force=force, dry_run=dry_run, as_json=json)


for _name, _help in {
    "tokenize": "train a tokenizer and write the corpus as token shards",
    "pretrain": "train a causal language model on the shards",
    "sft": "fine-tune on conversations",
    "reward": "train a reward model on preferences",
    "ppo": "optimise the policy against a reward",
    "dpo": "optimise the policy on preferences directly",
    "eval": "measure any set of models, with intervals",
}.items():
    _add_stage_command(_name, _help)


DataOption = Annotated[
    list[str] | None, typer.Option("--data", help="prompts; those the model was trained on unless given")
]
AsOption = Annotated[str | None, typer.Option("--as", help="name of what is made, in its run")]


@app.command()
def sample(
    target: Annotated[str, typer.Argument(help="a model (run/stage, ./folder or hub:org/name), or a recipe")],
    data: DataOption = None,
    reward: Annotated[
        str | None, typer.Option("--reward", help="what scores the answers: run/stage, or ./rewards.py:exact")
    ] = None,
    as_: AsOption = None,
    only: Annotated[str | None, typer.Option("--stage", help="of a recipe: which sample stage")] = None,
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


@app.command()
def label(
    target: Annotated[str, typer.Argument(help="a model or rows (run/stage, ./folder or hub:org/name), or a recipe")],
    other: Annotated[str | None, typer.Argument(help="a second one, to be compared with the first")] = None,
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
    only: Annotated[str | None, typer.Option("--stage", help="of a recipe: which label stage")] = None,
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


@app.command()
def status(
    target: Annotated[str, typer.Argument(help="a recipe, or one artifact as run/stage")] = "demo",
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


@app.command()
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
        list[str] | None, typer.Option("--fit", help="run/stage of a pretrained model, or a run; three or more")
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


@app.command()
def preview(
    recipe: RecipeArgument,
    stage: Annotated[str, typer.Argument(help="a stage of the recipe")],
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


@app.command()
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


@app.command()
def recipes(json: JsonOption = False) -> None:
    """The recipes that ship with llmpipe, with what each needs and takes."""
    from pipeline.cli.show import list_recipes

    list_recipes(as_json=json)


@app.command()
def eject(
    stage: Annotated[str, typer.Argument(help="the stage to copy: tokenize, pretrain, sft, …")],
    to: Annotated[Path, typer.Option("--to", help="folder, best the recipe's own")] = Path("."),
    force: Annotated[bool, typer.Option("--force", help="overwrite the file that is there")] = False,
) -> None:
    """Copy a stage's file beside the recipe, as the place to start changing it."""
    from pipeline.cli.show import eject_stage

    eject_stage(stage, to, force=force)


@app.command()
def chat(
    reference: Annotated[str, typer.Argument(help="run/stage, ./folder or hub:org/name")],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="answer this and end")] = None,
    system: Annotated[str | None, typer.Option("--system", help="system message")] = None,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0 is greedy")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="longest answer, in tokens")] = 256,
    seed: Annotated[int, typer.Option("--seed", help="seed of the sampling")] = 0,
    artifacts: ArtifactsOption = None,
) -> None:
    """Talk to a model: answers stream on stdout."""
    from pipeline.artifacts import Store
    from pipeline.cli.chat import chat as talk
    from pipeline.cli.session import artifacts_root

    talk(
        Store(artifacts_root(artifacts)).resolve_or_unfinished(reference),
        reference=reference,
        prompt=prompt,
        system=system,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )


@app.command()
def export(
    reference: Annotated[str, typer.Argument(help="run/stage, ./folder (peft's adapters too) or hub:org/name")],
    out: Annotated[Path, typer.Option("--out", help="the folder to write, which must not be there yet")],
    to: Annotated[str, typer.Option("--to", help="merged: a plain Hugging Face folder")] = "merged",
    base: Annotated[
        str | None, typer.Option("--base", help="what an adapter stands on, unless it is where its config says")
    ] = None,
    artifacts: ArtifactsOption = None,
) -> None:
    """A plain Hugging Face folder of a model; adapters are merged into their base."""
    from pipeline.artifacts import Store
    from pipeline.cli.export import export as write
    from pipeline.cli.session import artifacts_root

    write(Store(artifacts_root(artifacts)), reference, to=to, out=out, base=base)


@config_app.command("show")
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


@config_app.command("schema")
def config_schema() -> None:
    """JSON Schema of a recipe, for editors."""
    from pipeline.cli.show import show_schema

    show_schema()
