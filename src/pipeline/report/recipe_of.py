"""The recipe that a run's manifests stand for: the values that are not at their defaults, data, references.

Names with an `@`, which a recipe may not hold, are written with `-`. Where files lie is as it was.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.recipe import DataEntry
from pipeline.report.records import RunRecord, StageRecord


def recipe_of(run: RunRecord) -> dict[str, Any]:
    """A recipe as a mapping, of the stages that are whole."""
    done = [each for each in run.stages if each.is_done]
    names = {each.name: plain_name(each.name) for each in done}
    return {"run": run.name, "stages": {names[each.name]: _stage(each, names) for each in done}}


def plain_name(name: str) -> str:
    """`dpo@beta=0.1@seed=0` -> `dpo-beta-0.1-seed-0`."""
    return re.sub(r"[@=+]", "-", name)


def as_yaml(recipe: Mapping[str, Any]) -> str:
    """YAML, a line a field; what is nested stands in one line."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.width, yaml.allow_unicode = None, 110, True
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    file = io.StringIO()
    yaml.dump(dict(recipe), file)
    return file.getvalue()


def _stage(stage: StageRecord, names: Mapping[str, str]) -> dict[str, Any]:
    parts, config = stage.manifest["parts"], stage.config
    values: dict[str, Any] = {}
    if stage.type != names[stage.name]:
        values["stage"] = stage.type
    roles = {role for role in stage.manifest["inputs"] if role in config and not _is_sections(config[role])}
    for field, value in config.items():
        if field in roles:
            values[field] = _renamed(value, names)
        elif field in parts["data"]:
            values[field] = [_entry(entry, stage, names) for entry in value]
        elif field in parts["config"] or any(key.startswith(f"{field}.") for key in parts["config"]):
            values[field] = _set(value, field, parts["config"], names)
    return values


def _is_sections(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, Mapping) for each in value)


def _set(value: Any, name: str, given: Mapping[str, Any], names: Mapping[str, str]) -> Any:
    """Of a section what is not at its default; any other value whole."""
    if isinstance(value, Mapping):
        return {
            key: _set(inner, f"{name}.{key}", given, names)
            for key, inner in value.items()
            if f"{name}.{key}" in given or any(other.startswith(f"{name}.{key}.") for other in given)
        }
    if _is_sections(value):
        return [_set(inner, f"{name}.{number}", given, names) for number, inner in enumerate(value)]
    return _renamed(value, names)


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, list):
        return [_renamed(each, names) for each in value]
    return names.get(value, value) if isinstance(value, str) else value


def _entry(entry: Mapping[str, Any], stage: StageRecord, names: Mapping[str, str]) -> Any:
    """A data entry without its defaults; rows of a stage of the run by the stage's name."""
    defaults = {name: info.default for name, info in DataEntry.model_fields.items()}
    given = {key: value for key, value in entry.items() if key not in defaults or value != defaults[key]}
    source = Path(given["source"])
    if source.is_absolute() and source.parent.name in names and source.parent.parent.name == stage.manifest["run"]:
        given["source"] = names[source.parent.name]
    return given["source"] if len(given) == 1 else given


def command(recipe: str, run: str) -> str:
    """One command of a shell that makes the run anew, under another name."""
    return f"llmpipe run /dev/stdin --run {run}-again <<'RECIPE'\n{recipe}RECIPE"


def missing_parts(stages: Sequence[StageRecord]) -> list[str]:
    """What the recipe names and does not hold: files of the user's own."""
    return sorted({each.type for each in stages if each.type.endswith(".py")})
