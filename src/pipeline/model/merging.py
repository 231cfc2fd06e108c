"""Adapters among a stage's inputs, merged into their base in a folder beside the stage's work, which goes with it."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline.artifacts import Artifact
from pipeline.model.adapters import merge_folder

MERGED = ".adapted"


def merged_inputs(
    inputs: Mapping[str, Any], partial: Path, is_main: bool, barrier: Callable[[], None]
) -> Mapping[str, Any]:
    """The inputs with every adapter merged into its base, each in a folder under `partial`; rank 0 writes, every rank
    calls. What a killed run has merged is taken as it is: the same adapter and base give the same bytes."""

    def merged(value: Any) -> Any:
        if isinstance(value, list):
            return [merged(each) for each in value]
        if value is None or value.adapter is None:
            return value
        folder = partial / MERGED / value.fingerprint[:16]
        if is_main and not folder.exists():
            merge(value, folder)
        barrier()
        return replace(value, path=folder, adapter=None)

    return {role: merged(value) for role, value in inputs.items()}


def merge(artifact: Artifact, folder: Path) -> Artifact:
    """Write the adapter's model to `folder`, whole or not at all; the artifact with it as its folder."""
    assert artifact.adapter is not None
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with (
        torch.random.fork_rng(),
        warnings.catch_warnings(),
    ):  # peft draws an adapter's first weights before it reads them
        warnings.simplefilter("ignore")
        merge_folder(artifact.adapter, artifact.path, temporary)
    temporary.rename(folder)
    return replace(artifact, path=folder, adapter=None)


def drop_merged(partial: Path) -> None:
    """Remove what `merged_inputs` has written."""
    shutil.rmtree(partial / MERGED, ignore_errors=True)
