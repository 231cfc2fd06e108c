"""`llmpipe status` and `llmpipe gc`: what lies in the store and whether it stands."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import failure
from pipeline.artifacts import Artifact, Store, changed_files
from pipeline.cli.session import Session, artifacts_root, open_session
from pipeline.cli.tree import tree
from pipeline.errors import ArtifactError
from pipeline.lineage import Standing, brief, survey
from pipeline.progress import clock, figure

KEY_FIGURES = {
    "tokenize": ("vocab_size", "train_tokens", "bytes_per_token"),
    "pretrain": ("bits_per_byte", "parameters", "epochs"),
    "sft": ("held_out_loss_before", "held_out_loss", "rows"),
    "reward": ("accuracy", "ece", "length_only"),
    "ppo": ("reward_first", "reward", "kl", "ended"),
    "dpo": ("accuracy", "kl_per_token", "greedy_length"),
    "sample": ("rows", "score", "score_best", "ended"),
}
"""Stage -> the figures that fit beside it; of a stage without a line here, the first three."""


SHOWN_INPUTS = 3


def show_recipe(
    recipe: str, run: str | None, artifacts: Path | None, overrides: Sequence[str], *, verify: bool, as_json: bool
) -> None:
    """The graph, a line a stage: its state, why, its figures; then the next commands. Broken bytes exit with 1."""
    session = open_session(recipe, run=run, artifacts=artifacts, overrides=overrides)
    standings = survey(session.recipe, session.store)
    rows = [_row(session, standing, verify) for standing in standings.values()]
    commands = _next(session, rows)
    if as_json:
        fields = {"run": session.recipe.run, "artifacts": str(session.store.root), "stages": rows, "next": commands}
        print(json.dumps(fields, indent=1))
    else:
        _print_rows(session, {row["stage"]: row for row in rows}, commands)
    broken = [f"{row['stage']}/{file}" for row in rows for file in row["broken"]]
    if broken:
        raise ArtifactError("; ".join(broken), where=str(session.store.root), mend=f"llmpipe run {recipe} --force")


def _row(session: Session, standing: Standing, check: bool) -> dict[str, Any]:
    artifact, node, run = standing.artifact, standing.node, session.recipe.run
    is_begun = standing.is_begun and standing.state != "stands"
    begun = session.store.partial_path(run, node.name, standing.planned)
    running = _running(session.store, run, standing)
    failed = failure.read(begun) if is_begun and running is None else None
    return {
        "stage": node.name,
        "type": node.stage.type,
        "state": standing.state,
        "reasons": list(standing.reasons),
        "unfinished": is_begun,
        "left": list(standing.left),
        "running": running,
        "failed": vars(failed) if failed else None,
        "step": _last_step(begun)[0] if is_begun else None,
        "parents": node.parents(session.recipe.nodes),
        "fingerprint": standing.fingerprint,
        "path": str(artifact.path) if artifact else None,
        "seconds": artifact.manifest["seconds"] if artifact else None,
        "bytes": sum(file["bytes"] for file in artifact.manifest["files"].values()) if artifact else None,
        "metrics": artifact.manifest["metrics"] if artifact else {},
        "kept": bool(artifact and artifact.manifest.get("blessed")),
        "broken": changed_files(artifact) if check and artifact else [],
    }


def _running(store: Store, run: str, standing: Standing) -> dict[str, Any] | None:
    """Of a stage that a live process works on: who, the last step it wrote of and how long ago; None of any other."""
    name = standing.node.name
    who = store.holder(run, name)
    if who is None:
        return None
    folder = store.unfinished(run, name)  # whatever values it was started with
    step, written = _last_step(folder) if folder else (None, None)
    return {
        "by": who,
        "step": step,
        "seconds_ago": None if written is None else round(max(0.0, time.time() - written), 1),
        "is_planned": folder is None or folder == store.partial_path(run, name, standing.planned),
    }


def _last_step(folder: Path) -> tuple[int | None, float | None]:
    """The last step that a stage wrote of in its folder, and when (seconds since 1970); Nones before the first."""
    file = folder / "metrics.jsonl"
    lines = file.read_bytes().splitlines() if file.exists() else []
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"]), file.stat().st_mtime
        except (ValueError, KeyError, TypeError):  # it is being written
            continue
    return None, None


def _next(session: Session, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The commands that lead on, the first first."""
    if any(row["state"] != "stands" for row in rows):
        return [f"llmpipe run{session.shown_recipe}"]
    run = session.recipe.run
    models = [row["stage"] for row in rows if row["type"] in ("dpo", "ppo", "sft")]
    return [*(f"llmpipe chat {run}/{name}" for name in models[-1:]), f"llmpipe report {run}"]


def _note(row: Mapping[str, Any]) -> str:
    """What a stage is at, why it does not stand, or the figures of one that does."""
    if row["running"]:
        return _at_work(row["running"])
    if row["failed"]:
        at = f"at step {row['step']:,}, " if row["step"] is not None else ""
        return f"{at}{row['failed']['time']}: {row['failed']['error']}"
    code = [reason for reason in row["reasons"] if reason.startswith("code: ")]
    shown = [reason for reason in row["reasons"] if reason not in code[1:]]
    if len(code) > 1:
        shown = [f"{reason} and {len(code) - 1} more" if reason == code[0] else reason for reason in shown]
    if shown:
        return "; ".join(shown)
    if row["unfinished"]:
        return "unfinished, would be resumed" + (f" (at step {row['step']:,})" if row["step"] is not None else "")
    if row["left"] and row["state"] == "missing":
        return f"one of other parts is unfinished: {brief(row['left'])}"
    metrics = row["metrics"]
    keys = [key for key in KEY_FIGURES.get(row["type"], ()) if key in metrics]
    if row["type"] == "eval":
        return f"{len(metrics):,} figures" if metrics else ""
    return "  ".join(f"{key} {figure(metrics[key])}" for key in keys or [k for k in metrics if k != "flops"][:3])


def _at_work(running: Mapping[str, Any]) -> str:
    step, seconds = running["step"], running["seconds_ago"]
    at = "no step yet" if step is None else f"at step {step:,}, written {clock(seconds)} ago"
    other = "" if running["is_planned"] else ", with other values than the recipe has now"
    return f"{at}, by {running['by']}{other}"


def _print_rows(session: Session, rows: Mapping[str, Mapping[str, Any]], commands: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    console = console if console.is_terminal else Console(width=160, highlight=False)  # no folding in a pipe
    table = Table(title=f"{session.recipe.run} in {session.store.root}", box=None, title_justify="left", pad_edge=False)
    for column in ("stage", "state", "time", "why, or its figures"):
        table.add_column(column, overflow="fold", no_wrap=column == "state")
    colours = {"stands": "green", "stale": "yellow", "missing": "dim", "running": "cyan", "failed": "red"}
    for line in tree(session.recipe.nodes):
        row = rows[line.stage]
        name = Text(line.drawn, style="dim").append(line.stage, style="not dim bold")
        if line.others:
            more = f" +{len(line.others) - SHOWN_INPUTS}" if len(line.others) > SHOWN_INPUTS else ""
            name.append(f" ◀ {', '.join(line.others[:SHOWN_INPUTS])}{more}", style="dim")
        state = next((name for name in ("running", "failed") if row[name]), row["state"])
        seconds = clock(row["seconds"]) if row["seconds"] is not None else ""
        kept = " (kept)" if row["kept"] and state == "stands" else ""
        table.add_row(name, Text(state + kept, colours[state]), seconds, Text(_note(row)))
    console.print(table)
    left = [name for name, row in rows.items() if row["state"] != "stands"]
    work, size = (sum(row[part] or 0 for row in rows.values()) for part in ("seconds", "bytes"))
    console.print(f"{len(rows) - len(left)} of {len(rows)} stand; {clock(work)} of work, {size / 1e6:,.1f} MB")
    is_at_work = any(row["running"] for row in rows.values())
    for command in commands:
        waiting = f"   ({', '.join(left)}{'; it waits for what is running' * is_at_work})" if left else ""
        console.print(f"next: {command}{waiting}", soft_wrap=True)


def show_artifact(reference: str, artifacts: Path | None, *, verify: bool, as_json: bool) -> None:
    """One artifact: what it is, what it came from, its figures and files."""
    artifact = Store(artifacts_root(artifacts)).resolve(reference)
    broken = changed_files(artifact) if verify else []
    if as_json:
        print(json.dumps({"path": str(artifact.path), "broken": broken, **artifact.manifest}, indent=1))
    else:
        _print_artifact(artifact)
    if broken:
        raise ArtifactError("; ".join(broken), where=str(artifact.path), mend="run its stage again with --force")
    if verify and not as_json:
        print("every file's bytes are as published")


def _print_artifact(artifact: Artifact) -> None:
    manifest = artifact.manifest
    print(f"{artifact.reference}: {manifest['kind']} made by {manifest['stage']}, {manifest['created']}")
    print(f"  path         {artifact.path}")
    print(f"  fingerprint  {artifact.fingerprint}")
    for role, parents in manifest["inputs"].items():
        for parent in parents:
            print(f"  {role:<12} {parent['reference']} ({parent['fingerprint'][:12]})")
    for record in manifest.get("blessed", []):
        print(f"  kept         {record['time']}: {record['why']}")
    print(f"  took         {clock(manifest['seconds'])} on {manifest['device']}, {manifest['processes']} process(es)")
    for name, value in manifest["metrics"].items():
        print(f"  {name:<28} {figure(value, 6)}")
    size = sum(file["bytes"] for file in manifest["files"].values())
    print(f"  {len(manifest['files'])} files, {size / 1e6:,.1f} MB")


def collect_garbage(artifacts: Path | None, *, dry_run: bool, older_than: float, as_json: bool) -> None:
    """Delete (or list) replaced artifacts, and unfinished stages untouched for `older_than` hours."""
    found: list[dict[str, Any]] = []
    for path, size, why in Store(artifacts_root(artifacts)).garbage():
        hours = (time.time() - max(p.stat().st_mtime for p in [path, *path.rglob("*")])) / 3600
        if path.suffix == ".old" or hours >= older_than:
            found.append({"path": str(path), "bytes": size, "why": f"{why}, {hours:.1f} h old"})
    for item in found if not dry_run else []:
        shutil.rmtree(str(item["path"]))
    if as_json:
        print(json.dumps(found, indent=1))
        return
    verb = "would delete" if dry_run else "deleted"
    for item in found:
        print(f"{verb} {item['path']}  {item['bytes'] / 1e6:,.1f} MB  ({item['why']})")
    total = sum(int(item["bytes"]) for item in found)
    print(f"{'would free' if dry_run else 'freed'} {total / 1e6:,.1f} MB")
