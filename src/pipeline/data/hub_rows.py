"""Datasets of the hub: fetched by `datasets` into its cache, or streamed file by file from where they lie.

`hub:org/name[@revision]` names one. `datasets` is imported only where one is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from pipeline.data.files import Row
from pipeline.errors import MissingInputError
from pipeline.recipe import DataEntry

HUB = "hub:"


def hub_rows(entry: DataEntry) -> Iterator[tuple[Row, str]]:
    """The rows of a dataset of the hub (split `train` unless the entry names one)."""
    if entry.streaming:
        yield from streamed_rows(entry, hub_dataset(entry))
        return
    for number, row in enumerate(hub_dataset(entry), start=1):
        yield dict(row), f"{entry.source} {entry.split or 'train'}: row {number}"


def streamed_rows(entry: DataEntry, rows: Any, files: Iterable[int] | None = None) -> Iterator[tuple[Row, str]]:
    """The rows of some files of a streamed dataset (None: of all of them), by their places among them.

    MissingInputError where the hub does not answer, after what `datasets` tries again by itself.
    """
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of whichever client it stands on

    for place in range(rows.num_shards) if files is None else files:
        named = f"{entry.source} {entry.split or 'train'}: file {place + 1}"
        number = 0
        try:
            for number, row in enumerate(rows.shard(num_shards=rows.num_shards, index=place), start=1):
                yield dict(row), f"{named}, row {number}"
        except (OSError, ValueError, HTTPError) as error:  # a connection, or a file that is none of its kind
            raise MissingInputError(
                f"can't be read after row {number}: {_reason(error)}",
                where=named,
                mend="run the same command again to go on from there; without `streaming` it is fetched once, first",
            ) from error


def hub_dataset(entry: DataEntry) -> Any:
    """A dataset of the hub, streamed or from the local cache if it is there. Raises MissingInputError."""
    import datasets

    name, revision = hub_name(entry)
    files = entry.data_files if entry.data_files is None or isinstance(entry.data_files, str) else [*entry.data_files]
    try:
        return datasets.load_dataset(
            name,
            entry.name,
            data_files=files,
            split=entry.split or "train",
            revision=revision,
            streaming=entry.streaming,
        )
    except (
        OSError,
        ValueError,
    ) as error:  # what `datasets` raises for a name, a split or a hub that is not there
        raise MissingInputError(
            f"the dataset cannot be had: {_reason(error)}",
            where=entry.source,
            mend="check its name, `name:`, `data_files:` and `split:`; without a hub, name local jsonl or parquet",
        ) from error


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def hub_name(entry: DataEntry) -> tuple[str, str | None]:
    """(org/name, revision) of a hub source."""
    name, _, revision = entry.source.removeprefix(HUB).partition("@")
    return name, entry.revision or revision or None
