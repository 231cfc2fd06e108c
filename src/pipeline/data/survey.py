"""What a stage's rows are like before anything is trained on them: how many and how long, what is there twice, and what
is measured on as well.

Needs a tokenizer and no model. Every count comes with its share and its first examples, by file and line.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data.chat import encode_messages, encode_prompt
from pipeline.data.duplicates import near_matches, shared_runs
from pipeline.data.formats import placed_rows, recognise
from pipeline.data.placed import Placed, repeated
from pipeline.data.sources import BUILT_IN, Split, read_source_rows
from pipeline.recipe import DataEntry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Found = dict[str, Any]

EXAMPLES = 3
LAYOUTS = {"demonstrations": "messages", "preferences": "preference", "prompts": "prompt"}
"""What rows are for -> the layout they are read in."""
QUANTILES = {"p10": 0.1, "median": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(frozen=True)
class Others:
    """Rows that something is measured on."""

    name: str
    rows: Sequence[Placed]


def format_of(entry: DataEntry) -> str:
    """The format of an entry's rows: its own word, or by the first row."""
    if entry.source in BUILT_IN:
        return "built in"
    if entry.format is not None:
        return entry.format
    first = next(read_source_rows(entry), None)
    return "nothing" if first is None else recognise(*first)


@dataclass(frozen=True)
class Source:
    """The rows of one entry, once each whatever their weight."""

    entry: DataEntry
    format: str
    train: list[Placed]
    held_out: list[Placed]

    def summary(self) -> Found:
        """Its format, weight, and how many rows are trained on and held out."""
        counts = {"rows": len(self.train), "held_out": len(self.held_out)}
        return {"source": self.entry.source, "format": self.format, "weight": self.entry.weight, **counts}


def read_source(entry: DataEntry, purpose: str, held_out: float) -> Source:
    """The rows of one entry for one purpose of `LAYOUTS`, divided at a share `held_out`."""
    chosen = format_of(entry)
    layout = LAYOUTS[purpose]
    if purpose == "preferences" and chosen in ("unpaired", "ranked"):
        layout = chosen

    def placed(split: Split) -> list[Placed]:
        rows = placed_rows(entry, layout, split, held_out, lambda text: None)
        return [Placed(row, where) for row, where in rows]

    return Source(entry, chosen, placed("train"), placed("held_out") if held_out else [])


def conversations(rows: Sequence[Placed]) -> Found:
    """Messages by role, rows by the roles in them in order, and rows by how often the user speaks."""
    roles: Counter[str] = Counter()
    orders: Counter[str] = Counter()
    turns: Counter[int] = Counter()
    for row in rows:
        said = [message["role"] for message in row.prompt]
        said += ["assistant"] if row.answers else []
        roles.update(said)
        orders[" ".join(said)] += 1
        turns[said.count("user")] += 1
    by_turns = {str(count): turns[count] for count in sorted(turns)}
    return {"roles": dict(roles.most_common()), "orders": dict(orders.most_common(8)), "turns": by_turns}


def lengths(
    rows: Sequence[Placed],
    tokenizer: PreTrainedTokenizerFast,
    longest: int | None,
) -> Found:
    """Tokens of prompts, of each answer with its stop token, and of the longest whole row: mean and quantiles; how many
    rows are longer than `longest`. A prompt is all that stands before the (last) answer, the template's words too."""
    found: dict[str, list[int]] = {"prompt": []}
    whole = []
    for row in rows:
        prompt = len(encode_prompt(tokenizer, row.prompt))
        found["prompt"].append(prompt)
        lengths_here = [prompt]
        for name, answer in row.answers.items():
            length = len(encode_messages(tokenizer, [*row.prompt, *answer]).input_ids)
            found.setdefault(name, []).append(length - prompt)
            lengths_here.append(length)
        whole.append(max(lengths_here))
    figures: Found = {name: spread(values) for name, values in (found | {"row": whole}).items()}
    if longest is None:
        return {"figures": figures}
    over = [place for place, length in enumerate(whole) if length > longest]
    examples = [{"row": rows[place].where, "tokens": whole[place]} for place in over[:EXAMPLES]]
    past = counted(len(over), len(rows)) | {"examples": examples}
    return {"figures": figures, "max_length": longest, "too_long": past}


def spread(values: Sequence[int]) -> dict[str, float]:
    """Mean, smallest, largest and quantiles; empty for no values."""
    if not values:
        return {}
    quantiles = np.quantile(values, list(QUANTILES.values()), method="lower").tolist()
    named = dict(zip(QUANTILES, map(int, quantiles), strict=True))
    return {"mean": round(float(np.mean(values)), 1), "min": min(values), **named, "max": max(values)}


def counted(count: int, total: int) -> Found:
    """How many, and their share."""
    return {"count": count, "share": round(count / total, 4) if total else 0.0}


def repeats(rows: Sequence[Placed]) -> Found:
    """Rows that are equal to an earlier one, that ask what an earlier one asks, and that are nearly equal to one.

    "near" counts the exact ones too: it is what one would leave out.
    """

    prompts: dict[str, int] = {}
    asked = [json.dumps(row.prompt) for row in rows]
    again = {place: prompts[key] for place, key in enumerate(asked) if prompts.setdefault(key, place) != place}
    return {
        "exact": listed(repeated(rows, "exact"), rows, rows),
        "same prompt": listed(again, rows, rows),
        "near": listed(repeated(rows, "near"), rows, rows),
    }


def listed(like: dict[int, int], rows: Sequence[Placed], others: Sequence[Placed]) -> Found:
    """How many of `rows` are like one of `others`, and the first of them with their likes."""
    examples = [{"row": rows[place].where, "like": others[other].where} for place, other in like.items()]
    return counted(len(like), len(rows)) | {"examples": examples[:EXAMPLES]}


def overlap(rows: Sequence[Placed], others: Others) -> Found:
    """How many of the rows that are measured on share a run of 13 words with a row that is trained on, and how many ask
    nearly what one asks; the shares are of the rows that are measured on."""

    touched = shared_runs([row.contents for row in others.rows], [row.contents for row in rows])
    near = near_matches([row.asked for row in others.rows], [row.asked for row in rows])
    return {
        "with": others.name,
        "rows": len(others.rows),
        "shared runs": listed(touched.matches, others.rows, rows) | {"too_short": touched.too_short},
        "near prompts": listed({place: match.place for place, match in near.items()}, others.rows, rows),
    }
