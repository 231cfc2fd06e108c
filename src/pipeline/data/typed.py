"""Control tokens that a tokenizer looks for in normalised text, and how typed ones stay letters.

An added token with `normalized: true`, beside a normaliser, is not found by its own letters: spaces are other
characters by then, `<|IM_START|>` may be `<|im_start|>`, and where the normaliser writes something before a text, the
token is found behind that alone. So nobody but the tokenizer can say where one stands. It is asked about what a person
has typed, by itself; what holds one is read apart from the template's text, by a copy of the tokenizer to which the
token is letters.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from transformers import AddedToken, PreTrainedTokenizerFast

from pipeline.data.messages import Message
from pipeline.data.runs import Run, Slot
from pipeline.data.tokenizers import PlainText, plain_text, read_plainly


@dataclass(frozen=True)
class Hidden:
    """Such tokens of one tokenizer, and how to read without them."""

    ids: frozenset[int]
    framing: frozenset[int]
    """Those that frame a turn: an assistant may write the others."""
    plain: PlainText
    everyones: PlainText
    assistants: PlainText

    def is_typed(self, text: str, *, is_assistants: bool) -> bool:
        """Whether the tokenizer finds one in a text that somebody has typed."""
        own = self.framing if is_assistants else self.ids
        backends = (self.plain.bare, self.plain.prefixed) if own else ()
        return any(not own.isdisjoint(backend.encode(text, add_special_tokens=False).ids) for backend in backends)

    def in_run(self, run: Run, messages: list[Message]) -> bool:
        """Whether one is typed in the run."""
        slots = [part for part in run.parts if isinstance(part, Slot)] if self.ids else []
        return any(self.is_typed(slot.text(messages), is_assistants=run.is_assistants) for slot in slots)

    def letters(self, text: str, run: Run, *, is_prefixed: bool) -> list[int]:
        """The ids of a typed text of the run, all of it letters."""
        plain = self.assistants if run.is_assistants else self.everyones
        ids: list[int] = (plain.prefixed if is_prefixed else plain.bare).encode(text, add_special_tokens=False).ids
        return ids


def hidden_in(tokenizer: PreTrainedTokenizerFast, written: Collection[int], frame: str) -> Hidden:
    """Of the added tokens `written` by the template those that are looked for in normalised text; `frame` is what
    frames turns."""
    added = tokenizer.added_tokens_decoder
    is_normalised = tokenizer.backend_tokenizer.normalizer is not None
    ids = frozenset(i for i in written if is_normalised and added[i].normalized)
    framing = frozenset(i for i in ids if added[i].content in frame)
    plain = plain_text(tokenizer)
    if not ids:
        return Hidden(ids, framing, plain, plain, plain)
    letters = [added[i].content for i in written]
    everyones = read_plainly(tokenizer, letters)
    return Hidden(ids, framing, plain, everyones, read_plainly(tokenizer, [name for name in letters if name in frame]))


def added_by_name(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The added tokens that stand in `text`, without white space."""
    added = tokenizer.added_tokens_decoder.items()
    return [i for i, token in added if token.content.strip() and token.content in text]


def special_pattern(token: AddedToken) -> str:
    """A special token as a group of a regex, with the white space that it swallows."""
    left, right = r"\s*" if token.lstrip else "", r"\s*" if token.rstrip else ""
    return f"{left}({re.escape(token.content)}){right}"
