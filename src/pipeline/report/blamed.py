"""Answers that `llmpipe blame --keep` has kept in a run's folder: which stage raised each token most."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.report.answers import cut
from pipeline.report.records import Row, RunRecord, read_rows

FILE = "blame.jsonl"
"""In the run's folder, an object a line as `llmpipe blame --json` prints it."""
COLOURS = 8


@dataclass(frozen=True)
class Piece:
    """Tokens one after another that one stage raised most; the figures of each stand in `title`."""

    text: str
    colour: int
    """From 1, of the page's palette; 0 where every stage lowered it."""
    title: str


@dataclass(frozen=True)
class Blamed:
    """One answer. `stages`: (reference, colour, tokens it owns, nats it added to the whole answer), the oldest first;
    `rows`: (reference, where, what it shares with the answer, text) of the nearest training rows."""

    model: str
    asked: str
    prompt: str
    pieces: tuple[Piece, ...]
    stages: tuple[tuple[str, int, int, float], ...]
    rows: tuple[tuple[str, str, str, str], ...]
    caution: str


def keep(folder: Path, found: Mapping[str, Any]) -> None:
    """Add an answer to those of the run in `folder`, in place of an older one to the same question of that stage."""
    path = folder / FILE
    rows = [row for row in read_rows(path) if key_of(row) != key_of(found)]
    partial = path.with_name(f".{FILE}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in (*rows, found))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def key_of(row: Row) -> tuple[Any, ...]:
    """What makes two results answers to one question: the model's name, what was asked, the answer if one was given."""
    return (row["model"], row["prompt"], row["system"], None if row["generated"] else row["answer"])


def blamed(run: RunRecord) -> tuple[Blamed, ...]:
    """What is kept of the models that stand; an answer of a model that was made again since is left out."""
    standing = {each.manifest.get("fingerprint") for each in run.stages}
    return tuple(_blamed(row) for row in read_rows(run.folder / FILE) if row["fingerprint"] in standing)


def _blamed(row: Row) -> Blamed:
    names = [stage["reference"] for stage in row["stages"]]
    pieces = [
        Piece(token["text"], 0 if token["owner"] is None else token["owner"] % COLOURS + 1, _title(names, token))
        for token in row["tokens"]
    ]
    return Blamed(
        row["model"],
        row["asked_in"],
        cut(row["prompt"]),
        tuple(pieces),
        tuple(
            (stage["reference"], place % COLOURS + 1, stage["tokens"], stage["gain"])
            for place, stage in enumerate(row["stages"])
        ),
        tuple(
            (each["stage"], near["where"], near["shared"], cut(near["text"]))
            for each in row["nearest"]
            for near in each["rows"]
        ),
        row["caution"],
    )


def _title(names: list[str], token: Mapping[str, Any]) -> str:
    figures = zip(names, token["logprobs"], token["gains"], strict=True)
    return "\n".join(f"{name}: log p {logprob:z.2f} ({gain:+z.2f})" for name, logprob, gain in figures)
