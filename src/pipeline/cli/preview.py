"""`llmpipe preview`: rows of a stage as tokens, with ids and the loss mask, before anything is trained."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pipeline.artifacts import Artifact
from pipeline.cli.session import Session
from pipeline.errors import ConfigError, MissingInputError
from pipeline.graph import Node
from pipeline.reading import meant
from pipeline.roles import input_of

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerFast

    from pipeline.data.shown import ShownRow


def show_rows(session: Session, name: str, *, rows: int, ids: bool, as_json: bool) -> None:
    """The first `rows` rows of the stage `name`. Raises MissingInputError while no tokenizer of it stands."""
    node = node_of(session, name)
    if node.stage.preview is None:
        raise ConfigError(f"{node.stage.type} has no rows to show", where=f"{session.recipe.name}: {name}")
    inputs = inputs_of(session, node)
    from pipeline.data.places import naming_rows
    from pipeline.data.tokenizers import load_tokenizer

    with naming_rows(node.config):
        shown = node.stage.preview(node.config, inputs, rows)
    tokenizer = load_tokenizer(next(each for each in inputs.values() if each is not None).model)
    if as_json:
        print(json.dumps([_plain(row, tokenizer) for row in shown], indent=1))
        return
    _print(shown, tokenizer, ids)


def node_of(session: Session, name: str) -> Node:
    """The one stage that a user means by `name`; ConfigError for none and for several."""
    nodes, found = session.recipe.nodes, session.recipe.select(name)
    if len(found) != 1:
        what = f"`{name}` is {len(found)} stages: {', '.join(found)}" if found else f"no stage `{name}`"
        raise ConfigError(f"{what}{'' if found else meant(name, nodes)}", where=session.recipe.name)
    return nodes[found[0]]


def inputs_of(session: Session, node: Node) -> dict[str, Artifact | None]:
    """What stands of each role that rows hang on; for a model, the nearest ancestor that has its tokenizer."""
    found: dict[str, Artifact | None] = {}
    for role, kind in node.stage.inputs.items():
        refs = node.inputs.get(role)
        if kind == "reward-model" or "." in role or not refs:
            found[role] = None
            continue
        found[role] = _standing(session, refs[0], kind)
    if not any(found.values()):
        raise MissingInputError(
            f"nothing of what `{node.name}` takes stands yet, so there is no tokenizer",
            where=session.recipe.name,
            mend=f"llmpipe run{session.shown_recipe} --until {_first(session, node)}",
        )
    return found


def _standing(session: Session, ref: str, kind: str) -> Artifact | None:
    nodes = session.recipe.nodes
    while ref in nodes:
        artifact = session.store.find(session.recipe.run, ref)
        if artifact is not None:
            return artifact
        node = nodes[ref]
        role = next((role for role in ("init", "tokens", "tokenizer") if node.inputs.get(role)), None)
        if role is None:
            return None
        ref, kind = node.inputs[role][0], node.stage.inputs[role]
    return input_of(session.store, ref, kind)


def _first(session: Session, node: Node) -> str:
    return session.recipe.ancestors(node.name)[0]


def _plain(row: ShownRow, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    tokens = [tokenizer.decode([token]) for token in row.ids]
    return {"title": row.title, "ids": list(row.ids), "tokens": tokens, "is_trained": list(row.is_trained)}


def _print(shown: list[ShownRow], tokenizer: PreTrainedTokenizerFast, ids: bool) -> None:
    from rich.console import Console

    console = Console()
    console = console if console.is_terminal else Console(width=120)
    for row in shown:
        trained = sum(row.is_trained)
        console.print(f"{row.title}: {len(row.ids)} tokens, {trained} trained", style="bold", highlight=False)
        console.print(_text(row, tokenizer, ids, plain=not console.is_terminal))
        console.print()


def _text(row: ShownRow, tokenizer: PreTrainedTokenizerFast, ids: bool, *, plain: bool) -> Text:
    """The row's tokens, each with its id behind it if asked; what is trained in green, without colours in « »."""
    from rich.text import Text

    text = Text()
    for place, (token, is_trained) in enumerate(zip(row.ids, row.is_trained, strict=True)):
        piece = tokenizer.decode([token]).replace("\n", "⏎").replace("\t", "⇥")
        begins = is_trained and (place == 0 or not row.is_trained[place - 1])
        ends = is_trained and (place + 1 == len(row.ids) or not row.is_trained[place + 1])
        shade = "green" if is_trained else "dim"
        style = f"{shade} underline" if place % 2 else shade  # where one token ends and the next begins
        text.append("«" if plain and begins else "")
        text.append(piece, style=style)
        text.append(f"·{token} " if ids else "", style="dim")
        text.append("»" if plain and ends else "")
    return text
