"""The models that a model was made from, one `init` after another, and which of them can be asked about the same
tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.artifacts import Artifact, Store
from pipeline.errors import ConfigError, PipelineError

PARENT = "init"
"""The role by which a stage takes the weights it starts from."""


@dataclass(frozen=True)
class LeftOut:
    """An ancestor, or what belongs to one, that is not looked at, and why."""

    reference: str
    why: str


@dataclass(frozen=True)
class Ancestry:
    """A model and what it was made from."""

    models: tuple[Artifact, ...]
    """The oldest first, the model itself last."""
    left_out: tuple[LeftOut, ...]


def ancestry(artifact: Artifact, store: Store) -> Ancestry:
    """The model's line as its manifests tell it, as far back as it stands.

    An ancestor that is missing, or that was made again since, ends the line: what it came from then is not known. One
    of another tokenizer is left out, for the same ids are other text to it; so is a chat model of another chat
    template. A base model, whose template taught it nothing, stays. Raises ConfigError for what is no language model.
    """
    if artifact.kind != "causal-lm":
        mend = "llmpipe status lists models"
        raise ConfigError(f"{artifact.kind} is no language model", where=artifact.reference, mend=mend)
    models, left_out = [artifact], []
    for found in parents(artifact, store):
        why = found.why if isinstance(found, LeftOut) else why_unlike(artifact, found)
        if why:
            left_out.append(LeftOut(found.reference, why))
        elif isinstance(found, Artifact):
            models.append(found)
    return Ancestry(tuple(reversed(models)), tuple(reversed(left_out)))


def parents(artifact: Artifact, store: Store) -> Iterator[Artifact | LeftOut]:
    """Parent, grandparent, … ; where the line ends before its beginning, why, last."""
    while True:
        recorded = artifact.manifest.get("inputs", {}).get(PARENT, [])
        if not recorded:
            return
        found = recorded_input(artifact, recorded[0], store)
        yield found
        if isinstance(found, LeftOut):
            return
        artifact = found


def recorded_input(artifact: Artifact, recorded: dict[str, str], store: Store) -> Artifact | LeftOut:
    """What a manifest names as an input, if it is still the same: in the artifact's own store, else in `store`."""
    reference = recorded["reference"]
    problem = ""
    for place in (Store(artifact.path.parents[1]), store):
        try:
            found = place.resolve(reference)
        except PipelineError as error:
            problem = problem or error.what
            continue
        if found.fingerprint == recorded["fingerprint"]:
            return found
        problem = "it was made again since, so this is not what the model came from"
    return LeftOut(reference, problem)


def why_unlike(artifact: Artifact, ancestor: Artifact) -> str:
    """Why the ancestor can't be asked about the model's tokens; empty where it can."""
    from pipeline.data.tokenizers import load_tokenizer
    from pipeline.evals.subject import is_chat

    if not (ancestor.model / "config.json").exists():
        return "its model is no longer there"
    if ancestor.tokenizer_hash != artifact.tokenizer_hash:
        return "it has another tokenizer"
    differs = ancestor.template_hash not in ("", artifact.template_hash)
    if differs and is_chat(ancestor.model, load_tokenizer(ancestor.model)):
        return "it was taught in another chat template"
    return ""
