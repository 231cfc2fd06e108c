"""`llmpipe plan`: what a recipe will take, printed before anything runs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from pipeline.cli.session import Session
from pipeline.errors import ConfigError
from pipeline.lineage import survey
from pipeline.progress import clock

if TYPE_CHECKING:
    from pipeline.model.scaling import Run
    from pipeline.plan.site import Estimate
    from pipeline.plan.speed import Probe

GIB = 2**30
BUDGET = re.compile(r"([0-9.]+(?:e[0-9]+)?)\s*(h|eur|)")


def show_plan(
    session: Session,
    *,
    budget: str | None,
    price: float,
    on: str | None,
    fit: Sequence[str],
    as_json: bool,
    probe: Probe | None = None,
    bytes_a_token: float | None = None,
) -> None:
    """A line a stage and its notes; with `budget` the best model for it, with `fit` the loss that own runs predict.

    probe: what has been measured of this machine before; measured now unless given. bytes_a_token: of the recipe's
    text, where it has been measured.
    """
    from pipeline.hardware import known_device, measure_device
    from pipeline.plan.lengths import si
    from pipeline.plan.planner import Planner
    from pipeline.plan.speed import Probe

    asked = _budget(budget) if budget is not None else None
    processes = _processes(session, on)
    device = known_device(on) if on else probe.device if probe else measure_device(processes=processes)
    shards, probe = session.launch.strategy == "fsdp", probe or Probe(device)
    planner = Planner(session.recipe, session.store, device, processes, shards, probe, bytes_a_token)
    standings = survey(session.recipe, session.store)
    found = [planner.estimate(standing) for standing in standings.values()]
    extra: list[str] = []
    if asked is not None:
        rate, source = planner.rate("pretrain", is_compiled=_compiles(session))
        extra.append(f"{_best_split(asked, price, processes, rate)}; {source}")
    if fit:
        extra += _predictions(session, fit, found)
    if as_json:
        rows = [_fields(each) for each in found]
        print(json.dumps({"device": asdict(device), "processes": processes, "stages": rows, "more": extra}, indent=1))
        return
    hardware = f"{device.name} × {processes}, {device.memory / GIB:.0f} GiB"
    kind = "bf16" if device.bf16 else "fp32"
    print(f"run {session.recipe.run} on {hardware}, {si(device.flops_per_second)}FLOP/s in a {kind} product")
    _print_table(found)
    for line in extra:
        print(line)


def _fields(found: Estimate) -> dict[str, Any]:
    """What `--json` has of a stage."""
    values = {each.name: getattr(found, each.name) for each in fields(found) if each.name != "work"}
    return {**values, "memory": dict(found.memory), "peak": found.peak}


def _print_table(found: Sequence[Estimate]) -> None:
    from rich.console import Console
    from rich.table import Table

    from pipeline.plan.lengths import si

    table = Table(box=None, pad_edge=False)
    for column in ("stage", "state", "parameters", "tokens", "FLOPs", "memory", "disk", "loss", "time"):
        table.add_column(column, justify="left" if column in ("stage", "state") else "right")
    for each in found:
        cells = [si(value) if value else "" for value in (each.parameters, each.tokens, each.flops)]
        memory = f"{each.peak / GIB:.2f} GiB" if each.memory else ""
        disk = f"{each.disk / GIB:.2f} GiB" if each.disk else ""
        loss = f"{each.loss:.2f}" if each.loss else ""
        seconds = clock(each.seconds) if each.seconds else ""
        table.add_row(each.stage, each.state, *cells, memory, disk, loss, seconds)
    left = [each for each in found if each.state != "stands"]
    time, space, work = (sum(getattr(each, part) or 0.0 for each in left) for part in ("seconds", "disk", "flops"))
    unknown = sum(each.seconds is None for each in left)
    closing = (si(work), "", f"{space / GIB:.2f} GiB", "", clock(time))
    table.add_row("to run", f"{len(left)} of {len(found)}", "", "", *closing)
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    console.print(table, highlight=False)
    for each in found:
        for note in each.notes:
            console.print(f"{each.stage}: {note}", highlight=False, soft_wrap=True)
        if each.memory:
            parts = "  ".join(f"{name} {size / GIB:.2f}" for name, size in each.memory.items() if size)
            console.print(f"{each.stage}: GiB a process: {parts}", highlight=False, soft_wrap=True, style="dim")
    if unknown:
        console.print(f"{unknown} of them not in the time", highlight=False)


def _budget(text: str) -> tuple[float, str]:
    """(amount, unit: `h`, `eur` or `` for FLOPs)."""
    found = BUDGET.fullmatch(text)
    if found is None or float(found[1]) <= 0:
        raise ConfigError(f"--budget {text}: no budget", mend="8h, 20eur, or FLOPs such as 1e19")
    return float(found[1]), found[2]


def _processes(session: Session, on: str | None) -> int:
    """Processes of the run: with `--on` as many as the devices named, unless their number is asked for."""
    from pipeline.hardware import known_device

    asked = session.launch.num_processes
    if on is None:
        return session.launch.processes()
    count = known_device(on).count
    if asked is not None and asked > count:
        mend = f"--on {on.partition('x')[0]}x{asked}"
        raise ConfigError(f"--num-processes {asked} on {on}: a process has a device", mend=mend)
    return 1 if session.launch.strategy == "single" else asked or count


def _compiles(session: Session) -> bool:
    """Whether the recipe leaves pretrain its compiled blocks."""
    configs: list[Any] = [node.config for node in session.recipe.nodes.values() if node.stage.type == "pretrain"]
    return any(config.torch_compile is not False for config in configs)


def _best_split(asked: tuple[float, str], price: float, processes: int, rate: float) -> str:
    """The model and the tokens of the lowest loss for the budget, by the Chinchilla law."""
    from pipeline.model.scaling import CHINCHILLA
    from pipeline.plan.lengths import si

    amount, unit = asked
    hours = {"h": amount, "eur": amount / price / processes}.get(unit)
    flops = amount if hours is None else hours * 3600 * rate * processes
    parameters, tokens = CHINCHILLA.best_split(flops)
    hours = flops / rate / processes / 3600
    euros = hours * processes * price
    return (
        f"best for {flops:.3g} FLOPs ({hours:.3g} h here, {euros:.3g} EUR): {si(parameters)} parameters on "
        f"{si(tokens)} tokens, loss {CHINCHILLA.loss(parameters, tokens):.2f} nats a token"
    )


def _predictions(session: Session, references: Sequence[str], found: Sequence[Estimate]) -> list[str]:
    """The held-out bits per byte of the recipe's pretrain stages, by a fit to finished ones."""
    from pipeline.model.build import count_parameters
    from pipeline.model.scaling import fit, predict
    from pipeline.plan.models import model_of

    runs = _runs(session, references)
    try:
        law = fit(runs)
    except ValueError as error:
        mend = "name three or more that differ in size and in tokens"
        raise ConfigError(f"--fit: {error}", mend=mend) from error
    lines = [f"fitted to {len(runs)} runs: {law.floor:.3f} + {law.of_parameters:.3g} / N^α + {law.of_tokens:.3g} / D^β"]
    for each in found:
        node = session.recipe.nodes[each.stage]
        if node.stage.type != "pretrain" or each.tokens is None:
            continue
        model = model_of(session.recipe, session.store, each.stage)
        assert model is not None
        value, low, high = predict(runs, count_parameters(model)[1], each.tokens)
        within = "without an interval: any three runs are met" if math.isnan(low) else f"{low:.3f} to {high:.3f}"
        lines.append(f"{each.stage}: {value:.3f} bits per byte, {within}")
    return lines


def _runs(session: Session, references: Sequence[str]) -> list[Run]:
    """What the references say: a pretrain artifact each, or a run with one."""
    from pipeline.model.build import count_parameters
    from pipeline.model.scaling import Run
    from pipeline.plan.models import empty_model

    runs, measured = [], dict[str, str]()
    for reference in references:
        artifact = session.store.artifact(*reference.split("/", 1)) if "/" in reference else None
        artifact = artifact or session.store.artifact(reference, "pretrain")
        metrics: dict[str, Any] = artifact.manifest["metrics"]
        if artifact.stage != "pretrain" or artifact.manifest["inputs"].get("init"):
            raise ConfigError(f"--fit {reference}: not a model pretrained from scratch")
        measured[artifact.manifest["inputs"]["tokens"][0]["fingerprint"]] = reference
        model = empty_model(artifact.model)
        tokens = float(artifact.manifest["tokens"])
        runs.append(Run(reference, count_parameters(model)[1], tokens, metrics["bits_per_byte"]))
    if len(measured) > 1:
        what = f"{' and '.join(measured.values())} are of other tokens: their bits per byte are of other held-out text"
        raise ConfigError(f"--fit: {what}", mend="name runs of the same tokens")
    if len(runs) < 3:
        raise ConfigError(f"--fit has {len(runs)} runs, and three numbers are fitted", mend="name three or more")
    return runs
