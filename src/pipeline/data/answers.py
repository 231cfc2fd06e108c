"""Answers to one prompt, gathered from rows of any layout, and the pairs of them that are compared. Needs no torch.

A demonstration holds one answer, a preference row two. What answers the same messages stands together, wherever it was
written. Of answers whose text is the same, white space around it aside, the first one counts.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pipeline.data.files import BadRows, Row, left_out
from pipeline.data.formats import PAIRS, canonical_rows, named_format, recognise, to_layout
from pipeline.data.messages import Message
from pipeline.data.preferences import TIE
from pipeline.data.ranked import as_pairs
from pipeline.data.sources import BUILT_IN, check_rows_entry, read_source_rows
from pipeline.data.tools import text_of
from pipeline.errors import ConfigError, DataError
from pipeline.recipe import DataEntry

Pair = tuple[int, int]
"""Places of two answers in their group; the first is shown, and asked about, as the first."""


@dataclass
class Answers:
    """A prompt and different answers to it."""

    prompt: list[Message]
    texts: list[str] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    """Of each answer the number of the source that it is from."""
    was_better: set[tuple[str, str]] = field(default_factory=set)
    """(the better, the worse) of preference and ranked rows, as they were labelled before."""

    def add(self, text: str, source: int) -> None:
        """One more answer, unless it is there."""
        if text.strip() not in (each.strip() for each in self.texts):
            self.texts.append(text)
            self.sources.append(source)


def read_answers(entries: Sequence[DataEntry], say: Callable[[str], None] = lambda text: None) -> list[Answers]:
    """The prompts of all rows, in the order in which they come first, with the answers to each.

    Raises DataError (file and line) for a bad row and for one without an answer, ConfigError where no prompt has two.
    """
    found: dict[str, Answers] = {}
    for number, entry in enumerate(entries):
        check_rows_entry(entry, ["weight", "deduplicate"], "does nothing where answers are compared: each counts once")
        for prompt, texts, better in itertools.islice(_rows(entry, say), entry.limit):
            group = found.setdefault(json.dumps(prompt, sort_keys=True), Answers(prompt))
            for text in texts:
                group.add(text, number)
            group.was_better.update(better)
    if not any(len(group.texts) > 1 for group in found.values()):
        raise ConfigError(
            f"none of {len(found):,} prompts has two different answers",
            where=entries[0].source,
            mend="a sample stage with num_generations of 2 or more and keep: all, or preference rows",
        )
    return list(found.values())


READER = "who compares two"
Read = tuple[list[Message], list[str], list[tuple[str, str]]]
"""(prompt, answers, which of two of them was labelled the better one: (the better, the worse))."""


def _rows(entry: DataEntry, say: Callable[[str], None]) -> Iterator[Read]:
    bad = BadRows(entry.max_bad_rows)
    if entry.source in BUILT_IN:
        for rows, _ in canonical_rows(entry, "preference", "train", bad, say):
            yield from (_of_pair(row, entry.source) for row in rows)
        return
    chosen = named_format(entry)
    for row, where in read_source_rows(entry, bad):
        try:
            chosen = chosen or recognise(row, where)
            found = _answers_in(row, chosen, where)
        except DataError as error:
            bad(error)
            continue
        yield found
    if bad.first:
        say(left_out(entry.source, bad.count, bad.first))


def _of_pair(pair: Row, where: str) -> Read:
    chosen, rejected = (text_of(pair[side], READER, where) for side in ("chosen", "rejected"))
    return pair["prompt"], [chosen, rejected], [(chosen, rejected)] if pair["preference"] > TIE else []


def _answers_in(row: Row, chosen: str, where: str) -> Read:
    if chosen in PAIRS:
        return _of_pair(to_layout(row, chosen, "preference", where)[0], where)
    if chosen == "ranked":
        listed = to_layout(row, chosen, "ranked", where)[0]
        texts = [text_of(answer, READER, where) for answer in listed["answers"]]
        pairs = [(pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in as_pairs(listed)]
        return listed["prompt"], texts, pairs
    if chosen == "unpaired":
        lone = to_layout(row, chosen, "unpaired", where)[0]
        return lone["prompt"], [text_of(lone["completion"], READER, where)], []
    answered = to_layout(row, chosen, "prompt", where)[0]
    if not answered["reference"].strip():
        raise DataError("a row without an answer", where=where, mend="take it out, or let `sample` answer it")
    return answered["prompt"], [answered["reference"]], []


def pairs_of(group: Answers, number: int, which: Literal["one", "all"], seed: int) -> list[Pair]:
    """The pairs of a group that are compared: one, or all; of several sources only those between two of them.

    Which one, and which side is the first, is drawn by the seed and the group's number.
    """
    possible = list(itertools.combinations(range(len(group.texts)), 2))
    if len(set(group.sources)) > 1:
        possible = [(a, b) for a, b in possible if group.sources[a] != group.sources[b]]
    draw = random.Random(f"{seed} pairs {number}")
    if which == "one" and possible:
        possible = [draw.choice(possible)]
    return [pair if draw.random() < 0.5 else pair[::-1] for pair in possible]
