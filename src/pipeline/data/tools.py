"""Tools in rows: what an assistant may call (`tools`), what it called (`tool_calls`), and both as a template gets them.

Rows have them as OpenAI and transformers write them:

    tools       [{"type": "function", "function": {"name": …, "description": …, "parameters": a JSON schema}}, …]
    tool_calls  [{"type": "function", "function": {"name": …, "arguments": {…}}}, …]      of an assistant's message

A message is a mapping of texts, so it holds its `tool_calls`, and the first message of a row its `tools`, as JSON.

A template writes these by pieces, as JSON or otherwise, so there is no one place to put a marker in. Instead every
character of them that control tokens are made with (`<`, `|`, …) stands between two private-use characters while the
template runs: what is still a control token in its text, the template has written. These are taken out again before
text becomes ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pipeline.data.files import Row
from pipeline.errors import DataError

Message = dict[str, str]

BREAK = "\ue002"
MARKS = re.compile("[\ue000-\ue002]|\\\\ue00[0-2]")
"""What `chat` and this file mark places with, and one of them as JSON or Python may write it."""
OF_TOOLS = frozenset({"tools", "tool_calls", "name", "tool_call_id"})
NO_TEMPLATE = "a tokenizer whose chat template writes tools, or write them into the contents yourself"


def tools_in(row: Row, where: str) -> str:
    """The row's `tools` as JSON, "" without any; DataError for what is no list of functions."""
    tools = _parsed(row.get("tools"), "`tools`", where)
    if not tools:
        return ""
    if not isinstance(tools, list):
        raise DataError("`tools` is no list of functions", where=where, mend='[{"type": "function", "function": {…}}]')
    for number, tool in enumerate(tools, start=1):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"tool {number} of `tools` has no name", where=where, mend='{"function": {"name": …}}')
    return _written(tools, "`tools`", where)


def calls_in(message: Row, place: str, where: str) -> str:
    """The message's `tool_calls` as JSON, each with its arguments as an object, "" without any; DataError for what is
    no list of calls."""
    calls = _parsed(message.get("tool_calls"), f"`tool_calls` of {place}", where)
    if not calls:
        return ""
    mend = '[{"type": "function", "function": {"name": …, "arguments": {…}}}]'
    if not isinstance(calls, list):
        raise DataError(f"`tool_calls` of {place} is no list", where=where, mend=mend)
    found = []
    for number, call in enumerate(calls, start=1):
        called = call.get("function") if isinstance(call, dict) else None
        if not isinstance(called, dict) or not isinstance(called.get("name"), str):
            raise DataError(f"call {number} of {place} names no function", where=where, mend=mend)
        arguments = _parsed(called.get("arguments") or {}, f"`arguments` of call {number} of {place}", where)
        if not isinstance(arguments, dict):
            raise DataError(f"`arguments` of call {number} of {place} is no object", where=where, mend=mend)
        found.append({**call, "function": {**called, "arguments": arguments}})
    return _written(found, f"`tool_calls` of {place}", where)


def _parsed(value: Any, what: str, where: str) -> Any:
    """The value, of a text what it says as JSON."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise DataError(f"{what} is a text that is no JSON ({error})", where=where, mend="mend the row") from error


def _written(value: Any, what: str, where: str) -> str:
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        mend = "write the text again, or take the row out"
        raise DataError(f"{what} holds half a character (a lone surrogate)", where=where, mend=mend) from error
    if MARKS.search(text):
        mend = "take the character out, or the row"
        raise DataError(f"{what} holds a private-use character, U+E000 to U+E002", where=where, mend=mend)
    return text


def with_tools(row: Row, tools: str) -> Row:
    """A canonical row whose first message holds the tools."""
    key = "messages" if "messages" in row else "prompt"
    first, *rest = row[key]
    return {**row, key: [{**first, "tools": tools}, *rest]} if tools else row


def text_of(answer: Sequence[Message], reader: str, where: str) -> str:
    """What an answer of one message says to a reader of texts; DataError where it calls a tool."""
    (message,) = answer
    if "tool_calls" in message:
        mend = "take the row out, or write the call into the content"
        raise DataError(f"an answer has `tool_calls`, and {reader} reads texts", where=where, mend=mend)
    return message["content"]


def is_wordless(message: Message) -> bool:
    """Whether a message says nothing but calls."""
    return "tool_calls" in message and not message["content"]


def has_tools(messages: Sequence[Message]) -> bool:
    """Whether a template has to be told more than who says what: of tools, calls, or what an output is of."""
    return any(not OF_TOOLS.isdisjoint(message) for message in messages)


def breaking(controls: Iterable[str]) -> re.Pattern[str]:
    """What is broken in a row's tools: the punctuation of the control strings, and those that have none as a whole."""
    marks: set[str] = set()
    words = []
    for control in controls:
        own = {letter for letter in control if not (letter.isalnum() or letter.isspace() or letter in "_-./")}
        marks |= own
        words += [] if own else [re.escape(control[:1])]
    return re.compile("|".join([*words, *map(re.escape, sorted(marks))]) or r"(?!)")


def for_template(messages: Sequence[Message], broken: re.Pattern[str]) -> tuple[list[Row], list[Row] | None]:
    """(messages, tools) as a template takes them, what is of the row's tools broken by `breaking`."""

    def safe(value: Any) -> Any:
        if isinstance(value, str):
            return broken.sub(lambda found: f"{BREAK}{found[0]}{BREAK}", value)
        if isinstance(value, list):
            return [safe(each) for each in value]
        if isinstance(value, dict):
            return {safe(key): safe(each) for key, each in value.items()}
        return value

    found = []
    for message in messages:
        kept: Row = {key: value for key, value in message.items() if key not in ("tools", "tool_calls")}
        kept |= {key: safe(kept[key]) for key in ("name", "tool_call_id") if key in kept}
        if "tool_calls" in message:
            kept["tool_calls"] = safe(json.loads(message["tool_calls"]))
        found.append(kept)
    tools = messages[0].get("tools") if messages else None
    return found, safe(json.loads(tools)) if tools else None


def unbroken(text: str) -> str:
    """The text as it would be had nothing been broken, also where the template wrote the character as an escape."""
    return text.replace(BREAK, "").replace("\\ue002", "") if BREAK in text or "\\ue002" in text else text


def check_written(messages: Sequence[Message], whole: str, turns: dict[int, str], where: str) -> None:
    """DataError where a template leaves out a tool or a part of a call. `whole` is all its text without contents,
    `turns` what it writes around each message's content."""
    for name in names_of(messages):
        if name not in unbroken(whole):
            raise DataError(f"the chat template does not write the tool `{name}`", where=where, mend=NO_TEMPLATE)
    for index, message in enumerate(messages):
        text = unbroken(turns[index])
        for each in json.loads(message.get("tool_calls", "[]")):
            for said in (each["function"]["name"], *leaves(each["function"]["arguments"])):
                if said not in text and json.dumps(said, ensure_ascii=False)[1:-1] not in text:
                    what = f"the chat template leaves `{said[:40]}` out of the tool calls of message {index + 1}"
                    raise DataError(what, where=where, mend=NO_TEMPLATE)


def names_of(messages: Sequence[Message]) -> list[str]:
    """The names of the row's tools."""
    tools = json.loads(messages[0].get("tools", "[]")) if messages else []
    return [str(tool.get("function", tool)["name"]) for tool in tools]


def said_of_tools(messages: Sequence[Message]) -> Iterator[str]:
    """All keys and texts in the row's tools and calls."""
    for message in messages:
        for key in OF_TOOLS & message.keys():
            yield from leaves(json.loads(message[key]) if key in ("tools", "tool_calls") else message[key])


def leaves(value: Any) -> Iterator[str]:
    """The keys and texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from leaves(each)
    elif isinstance(value, dict):
        for key, each in value.items():
            yield key
            yield from leaves(each)
