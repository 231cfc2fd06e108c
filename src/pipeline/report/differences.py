"""What stages of one kind are told differently, and what two runs are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.recipe import DataEntry
from pipeline.report.records import StageRecord
from pipeline.roles import ROWS


@dataclass(frozen=True)
class Difference:
    """One field; a value for each column, None where the stage has no such field."""

    field: str
    values: tuple[str | None, ...]


@dataclass(frozen=True)
class Differing:
    """Stages of one kind and the fields that they do not agree on."""

    kind: str
    stages: tuple[str, ...]
    fields: tuple[Difference, ...]


def within(stages: Sequence[StageRecord]) -> list[Differing]:
    """For each kind of which there are several stages."""
    kinds: dict[str, list[StageRecord]] = {}
    for each in stages:
        kinds.setdefault(each.type, []).append(each)
    found = []
    for kind, members in kinds.items():
        if len(members) > 1:
            fields = differing([each.config for each in members])
            found.append(Differing(kind, tuple(each.name for each in members), tuple(fields)))
    return found


def differing(configs: Sequence[Mapping[str, Any]]) -> list[Difference]:
    """The fields whose values are not all equal."""
    flat = [dict(leaves(config)) for config in configs]
    names = dict.fromkeys(name for values in flat for name in values)
    return [
        Difference(name, tuple(values.get(name) for values in flat))
        for name in names
        if len({values.get(name) for values in flat}) > 1
    ]


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(dotted field, value as it is written) of what is no mapping or list of mappings; data entries in one line."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and value and all(isinstance(inner, Mapping) for inner in value):
        if all("source" in inner for inner in value):
            yield name, "; ".join(map(entry_text, value))
            return
        for number, inner in enumerate(value):
            yield from leaves(inner, f"{name}.{number}")
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def entry_text(entry: Mapping[str, Any]) -> str:
    """`pydocs (limit 1400)`: a data entry without its defaults; the rows of a stage by the stage's name."""
    source = Path(entry["source"])
    name = source.parent.name if source.is_absolute() and source.name == ROWS else str(entry["source"])
    more = ", ".join(
        f"{key} {value}" for key, value in entry.items() if key != "source" and not _is_default(key, value)
    )
    return f"{name} ({more})" if more else name


def _is_default(key: str, value: Any) -> bool:
    return key in DataEntry.model_fields and value == DataEntry.model_fields[key].default
