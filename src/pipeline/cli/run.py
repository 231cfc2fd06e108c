"""`llmpipe run` and the stage commands: walk the graph, skip what stands, run the rest."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from pipeline.artifacts import Artifact
from pipeline.cli.gates import Gate, failure, gates_of, shown
from pipeline.cli.session import Session
from pipeline.errors import ConfigError
from pipeline.launch import rank_from_outside, run_stage, wait_line, world_size_from_outside
from pipeline.lineage import Standing, brief, inputs_of, survey
from pipeline.progress import clock, figure
from pipeline.reading import meant
from pipeline.tracking import check_packages


def run_graph(
    session: Session,
    *,
    until: str | None,
    keep: Collection[str],
    force: bool,
    dry_run: bool,
    as_json: bool,
    closes: bool = True,
) -> None:
    """Run every stage of the recipe (or those that `until` needs) that does not stand; `closes` with what it made."""
    recipe = session.recipe
    last = recipe.select(until) if until is not None else tuple(recipe.nodes)
    if not last:
        raise ConfigError(f"--until {until}: no such stage{meant(str(until), recipe.nodes)}", where=recipe.name)
    needed = {needed for name in last for needed in recipe.ancestors(name)}
    names = [name for name in recipe.nodes if name in needed]
    _check_strategy(session, names)
    _run(session, names, keep=keep, force=force, dry_run=dry_run, as_json=as_json, closes=closes)


def run_one(
    session: Session,
    type_name: str,
    only: str | None,
    *,
    keep: Collection[str],
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Run the one stage of this type; what it takes must stand."""
    name = _pick(session, type_name, only)
    _check_strategy(session, [name])
    standings = survey(session.recipe, session.store, keep, bless=False)
    for parent in session.recipe.nodes[name].parents(session.recipe.nodes):
        if standings[parent].state != "stands" and not dry_run:
            why = brief(standings[parent].reasons) or "it has not run"
            raise ConfigError(
                f"`{name}` takes `{parent}`, which does not stand ({why})",
                where=session.recipe.name,
                mend=f"llmpipe run {session.named} --until {name}",
            )
    _run(session, [name], keep=keep, force=force, dry_run=dry_run, as_json=as_json)


def _check_strategy(session: Session, names: list[str]) -> None:
    """ConfigError where fsdp is asked for and none of the stages keeps its model in shards; says which ones don't."""
    if session.launch.strategy != "fsdp":
        return
    plain = [name for name in names if not session.recipe.nodes[name].stage.shards]
    if len(plain) == len(names):
        what = f"`{names[0]}` keeps" if len(names) == 1 else f"{', '.join(names)} keep"
        raise ConfigError(
            f"--strategy fsdp: {what} the model whole in every process; only pretrain can shard it",
            where=session.recipe.name,
            mend="--strategy ddp",
        )
    if plain and rank_from_outside() == 0:
        _say(session, f"--strategy fsdp: {', '.join(plain)} as under ddp, the model whole in every process")


def _pick(session: Session, type_name: str, only: str | None) -> str:
    nodes = session.recipe.nodes.values()
    names = [node.name for node in nodes if type_name in (node.stage.type, node.name)]
    if only is not None:
        chosen = [name for name in session.recipe.select(only) if name in names]
        if len(chosen) != 1:
            several = f"{len(chosen)} stages: {', '.join(chosen)}" if chosen else ""
            what = several or f"no {type_name} stage{meant(only, names)}"
            raise ConfigError(f"--stage {only}: {what}", where=session.recipe.name)
        return chosen[0]
    if len(names) == 1 or type_name in names:
        return type_name if type_name in names else names[0]
    what = f"several {type_name} stages: {', '.join(names)}" if names else f"no {type_name} stage"
    mend = f"llmpipe {type_name} {session.named} --stage {names[0]}" if names else ""
    raise ConfigError(f"the recipe has {what}", where=session.recipe.name, mend=mend)


def _run(
    session: Session,
    names: list[str],
    *,
    keep: Collection[str],
    force: bool,
    dry_run: bool,
    as_json: bool,
    closes: bool = True,
) -> None:
    start = time.monotonic()
    is_main = rank_from_outside() == 0
    if not is_main:
        session = replace(session, launch=replace(session.launch, quiet=True))
        as_json = False
    standings = survey(session.recipe, session.store, keep, bless=is_main and not dry_run)
    gates = {name: gates_of(session.recipe.nodes[name], session.document) for name in names}
    check_packages(session.launch.tracks)
    if dry_run:
        _say_plan(standings, names, force, as_json)
        return
    width = max(map(len, names))
    ran, failed = [], None
    for place, name in enumerate(names):
        standing = survey(session.recipe, session.store)[name]
        if standing.state == "stands" and not force and world_size_from_outside() <= 1:  # else rank 0 decides
            _say(session, f"{name:<{width}}  stands ({_made(standing)})")
        elif _hold_and_run(session, name, force, width):
            ran.append(name)
        failed = failure(gates[name], session.store.artifact(session.recipe.run, name)) if gates[name] else None
        if failed is not None:  # nothing that follows runs; what was measured is kept and shown
            names = names[: place + 1]
            break
    standings = survey(session.recipe, session.store)
    if as_json:
        print(json.dumps(_results(session, standings, names, gates), indent=1))
    elif closes and not session.launch.quiet:
        from pipeline.cli.closing import close

        close(session, standings, names, ran, time.monotonic() - start)
    if failed is not None:
        raise failed


def _hold_and_run(session: Session, name: str, force: bool, width: int) -> bool:
    """Run the stage with its lock held; False if another process has made it meanwhile."""
    run = session.recipe.run
    if world_size_from_outside() > 1:
        from pipeline.cli.ranks import run_as_rank

        return run_as_rank(session, name, force)
    with session.store.hold(run, name, wait_line(run, name)):
        standing = survey(session.recipe, session.store)[name]
        if standing.state == "stands" and not force:
            _say(session, f"{name:<{width}}  stands (made meanwhile by another process)")
            return False
        if force and standing.state == "stands":
            shutil.rmtree(session.store.partial(run, name, standing.planned))
        why = brief(standing.reasons) or ("again (--force)" if force else "")
        resumed = " from where it stopped" if standing.is_begun else ""
        _say(session, f"{name:<{width}}  runs{resumed}{f': {why}' if why else ''}")
        if standing.left:
            _say(session, f"  an unfinished one is left as it is, it was of other parts: {brief(standing.left)}")
        run_stage(standing, inputs_of(standing, session.recipe, session.store), session.store, run, session.launch)
    made = session.store.artifact(run, name)
    _say(session, f"{name:<{width}}  done in {clock(made.manifest['seconds'])}  {_figures(made)}")
    return True


def _say(session: Session, text: str) -> None:
    if not session.launch.quiet:
        print(text, file=sys.stderr, flush=True)


def _made(standing: Standing) -> str:
    assert standing.artifact is not None
    manifest = standing.artifact.manifest
    return f"made {manifest['created']}, {standing.fingerprint[:12]}"


def _figures(artifact: Artifact) -> str:
    shown = [f"{key} {figure(value)}" for key, value in artifact.manifest["metrics"].items() if key != "flops"]
    return "  ".join(shown[:4])


def _say_plan(standings: dict[str, Standing], names: list[str], force: bool, as_json: bool) -> None:
    rows = []
    for name in names:
        standing = standings[name]
        will_run = force or standing.state != "stands"
        why = brief(standing.reasons) or ("" if standing.state != "missing" else "has not run")
        rows.append({"stage": name, "state": standing.state, "runs": will_run, "why": why})
    width = max(12, *map(len, names))
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        why = f": {row['why']}" if row["why"] else ""
        print(f"{row['stage']:<{width}} {'would run' if row['runs'] else 'stands'}{why}")


def _results(
    session: Session, standings: dict[str, Standing], names: list[str], gates: dict[str, list[Gate]]
) -> dict[str, Any]:
    stages = []
    for name in names:
        artifact = standings[name].artifact
        assert artifact is not None
        manifest = artifact.manifest
        kept = ("kind", "fingerprint", "metrics", "tokens", "flops", "seconds", "resumed_from")
        found = {"stage": name, "path": str(artifact.path), **{key: manifest[key] for key in kept}}
        stages.append(found | ({"require": shown(gates[name], artifact)} if gates[name] else {}))
    return {"run": session.recipe.run, "artifacts": str(session.store.root), "stages": stages}
