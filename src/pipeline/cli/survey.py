"""`llmpipe preview --stats`: how many rows a stage has and how long, what is there twice or measured on as well."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from pipeline.cli.preview import inputs_of, node_of
from pipeline.cli.session import Session
from pipeline.errors import ConfigError
from pipeline.recipe import DataEntry, is_data

if TYPE_CHECKING:
    from pipeline.data.placed import Placed
    from pipeline.data.survey import Others

PURPOSES = {"demonstrations": "demonstrations", "preferences": "preferences", "": "prompts"}
"""What a stage trains on, as its file says -> what its `data` is read for."""
WAYS = {
    "exact": "equal to an earlier row",
    "same prompt": "with an earlier row's prompt",
    "near": "like an earlier row (Jaccard of word 5-grams ≥ 0.8)",
    "shared runs": "with 13 words in a row that a row to train on has too",
    "near prompts": "with nearly the prompt of a row to train on",
}


def show_survey(session: Session, name: str, *, as_json: bool) -> None:
    """The statistics of the stage `name`, on stdout.

    Raises ConfigError for a stage without rows, MissingInputError while no tokenizer of it stands.
    """
    found = survey(session, name)
    if as_json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return
    for line in _lines(found):
        print(line)


def survey(session: Session, name: str) -> dict[str, Any]:
    """All of it as one object: sources, conversations, tokens, repeats, overlaps."""
    node = node_of(session, name)
    name = node.name
    config = node.config.model_dump()
    data: tuple[DataEntry, ...] | None = dict(node.config).get("data")
    if not data or not is_data(node.stage.config, "data") or node.stage.kind in ("tokens", "evaluation"):
        raise ConfigError(
            f"{node.stage.type} has no rows to count",
            where=f"{session.recipe.name}: {name}",
            mend="name a stage with `data` of rows",
        )
    inputs = inputs_of(session, node)
    from pipeline.data import survey as rows_of
    from pipeline.data.places import naming_rows
    from pipeline.data.tokenizers import CHATML, load_tokenizer

    tokenizer = load_tokenizer(next(each for each in inputs.values() if each is not None).model)
    if config.get("chat_template"):
        tokenizer.chat_template = CHATML if config["chat_template"] == "chatml" else config["chat_template"]
    purpose = PURPOSES.get(node.stage.trains_on, "prompts")
    held_out = config.get("held_out") or 0.0
    _say(f"{name}: reading rows")
    sources = [rows_of.read_source(entry, purpose, held_out) for entry in data]
    rows = [row for source in sources for row in source.train]
    found: dict[str, Any] = {"stage": name, "sources": [source.summary() for source in sources]}
    found |= rows_of.conversations(rows)
    _say(f"{name}: tokens of {len(rows):,} rows")
    limit = config.get("max_length") or config.get("max_prompt_length")
    with naming_rows(node.config):
        found["tokens"] = rows_of.lengths(rows, tokenizer, limit)
    _say(f"{name}: repeats and overlaps")
    found["repeats"] = rows_of.repeats(rows)
    own = rows_of.Others(f"held-out rows of {name}.data", [row for source in sources for row in source.held_out])
    found["overlaps"] = [rows_of.overlap(rows, others) for others in _measured_on(session, own)]
    return found


def _measured_on(session: Session, own: Others) -> list[Others]:
    """The rows that the stage holds out itself, and those of every eval in the recipe; the same rows once.

    `reward_bench` is measured whole, whatever share of other rows is held out.
    """
    from pipeline.data.survey import Others, read_source

    named: dict[str, list[Placed]] = {own.name: list(own.rows)}
    for node in session.recipe.nodes.values():
        if node.stage.kind == "evaluation":
            config = dict(node.config)
            share = config.get("held_out") or 0.0
            for field in (each for each in config if is_data(node.stage.config, each)):
                purpose = "preferences" if field in ("preferences", "reward_bench") else "prompts"
                read = [read_source(entry, purpose, share) for entry in config[field] or ()]
                rows = [row for source in read for row in source.held_out]
                if field == "reward_bench":
                    rows += [row for source in read for row in source.train]
                named[f"{node.name}.{field}"] = rows
    found: dict[tuple[str, ...], Others] = {}
    for name, rows in named.items():
        places = tuple(row.where for row in rows)
        known = found.get(places)
        if rows:
            found[places] = Others(f"{known.name}, {name}" if known else name, known.rows if known else rows)
    return list(found.values())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _lines(found: dict[str, Any]) -> list[str]:
    """The survey as text, a line a fact."""
    lines = []
    for each in found["sources"]:
        weight = "" if each["weight"] == 1 else f", weight {each['weight']:g}"
        lines.append(f"{each['source']}: {each['rows']:,} {each['format']} rows, {each['held_out']:,} held out{weight}")
    lines += ["", "roles    " + "  ".join(f"{role} {count:,}" for role, count in found["roles"].items())]
    lines.append("turns    " + "  ".join(f"{turns}: {_rows(count)}" for turns, count in found["turns"].items()))
    lines += [f"         {_rows(count)}: {order}" for order, count in found["orders"].items()]
    lines += [
        "",
        f"{'tokens':<12}" + "".join(f"{name:>9}" for name in next(iter(found["tokens"]["figures"].values()), {})),
    ]
    for name, figures in found["tokens"]["figures"].items():
        lines.append(f"{name:<12}" + "".join(f"{value:>9,}" for value in figures.values()))
    if "too_long" in found["tokens"]:
        long = found["tokens"]["too_long"]
        lines.append(
            f"{_rows(long['count'])} ({long['share']:.1%}) longer than {found['tokens']['max_length']:,} tokens"
        )
        lines += [f"         {each['row']}: {each['tokens']:,} tokens" for each in long["examples"]]
    lines += ["", "to train on"]
    for way, each in found["repeats"].items():
        lines += _counted(way, each)
    for each in found["overlaps"]:
        lines += ["", f"{each['with']}: {_rows(each['rows'])}"]
        lines += _counted("shared runs", each["shared runs"])
        if each["shared runs"]["too_short"]:
            lines.append(
                f"         says nothing of {_rows(each['shared runs']['too_short'])} without 13 words in a row"
            )
        lines += _counted("near prompts", each["near prompts"])
    return lines


def _counted(way: str, found: dict[str, Any]) -> list[str]:
    head = f"{_rows(found['count'])} ({found['share']:.1%}) {WAYS[way]}"
    return [head, *(f"         {each['row']} like {each['like']}" for each in found["examples"])]


def _rows(count: int) -> str:
    return f"{count:,} row" + ("" if count == 1 else "s")
