"""What a chat row is made of, before its contents are filled in: text, places for contents, special tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from pipeline.data.messages import Message


@dataclass(frozen=True)
class Slot:
    """The place of message `index`'s content, and which of its sides the template strips of white space."""

    index: int
    strips_left: bool
    strips_right: bool
    is_json: bool = False  # the template writes it as a JSON string

    def text(self, messages: list[Message]) -> str:
        """The content as the template writes it."""
        content = messages[self.index]["content"]
        if self.is_json:
            return json.dumps(content, ensure_ascii=False)[1:-1]
        if self.strips_left and self.strips_right:
            return content.strip()
        if self.strips_left:
            return content.lstrip()
        return content.rstrip() if self.strips_right else content


@dataclass(frozen=True)
class Run:
    """A stretch of a row that is encoded in one go, all trained or none of it: fixed ids, or text and slots."""

    is_trained: bool
    ids: tuple[int, ...] = ()
    parts: tuple[str | Slot, ...] = ()
    is_prefixed: bool = False  # the tokenizer writes its space before it (SentencePiece's manner)
    is_assistants: bool = False  # an assistant's words, in which some control tokens are its own


@dataclass
class Draft:
    """Runs under construction: text is gathered until a special token or a change of `is_trained`."""

    runs: list[Run] = field(default_factory=list)
    parts: list[str | Slot] = field(default_factory=list)
    is_trained: bool = False

    def text(self, part: str | Slot, is_trained: bool) -> None:
        """Adds text or a slot."""
        if is_trained != self.is_trained:
            self.close()
            self.is_trained = is_trained
        self.parts.append(part)

    def special(self, token: int, is_trained: bool) -> None:
        """Adds a special token, which ends a run of text."""
        self.close()
        self.runs.append(Run(is_trained, ids=(token,)))

    def close(self) -> None:
        """Ends the run of text, if there is one."""
        if self.parts:
            self.runs.append(Run(self.is_trained, parts=tuple(self.parts)))
            self.parts = []


@dataclass(frozen=True)
class Plan:
    """How rows of one sequence of roles are built: the runs to encode, and all that the template renders.

    `rendered` also holds what follows the last stop token, which the row leaves out; it is what the real
    rendering of a row is compared with.
    """

    runs: tuple[Run, ...]
    rendered: tuple[str | Slot, ...]
