"""`repeat:` and `matrix:` as plain named stages, before anything is validated.

    repeat: {times: 2, carry: {policy: {first: sft, then: dpo}}, stages: {label: …, dpo: {init: policy, …}}}
                                        → label@1, dpo@1 (init: sft), label@2, dpo@2 (init: dpo@1)
    dpo: {matrix: {seed: [0, 1], beta: [0.05, 0.1]}, init: sft}
                                        → dpo@beta=0.05@seed=0, dpo@beta=0.05@seed=1, dpo@beta=0.1@seed=0, …

A block may have a matrix too: each combination is a chain of rounds of its own (`dpo@2@seed=1` after `dpo@1@seed=1`).

A name is the stage's own, then `@round`, then `@field=value` by the fields' names, the seed last: the order in which a
matrix is written does not count, so that what stands goes on standing. `@` is in no name that a user writes. Every
value keeps its file and line. Which stages a reference means is `meaning`; the graph asks it with what it resolves.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.errors import RecipeError
from pipeline.reading import Document, Key, Scope, assign_to, meant, validate
from pipeline.recipe import LONGEST_NAME, NAME, STAGE_NAME, Section, field

REPEAT, MATRIX, SEED = "repeat", "matrix", "seed"
SEEDS_A_ROUND = 1000
"""What a round adds to a seed: more than anyone counts seeds, so that no round draws as another seed's does."""
LABEL = re.compile(r"[A-Za-z0-9._+-]+")
NO_AT = "`@` stands in the names that `repeat:` and `matrix:` make alone"


Variant = dict[str, tuple[str, Any, Key]]
"""Field -> (label, value, key of the value in the recipe as written)."""


class Carry(Section):
    """What a round takes from the round before."""

    first: str = field(..., "what the first round takes: a reference to something outside the block")
    then: str = field(..., "what each next round takes: the stage of the block, of the round before")


class Repeat(Section):
    """A block of stages that is run several times."""

    times: int = field(..., "rounds", unit="rounds", ge=1)
    carry: dict[str, Carry] = field({}, "name -> what it means in the first round and in the next ones")
    matrix: Any = field(
        None, "`seed` of all its stages, or stage.field -> values: a chain of rounds for each combination"
    )
    stages: dict[str, dict[str, Any] | None] = field(..., "name -> the stage's fields, as in the recipe")


def unroll(document: Document) -> Document:
    """The recipe without `repeat` and `matrix`. RecipeError, at its line, for what can't be unrolled.

    Values for one unrolled stage (`--set dpo@2.beta=0.1`) are laid over it here.
    """
    stages = document.values.get("stages")
    if not isinstance(stages, dict):
        return document  # refused where the recipe is validated
    made = replace(document, values={**document.values, "stages": {}}, places=dict(document.places), scopes={})
    _check_names(document, stages, ("stages",))
    for name, values in stages.items():
        if name == REPEAT:
            for key, block in _blocks(document, values):
                _unroll_block(document, made, key, block)
        else:
            _unroll_stage(document, made, ("stages", name), name, values, None, {}, {})
    for assignment, where in document.later:
        _assign_later(made, assignment, where)
    return made


def _check_names(document: Document, stages: Mapping[str, Any], key: Key) -> None:
    for name in stages:
        if "@" in name:
            raise RecipeError(f"{name!r} is no name: {NO_AT}", where=document.place(*key, name))


def _blocks(document: Document, values: Any) -> Iterator[tuple[Key, Repeat]]:
    """Each block with its key; a lone mapping is a list of one."""
    key: Key = ("stages", REPEAT)
    listed = isinstance(values, list) and len(values) > 0
    for place, block in enumerate(values if listed else [values]):
        at = (*key, place) if listed else key
        if not isinstance(block, dict):
            what = "`repeat` is a mapping of `times`, `carry` and `stages`, or a list of them"
            raise RecipeError(what, where=document.place(*at))
        yield at, validate(Repeat, block, document, at)


def _unroll_block(document: Document, made: Document, key: Key, block: Repeat) -> None:
    """The block's stages, round by round."""
    if not block.stages:
        raise RecipeError("`repeat.stages` is empty", where=document.place(*key, "stages"))
    _check_names(document, block.stages, (*key, "stages"))
    _check_block(document, made, key, block)
    for stage, name in itertools.product(block.stages, block.carry):
        made.places[carry_key(Scope(stage, 1, {}, {}), name)] = document.place(*key, "carry", name, "first")
    first = {name: _first(document, (*key, "carry", name), carry) for name, carry in block.carry.items()}
    chains = _chains(document, key, block)
    for turn, chain in itertools.product(range(1, block.times + 1), chains):
        labels = "".join(f"@{path}={label}" for path, (label, _, _) in chain.items())
        before = {name: f"{carry.then}@{turn - 1}{labels}" for name, carry in block.carry.items()}
        names = {name: f"{name}@{turn}{labels}" for name in block.stages} | (first if turn == 1 else before)
        for name, values in block.stages.items():
            _unroll_stage(document, made, (*key, "stages", name), name, values, turn, names, chain)


def _chains(document: Document, key: Key, block: Repeat) -> list[Variant]:
    """The combinations of the block's own matrix; its fields are `seed` and `stage.field`."""
    if block.matrix is None:
        return [{}]
    chains = _variants(document, (*key, MATRIX), {**block.stages, MATRIX: block.matrix})
    for path in block.matrix:
        stage, dot, inner = path.partition(".")
        where = document.place(*key, MATRIX, path)
        if path != SEED and not (dot and stage in block.stages):
            what = f"`matrix.{path}`: a block's matrix is of `seed` and of its stages' fields"
            raise RecipeError(what, where=where, mend=f"such as {next(iter(block.stages))}.{stage}")
        for name, values in block.stages.items() if path == SEED else [(stage, block.stages[stage])]:
            own = inner or SEED
            if isinstance(values, dict) and (own in values or own in (values.get(MATRIX) or {})):
                what = f"`{own}` of `{name}` is set, and in the block's matrix too"
                raise RecipeError(what, where=where, mend="take one of the two out")
    return chains


def _check_block(document: Document, made: Document, key: Key, block: Repeat) -> None:
    """Names that would mean two things, and a carry that leads nowhere."""
    outside = {*document.values["stages"], *(scope.base for scope in made.scopes.values())} - {REPEAT}
    for name in block.stages:
        if name == REPEAT:
            what = "a block in a block can't be unrolled"
            raise RecipeError(what, where=document.place(*key, "stages", name), mend="write its stages into one block")
        if name in outside:
            what = f"`{name}` is a stage inside of `repeat` and outside"
            raise RecipeError(what, where=document.place(*key, "stages", name), mend="give one of them another name")
    for name, carry in block.carry.items():
        where = (*key, "carry", name)
        if name in outside or name in block.stages:
            what = f"`carry.{name}` has the name of a stage"
            raise RecipeError(what, where=document.place(*where), mend="a name of its own, such as `policy`")
        if carry.then not in block.stages:
            what = f"`carry.{name}.then`: no stage `{carry.then}` in the block{meant(carry.then, block.stages)}"
            raise RecipeError(what, where=document.place(*where, "then"))
        if carry.first in block.stages or carry.first in block.carry:
            what = f"`carry.{name}.first`: `{carry.first}` is of the block, which has not run before the first round"
            raise RecipeError(what, where=document.place(*where, "first"), mend="name something outside the block")


def carry_key(scope: Scope, name: str) -> Key:
    """Under which the unrolled recipe keeps the place of what the carry `name` means in a stage: of its first round."""
    return ("carry", scope.base, scope.turn or 0, name)


def _first(document: Document, key: Key, carry: Carry) -> str:
    """The reference as the recipe's own stages would write it: a path of `--set` starts at the current folder."""
    if document.is_set(*key, "first") and carry.first.startswith(("./", "../")):
        file, colon, member = carry.first.partition(":")
        return f"{(Path.cwd() / file).resolve()}{colon}{member}"
    return carry.first


def _unroll_stage(
    document: Document,
    made: Document,
    key: Key,
    base: str,
    values: Any,
    turn: int | None,
    names: Mapping[str, str],
    chain: Variant,
) -> None:
    """The stage written at `key`, as many as its matrix has combinations, in the round `turn` of `chain`."""
    is_matrix = isinstance(values, dict) and MATRIX in values
    variants = _variants(document, (*key, MATRIX), values) if is_matrix else [{}]
    written = {k: v for k, v in values.items() if k != MATRIX} if isinstance(values, dict) else values
    for variant in variants:
        given = {**chain, **variant}
        labels = {path: given[path][0] for path in sorted(given, key=_seed_last)}
        parts = [] if turn is None else [str(turn)]
        name = "@".join([base, *parts, *(f"{path}={label}" for path, label in labels.items())])
        if len(name) > LONGEST_NAME:
            what = f"{name!r} is too long a name ({len(name)} characters, at most {LONGEST_NAME})"
            mend = "short names for the values: matrix: {data: {short: …, long: …}}"
            raise RecipeError(what, where=document.place(*key, MATRIX), mend=mend)
        if NAME.fullmatch(base) and not STAGE_NAME.fullmatch(name):  # a bad base is refused with the whole recipe
            path = next(path for path in labels if not STAGE_NAME.fullmatch(f"{base}@{path}=1"))
            what = f"`matrix.{path}`: {path!r} can't stand in a stage's name"
            outer, dot, inner = path.partition(".")
            mend = f"matrix: {{{outer}: {{one: {{{inner}: …}}, other: …}}}}" if dot else ""
            raise RecipeError(what, where=document.place(*given[path][2]), mend=mend)
        made.values["stages"][name] = own = copy.deepcopy(written)
        _copy_places(document, made, key, ("stages", name))
        if name == base:
            continue
        made.scopes[name] = Scope(base, turn, labels, names)
        if own is None:
            made.values["stages"][name] = own = {}
        if isinstance(own, dict):
            own.setdefault("stage", base)
            for path, value, origin in [
                *_of_chain(chain, base, turn),
                *((p, v, o) for p, (_, v, o) in variant.items()),
            ]:
                _set(document, own, path, value, origin)
                _copy_places(document, made, origin, ("stages", name, *path.split(".")))


def _of_chain(chain: Variant, base: str, turn: int | None) -> Iterator[tuple[str, Any, Key]]:
    """(field, value, key) of what the block's matrix says of this stage; a seed is another in every round."""
    for path, (_, value, origin) in chain.items():
        if path == SEED and isinstance(value, int) and turn is not None:
            yield SEED, value + SEEDS_A_ROUND * (turn - 1), origin
        elif path == SEED or path.startswith(f"{base}."):
            yield path.removeprefix(f"{base}."), value, origin


def _seed_last(path: str) -> tuple[bool, str]:
    return (path == SEED, path)


def _variants(document: Document, key: Key, values: Mapping[str, Any]) -> list[Variant]:
    """Every combination, fields by name and the seed last, the last one varying fastest."""
    matrix = values[MATRIX]
    if not isinstance(matrix, dict) or not matrix:
        what = "`matrix` is a mapping of fields to lists of values"
        raise RecipeError(what, where=document.place(*key), mend="matrix: {seed: [0, 1, 2], beta: [0.05, 0.1]}")
    for path in matrix:
        if path.partition(".")[0] == MATRIX or _reaches(values, path):
            what = f"`{path}` is set, and in the matrix too"
            raise RecipeError(what, where=document.place(*key, path), mend="take one of the two out")
    fields = sorted(matrix, key=_seed_last)
    choices = [_choices(document, (*key, path), path, matrix[path]) for path in fields]
    return [dict(zip(fields, chosen, strict=True)) for chosen in itertools.product(*choices)]


def _reaches(values: Any, path: str) -> bool:
    """Whether the value at the dotted path is written."""
    for part in path.split("."):
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True


def _choices(document: Document, key: Key, path: str, given: Any) -> list[tuple[str, Any, Key]]:
    """(label, value, key) of each value: a list is named by its values, a mapping by its keys."""
    if isinstance(given, dict):
        found = [(str(label), value, (*key, label)) for label, value in given.items()]
    elif isinstance(given, list):
        found = [(_label(value), value, (*key, place)) for place, value in enumerate(given)]
    else:
        what = f"`matrix.{path}` is neither a list of values nor a mapping of names to values"
        raise RecipeError(what, where=document.place(*key), mend=f"matrix: {{{path}: [{given}]}}")
    if not found:
        raise RecipeError(f"`matrix.{path}` is empty", where=document.place(*key), mend=f"leave `{path}` out")
    seen: set[str] = set()
    for label, value, at in found:
        if not LABEL.fullmatch(label):
            what = f"`matrix.{path}`: {str(value)[:60]!r} can't stand in a stage's name"
            mend = f"give it one of letters, digits, '.', '_', '+' and '-': matrix: {{{path}: {{one: …, other: …}}}}"
            raise RecipeError(what, where=document.place(*at), mend=mend)
        if label in seen:
            raise RecipeError(f"`matrix.{path}`: {label} is there twice", where=document.place(*at))
        seen.add(label)
    return found


def _label(value: Any) -> str:
    """`0.05`, `1e-5`, `true`, `null`, `ipo`; what has no such name gives what is no label."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return re.sub(r"e\+?(-?)0*", r"e\1", repr(value))
    return str(value) if isinstance(value, str | int) else ""


def _set(document: Document, own: dict[str, Any], path: str, value: Any, origin: Key) -> None:
    *outer, last = path.split(".")
    node = own
    for part in outer:
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise RecipeError(f"`matrix.{path}`: `{part}` holds no fields", where=document.place(*origin))
    node[last] = copy.deepcopy(value)


def _copy_places(document: Document, made: Document, old: Key, new: Key) -> None:
    """The lines of all that is written at `old`, for what stands at `new`."""
    inside = {(*new, *key[len(old) :]): place for key, place in document.places.items() if key[: len(old)] == old}
    made.places |= {new: document.place(*old)} | inside


def _assign_later(made: Document, assignment: str, where: str) -> None:
    """`dpo@2.beta=0.1`: the name may hold `=` and `.`, so it is found by the names there are."""
    stages = made.values["stages"]
    name = max((name for name in stages if assignment.startswith(f"{name}.")), key=len, default="")
    if not name:
        raise RecipeError(f"{assignment!r} begins with no stage{meant(assignment, made.scopes)}", where=where)
    assign_to(made, ("stages", name), assignment[len(name) + 1 :], where)


def meaning(document: Document, stage: str, reference: str) -> tuple[str, ...]:
    """The stages that `reference` means where `stage` takes it, in the recipe's order; itself where it is no such name.

    In a round its own names come first. Of a repeated stage the bare name means the last round, `dpo@*` every one; of
    a matrix it means all members, `dpo@beta=0.1` those with this value. `stage` is "" for what is named from outside.
    """
    scope = document.scopes.get(stage)
    base, at, tail = reference.partition("@")
    if scope is not None and base in scope.names and not re.match(r"[0-9*]", tail):
        reference = scope.names[base] + at + tail
    stages = document.values["stages"]
    if reference in stages:
        return (reference,)
    base, *parts = reference.split("@")
    members = [(name, each) for name, each in document.scopes.items() if each.base == base]
    settings = {part for part in parts if "=" in part}
    turns = [part for part in parts if "=" not in part]
    last = max((each.turn for _, each in members if each.turn is not None), default=None)
    found = tuple(
        name
        for name, each in members
        if (turns in ([str(each.turn)], ["*"]) if turns else each.turn == last)
        and settings <= {f"{path}={label}" for path, label in each.settings.items()}
    )
    return found or (reference,)
