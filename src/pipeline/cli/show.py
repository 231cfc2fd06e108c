"""`llmpipe config`, `recipes` and `eject`: what can be written, and what was."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from pipeline.cli.session import Session
from pipeline.cli.stages import STAGES, first_comment, load_stage, shipped_recipes
from pipeline.errors import ConfigError
from pipeline.graph import RecipeFile
from pipeline.reading import meant, read_recipe
from pipeline.recipe import is_section_list, unit_of
from pipeline.unroll import MATRIX, REPEAT, Repeat, unroll


def show_config(session: Session, *, as_json: bool) -> None:
    """Every stage's every value, its unit and where it came from."""
    rows = []
    for node in session.recipe.nodes.values():
        for name in node.stage.config.model_fields:
            key = ("stages", node.name, name)
            for path, value, origin in _leaves(node.config, name, key, session, node.origins[name]):
                unit = unit_of(type(node.config), name)
                rows.append({"stage": node.name, "field": path, "value": value, "unit": unit, "from": origin})
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, title=f"run {session.recipe.run}", title_justify="left")
    for column in ("field", "value", "unit", "from"):
        table.add_column(column, overflow="fold")
    for row in rows:
        style = "dim" if row["from"] == "default" else ""
        cells = (f"{row['stage']}.{row['field']}", json.dumps(row["value"]), str(row["unit"]), str(row["from"]))
        table.add_row(*(Text(cell) for cell in cells), style=style)
    Console(width=None if Console().is_terminal else 160).print(table)


def _leaves(
    config: BaseModel, name: str, key: tuple[str, ...], session: Session, origin: str
) -> list[tuple[str, Any, str]]:
    """(dotted field, value, origin); a nested mapping gives a line for each of its fields."""
    value = getattr(config, name)
    if not isinstance(value, BaseModel):
        return [(name, to_jsonable_python(value, exclude_none=is_section_list(value)), origin)]
    rows = []
    for inner in type(value).model_fields:
        place = session.document.places.get((*key, inner))
        for path, leaf, where in _leaves(value, inner, (*key, inner), session, place or "default"):
            rows.append((f"{name}.{path}", leaf, where))
    return rows


def show_schema() -> None:
    """JSON Schema of a recipe on stdout."""
    print(json.dumps(schema(), indent=1))


def schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a recipe: each stage under its own name, any other name says its `stage`."""
    definitions: dict[str, Any] = {}
    for name in STAGES:
        stage = load_stage(name, Path.cwd()).config.model_json_schema(ref_template="#/$defs/{model}")
        definitions |= stage.pop("$defs", {})
        stage["properties"]["stage"] = {"type": "string", "description": "the stage's type, or ./file.py"}
        stage["properties"][MATRIX] = {
            "type": "object",
            "description": "field -> its values: a stage for each combination",
            "additionalProperties": {"type": ["array", "object"]},
        }
        required = stage.pop("required", [])
        if required:  # the matrix may hold it
            stage["anyOf"] = [{"required": required}, {"required": [MATRIX]}]
        else:
            stage["type"] = ["object", "null"]  # `pretrain:` and nothing behind it is all its defaults
        definitions[name] = stage
    top = RecipeFile.model_json_schema()
    top["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    repeat = Repeat.model_json_schema(ref_template="#/$defs/{model}")
    definitions |= repeat.pop("$defs", {}) | {REPEAT: repeat}
    in_block: dict[str, Any] = {
        "type": "object",
        "properties": {name: {"$ref": f"#/$defs/{name}"} for name in STAGES},
        "additionalProperties": {"type": "object", "required": ["stage"]},
    }
    repeat["properties"]["stages"] = in_block
    block = {"$ref": f"#/$defs/{REPEAT}"}
    blocks = {"anyOf": [block, {"type": "array", "items": block}]}
    top["properties"]["stages"] = in_block | {"properties": in_block["properties"] | {REPEAT: blocks}}
    top["$defs"] = definitions
    return top


def list_recipes(*, as_json: bool) -> None:
    """Each shipped recipe: what it needs and how long it takes, in its own words; its stages; its data on the hub."""
    found = {name: _about(path) for name, path in shipped_recipes().items()}
    if as_json:
        print(json.dumps(found, indent=1))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for name, about in found.items():
        cell = Text(about["about"])
        cell.append(f"\n{', '.join(about['stages'])}", style="dim")
        table.add_row(Text(name, "bold"), cell)
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)
    print("\nllmpipe run NAME; llmpipe plan NAME says what it takes on this machine", file=sys.stderr)


def _about(path: Path) -> dict[str, Any]:
    document = unroll(read_recipe(path, ()))
    stages: dict[str, Any] = document.values["stages"]
    written = [document.scopes[stage].base if stage in document.scopes else stage for stage in stages]
    entries = [entry for fields in stages.values() for entry in (fields or {}).get("data") or () if entry]
    sources = [entry["source"] if isinstance(entry, dict) else entry for entry in entries]
    hub = sorted({str(source) for source in sources if str(source).startswith("hub:")})
    return {"about": first_comment(path), "stages": [*dict.fromkeys(written)], "hub": hub, "path": str(path)}


def eject_stage(stage: str, folder: Path, *, force: bool, as_json: bool) -> None:
    """Copy the stage's file to `folder`/my_<stage>.py and say how a recipe takes it."""
    if stage not in STAGES:
        raise ConfigError(f"no stage `{stage}`{meant(stage, STAGES)}")
    target = folder / f"my_{stage}.py"
    if target.exists() and not force:
        raise ConfigError("the file is there already", where=str(target), mend="--force overwrites it")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(load_stage(stage, folder).file, target)
    if as_json:
        print(json.dumps({"file": str(target), "stage": f"./{target.name}"}))
        return
    print(f"{target}\nin the recipe beside it:  {stage}: {{stage: ./{target.name}, …}}")
