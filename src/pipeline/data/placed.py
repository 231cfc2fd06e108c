"""A row of any canonical layout: its prompt, its answers, and which rows of many are there twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.data.files import Row
from pipeline.data.messages import Message, words
from pipeline.recipe import DataEntry


@dataclass(frozen=True)
class Placed:
    """A row in its canonical layout, and where it stands."""

    row: Row
    where: str

    @property
    def prompt(self) -> list[Message]:
        """What is answered."""
        found: list[Message] = self.row["messages"][:-1] if "messages" in self.row else self.row["prompt"]
        return found

    @property
    def answers(self) -> dict[str, list[Message]]:
        """What the answer is called -> the answer."""
        if "messages" in self.row:
            return {"answer": self.row["messages"][-1:]}
        if "reference" in self.row and "answers" not in self.row:
            text = self.row["reference"]
            return {"reference": [{"role": "assistant", "content": text}]} if text else {}
        ranked = {f"answer {rank}": answer for rank, answer in enumerate(self.row.get("answers", ()), start=1)}
        return ranked or {name: self.row[name] for name in ("chosen", "rejected", "completion") if name in self.row}

    @property
    def contents(self) -> tuple[str, ...]:
        """What was said, system messages left out: they are the same in many rows."""
        answers = [message for answer in self.answers.values() for message in answer]
        return tuple(words(each) for each in [*self.prompt, *answers] if each["role"] != "system")

    @property
    def asked(self) -> str:
        """The prompt as one text, system messages left out."""
        return "\n".join(words(message) for message in self.prompt if message["role"] != "system")

    @property
    def told_apart_by(self) -> tuple[str, ...]:
        """What rows that are alike have to be alike in one by one: the end of the question, and every answer. Beside a
        long passage that both are about, neither counts for much in the whole."""
        question = self.prompt[-1]["content"].strip().split("\n\n")[-1] if self.prompt else ""
        return (question, *("\n".join(map(words, answer)) for answer in self.answers.values()))

    @property
    def key(self) -> str:
        """The same for rows that are equal to the letter, whatever their kind or margin."""
        return json.dumps([self.prompt, *self.answers.values(), self.row.get("label")])


def repeated(rows: Sequence[Placed], how: Literal["exact", "near"]) -> dict[int, int]:
    """Each row that is equal to an earlier one, or like one, and which; rows of other labels are not."""
    if how == "exact":
        seen: dict[str, int] = {}
        return {place: seen[row.key] for place, row in enumerate(rows) if seen.setdefault(row.key, place) != place}
    from pipeline.data.duplicates import near_duplicates

    found: dict[int, int] = {}
    for label in (None, True, False):
        places = [place for place, row in enumerate(rows) if row.row.get("label") is label]
        own = [rows[place] for place in places]
        alike = near_duplicates(["\n".join(row.contents) for row in own], [row.told_apart_by for row in own])
        found |= {places[place]: places[match.place] for place, match in alike.items()}
    return dict(sorted(found.items()))


def without_repeats(
    entries: Sequence[DataEntry], sources: Sequence[list[Placed]], say: Callable[[str], None]
) -> list[list[Placed]]:
    """The rows of each source; where it says `deduplicate`, without those that an earlier row of it or of a source
    before it repeats. `say` is told how many that are."""
    together = [row for source in sources for row in source]
    ways = {entry.deduplicate for entry in entries if entry.deduplicate is not None}
    repeats = {how: repeated(together, how) for how in ways}
    kept: list[list[Placed]] = []
    start = 0
    for entry, source in zip(entries, sources, strict=True):
        like = repeats[entry.deduplicate] if entry.deduplicate is not None else {}
        out = [place for place in range(len(source)) if start + place in like]
        if out:
            first, other = source[out[0]].where, together[like[start + out[0]]].where
            what = f"{len(out):,} of {len(source):,} rows are left out as repeats ({entry.deduplicate})"
            say(f"{entry.source}: {what}, the first at {first}, like {other}")
        dropped = set(out)
        kept.append([row for place, row in enumerate(source) if place not in dropped])
        start += len(source)
    return kept
