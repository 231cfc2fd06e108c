"""The graph of a recipe: named stages, references between them, every default in its place.

All that can be found wrong without loading a model is found here, with the file, the line and a suggestion:
unknown stages, unknown references, kinds that do not fit, cycles, missing files, a reward model of another tokenizer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from pipeline.artifacts import Store
from pipeline.errors import ArtifactError, MissingInputError, RecipeError
from pipeline.hashes import tokenizer_hash
from pipeline.paths import absolute_paths, written_by
from pipeline.reading import Document, Key, meant, validate
from pipeline.recipe import (
    NAME,
    STAGE_NAME,
    USER_CODE,
    Section,
    Stage,
    StageConfig,
    field,
    is_section_list,
    preset_of,
)
from pipeline.roles import MODEL, NO_TOKENIZER, TOKENIZER, fits, input_of, rows_of
from pipeline.tracking import Track, read_tracks
from pipeline.unroll import SEEDS_A_ROUND, meaning

LoadStage = Callable[[str, Path], Stage]
"""(type as the recipe wrote it, folder its path starts at) -> the stage; raises RecipeError's parents."""


class RecipeFile(Section):
    """The top level of a recipe."""

    run: str = field("demo", "name of the run: its folder under the artifacts")
    seed: int = field(0, "seed of every stage that sets none", ge=0)
    track: str | list[str] | dict[str, dict[str, Any] | None] | None = field(
        None, "trackers that get the metrics too: a name of accelerate's, several, or name -> its options"
    )
    stages: dict[str, dict[str, Any] | None] = field(..., "name -> the stage's fields")


@dataclass(frozen=True)
class Node:
    """A stage of a recipe, resolved."""

    name: str
    stage: Stage
    config: StageConfig
    inputs: Mapping[str, tuple[str, ...]]
    """Role -> references (names of this recipe, `run/stage`, absolute paths, `hub:`); () where there is none."""
    is_list: Mapping[str, bool]
    origins: Mapping[str, str]
    """Field -> where its value came from: `default`, `recipe.yaml:7`, `--set …`, `LLMPIPE_SET …`."""
    rows: Mapping[str, str] = dataclass_field(default_factory=dict)
    """Source of a data entry -> the stage of this recipe that writes the rows there (`data: [{source: label}]`)."""

    def parents(self, names: Mapping[str, Any]) -> list[str]:
        """The stages of the recipe that this one takes, each once."""
        refs = [ref for refs in self.inputs.values() for ref in refs if ref in names]
        return list(dict.fromkeys([*refs, *self.rows.values()]))


@dataclass(frozen=True)
class Recipe:
    """A whole recipe; `nodes` in an order in which they can run."""

    name: str
    run: str
    seed: int
    nodes: Mapping[str, Node]
    document: Document
    tracks: tuple[Track, ...] = ()

    def select(self, name: str) -> tuple[str, ...]:
        """The stages that a user means by `name`: of `repeat:` the last round, of `matrix:` all; () for none."""
        return tuple(found for found in meaning(self.document, "", name) if found in self.nodes)

    def descendants(self, name: str) -> set[str]:
        """All stages that take what `name` makes, directly or not."""
        found: set[str] = set()
        for node in self.nodes.values():
            if found.union({name}) & set(node.parents(self.nodes)):
                found.add(node.name)
        return found

    def ancestors(self, name: str) -> list[str]:
        """All stages that `name` needs, in running order, itself last."""
        needed = {name}
        for node in reversed(list(self.nodes.values())):
            if node.name in needed:
                needed.update(node.parents(self.nodes))
        return [other for other in self.nodes if other in needed]


def build(document: Document, load_stage: LoadStage, store: Store) -> Recipe:
    """The recipe in `document` (unrolled), validated as a whole. Raises RecipeError or MissingInputError."""
    top = validate(RecipeFile, document.values, document, ())
    written = {stage: document.scopes[stage].base if stage in document.scopes else stage for stage in top.stages}
    for name, key in [(top.run, ("run",)), *((base, ("stages", stage)) for stage, base in written.items())]:
        if not NAME.fullmatch(name):
            raise RecipeError(
                f"{name!r} is no name: letters, digits, '.', '_' and '-', at most 64, a letter or digit first",
                where=document.place(*key),
            )
    stages = {name: _stage(document, name, values or {}, load_stage) for name, values in top.stages.items()}
    if not stages:
        raise RecipeError("no stages", where=document.place("stages"))
    rows = {name: str(rows_of(store, top.run, name)) for name, stage in stages.items() if stage.kind == "rows"}
    nodes = {name: _node(document, name, stages, top.seed, store, rows) for name in stages}
    nodes = {
        name: replace(node, rows=written_by(node.config, rows)) for name, node in _inherit(document, nodes).items()
    }
    tracks = read_tracks(top.track, document)
    recipe = Recipe(document.name, top.run, top.seed, _ordered(document, nodes), document, tracks)
    for node in recipe.nodes.values():
        _check_tokenizers(document, recipe, node, store)
    return recipe


def _stage(document: Document, name: str, values: Mapping[str, Any], load_stage: LoadStage) -> Stage:
    key = ("stages", name, "stage") if "stage" in values else ("stages", name)
    base = Path.cwd() if document.is_set(*key) else document.base
    try:
        return load_stage(str(values.get("stage", name)), base)
    except (RecipeError, MissingInputError) as error:
        raise type(error)(error.what, where=error.where or document.place(*key), mend=error.mend) from error


def _node(
    document: Document, name: str, stages: Mapping[str, Stage], seed: int, store: Store, rows: Mapping[str, str]
) -> Node:
    stage = stages[name]
    key = ("stages", name)
    values = {k: v for k, v in (document.values["stages"][name] or {}).items() if k != "stage"}
    config = validate(stage.config, _spread(document, key, stage, values), document, key)
    filled, preset = config.model_fields_set, preset_of(config)
    origins = {
        name: document.place(*key, name) if name in values else preset if name in filled else "default"
        for name in stage.config.model_fields
    }
    if "seed" not in values:
        scope = document.scopes.get(name)
        turn = 1 if scope is None or scope.turn is None else scope.turn
        more = SEEDS_A_ROUND * (turn - 1)  # another round is another draw
        config = config.model_copy(update={"seed": seed + more})
        origins["seed"] = document.place("seed") if "seed" in document.values else "default"
        origins["seed"] += f" + {more}, round {turn}" if more else ""
    inputs: dict[str, tuple[str, ...]] = {}
    is_list: dict[str, bool] = {}
    updates: dict[str, Any] = {}
    for role, kind in stage.inputs.items():
        outer, _, inner = role.partition(".")
        value = updates.get(outer, getattr(config, outer))
        if inner and is_section_list(value):
            updates[outer], found = _in_sections(document, (*key, outer), value, inner, kind, stages, store)
            inputs |= {role: found} if found else {}
            is_list[role] = True
        elif is_section_list(value):
            inputs[role], is_list[role] = (), False  # the references are in the sections
        elif inner:
            assert not isinstance(value, BaseModel), "a role in a section is in a list of sections"
        else:
            is_list[role] = isinstance(value, tuple)
            refs = value if isinstance(value, tuple) else () if value is None else (value,)
            if origins[role] == "default":
                refs = _present(document, name, role, refs, stages, stage)
            resolved = tuple(
                dict.fromkeys(  # two names of one stage (`dpo@1` and, after one round, `dpo`) take it once
                    found
                    for i, ref in enumerate(refs)
                    for found in _references(document, (*key, role, i), ref, kind, stages, store, is_list[role])
                )
            )
            inputs[role] = tuple(ref for ref in resolved if not USER_CODE.fullmatch(ref))
            updates[role] = resolved if is_list[role] else (resolved[0] if resolved else None)
    config = config.model_copy(update=updates)
    config = config.model_copy(update=absolute_paths(document, key, config, rows, stage.inputs))
    return Node(name, stage, config, inputs, is_list, origins)


def _spread(document: Document, key: Key, stage: Stage, values: dict[str, Any]) -> dict[str, Any]:
    """`values` where each name in a list of a section is what it means: a section checks how many there are."""
    values = copy.deepcopy(values)
    for outer, _, inner in (role.partition(".") for role in stage.inputs):
        sections = values.get(outer)
        sections = [sections] if isinstance(sections, dict) else sections
        for i, section in enumerate(sections if inner and isinstance(sections, list) else ()):
            refs = section.get(inner) if isinstance(section, dict) else None
            if isinstance(refs, list) and all(isinstance(ref, str) for ref in refs):
                at = (*key, outer, i, inner)
                found: dict[str, str] = {}  # each once, at the place of its first name
                for j, ref in enumerate(refs):
                    for each in meaning(document, str(key[1]), ref):
                        found.setdefault(each, document.place(*at, j))
                document.places |= {(*at, j): place for j, place in enumerate(found.values())}
                section[inner] = list(found)
    return values


def _in_sections(
    document: Document,
    key: Key,
    sections: tuple[Any, ...],
    name: str,
    kind: str,
    stages: Mapping[str, Stage],
    store: Store,
) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    """The sections at `key` with the references in their field `name` checked, and all of these in order."""
    done: list[Any] = []
    found: list[str] = []
    for i, section in enumerate(sections):
        value = getattr(section, name)
        if value is not None:
            refs = value if isinstance(value, tuple) else (value,)
            refs = tuple(
                each
                for j, ref in enumerate(refs)
                for each in _references(
                    document, (*key, i, name, j), ref, kind, stages, store, isinstance(value, tuple)
                )
            )
            found += refs
            section = section.model_copy(update={name: refs if isinstance(value, tuple) else refs[0]})
        done.append(section)
    return tuple(done), tuple(found)


def _present(
    document: Document, name: str, role: str, refs: tuple[str, ...], stages: Mapping[str, Stage], stage: Stage
) -> tuple[str, ...]:
    """A default reference that the recipe lacks: none where the field may be null, else an error."""
    absent = [ref for ref in refs if not stages.keys() >= {*meaning(document, name, ref)}]
    may_be_null = type(None) in get_args(stage.config.model_fields[role].annotation)
    if absent and not may_be_null:
        raise RecipeError(
            f"`{role}` is `{absent[0]}` by default, and the recipe has no such stage",
            where=document.place("stages", name),
            mend=f"set {name}.{role} to a stage of the recipe, run/stage, ./folder or hub:org/name",
        )
    return tuple(ref for ref in refs if ref not in absent)


def _references(
    document: Document, key: Key, ref: str, kind: str, stages: Mapping[str, Stage], store: Store, is_list: bool
) -> tuple[str, ...]:
    """What `ref` means in its stage, checked: one reference, or where a list of them is taken any number."""
    found = meaning(document, str(key[1]), ref)
    if len(found) > 1 and not is_list:
        raise RecipeError(
            f"`{'.'.join(map(str, key[2:-1]))}` takes one {kind}, and `{ref}` is {len(found)}: {', '.join(found)}",
            where=document.place(*key),
            mend=f"name one, such as {found[0]}",
        )
    return tuple(_reference(document, key, each, kind, stages, store) for each in found)


def _reference(document: Document, key: Key, ref: str, kind: str, stages: Mapping[str, Stage], store: Store) -> str:
    """`ref` checked: it exists, it is one thing only, and it is of the kind the stage takes.

    `key` is ("stages", stage, role, place in the role's list); for a section in a list the role is three keys.
    """
    where = document.place(*key)
    base = Path.cwd() if document.is_set(*key) else document.base
    role = f"`{'.'.join(map(str, key[2:-1]))}`"
    if ref in stages:
        _check_kind(f"{role} takes a {kind}, and `{ref}` makes a", stages[ref].kind, kind, where)
        return ref
    if USER_CODE.fullmatch(ref) or ref.startswith(("./", "../", "/")):
        file, _, member = ref.rpartition(":") if USER_CODE.fullmatch(ref) else (ref, "", "")
        path = Path(file) if file.startswith("/") else (base / file).resolve()
        if not path.exists():
            raise MissingInputError(f"{role}: nothing at {path}", where=where)
        if member and kind != "reward-model":
            raise RecipeError(f"{role} takes a {kind}; code of yours stands for a reward alone", where=where)
        if member:
            return f"{path}:{member}"
        _check_outside(role, str(path), kind, store, where)
        return str(path)
    if ref.startswith("hub:"):
        return ref
    run, slash, stage_name = ref.partition("/")
    if slash and NAME.fullmatch(run) and STAGE_NAME.fullmatch(stage_name):
        try:
            _check_outside(role, ref, kind, store, where)
        except ArtifactError as error:
            raise MissingInputError(
                f"{role}: no artifact {ref} under {store.root}",
                where=where,
                mend=f"hub:{ref} for a model of the hub, ./{ref} for a folder",
            ) from error
        return ref
    raise RecipeError(f"{role}: no stage `{ref}`{meant(ref, stages)}", where=where)


def _check_outside(role: str, ref: str, kind: str, store: Store, where: str) -> None:
    try:
        found = input_of(store, ref, kind).kind
    except MissingInputError as error:
        raise MissingInputError(f"{role}: {ref} is {error.what}", where=where, mend=error.mend) from error
    _check_kind(f"{role} takes a {kind}, and {ref} is a", found, kind, where)


def _check_kind(what: str, found: str, kind: str, where: str) -> None:
    if not fits(kind, found):
        raise RecipeError(f"{what} {found}", where=where, mend=NO_TOKENIZER if kind == TOKENIZER else "")


def _inherit(document: Document, nodes: dict[str, Node]) -> dict[str, Node]:
    """Fill the fields whose default is the data of another stage (`ppo.data`: the sft stage's)."""
    filled = dict(nodes)
    for node in nodes.values():
        for name, purpose in node.stage.defaults.items():
            if getattr(node.config, name) is not None and node.origins[name] != "default":
                continue
            giver = next((a for a in _along_init(node, nodes) if a.stage.trains_on == purpose), None)
            if giver is None and node.stage.config.model_fields[name].default in (None, PydanticUndefined):
                raise RecipeError(
                    f"`{name}` is required here: no stage along `init` trains on {purpose}",
                    where=document.place("stages", node.name),
                    mend=f"add {node.name}.{name}: [a path, a glob, pydocs or hub:org/name]",
                )
            if giver is not None:
                value = getattr(giver.config, "data")  # noqa: B009
                config = filled[node.name].config.model_copy(update={name: value})
                origins = {**filled[node.name].origins, name: f"default: the data of `{giver.name}`"}
                filled[node.name] = replace(filled[node.name], config=config, origins=origins)
    return filled


def _along_init(node: Node, nodes: Mapping[str, Node]) -> Iterator[Node]:
    seen = {node.name}
    while node.inputs.get("init") and node.inputs["init"][0] in nodes:
        node = nodes[node.inputs["init"][0]]
        if node.name in seen:
            return
        seen.add(node.name)
        yield node


def _ordered(document: Document, nodes: Mapping[str, Node]) -> dict[str, Node]:
    """The nodes with parents first, in the recipe's order where that is free; RecipeError on a cycle."""
    done: dict[str, Node] = {}
    while len(done) < len(nodes):
        ready = [n for n in nodes.values() if n.name not in done and all(p in done for p in n.parents(nodes))]
        if not ready:
            left = [name for name in nodes if name not in done]
            path = [left[0]]
            while path[-1] not in path[:-1]:
                path.append(next(p for p in nodes[path[-1]].parents(nodes) if p in left))
            loop = path[path.index(path[-1]) :]
            where = document.place("stages", loop[0])
            raise RecipeError(f"the stages go round in a circle: {' → '.join(reversed(loop))}", where=where)
        done[ready[0].name] = ready[0]
    return done


def _check_tokenizers(document: Document, recipe: Recipe, node: Node, store: Store) -> None:
    """A policy and the reward model that scores it must speak the same tokens."""
    rewards = [r for role, refs in node.inputs.items() if node.stage.inputs[role] == "reward-model" for r in refs]
    for reward in rewards:
        for init in node.inputs.get("init", ()):
            left, right = (tokenizer_root(recipe, ref, store) for ref in (init, reward))
            if left and right and left != right and left.partition(":")[0] == right.partition(":")[0]:
                raise RecipeError(
                    f"the reward model `{reward}` has another tokenizer ({right}) than `{init}` ({left})",
                    where=document.place("stages", node.name, "reward"),
                    mend="train a reward model from the same base",
                )


def tokenizer_root(recipe: Recipe, ref: str, store: Store) -> str:
    """What decides the tokenizer of `ref`: `stage:NAME` of this recipe or `hash:…` from outside; "" if unknown.

    Two tokenize stages that take the tokenizer of one model have the same: of them nothing is known before they run.
    """
    while ref in recipe.nodes:
        node = recipe.nodes[ref]
        if node.stage.kind == "tokens":
            return "" if node.inputs.get("tokenizer") else f"stage:{ref}"
        above = node.inputs.get("tokens") or node.inputs.get("init")
        if not above:
            return ""
        ref = above[0]
    if ref.startswith("hub:"):
        return ""
    found = tokenizer_hash(input_of(store, ref, MODEL).model)
    return f"hash:{found[:12]}" if found else ""
