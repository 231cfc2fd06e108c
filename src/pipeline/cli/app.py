"""Every command, in the order of `llmpipe --help`."""

from collections.abc import Callable

import typer

from pipeline.cli.commands import about, graph, models, rows, start

STAGES = {
    "tokenize": "train a tokenizer and write the corpus as token shards",
    "pretrain": "train a causal language model on the shards",
    "sft": "fine-tune on conversations",
    "reward": "train a reward model on preferences",
    "ppo": "optimise the policy against a reward",
    "dpo": "optimise the policy on preferences directly",
    "eval": "measure any set of models, with intervals",
}

app = typer.Typer(
    name="llmpipe",
    help="From a folder of text to an aligned chat model: tokenize, pretrain, sft, reward, ppo, dpo, eval.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config = typer.Typer(help="Look at a recipe's values and at what a recipe may hold.", no_args_is_help=True)

app.command()(graph.run)
for stage, does in STAGES.items():
    app.command(stage, help=f"{does[0].upper()}{does[1:]}: one stage of the recipe.")(graph.stage_command(stage))
COMMANDS: tuple[Callable[..., None], ...] = (
    start.init,
    rows.sample,
    rows.label,
    graph.status,
    graph.plan,
    graph.report,
    rows.preview,
    graph.gc,
    start.doctor,
    about.recipes,
    about.eject,
    models.chat,
    models.blame,
    models.serve,
    models.export,
)
for command in COMMANDS:
    app.command()(command)
config.command("show")(about.config_show)
config.command("schema")(about.config_schema)
app.add_typer(config, name="config")
