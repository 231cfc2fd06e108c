"""The FLOPs a model took: those of its own stage, and those of all that it was made of. Needs no torch.

Cumulative are its own and those of every stage it goes back to, each once: what trained its weights before, the reward
model it was trained against, what wrote the rows it was trained on. Stages that count none (tokenize) add none, nor
does a model from outside, whose training nobody here knows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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
    found, is_whole = lineage(artifact)
    own = float(artifact.manifest.get("flops") or math.nan)
    every = sum(float(each.manifest.get("flops") or 0.0) for each in found)
    return Spent(own, every or math.nan if is_whole else math.nan)


def lineage(artifact: Artifact) -> tuple[list[Artifact], bool]:
    """(the artifact and all that it goes back to, each once; whether none of them is gone or was made anew since)."""
    found: dict[str, Artifact] = {artifact.fingerprint: artifact}
    queue, is_whole = [artifact], True
    while queue:
        for parent in _parents(queue.pop()):
            if parent is None:
                is_whole = False
            elif parent.fingerprint not in found:
                found[parent.fingerprint] = parent
                queue.append(parent)
    return list(found.values()), is_whole


def _parents(artifact: Artifact) -> Iterator[Artifact | None]:
    """What the artifact took; None for one that is not there as it was. A folder, or a model of the hub, is none."""
    for parent in (each for role in artifact.manifest.get("inputs", {}).values() for each in role):
        run, slash, stage = parent["reference"].partition("/")
        if not slash or not run or run.startswith(("hub:", ".")):
            continue
        try:
            found = read_artifact(artifact.path.parent.parent / run / stage, parent["reference"])
        except (PipelineError, OSError):
            yield None
            continue
        blessed = [record["fingerprint"] for record in found.manifest.get("blessed", [])]
        yield found if parent["fingerprint"] in (found.fingerprint, *blessed) else None
