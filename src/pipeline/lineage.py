"""What of a recipe stands, what is stale and why, and what a stage takes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.artifacts import Artifact, Store, read_begun
from pipeline.data.sources import read_options, source_fingerprint
from pipeline.errors import ConfigError
from pipeline.fingerprint import defaults, differences, fingerprint, stage_parts
from pipeline.graph import Node, Recipe
from pipeline.hashes import digest, sha256
from pipeline.recipe import DataEntry, is_data
from pipeline.roles import input_of


@dataclass(frozen=True)
class Standing:
    """How one stage of a recipe stands in the store."""

    node: Node
    fingerprint: str
    """What its followers count with: the artifact's own where it stands, else `planned`."""
    planned: str
    """What the stage would make now; other than `fingerprint` where `--keep` blessed what stands."""
    parts: dict[str, Any]
    state: Literal["stands", "stale", "missing"]
    reasons: tuple[str, ...]
    artifact: Artifact | None
    is_begun: bool
    """Whether a partial folder of this fingerprint waits to be resumed."""
    left: tuple[str, ...] = ()
    """Why the newest unfinished one is not gone on from, where there is one of another fingerprint only."""


def survey(recipe: Recipe, store: Store, keep: Collection[str] = (), *, bless: bool = True) -> dict[str, Standing]:
    """Every stage's standing, in running order.

    `keep` names stale stages that shall stand as they are; `bless` writes that on their record.
    """
    unknown = [name for name in keep if not recipe.select(name)]
    if unknown:
        raise ConfigError(f"--keep {unknown[0]}: the recipe has no such stage", where=recipe.name)
    kept = {name for each in keep for name in recipe.select(each)}
    found: dict[str, Standing] = {}
    for node in recipe.nodes.values():
        found[node.name] = _standing(recipe, node, store, found, node.name in kept, bless)
    return found


def _standing(
    recipe: Recipe, node: Node, store: Store, found: dict[str, Standing], keep: bool, bless: bool
) -> Standing:
    inputs = {
        role: [found[ref].fingerprint if ref in found else input_of(store, ref, kind).fingerprint for ref in refs]
        for role, refs in node.inputs.items()
        for kind in [node.stage.inputs[role]]
        if refs  # a role that nothing fills is as one that the stage does not have
    }
    writers = dict.fromkeys(node.rows.values())
    if writers:
        inputs["data"] = [found[name].fingerprint for name in writers]
    parts = stage_parts(node.stage, node.config, _data(node, found), inputs)
    planned = fingerprint(parts)
    artifact = store.find(recipe.run, node.name)
    is_begun = store.partial_path(recipe.run, node.name, planned).exists()
    left = () if is_begun else tuple(_left(recipe, node, store, parts))
    if artifact is None:
        return Standing(node, planned, planned, parts, "missing", (), None, is_begun, left)
    blessed = [record["fingerprint"] for record in artifact.manifest.get("blessed", [])]
    if planned in (artifact.fingerprint, *blessed):
        return Standing(node, artifact.fingerprint, planned, parts, "stands", (), artifact, is_begun)
    reasons = tuple(_reasons(node, artifact.stage, artifact.manifest["parts"], parts))
    if keep:
        artifact = store.bless(artifact, planned, "; ".join(reasons)) if bless else artifact
        return Standing(node, artifact.fingerprint, planned, parts, "stands", (), artifact, is_begun)
    return Standing(node, planned, planned, parts, "stale", reasons, artifact, is_begun, left)


SHOWN_FILES = 3


def brief(reasons: Sequence[str]) -> str:
    """Reasons in one line: of the files whose code has changed the first ones, and how many more."""
    code = [reason for reason in reasons if reason.startswith("code: ")]
    hidden = code[SHOWN_FILES:]
    shown = [reason for reason in reasons if reason not in hidden]
    if hidden:
        last = shown.index(code[SHOWN_FILES - 1])
        shown[last] += f" and {len(hidden)} more files"
    return "; ".join(shown)


def _left(recipe: Recipe, node: Node, store: Store, parts: dict[str, Any]) -> list[str]:
    """What tells the newest unfinished stage of this name from the one that would run."""
    folder = store.unfinished(recipe.run, node.name)
    begun = read_begun(folder) if folder else None
    return [] if begun is None else _reasons(node, begun["stage"], begun["parts"], parts)


def _reasons(node: Node, stage: str, before: dict[str, Any], parts: dict[str, Any]) -> list[str]:
    """Why what the stage of type `stage` made, or would have made, of the parts `before` is not what is wanted."""
    if stage != node.stage.type:
        return [f"{node.name}.stage {stage} → {node.stage.type}"]
    reasons = differences(node.name, before, parts, defaults(node.stage.config))
    refs = {f"input: {role}": ", ".join(names) for role, names in {**node.inputs, "data": node.rows.values()}.items()}
    for field in parts["data"]:
        refs[f"data: {field}"] = ", ".join(entry.source for entry in getattr(node.config, field))
    return [f"{reason} ({refs[reason]})" if refs.get(reason) else reason for reason in reasons]


def _data(node: Node, parents: Mapping[str, Standing]) -> dict[str, Any]:
    """Field -> what its sources hold, by content; a source's path does not count, its other options do.

    What a stage of the recipe writes counts by that stage's fingerprint, since it need not stand yet.
    """
    found = {}
    for name in node.stage.config.model_fields:
        entries = getattr(node.config, name)
        if is_data(node.stage.config, name) and entries:
            made = [parents[node.rows[e.source]].fingerprint if e.source in node.rows else None for e in entries]
            found[name] = [_entry(entry, fingerprint) for entry, fingerprint in zip(entries, made, strict=True)]
    return found


def _entry(entry: DataEntry, made: str | None) -> str:
    options = read_options(entry)
    content = source_fingerprint(entry, hash_file=sha256) if made is None else {"rows": made}
    return digest({"content": content, "options": options})


def inputs_of(standing: Standing, recipe: Recipe, store: Store) -> dict[str, Artifact | list[Artifact] | None]:
    """Role -> the artifact that the stage takes, the list of them, or None."""
    found: dict[str, Artifact | list[Artifact] | None] = {}
    node = standing.node
    for role, refs in node.inputs.items():
        named = [f"{recipe.run}/{ref}" if ref in recipe.nodes else ref for ref in refs]
        artifacts = [input_of(store, ref, node.stage.inputs[role]) for ref in named]
        found[role] = artifacts if node.is_list[role] else (artifacts[0] if artifacts else None)
    return found
