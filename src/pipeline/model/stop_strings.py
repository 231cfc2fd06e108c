"""Stop strings: whether what a row has written so far ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

MARGIN = 4
"""Tokens read before the reach of a stop string: the first of them may be the rest of a character, or lose a space
that decoders drop at the beginning of a text."""


class StopStrings:
    """Looks for any of `strings` in what the last tokens of a row say.

    `decode` is ids -> text, a tokenizer's. A token writes at least one byte, or nothing at all (a special token that
    `decode` leaves out), so that a string of n bytes that the last token completes began at most n writing tokens
    before: no more than these are read, however long the row.
    """

    def __init__(self, strings: Sequence[str], decode: Callable[[list[int]], str]) -> None:
        assert all(string and "\ufffd" not in string for string in strings), "a stop string is text"
        self.strings = tuple(strings)
        self.decode = decode
        self.reach = max(len(string.encode()) for string in strings) + MARGIN
        self._writes: dict[int, bool] = {}

    def found(self, ids: Sequence[int]) -> bool:
        """Whether the text of `ids` holds a stop string that its last token completes. (What an earlier token
        completed may be found as well, or not.)"""
        begin, writing = len(ids), 0
        while begin > 0 and writing < self.reach:
            begin -= 1
            writing += self._writes_text(ids[begin])
        text = self.decode(list(ids[begin:]))
        return any(string in text for string in self.strings)

    def _writes_text(self, token: int) -> bool:
        if token not in self._writes:
            self._writes[token] = self.decode([token]) != ""
        return self._writes[token]


def before_stop(text: str, strings: Sequence[str]) -> str:
    """`text` up to where the first stop string in it begins; all of it where there is none."""
    return text[: min((text.index(string) for string in strings if string in text), default=len(text))]
