"""The place of a row that turned out to be unusable only when it was encoded: file and line, looked up then."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pipeline.data.formats import LAYOUTS, placed_rows
from pipeline.data.messages import Message, words
from pipeline.data.placed import Placed
from pipeline.errors import PipelineError, RowError
from pipeline.recipe import DataEntry, StageConfig, is_data


@contextmanager
def naming_rows(config: StageConfig) -> Iterator[None]:
    """A RowError from within gets the file and line of its row, where the data that `config` names holds it."""
    try:
        yield
    except RowError as error:
        fields = dict(config)
        entries = [entry for name in fields if is_data(type(config), name) for entry in fields[name] or ()]
        place = next((found for entry in entries if (found := place_in(entry, error.messages))), "")
        if not place:
            raise
        raise RowError(error.what, where=f"{place} ({error.where})", mend=error.mend) from error


def place_in(entry: DataEntry, messages: Sequence[Message]) -> str:
    """Where the first row stands that begins with these messages; "" where none does."""
    sought = said(messages)
    for layout in LAYOUTS:
        try:
            for row, where in placed_rows(entry, layout, "all", 0.0, lambda text: None):
                placed = Placed(row, where)
                for answer in [*placed.answers.values(), []]:
                    if said([*placed.prompt, *answer][: len(messages)]) == sought:
                        return where
        except PipelineError:  # rows of this format have no such layout
            continue
    return ""


def said(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """Who says what; which messages are trained is the stage's to change (`train_on_turns`)."""
    return [(message["role"], words(message)) for message in messages]
