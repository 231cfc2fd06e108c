"""The two passes over a corpus in units: what it holds, and its tokens; here, or by workers that read for themselves.

Either way the results come in the corpus' order and are the same. A unit that is more than a worker's share of all is
read here, and in the second pass handed out in batches: one worker by itself would take longer with it than all others.
"""

from __future__ import annotations

import itertools
import os
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.corpus import LeftOut, Piece, Sample, Survey, pieces
from pipeline.data.encoding import BulkEncoder, encode_by, encode_here, encoder_of
from pipeline.data.files import BadRows
from pipeline.data.shards import ShardWriter, TokenFile
from pipeline.data.units import Unit, place_in_file
from pipeline.data.workers import Crew, Tell, in_order, result_of
from pipeline.errors import DataError

SIDES = ("train.ds", "valid.ds")


@dataclass(frozen=True)
class Hands:
    """Who does the work, and how it is heard of."""

    crew: Crew | None
    """None: it is done here."""
    tell: Tell
    """Told of bytes of text that are done, in whichever thread."""
    look_up: Callable[[], None]
    """Called often, in the main thread; may raise."""

    def here(self, done: int) -> None:
        """Told of bytes of text that are done here."""
        self.tell(done)
        self.look_up()

    def share_out(
        self, units: Sequence[Unit], first: int, call: Callable[[int], tuple[Any, ...]]
    ) -> Iterator[tuple[int, Future[Any] | None]]:
        """The place of each unit from the `first` on, in order, with what a worker makes of `call(place)` (a function
        and its arguments); None where it is to be done here."""
        crew, total = self.crew, sum(unit.bytes for unit in units[first:])

        def submit(place: int) -> Future[Any] | None:
            if crew is None or units[place].bytes * crew.count > total:
                return None
            return crew.submit(self.tell, *call(place))

        yield from in_order(range(first, len(units)), submit, 2 * crew.count if crew else 0)


# 1. What the corpus holds.


def look_through(units: Sequence[Unit], survey: Survey, hands: Hands) -> Iterator[Survey]:
    """Adds to `survey` the units it lacks, in order; yields what each of them holds. DataError for a bad row more than
    its source may have."""
    sample = survey.sample

    def call(place: int) -> tuple[Any, ...]:
        return survey_unit, units[place], sample.limit, sample.threshold, 0, False

    for place, future in hands.share_out(units, len(survey.units), call):
        unit = units[place]
        before = survey.bad_rows(unit.source)
        found = None if future is None else survey_of(future, unit.entry.max_bad_rows - before, hands)
        if found is None:
            keep = survey.pieces is not None and hands.crew is None
            found = survey_unit(unit, sample.limit, sample.threshold, before, keep, hands.here)
        if found.left_out and not before:
            first = found.left_out[unit.source]
            found.left_out[unit.source] = first._replace(where=place_in_file(unit, first.where))
        survey.add_unit(found)
        yield found


def survey_of(future: Future[Survey], most: int, hands: Hands) -> Survey | None:
    """What a worker found; None where it met an error, or more bad rows than `most`: read once more behind the rows
    before it, the unit ends at the right one."""
    try:
        found = result_of(future, hands.look_up)
    except DataError:
        return None
    return found if sum(each.rows for each in found.left_out.values()) <= most else None


def survey_unit(unit: Unit, limit: int, threshold: float, before: int, keep: bool, tell: Tell) -> Survey:
    """What a unit holds, with what it gives to a sample of at most `threshold`; its pieces too, to `keep` them. So many
    bad rows of its source were left out `before`."""
    survey = Survey(Sample(limit, threshold), pieces=[] if keep else None)
    bad = BadRows(unit.entry.max_bad_rows, before)
    for piece in pieces(unit, bad):
        survey.add(piece, unit.entry.weight)
        tell(piece.bytes)
    if bad.first:
        survey.left_out[unit.source] = LeftOut(bad.count - before, *bad.first)
    return survey


# 2. Its tokens.


@dataclass(frozen=True)
class Files:
    """The token files of both sides, as they are written."""

    train: ShardWriter
    valid: ShardWriter

    @property
    def documents(self) -> int:
        """Written so far."""
        return self.train.documents + self.valid.documents

    @property
    def text_bytes(self) -> int:
        """Likewise."""
        return self.train.text_bytes + self.valid.text_bytes

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """As a survey counts."""
        return self.train.documents, self.train.text_bytes, self.valid.documents, self.valid.text_bytes


def write(
    units: Sequence[Unit], survey: Survey, encoder: BulkEncoder, files: Files, hands: Hands, parts: Path
) -> Iterator[None]:
    """Writes the documents that `files` lack, in order; pauses between two of them, or two units. Workers leave theirs
    in the folder `parts` until it is their turn. Raises DataError where a unit is not what the survey has found."""
    done = files.documents
    if survey.pieces is not None:
        yield from append(survey.pieces[done:], encoder, files, hands)
        return
    ends = [train + held_out for train, _, held_out, _ in survey.units]
    first = bisect_right(ends, done)  # the units before it are written
    skip = done - (ends[first - 1] if first else 0)
    train = files.train
    what = (train.vocab_size, train.separator_id, train.tokenizer_hash)

    def part_of(place: int) -> tuple[Path, int]:
        return parts / f"{place:07d}", skip if place == first else 0

    def call(place: int) -> tuple[Any, ...]:
        return encode_unit, units[place], *part_of(place), *encoder.how, what

    for place, future in hands.share_out(units, first, call):
        unit, (part, before) = units[place], part_of(place)
        if future is None:
            yield from append(itertools.islice(pieces(unit), before, None), encoder, files, hands)
        else:
            result_of(future, hands.look_up)
            for writer, side in zip((files.train, files.valid), SIDES, strict=True):
                writer.take(TokenFile(part / side), unit.source)
            shutil.rmtree(part)
            yield
        if files.counts != survey.units[place]:
            named = ", ".join(map(str, unit.files[:3])) or unit.entry.source
            raise DataError("was changed while it was read", where=named, mend="run the same command again")


def append(found: Iterable[Piece], encoder: BulkEncoder, files: Files, hands: Hands) -> Iterator[None]:
    """Encodes pieces that are read here and writes them."""
    tagged = tags_of(found)
    encoded = (
        encode_here(tagged, encoder) if hands.crew is None else encode_by(hands.crew, tagged, encoder, hands.look_up)
    )
    for (is_held_out, size, source), ids in encoded:
        (files.valid if is_held_out else files.train).append(ids, size, source)
        hands.here(size)
        yield


def tags_of(found: Iterable[Piece]) -> Iterator[tuple[tuple[bool, int, int], str]]:
    return (((piece.is_held_out, piece.bytes, piece.source), piece.text) for piece in found)


def encode_unit(
    unit: Unit, part: Path, skip: int, folder: Path, use_tiktoken: bool, what: tuple[int, int, str], tell: Tell
) -> None:
    """The documents of a unit but the first `skip`, as token files in the folder `part`, which is there when they are
    whole."""
    encoder = encoder_of(folder, use_tiktoken)
    working = part.with_name(f".{part.name}.{os.getpid()}")
    working.mkdir(parents=True)
    found = itertools.islice(pieces(unit), skip, None)
    with ShardWriter(working / SIDES[0], *what) as train, ShardWriter(working / SIDES[1], *what) as valid:
        for (is_held_out, size, _), ids in encode_here(tags_of(found), encoder):
            (valid if is_held_out else train).append(ids, size)
            tell(size)
    working.rename(part)
