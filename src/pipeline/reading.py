"""Read a recipe: YAML 1.2 and `--set`, with the file and the line of every value kept for the errors.

A `Source` says where a value came from. Values are plain Python (dict, list, str, int, float, bool, None); what they
must be is decided by the stage's config, and a value that does not fit is reported at its own line.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ValidationError

from pipeline.errors import MissingInputError, RecipeError
from pipeline.recipe import models_in

Config = TypeVar("Config", bound=BaseModel)
Key = tuple[str | int, ...]


@dataclass(frozen=True)
class Scope:
    """Where a stage comes from that a recipe's `repeat:` or `matrix:` has made."""

    base: str
    """Its name as written."""
    turn: int | None
    """Its round, from 1; None outside of `repeat:`."""
    settings: Mapping[str, str]
    """Field of its matrix -> the value's name; {} without a matrix."""
    names: Mapping[str, str]
    """What the names of its block mean in its round; {} outside of `repeat:`."""


@dataclass
class Document:
    """A recipe as written: its values, and for every key path the place it came from."""

    name: str
    base: Path
    """Relative paths of the recipe start here; those of `--set` at the current folder."""
    values: dict[str, Any]
    places: dict[Key, str] = field(default_factory=dict)
    later: list[tuple[str, str]] = field(default_factory=list)
    """(assignment, where) of `--set`s on names with an `@`, which are there once the recipe is unrolled."""
    scopes: dict[str, Scope] = field(default_factory=dict)
    """Of the stages that `repeat:` and `matrix:` have made, where each comes from."""

    def place(self, *key: str | int) -> str:
        """`file:line` of the value, or of the nearest mapping around it that has one."""
        for end in range(len(key), -1, -1):
            if key[:end] in self.places:
                return self.places[key[:end]]
        return self.name

    def is_set(self, *key: str | int) -> bool:
        """Whether the value came from `--set` or the environment (its paths are relative to the current folder)."""
        return self.place(*key).startswith(("--set", "LLMPIPE_SET"))


def read_recipe(path: Path, overrides: Iterable[str] = ()) -> Document:
    """The recipe at `path`, with `LLMPIPE_SET` and then `overrides` (`stage.field=value`) laid over it.

    Raises RecipeError (file and line) for what is no YAML, a duplicate key, or a `--set` that leads nowhere.
    """
    document = read_yaml(path, "a recipe is a mapping with the key `stages`")
    for assignment in from_environment():
        _assign(document, assignment, f"LLMPIPE_SET {assignment}")
    lay_over(document, overrides)
    return document


def read_yaml(path: Path, otherwise: str = "not a mapping of names to values") -> Document:
    """The YAML file at `path` as it stands, with the line of every value; RecipeError, `otherwise` for no mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise MissingInputError(f"no recipe there ({error.strerror})", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"not UTF-8 text ({error.reason})", where=str(path)) from error
    document = Document(name=_shown(path), base=path.resolve().parent, values={})
    tree = _parse(text, document.name)
    if not isinstance(tree, dict):
        raise RecipeError(otherwise, where=f"{document.name}:1")
    document.values = _plain(tree, (), document)
    document.places.setdefault((), f"{document.name}:1")
    return document


def lay_over(document: Document, overrides: Iterable[str]) -> None:
    """Lay `--set stage.field=value` over the document; RecipeError for one that leads nowhere."""
    for assignment in overrides:
        _assign(document, assignment, f"--set {assignment}")


def from_environment() -> list[str]:
    """The words of `LLMPIPE_SET`, each an assignment. RecipeError where it can't be cut into words."""
    text = os.environ.get("LLMPIPE_SET", "")
    try:
        return shlex.split(text)
    except ValueError as error:
        raise RecipeError(f"not words of a shell ({error})", where=f"LLMPIPE_SET {text}") from error


def _shown(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _parse(text: str, where: str) -> Any:
    from ruamel.yaml import YAML
    from ruamel.yaml.constructor import DuplicateKeyError
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    yaml = YAML(typ="rt", pure=True)
    try:
        return yaml.load(text)
    except DuplicateKeyError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = str(error.problem).split(" with value")[0].replace("found ", "")
        raise RecipeError(problem, where=f"{where}:{line}", mend="keep one of the two") from error
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"not YAML: {error.problem}", where=f"{where}:{line}") from error
    except YAMLError as error:
        raise RecipeError(f"not YAML: {error}", where=where) from error


def _plain(node: Any, key: Key, document: Document) -> Any:
    """Plain Python out of ruamel's nodes, noting the line of every key and item."""
    from ruamel.yaml.scalarbool import ScalarBoolean

    marks: Any = cast("Any", node).lc if isinstance(node, dict | list) else None
    if isinstance(node, dict):
        own = marks.data or {}  # a key that `<<: *base` brings has no line here: its mapping's is shown
        for name in node:
            if name in own:
                document.places[(*key, str(name))] = f"{document.name}:{marks.key(name)[0] + 1}"
        return {str(name): _plain(value, (*key, str(name)), document) for name, value in node.items()}
    if isinstance(node, list):
        for index in range(len(node)):
            document.places[(*key, index)] = f"{document.name}:{marks.item(index)[0] + 1}"
        return [_plain(value, (*key, index), document) for index, value in enumerate(node)]
    if isinstance(node, ScalarBoolean):  # a bool with an anchor, which is an int to Python
        return bool(node)
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node if node is None else str(node)


def _assign(document: Document, assignment: str, where: str) -> None:
    """Lay `a.b=value` over the document; the value is read as YAML."""
    path = assignment.partition("=")[0]
    if "@" in path.partition(".")[0]:
        document.later.append((assignment, where))
    else:
        assign_to(document, ("stages",) if "." in path else (), assignment, where)


def assign_to(document: Document, under: Key, assignment: str, where: str) -> None:
    """Lay `a.b=value` over what stands at `under`; RecipeError where it leads nowhere."""
    path, equals, text = assignment.partition("=")
    keys: Key = tuple(int(part) if part.isdigit() else part for part in path.strip().split("."))
    if not equals or not all(str(part) for part in keys):
        raise RecipeError("write it as stage.field=value", where=where)
    keys = _below_matrix(document, (*under, *keys))
    node: Any = document.values
    for depth, part in enumerate(keys[:-1]):
        if isinstance(node, dict) and node.get(str(part)) is None and (str(part) in node or depth > 1):
            node[str(part)] = {}  # a stage or section that was left empty
            document.places.setdefault(keys[: depth + 1], where)
        try:
            node = node[part] if isinstance(node, list) and isinstance(part, int) else node[str(part)]
        except (KeyError, IndexError, TypeError) as error:
            known = list(node) if isinstance(node, dict) else []
            raise RecipeError(f"there is no {part!r}{meant(str(part), known)}", where=where) from error
    last, value = keys[-1], _plain(_parse(text, where), keys, document)
    if isinstance(node, dict):
        node[str(last)] = value
    elif isinstance(node, list) and isinstance(last, int) and last < len(node):
        node[last] = value
    else:
        raise RecipeError(f"{'.'.join(map(str, keys[:-1]))} holds no fields", where=where)
    for old in [key for key in document.places if key[: len(keys)] == keys]:
        del document.places[old]
    document.places[keys] = where


MATRIX_KEY = re.compile(r"stages\.((repeat(\.\d+)?\.stages\.)?[^.]+|repeat\.\d+)\.matrix\.")


def _below_matrix(document: Document, keys: Key) -> Key:
    """`keys` with what follows the `matrix` of a stage or block joined: its fields have dots (`{peft.r: [8, 16]}`).

    What leads into the values of a field that is there (`matrix.peft.r.0`) goes on behind it.
    """
    found = MATRIX_KEY.match(".".join(map(str, keys)))
    if found is None:
        return keys
    at = found[0].count(".")
    matrix: Any = document.values
    for part in keys[:at]:
        if isinstance(matrix, list) and isinstance(part, int) and part < len(matrix):
            matrix = matrix[part]
        else:
            matrix = matrix.get(str(part)) if isinstance(matrix, dict) else None
    rest = keys[at:]
    written = matrix if isinstance(matrix, dict) else {}
    ends = [end for end in range(len(rest), 0, -1) if ".".join(map(str, rest[:end])) in written]
    end = ends[0] if ends else len(rest)
    return (*keys[:at], ".".join(map(str, rest[:end])), *rest[end:])


def meant(name: str, known: Iterable[str]) -> str:
    """`; did you mean \\`learning_rate\\`?`, or the known names where none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean `{near[0]}`?"
    return f"; there are {', '.join(names)}" if 0 < len(names) <= 30 else ""


def validate(kind: type[Config], values: Mapping[str, Any], document: Document, key: Key) -> Config:
    """`values` as the config `kind`; RecipeError at the line of the first value that does not fit."""
    try:
        return kind.model_validate_json(json.dumps(values))
    except ValidationError as error:
        first = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
        location = tuple(part for part in first["loc"] if not _is_tag(part))
        raise RecipeError(_explain(first, location, kind), where=document.place(*key, *location)) from error


def _is_tag(part: str | int) -> bool:
    """Whether a step of pydantic's location names a branch of a union rather than a key."""
    return isinstance(part, str) and (part in {"str", "int", "float", "bool"} or "[" in part or part.endswith("Config"))


def _explain(error: Any, location: Key, kind: type[BaseModel]) -> str:
    name = ".".join(map(str, location))
    if error["type"] == "extra_forbidden":
        return f"unknown key `{name}`{meant(str(location[-1]), _fields_at(kind, location[:-1]))}"
    if error["type"] == "missing":
        return f"`{name}` is required"
    got = json.dumps(error["input"], default=str)
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "literal_error":
        near = difflib.get_close_matches(str(error["input"]), re.findall(r"'([^']*)'", error["ctx"]["expected"]), n=1)
        message += f"; did you mean `{near[0]}`?" if near else ""
    told = f"`{name}`: {message[:1].lower()}{message[1:]} (got {got[:80]})"
    return re.sub(r"//[^/@\s]*@", "//…@", told)  # a password in an address


def _fields_at(kind: type[BaseModel], location: Key) -> list[str]:
    """The field names of the (nested) model at `location`, for suggestions."""
    for part in location:
        if isinstance(part, int) or part not in kind.model_fields:
            continue
        nested = models_in(kind.model_fields[part].annotation)
        if nested:
            kind = nested[0]
    return list(kind.model_fields)
