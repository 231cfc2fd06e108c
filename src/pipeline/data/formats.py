"""Rows of the layouts people have, as one canonical layout a purpose.

    messages            {"messages": [{"role": "user", "content": …}, {"role": "assistant", …}]}
    prompt_completion   {"prompt": …, "completion": …}        texts or lists of messages
    question_answer     {"question": …, "answer": …}          texts, as in GSM8K; and optionally "system"
    alpaca              {"instruction": …, "input": …, "output": …}       and optionally "system"
    sharegpt            {"conversations": [{"from": "human", "value": …}, {"from": "gpt", …}]}   "system"
    likewise preference          {"prompt": …, "chosen": …, "rejected": …}    texts or messages; the prompt
    may be left out
                        where both sides are message lists that begin alike
    sharegpt_preference {"conversations": […], "chosen": {"from": "gpt", "value": …}, "rejected": {…}}

A source's format is recognised by the keys of its first row, or named by the entry. Fields of other names are
let lie. A row that doesn't fit is an error with its file and line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pipeline.data.files import Row
from pipeline.data.sources import ARITHMETIC, BUILT_IN, PYDOCS, Split, check_entry, copies, read_source_rows, share
from pipeline.errors import ConfigError, DataError
from pipeline.recipe import DataEntry

Message = dict[str, str]

LAYOUTS = ("messages", "preference", "prompt")

# format -> the keys it is recognised by; the first that fits is taken, so what has more keys stands first
KEYS = {
    "sharegpt_preference": ("conversations", "chosen", "rejected"),
    "preference": ("chosen", "rejected"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "question_answer": ("question", "answer"),
}
PREFERENCES = ("sharegpt_preference", "preference")

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


def read_rows(
    entries: Sequence[DataEntry],
    layout: str,
    *,
    split: Split = "train",
    held_out: float = 0.05,
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """The rows of all entries in one canonical layout.

    layout "messages":   {"messages": [...]}, the last message an assistant's
    layout "preference": {"prompt": [...], "chosen": [message], "rejected": [message], "kind": str}; the kind is
                         the row's own field of that name, "" without one
    layout "prompt":     {"prompt": [...], "reference": str}; the reference is the assistant's answer, or ""

    `split` is "train", "held_out" or "all". Rows of files and of the hub are held out by a hash of their
    prompt, a share `held_out` of them, the same ones in every stage; what is built in has a split of its own. `say` is
    told the format of each source. Raises DataError (file and line) for a bad row, ConfigError for a format
    that can't be used here, for a source without rows to train on, and where nothing at all is held out.
    """
    assert layout in LAYOUTS, layout
    rows: list[Row] = []
    for entry in entries:
        before = len(rows)
        rows += entry_rows(entry, layout, split, held_out, say)
        is_last = entry is entries[-1]
        if len(rows) == before and (split != "held_out" or (is_last and not rows)):
            raise ConfigError(
                f"no {split.replace('_', '-')} row in this source",
                where=entry.source,
                mend="name a source with more rows, raise its `limit`, or change the held-out share",
            )
    return rows


def entry_rows(
    entry: DataEntry, layout: str, split: Split, held_out: float, say: Callable[[str], None]
) -> Iterator[Row]:
    """The rows of one entry: read, put into the layout, divided; those to train on as often as it weighs."""
    weight = entry.weight if split == "train" else 1.0
    check_entry(entry)
    for count, (row, _) in enumerate(canonical_rows(entry, layout, split, say), start=1):
        key = prompt_key(row)
        is_held_out = entry.source not in BUILT_IN and share(key) < held_out
        if split == "all" or entry.source in BUILT_IN or is_held_out == (split == "held_out"):
            for _ in range(copies(key, weight)):
                yield row
        if count == entry.limit:
            return


def canonical_rows(
    entry: DataEntry, layout: str, split: Split, say: Callable[[str], None]
) -> Iterator[tuple[Row, str]]:
    """The rows of one entry in the layout, with where each stands."""
    if entry.source == PYDOCS:
        yield from pydocs_rows(layout, split)
        return
    if entry.source == ARITHMETIC:
        yield from arithmetic_rows(layout, split)
        return
    chosen = entry.format
    if chosen is not None and chosen not in KEYS:
        raise ConfigError(f"no format {chosen!r} of rows", where=entry.source, mend=f"one of {', '.join(KEYS)}")
    for row, where in read_source_rows(entry):
        if chosen is None:
            chosen = recognise(row, where)
            say(f"{entry.source}: {chosen} rows ({', '.join(KEYS[chosen])})")
        yield to_layout(row, chosen, layout, where), where


def recognise(row: Row, where: str) -> str:
    """The format of a row by its keys; DataError where none fits."""
    for name, keys in KEYS.items():
        if all(key in row for key in keys):
            return name
    known = "; ".join(f"{name}: {', '.join(keys)}" for name, keys in KEYS.items())
    raise DataError(
        f"no known format has the fields {', '.join(row) or '(none)'}",
        where=where,
        mend=f"rename the fields to one of these formats: {known}",
    )


def pydocs_rows(layout: str, split: Split) -> Iterator[tuple[Row, str]]:
    """The embedded rows, divided as pydocs divides itself."""
    from pipeline.data import pydocs

    if layout == "preference":
        rows: Iterator[Row] = pydocs.preference_rows(split)
        chosen = "preference"
    else:
        rows = pydocs.instruction_rows(split)
        chosen = "messages"
    for number, row in enumerate(rows, start=1):
        where = f"pydocs {split} row {number}"
        yield to_layout(row, chosen, layout, where), where


def arithmetic_rows(layout: str, split: Split) -> Iterator[tuple[Row, str]]:
    """Questions and answers, divided as `arithmetic` divides itself; it has no preferences."""
    from pipeline.data import arithmetic

    for number, row in enumerate(arithmetic.instruction_rows(split), start=1):
        where = f"arithmetic {split} row {number}"
        yield to_layout(row, "messages", layout, where), where


def to_layout(row: Row, chosen: str, layout: str, where: str) -> Row:
    """A row of format `chosen` in canonical `layout`."""
    for key in KEYS[chosen]:
        if row.get(key) is None:
            raise DataError(
                f"field `{key}` of a {chosen} row is missing", where=where, mend="add it, or take the row out"
            )
    if chosen in PREFERENCES:
        if layout == "messages":
            raise ConfigError(
                f"these are {chosen} rows, and demonstrations are needed here",
                where=where,
                mend=f"name rows of one of {', '.join(name for name in KEYS if name not in PREFERENCES)}",
            )
        pair = preference(row, chosen, where)
        return pair if layout == "preference" else {"prompt": pair["prompt"], "reference": pair["chosen"][0]["content"]}
    if layout == "preference":
        raise ConfigError(
            f"these are {chosen} rows, and preferences are needed here",
            where=where,
            mend=f"name rows with {', '.join(KEYS['preference'])}",
        )
    messages = demonstration(row, chosen, where)
    check_conversation(messages, where)
    if layout == "messages":
        if messages[-1]["role"] != "assistant":
            raise DataError(
                f"the last message is from {messages[-1]['role']}: nothing answers it",
                where=where,
                mend="end the row with an assistant's message",
            )
        return {"messages": messages}
    if messages[-1]["role"] == "assistant":
        return {"prompt": checked_prompt(messages[:-1], where), "reference": messages[-1]["content"]}
    return {"prompt": checked_prompt(messages, where), "reference": ""}


def demonstration(row: Row, chosen: str, where: str) -> list[Message]:
    """The conversation of a row that is no preference row."""
    if chosen == "messages":
        return messages_of(row["messages"], "messages", ROLES, where)
    if chosen == "sharegpt":
        return system_of(row, where) + messages_of(row["conversations"], "conversations", SHAREGPT_ROLES, where)
    if chosen == "alpaca":
        parts = [text_in(row, "instruction", where)]
        if row.get("input"):
            parts.append(text_in(row, "input", where))
        question = {"role": "user", "content": "\n\n".join(part for part in parts if part)}
        return [
            *system_of(row, where),
            question,
            {"role": "assistant", "content": text_in(row, "output", where)},
        ]
    if chosen == "question_answer":
        said = [("user", text_in(row, "question", where)), ("assistant", text_in(row, "answer", where))]
        return [*system_of(row, where), *({"role": role, "content": text} for role, text in said)]
    return side(row, "prompt", "user", where) + side(row, "completion", "assistant", where)


def preference(row: Row, chosen: str, where: str) -> Row:
    """A preference row: what is common to both sides is the prompt, each side is one assistant's message."""
    if chosen == "sharegpt_preference":
        prompt = system_of(row, where) + messages_of(row["conversations"], "conversations", SHAREGPT_ROLES, where)
        good, bad = (answer_of(row[key], key, where) for key in ("chosen", "rejected"))
    else:
        prompt = side(row, "prompt", "user", where) if row.get("prompt") is not None else []
        good, bad = (side(row, key, "assistant", where) for key in ("chosen", "rejected"))
    prompt, good, bad = common_prompt(prompt, good, bad, where)
    for key, messages in (("chosen", good), ("rejected", bad)):
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            roles = " ".join(message["role"] for message in messages)
            raise DataError(
                f"`{key}` is {roles or 'nothing'} where the two sides part, not one assistant's answer",
                where=where,
                mend="let both sides have the same prompt and one answer each",
            )
        check_conversation([*prompt, *messages], where)
    return {
        "prompt": checked_prompt(prompt, where),
        "chosen": good,
        "rejected": bad,
        "kind": row["kind"] if isinstance(row.get("kind"), str) else "",
    }


def common_prompt(
    prompt: list[Message], good: list[Message], bad: list[Message], where: str
) -> tuple[list[Message], list[Message], list[Message]]:
    """(prompt, chosen, rejected), the messages that both sides begin with moved into the prompt.

    Where the sides repeat the prompt that is given (UltraFeedback's habit), it is taken once.
    """
    if prompt and good[: len(prompt)] == prompt and bad[: len(prompt)] == prompt:
        good, bad = good[len(prompt) :], bad[len(prompt) :]
    if good == bad:
        raise DataError("chosen and rejected are the same", where=where, mend="take the row out")
    shared = 0
    while good[shared : shared + 1] == bad[shared : shared + 1]:
        shared += 1
    return prompt + good[:shared], good[shared:], bad[shared:]


def answer_of(value: Any, key: str, where: str) -> list[Message]:
    """One side of a sharegpt preference: a message, a list of messages, or its text."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    return messages_of(value if isinstance(value, list) else [value], key, SHAREGPT_ROLES, where)


def side(row: Row, key: str, role: str, where: str) -> list[Message]:
    """A field that holds a text (then it is one message of `role`) or a list of messages."""
    if isinstance(row[key], str):
        return [{"role": role, "content": row[key]}]
    return messages_of(row[key], key, ROLES, where)


def system_of(row: Row, where: str) -> list[Message]:
    """The system message of a row with a `system` field, if it has one."""
    return [{"role": "system", "content": text_in(row, "system", where)}] if row.get("system") else []


def text_in(row: Row, key: str, where: str) -> str:
    """A field that must hold text."""
    if not isinstance(row[key], str):
        raise DataError(f"field `{key}` holds {type(row[key]).__name__}, not text", where=where, mend="mend the row")
    text: str = row[key]
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
        if role not in roles:
            raise DataError(f"{place} has the role {role!r}", where=where, mend=f"one of {', '.join(roles)}")
        if not isinstance(content, str):
            raise DataError(f"{place} has no text as its content", where=where, mend="contents are texts")
        messages.append({"role": roles[role], "content": content})
    return messages


def check_conversation(messages: list[Message], where: str) -> None:
    """DataError where an assistant says nothing, or nobody but the system speaks."""
    for number, message in enumerate(messages, start=1):
        if message["role"] == "assistant" and not message["content"].strip():
            raise DataError(f"message {number}, an assistant's, is empty", where=where, mend="take the row out")
    if all(message["role"] == "system" for message in messages):
        raise DataError("nobody speaks in this row but the system", where=where, mend="take the row out")


def checked_prompt(prompt: list[Message], where: str) -> list[Message]:
    """A prompt that can be answered: not empty, and the last word not the assistant's."""
    if not prompt or prompt[-1]["role"] == "assistant":
        what = "ends with an assistant's message" if prompt else "is empty"
        raise DataError(f"the prompt {what}", where=where, mend="end the prompt with a user's message")
    return prompt


def prompt_key(row: Row) -> str:
    """What decides on which side of the split a row falls: what the user says first.

    So all rows about one question fall on one side, in sft, reward, dpo and evaluation alike, whatever the
    system message, the answer and the later turns.
    """
    messages: list[Message] = row["messages"] if "messages" in row else row["prompt"]
    first = next((message for message in messages if message["role"] == "user"), messages[0])
    return first["content"].strip()
