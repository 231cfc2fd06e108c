"""Files of the hub's repositories, from the local cache where it has them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import MissingInputError


def hub_folder(reference: str, needed: Sequence[str], only: Sequence[str] | None = None) -> Path:
    """The folder in the local cache that holds `hub:org/name[@revision]`, fetched where it is not there.

    needed: patterns of which one file must be there: a tokenizer that was fetched alone leaves a folder in the cache
    that is no model. only: patterns of the files to fetch, all unless given. MissingInputError where it cannot be had.
    """
    from huggingface_hub import snapshot_download

    name, _, revision = reference.removeprefix("hub:").partition("@")
    allowed = None if only is None else list(only)
    why = ""
    for is_local in (True, False):
        try:
            found = snapshot_download(
                name, revision=revision or None, allow_patterns=allowed, local_files_only=is_local
            )
        except OSError as error:  # the hub's errors are of this kind
            why = str(error).splitlines()[0]
            continue
        if any(any(Path(found).glob(pattern)) for pattern in needed):
            return Path(found)
        why = f"it has no {' or '.join(needed)}"
    raise MissingInputError(
        f"the hub's {name} is neither in the local cache nor to be had: {why}",
        where=reference,
        mend="a local folder works too: ./folder",
    )
