"""The messages in a row: texts and lists of messages read, roles named alike, what nobody can learn from refused."""

from __future__ import annotations

from typing import Any

from pipeline.data.files import Row
from pipeline.data.tools import calls_in, tools_in
from pipeline.errors import DataError

Message = dict[str, str]

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
SHAREGPT_ROLES = ROLES | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "observation": "tool",
}


def side(row: Row, key: str, role: str, where: str) -> list[Message]:
    """A field that holds a text (then it is one message of `role`) or a list of messages."""
    if isinstance(row[key], str):
        return [{"role": role, "content": whole(row[key], f"field `{key}`", where)}]
    return messages_of(row[key], key, ROLES, where)


def system_of(row: Row, where: str) -> list[Message]:
    """The system message of a row with a `system` field, if it has one."""
    return [{"role": "system", "content": text_in(row, "system", where)}] if row.get("system") else []


def systems_of(messages: list[Message]) -> list[Message]:
    """The system messages among the messages."""
    return [message for message in messages if message["role"] == "system"]


def behind_system(row: Row, messages: list[Message], where: str) -> list[Message]:
    """The messages with the row's `system` field, if it has one, as their first; DataError where they have another."""
    return joined(system_of(row, where), messages, where)


def joined(systems: list[Message], messages: list[Message], where: str) -> list[Message]:
    """The messages behind the system messages that stand apart from them; DataError where they have another first."""
    if not systems or messages[: len(systems)] == systems:
        return messages
    if messages and messages[0]["role"] == "system":
        raise DataError(
            "the row has two system messages that differ", where=where, mend="let one of them hold what both say"
        )
    return systems + messages


def text_in(row: Row, key: str, where: str) -> str:
    """A field that must hold text."""
    if not isinstance(row[key], str):
        raise DataError(f"field `{key}` holds {type(row[key]).__name__}, not text", where=where, mend="mend the row")
    return whole(row[key], f"field `{key}`", where)


def whole(text: str, place: str, where: str) -> str:
    """The text; DataError where it holds half a character (a `\\ud83d` of JSON alone): no tokenizer reads that."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        what = f"{place} holds half a character (a lone surrogate, character {error.start + 1})"
        raise DataError(what, where=where, mend="write the text again, or take the row out") from error
    return text


def messages_of(value: Any, key: str, roles: dict[str, str], where: str) -> list[Message]:
    """A list of {role, content} or {from, value}, role names as `roles` says."""
    if not isinstance(value, list) or not value:
        raise DataError(f"`{key}` is no list of messages", where=where, mend='[{"role": "user", "content": …}, …]')
    messages = []
    for number, message in enumerate(value, start=1):
        place = f"message {number} of `{key}`"
        if not isinstance(message, dict):
            raise DataError(f"{place} is {type(message).__name__}, not an object", where=where)
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if not isinstance(role, str) or role not in roles:
            raise DataError(f"{place} has the role {role!r}", where=where, mend=f"one of {', '.join(roles)}")
        calls = called(message, roles[role], place, where)
        if calls and (content is None or (isinstance(content, str) and not content.strip())):
            content = ""
        if not isinstance(content, str):
            raise DataError(f"{place} has no text as its content", where=where, mend="contents are texts")
        messages.append(
            {"role": roles[role], "content": whole(content, place, where), **untrained(message, place, where), **calls}
        )
    return messages


def called(message: Row, role: str, place: str, where: str) -> Message:
    """What a message holds of tools: an assistant's calls, the name and the call that a tool's output is of, and the
    row's tools where a first message of ours brings them along."""
    found = {"tool_calls": calls_in(message, place, where), "tools": tools_in(message, where)}
    if found["tool_calls"] and role != "assistant":
        raise DataError(f"{place} has `tool_calls`, and is no assistant's", where=where, mend="mend the row")
    for key in ("name", "tool_call_id") if role == "tool" else ():
        found[key] = text_in(message, key, where) if message.get(key) else ""
    return {key: text for key, text in found.items() if text}


def words(message: Message) -> str:
    """What a message says, its calls included."""
    return message["content"] + message.get("tool_calls", "")


def letters(message: Message) -> str:
    """All that a template writes of a message: its words, its calls, and the row's tools where it holds them."""
    return message.get("tools", "") + words(message)


def untrained(message: Row, place: str, where: str) -> Message:
    """{"weight": "0"} for a message that is not trained (`weight: 0`, as in OpenAI's format), else nothing."""
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise DataError(f"{place} has the weight {weight!r}", where=where, mend="0: not trained; 1: trained")
    return {"weight": "0"} if weight == 0 else {}


def check_conversation(messages: list[Message], where: str) -> None:
    """DataError where an assistant says nothing, or nobody but the system speaks."""
    for number, message in enumerate(messages, start=1):
        if message["role"] == "assistant" and not words(message).strip():
            raise DataError(f"message {number}, an assistant's, is empty", where=where, mend="take the row out")
    if all(message["role"] == "system" for message in messages):
        raise DataError("nobody speaks in this row but the system", where=where, mend="take the row out")


def checked_prompt(prompt: list[Message], where: str) -> list[Message]:
    """A prompt that can be answered: not empty, and the last word not the assistant's."""
    if not prompt or prompt[-1]["role"] == "assistant":
        what = "ends with an assistant's message" if prompt else "is empty"
        raise DataError(f"the prompt {what}", where=where, mend="end the prompt with a user's message")
    return prompt
