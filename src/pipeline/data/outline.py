"""Messages with markers in the place of their contents: a template is asked to render these, so that its words show."""

from __future__ import annotations

import re

from pipeline.data.messages import Message
from pipeline.data.runs import Slot
from pipeline.data.tools import is_wordless

# A marker is a number between two private-use characters; the vertical tabs around it show whether the
# template strips what it is given (`| trim`), since no template writes one itself.
# A template that writes a content as JSON writes the tabs as escapes.
PROBE = re.compile("(\x0b|\\\\u000b|)\ue000(\\d+)\ue001(\x0b|\\\\u000b|)")


def probes(roles: tuple[str, ...]) -> list[Message]:
    """Messages of these roles whose contents are markers."""
    return [{"role": role, "content": f"\x0b\ue000{i}\ue001\x0b"} for i, role in enumerate(roles)]


def outline_of(messages: list[Message]) -> list[Message]:
    """The messages with markers as their contents; where one is of calls alone it stays so."""
    marked = probes(tuple(message["role"] for message in messages))
    return [
        {**message, "content": "" if is_wordless(message) else marker["content"]}
        for message, marker in zip(messages, marked, strict=True)
    ]


def mark(slot: Slot) -> str:
    """The marker of a slot without the white space around it."""
    return f"\ue000{slot.index}\ue001"
