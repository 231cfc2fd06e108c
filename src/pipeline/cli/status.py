"""`llmpipe status` and `llmpipe gc`: what lies in the store and whether it stands."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.artifacts import Artifact, Store, changed_files
from pipeline.cli.session import Session, artifacts_root, open_session
from pipeline.errors import ArtifactError
from pipeline.lineage import Standing, brief, survey
from pipeline.progress import clock


def show_recipe(
    recipe: str, run: str | None, artifacts: Path | None, overrides: Sequence[str], *, verify: bool, as_json: bool
) -> None:
    """One line a stage: its state, why, its figures; then the next command. Broken bytes exit with 1."""
    session = open_session(recipe, run=run, artifacts=artifacts, overrides=overrides)
    standings = survey(session.recipe, session.store)
    rows = [_row(standing, verify) for standing in standings.values()]
    if as_json:
        print(json.dumps({"run": session.recipe.run, "artifacts": str(session.store.root), "stages": rows}, indent=1))
    else:
        _print_rows(session, rows)
    broken = [f"{row['stage']}/{file}" for row in rows for file in row["broken"]]
    if broken:
        raise ArtifactError("; ".join(broken), where=str(session.store.root), mend=f"llmpipe run {recipe} --force")


def _row(standing: Standing, check: bool) -> dict[str, Any]:
    artifact = standing.artifact
    return {
        "stage": standing.node.name,
        "type": standing.node.stage.type,
        "state": standing.state,
        "reasons": list(standing.reasons),
        "unfinished": standing.is_begun and standing.state != "stands",
        "fingerprint": standing.fingerprint,
        "path": str(artifact.path) if artifact else None,
        "seconds": artifact.manifest["seconds"] if artifact else None,
        "metrics": artifact.manifest["metrics"] if artifact else {},
        "kept": bool(artifact and artifact.manifest.get("blessed")),
        "broken": changed_files(artifact) if check and artifact else [],
    }


def _print_rows(session: Session, rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console = console if console.is_terminal else Console(width=160)  # no folding in a pipe
    table = Table(title=f"{session.recipe.run} in {session.store.root}", box=None, title_justify="left", pad_edge=False)
    for column in ("stage", "state", "time", "why, or its figures"):
        table.add_column(column, overflow="fold")
    colours = {"stands": "green", "stale": "yellow", "missing": "dim"}
    for row in rows:
        figures = "  ".join(f"{k} {v:.4g}" for k, v in list(row["metrics"].items())[:3] if k != "flops")
        note = brief(row["reasons"]) or ("unfinished, would be resumed" if row["unfinished"] else figures)
        state = row["state"] + (" (kept)" if row["kept"] and row["state"] == "stands" else "")
        seconds = clock(row["seconds"]) if row["seconds"] is not None else ""
        table.add_row(row["stage"], Text(state, colours[row["state"]]), seconds, Text(note))
    console.print(table)
    left = [row["stage"] for row in rows if row["state"] != "stands"]
    if left:
        console.print(f"next: llmpipe run{session.shown_recipe}   ({', '.join(left)})", highlight=False)
    else:
        models = [row["stage"] for row in rows if row["type"] in ("dpo", "ppo", "sft")]
        talk = f"llmpipe chat {session.recipe.run}/{models[-1]}" if models else "everything stands"
        console.print(f"next: {talk}", highlight=False)


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
        print(f"  {name:<28} {value:.6g}")
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
