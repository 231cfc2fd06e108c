"""Adapter folders, as peft saves them, where a model is asked for: found with their base, merged where they are used.

A recipe is checked without torch, so an adapter stands for its base until a stage works: tokenizer, template and shape
are the base's. What runs the stage merges it then (`pipeline.model.merging`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.artifacts import Artifact, content_hash, outside_model
from pipeline.errors import MismatchError, MissingInputError
from pipeline.hashes import digest

ADAPTER = "adapter_config.json"


def is_adapter(path: Path) -> bool:
    """Whether the folder holds an adapter and no model."""
    return (path / ADAPTER).exists() and not (path / "config.json").exists()


def adapted_model(path: Path) -> Artifact:
    """The adapter in `path` on the base that its config names, fingerprinted with both; its folder is the base's until
    it is merged. MissingInputError where the base is not on this machine, MismatchError for an adapter of another kind
    than a language model's, or with another tokenizer or chat template than the base's."""
    mend = f"llmpipe export {path} --to merged --out {path}-merged, and name that folder"
    config: dict[str, Any] = json.loads((path / ADAPTER).read_text(encoding="utf-8"))
    base_folder = base_of(path, config)
    if base_folder is None:
        name = config.get("base_model_name_or_path")
        what = f"an adapter whose base, {name!r}, is no folder here" if name else "an adapter that names no base"
        raise MissingInputError(what, where=str(path), mend=mend.replace(" --out", " --base REF --out"))
    base = outside_model(base_folder.absolute())
    if config.get("task_type") not in (None, "CAUSAL_LM") or base.kind != "causal-lm":
        what = f"an adapter of the kind {config.get('task_type')} on a {base.kind}, and a language model is needed"
        raise MismatchError(what, where=str(path))
    own = outside_tokenizer(path)
    if any(mine and mine != its for mine, its in zip(own, (base.tokenizer_hash, base.template_hash), strict=True)):
        raise MismatchError(
            "an adapter that brings another tokenizer or chat template than its base's", where=str(path), mend=mend
        )
    both = digest(["adapter", content_hash(path), base.fingerprint])
    return replace(base, reference=str(path), path=base.model, fingerprint=both, manifest={}, adapter=path)


def outside_tokenizer(folder: Path) -> tuple[str, str]:
    """(hash of the tokenizer, hash of the chat template) of a folder; "" for what it does not have."""
    there = Artifact("", folder, "", "", {})
    return there.tokenizer_hash, there.template_hash


def base_of(adapter: Path, config: Mapping[str, Any]) -> Path | None:
    """The folder that an adapter's config names as its base: beside it, or from where the command runs."""
    name = config.get("base_model_name_or_path") or ""
    folders = (adapter / name, Path(name)) if name else ()
    return next((folder for folder in folders if (folder / "config.json").exists()), None)
