"""What a stage's result depends on, as one hash that can say why it changed.

The fingerprint covers the config's result-bearing values, the data's contents, the parents' fingerprints and the code
that computes the stage. Of what a user can edit (a checkout, an ejected stage, files of their own) the code is the
syntax trees of the stage's file and the modules it reaches, without comments, layout and docstrings; of an installed
release it is the stage's result version. Where things lie and how they were launched do not count.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

import pipeline
from pipeline.errors import ConfigError
from pipeline.hashes import digest, sha256
from pipeline.recipe import Stage, StageConfig, is_data, is_run_only, is_section_list, is_user_code

PACKAGES = Path(pipeline.__file__).resolve().parent.parent
NO_BEARING = (
    *("pipeline.errors", "pipeline.recipe", "pipeline.reading", "pipeline.unroll", "pipeline.paths"),
    *("pipeline.graph", "pipeline.usercode", "pipeline.artifacts", "pipeline.hashes", "pipeline.fingerprint"),
    *("pipeline.lineage", "pipeline.checkpoint", "pipeline.tensor_file", "pipeline.progress", "pipeline.launch"),
    *("pipeline.forking", "pipeline.plan", "pipeline.report"),
    *("pipeline.cli", "pipeline.trainer_options", "pipeline.tracking", "pipeline.hardware"),
)
"""Modules that read a recipe, or run, show and keep a stage, and do not bear on what it computes."""


def stage_parts(
    stage: Stage, config: StageConfig, data: Mapping[str, Any], inputs: Mapping[str, list[str]]
) -> dict[str, Any]:
    """Everything the fingerprint covers, by part. `data`: field -> what the sources hold; `inputs`: role -> parents.

    A value at its default is left out, so that a field added by a release does not make what stands stale.
    """
    user_files: list[Path] = []
    values = _values(config, stage.inputs, user_files)
    if stage.kind == "evaluation":
        values = _names(config, stage.inputs) | values
    code = code_parts(stage, user_files)
    return {"config": values, "data": dict(data), "inputs": dict(inputs), "code": code}


def _values(config: BaseModel, roles: Collection[str], user_files: list[Path]) -> dict[str, Any]:
    """Dotted field -> value, of what bears on the result and is not at its default; adds to `user_files`."""
    values: dict[str, Any] = {}
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        named = [v for v in (value if isinstance(value, tuple) else (value,)) if is_user_code(v)]
        if named:
            files = [Path(reference.rpartition(":")[0]) for reference in named]
            user_files += files
            values[name] = [f"{file.name}:{v.rpartition(':')[2]}" for file, v in zip(files, named)]
        elif is_section_list(value) and not is_data(type(config), name):
            inner_roles = [role.removeprefix(f"{name}.") for role in roles if role.startswith(f"{name}.")]
            for i, section in enumerate(value):
                held = {role: _count(getattr(section, role)) for role in inner_roles}
                found = {role: count for role, count in held.items() if count} | _values(
                    section, inner_roles, user_files
                )
                values |= {f"{name}.{i}.{key}": each for key, each in found.items()}
        elif name in roles or is_data(type(config), name) or is_run_only(type(config), name):
            continue
        elif isinstance(value, Path):
            values[name] = [value.name, sha256(value)]
        elif isinstance(value, BaseModel):
            inner = _values(value, (), user_files)
            values |= {f"{name}.{key}": found for key, found in inner.items()}
            if info.default is None:
                values[name] = "set"
        elif value != info.default:
            values[name] = to_jsonable_python(value)
    return values


def _names(config: BaseModel, roles: Collection[str]) -> dict[str, Any]:
    """Role -> what its references are called: an evaluation's figures bear these names, and its means go by them.

    Of a folder only its own name, since where things lie does not count.
    """

    def called(ref: str) -> str:
        return Path(ref).name if ref.startswith("/") else ref

    found: dict[str, Any] = {}
    for role in (role for role in roles if "." not in role):
        value = getattr(config, role)
        if isinstance(value, tuple) and not is_section_list(value):
            found[role] = [called(ref) for ref in value]
        elif isinstance(value, str) and value != type(config).model_fields[role].default:
            found[role] = called(value)
    return found


def _count(value: Any) -> int:
    """How many references a field holds: which parents are whose, when the parents are listed in one line."""
    return 0 if value is None else len(value) if isinstance(value, tuple) else 1


def defaults(config: type[BaseModel], default: BaseModel | None = None) -> dict[str, Any]:
    """Dotted field -> what `_values` leaves out (of the section `default`, if given); None where required."""
    found: dict[str, Any] = {}
    for name, info in config.model_fields.items():
        value = getattr(default, name) if default else None if info.is_required() else info.default
        if isinstance(value, BaseModel):
            found |= {f"{name}.{key}": inner for key, inner in defaults(type(value), value).items()}
        else:
            found[name] = to_jsonable_python(value)
    return found


def fingerprint(parts: Mapping[str, Any]) -> str:
    """64 hexadecimal digits over all parts."""
    return digest(parts)


def differences(name: str, old: Mapping[str, Any], new: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """Why `new` is not `old`, a line each: `sft.learning_rate 1e-4 → 2e-4`, `code: pipeline/rl/kl.py`."""
    reasons = []
    for key in sorted({*old["config"], *new["config"]}):
        before, after = (part["config"].get(key, defaults.get(key)) for part in (old, new))
        if before != after:
            reasons.append(f"{name}.{key} {_short(before)} → {_short(after)}")
    for part, what in (("code", "code"), ("data", "data"), ("inputs", "input")):
        before, after = old[part], new[part]
        changed = [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
        reasons += [f"{what}: {key}" for key in changed]
    return reasons


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else f"{text[:37]}…"


def code_parts(stage: Stage, user_files: Iterable[Path] = ()) -> dict[str, str]:
    """File -> hash of its syntax tree for all code the user can edit; the result version of what is installed."""
    found: dict[str, str] = {}
    if _is_installed(stage.file):
        found[f"stages/{stage.type}"] = f"result version {stage.result_version}"
    files = dict.fromkeys(part for file in (stage.file, *user_files) for part in reached(file))
    for file in files:
        if not _is_installed(file):
            label = _label(file)
            while label in found:  # two of the user's files of one name, in two folders
                label += "'"
            found[label] = _tree_hash(file)
    return found


@functools.cache
def reached(start: Path) -> tuple[Path, ...]:
    """The file and all it imports, directly or not, of `pipeline`, `stages` and the modules beside it."""
    seen: dict[Path, None] = {start.resolve(): None}
    queue = [start.resolve()]
    while queue:
        for name in _imports(queue.pop()):
            file = _module_file(name, start.resolve().parent)
            if file is not None and file not in seen:
                seen[file] = None
                queue.append(file)
    return tuple(seen)


@functools.cache
def _imports(file: Path) -> frozenset[str]:
    """Dotted names the file imports, at the top or inside functions; `from a import b` gives a and a.b."""
    names: set[str] = set()
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(names)


@functools.cache
def _module_file(name: str, beside: Path) -> Path | None:
    top = name.split(".")[0]
    if top in ("pipeline", "stages"):
        if any(name == other or name.startswith(f"{other}.") for other in NO_BEARING):
            return None
        roots = (PACKAGES, PACKAGES.parent)
    elif beside != PACKAGES.parent / "stages":
        roots = (beside, beside)
    else:
        return None
    for root in roots:
        stem = root.joinpath(*name.split("."))
        for path in (stem.with_suffix(".py"), stem / "__init__.py"):
            if path.exists():
                return path.resolve()
    return None


def _is_installed(file: Path) -> bool:
    return bool({"site-packages", "dist-packages"} & set(file.parts))


def _label(file: Path) -> str:
    for root in (PACKAGES, PACKAGES.parent):
        if file.is_relative_to(root) and file.relative_to(root).parts[0] in ("pipeline", "stages"):
            return str(file.relative_to(root))
    return file.name


def _tree(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise ConfigError(f"not Python: {error.msg}", where=f"{file}:{error.lineno}") from error


@functools.cache
def _tree_hash(file: Path) -> str:
    tree = _tree(file)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()
