"""Files of the hub's repositories, from the local cache where it has them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import MissingInputError

WEIGHTS = ("*.safetensors", "*.bin")
"""The first kind that a repository has is what is loaded."""
BESIDE = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.md", "LICENSE*")
"""What a model is loaded with, and what is said of it."""
TWICE = ("*/*.safetensors", "*/*.bin", "consolidated*", "training_args.bin")
"""Weights once more, in folders or as they were trained, and what is none."""


def hub_folder(reference: str, needed: Sequence[str], only: Sequence[str]) -> Path:
    """The folder in the local cache that holds some files of `hub:org/name[@revision]`, fetched where it lacks them.

    needed: patterns of which one file must be there: the folder may be of what was fetched for another end.
    only: patterns of the files to fetch. MissingInputError where it cannot be had.
    """
    return _first(reference, [(needed, only)])


def hub_weights(reference: str) -> Path:
    """The folder in the local cache that holds the model `hub:org/name[@revision]`, fetched where it is not there: its
    weights of one kind with what stands beside them, no ONNX, GGUF, TensorFlow or second copy. MissingInputError where
    it cannot be had."""
    return _first(reference, [((kind,), (*BESIDE, kind)) for kind in WEIGHTS])


def _first(reference: str, choices: Sequence[tuple[Sequence[str], Sequence[str]]]) -> Path:
    """The first of the choices (needed, only) that can be had, in the cache before anything is fetched."""
    from huggingface_hub import snapshot_download

    name, _, revision = reference.removeprefix("hub:").partition("@")
    why = ""
    for is_local in (True, False):
        for needed, only in choices:
            try:
                folder = snapshot_download(
                    name,
                    revision=revision or None,
                    allow_patterns=[*only],
                    ignore_patterns=[*TWICE],
                    local_files_only=is_local,
                )
            except OSError as error:  # the hub's errors are of this kind
                why = str(error).splitlines()[0]
                continue
            if any(any(Path(folder).glob(pattern)) for pattern in needed):
                return Path(folder)
            why = f"it has no {' or '.join(pattern for needed, _ in choices for pattern in needed)}"
    raise MissingInputError(
        f"the hub's {name} is neither in the local cache nor to be had: {why}",
        where=reference,
        mend="a local folder works too: ./folder",
    )
