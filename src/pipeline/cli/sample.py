"""`llmpipe sample REF`: the sample stage on any model, without a recipe. What it makes is like any other artifact."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.artifacts import Artifact, Store
from pipeline.cli.session import Session, open_stages
from pipeline.cli.stages import shipped_recipes
from pipeline.errors import ConfigError
from pipeline.launch import Launch
from pipeline.roles import MODEL, input_of

Stages = dict[str, dict[str, Any]]
OUTSIDE = "answers"
"""The run that holds what is made of models that are no artifacts of the store."""


def is_recipe(target: str) -> bool:
    """Whether an argument names a recipe; else it is a reference."""
    return target.endswith((".yaml", ".yml")) or target in shipped_recipes()


def sample_reference(
    reference: str,
    store: Store,
    *,
    data: Sequence[str],
    reward: str | None,
    run: str | None,
    name: str | None,
    overrides: Sequence[str],
    launch: Launch,
    run_one: Callable[[Session, str, str | None], None],
) -> None:
    """Let the model that `reference` names answer; `overrides` are fields of the stage (`keep=best`), `run_one` is how
    its stage is run. ConfigError where nothing says which prompts."""
    made_up = name is None
    run, name = run or run_of(reference), name or f"{short(reference)}-sample"
    fields = sample_fields(reference, store, data) | ({"reward": reward} if reward else {})
    session = open_stages(
        {name: fields},
        run=run,
        store=store,
        named=f"{run}/{name}",
        overrides={name: overrides},
        launch=launch,
    )
    if made_up:
        refuse_another_model(session)
    run_one(session, name, None)


def sample_fields(reference: str, store: Store, data: Sequence[Any]) -> dict[str, Any]:
    """The sample stage's `init` and `data` for a model; of an artifact the data that it was trained on unless given."""
    artifact = input_of(store, reference, MODEL)
    if artifact.kind != "causal-lm":
        raise ConfigError(f"a {artifact.kind} does not answer", where=reference, mend="name a language model")
    return {"stage": "sample", "init": reference, "data": list(data) or _own_data(artifact)}


def _own_data(artifact: Artifact) -> list[dict[str, Any]]:
    own = artifact.manifest.get("config", {}).get("data")
    if not own or artifact.stage in ("tokenize", "pretrain"):
        raise ConfigError(
            "nothing says which prompts it is to answer",
            where=artifact.reference,
            mend="--data prompts.jsonl (docs/data.md has the layouts), or --data pydocs",
        )
    return [{key: value for key, value in entry.items() if value is not None} for entry in own]


def run_of(reference: str) -> str:
    """The run of `run/stage`; a run of their own for models from outside."""
    return OUTSIDE if reference.startswith((".", "/", "hub:")) else reference.partition("/")[0]


def short(reference: str, longest: int = 48) -> str:
    """A reference as a part of a stage's name: of `run/stage` the stage, from outside the folder or org around it too.

    What is longer than `longest` is cut and ends in six digits of its hash.
    """
    outside = reference.startswith((".", "/", "hub:"))
    written = reference.removeprefix("hub:").partition("@")[0] if reference.startswith("hub:") else reference
    last = "-".join([part for part in Path(written).parts if part not in ("/", "..")][-2 if outside else -1 :])
    name = re.sub(r"[^A-Za-z0-9._-]", "-", last).strip("-._") or "model"
    if len(name) <= longest:
        return name
    return f"{name[: longest - 7]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def refuse_another_model(session: Session) -> None:
    """ConfigError where an artifact that would be replaced under a made-up name is of another model.

    A model that was moved, or trained again where it lay, is the same one.
    """
    for node in session.recipe.nodes.values():
        standing, refs = session.store.find(session.recipe.run, node.name), node.inputs.get("init")
        if standing is None or not refs:
            continue
        for before in standing.manifest["inputs"].get("init", ()):
            is_same = before["reference"] == refs[0]
            if not is_same and before["fingerprint"] != input_of(session.store, refs[0], MODEL).fingerprint:
                what = f"{standing.reference} is of another model, {before['reference']}"
                raise ConfigError(what, where=refs[0], mend="--run NAME for a run of its own")
