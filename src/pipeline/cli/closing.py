"""What a run ends with: what each stage did to the held-out numbers, where things lie, what to try next."""

from __future__ import annotations

import json
import sys

from rich.console import Console

from pipeline.cli.session import Session
from pipeline.lineage import Standing
from pipeline.progress import clock


def close(session: Session, standings: dict[str, Standing], names: list[str], ran: list[str], seconds: float) -> None:
    """Print the closing words of `llmpipe run` and of a stage command on stdout."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print()
    for name in names:
        if standings[name].node.stage.kind == "evaluation" and standings[name].state == "stands":
            _print_table(standings[name], console)
    if ran:
        console.print(f"{len(ran)} of {len(names)} stages ran in {clock(seconds)}: {', '.join(ran)}")
    else:
        console.print(
            f"nothing to do: {'all ' if len(names) > 1 else ''}{', '.join(names)} "
            f"stand{'s' if len(names) == 1 else ''} (data, config and code are what they were)"
        )
    console.print(f"artifacts   {session.store.root / session.recipe.run}", soft_wrap=True)
    if any(each.state == "stands" for each in standings.values()):
        console.print(f"report      llmpipe report {session.recipe.run}", soft_wrap=True)
    for command in _next(session, standings):
        console.print(f"next        {command}", soft_wrap=True)


def _print_table(standing: Standing, console: Console) -> None:
    from pipeline.evals.export import read_csv
    from pipeline.evals.table import render_comparisons, render_table

    assert standing.artifact is not None
    folder = standing.artifact.path
    lines = (folder / "results.jsonl").read_bytes().splitlines()
    table = (
        read_csv(folder / "table.csv") if (folder / "table.csv").exists() else []
    )  # a stage of one's own writes none
    own = [line for line in table if line["kind"] == "model"]
    flops, cumulative = ({line["model"]: line.get(name) for line in own} for name in ("flops", "flops_cumulative"))
    rows = [json.loads(line) for line in lines]
    console.print(render_table(rows, flops=flops, cumulative=cumulative, width=console.width))
    console.print()
    for kind in ("mean", "difference", "matched"):
        if any(line["kind"] == kind for line in table):
            console.print(render_comparisons(table, kind, width=console.width))
            console.print()


def _next(session: Session, standings: dict[str, Standing]) -> list[str]:
    run = session.recipe.run
    stand = [s.node for s in standings.values() if s.state == "stands" and s.node.stage.kind == "causal-lm"]
    left = [name for name, s in standings.items() if s.state != "stands"]
    commands = [f"llmpipe run{session.shown_recipe}"] if left else []
    if stand:
        commands.append(f"llmpipe chat {run}/{stand[-1].name}")
    return [*commands, f"llmpipe status{session.shown_recipe}"]
