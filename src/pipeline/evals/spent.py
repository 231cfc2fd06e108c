"""The FLOPs a model took: those of its own stage, and those of all that it was made of. Needs no torch.

Cumulative are its own and those of every stage it goes back to, each once: what trained its weights before, the reward
model it was trained against, what wrote the rows it was trained on. Stages that count none (tokenize) add none, nor
does a model from outside, whose training nobody here knows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.artifacts import Artifact, read_artifact
from pipeline.errors import PipelineError


@dataclass(frozen=True)
class Spent:
    """FLOPs; NaN where they are not known."""

    own: float
    cumulative: float


def spent_on(artifact: Artifact) -> Spent:
    """What the artifact's manifest and those of its ancestors say.

    `cumulative` is not known where an ancestor is gone, or has been made anew since.
    """
    own = float(artifact.manifest.get("flops") or math.nan)
    known: dict[str, float] = {}
    try:
        _walk(artifact, known)
    except _Gone:
        return Spent(own, math.nan)
    return Spent(own, sum(known.values()) or math.nan)


class _Gone(Exception):
    """An ancestor that is not there as it was."""


def _walk(artifact: Artifact, known: dict[str, float]) -> None:
    """Adds fingerprint -> FLOPs of the artifact and of all that it goes back to."""
    if artifact.fingerprint in known:
        return
    known[artifact.fingerprint] = float(artifact.manifest.get("flops") or 0.0)
    for parents in artifact.manifest.get("inputs", {}).values():
        for parent in parents:
            run, slash, stage = parent["reference"].partition("/")
            if not slash or not run or parent["reference"].startswith("hub:"):
                continue  # a folder or a model of the hub
            folder = artifact.path.parent.parent / run / stage
            if parent["fingerprint"] in known:
                continue
            try:
                found = read_artifact(folder, parent["reference"])
            except (PipelineError, OSError) as error:
                raise _Gone from error
            blessed = [record["fingerprint"] for record in found.manifest.get("blessed", [])]
            if parent["fingerprint"] not in (found.fingerprint, *blessed):
                raise _Gone
            _walk(found, known)
