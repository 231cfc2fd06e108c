"""Rows of the layouts people have, as one canonical layout a purpose.

    messages            {"messages": [{"role": "user", "content": …}, {"role": "assistant", …}]}
    prompt_completion   {"prompt": …, "completion": …}        texts or lists of messages
    question_answer     {"question": …, "answer": …}          texts, as in GSM8K; and optionally "system"
    alpaca              {"instruction": …, "input": …, "output": …}       and optionally "system"
    sharegpt            {"conversations": [{"from": "human", "value": …}, {"from": "gpt", …}]}   "system"
                        likewise
    preference          {"prompt": …, "chosen": …, "rejected": …}    texts or messages; the prompt may be left out
                        where both sides are message lists that begin alike; "kind", "margin", "preference" likewise
    sharegpt_preference {"conversations": […], "chosen": {"from": "gpt", "value": …}, "rejected": {…}}     likewise
    ranked              {"prompt": …, "answers": [the best, the next, …]}     texts or messages; "ranks" for ties
    unpaired            {"prompt": …, "completion": …, "label": true}         texts or messages; whether it is desirable

A source's format is recognised by the keys of its first row, or named by the entry. Fields of other names are
let lie. A row that doesn't fit is an error with its file and line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from pipeline.data.files import BadRows, Row, left_out
from pipeline.data.messages import (
    ROLES,
    SHAREGPT_ROLES,
    Message,
    behind_system,
    check_conversation,
    checked_prompt,
    joined,
    messages_of,
    side,
    system_of,
    systems_of,
    text_in,
)
from pipeline.data.placed import Placed, without_repeats
from pipeline.data.preferences import as_unpaired, preference, repeats, unpaired
from pipeline.data.ranked import as_pairs, as_ranked, ranked
from pipeline.data.sources import BUILT_IN, PYDOCS, Split, check_rows_entry, copies, read_source_rows, share
from pipeline.data.tools import tools_in, with_tools
from pipeline.errors import ConfigError, DataError
from pipeline.recipe import DataEntry

LAYOUTS = ("messages", "preference", "ranked", "unpaired", "prompt")

# format -> the keys it is recognised by; the first that fits is taken, so what has more keys stands first
KEYS = {
    "sharegpt_preference": ("conversations", "chosen", "rejected"),
    "preference": ("chosen", "rejected"),
    "ranked": ("prompt", "answers"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "unpaired": ("prompt", "completion", "label"),
    "prompt_completion": ("prompt", "completion"),
    "question_answer": ("question", "answer"),
}
PAIRS = ("sharegpt_preference", "preference")
COMPARED = (*PAIRS, "ranked")
JUDGED = (*COMPARED, "unpaired")
"""Rows that hold what should not be said as well."""


def read_rows(
    entries: Sequence[DataEntry],
    layout: str,
    *,
    split: Split = "train",
    held_out: float = 0.05,
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """The rows of all entries in one canonical layout.

    layout "messages":   {"messages": [...]}, the last message an assistant's; an assistant's that is not to be trained
                         (`weight: 0`) holds "weight": "0"
    layout "preference": {"prompt": [...], "chosen": [message], "rejected": [message], "kind": str, "margin": float,
                         "preference": float}; the last three are the row's own fields of these names, "", 0 and 1
                         without them (see `preferences.preference`); a ranked row becomes its pairs without ties
    layout "ranked":     {"prompt": [...], "answers": [[message], ...], "ranks": [int, ...], "kind", "margin",
                         "preference", "reference"}, best first; a preference row is a list of two
    layout "unpaired":   {"prompt": [...], "completion": [message], "label": bool, "kind": str}; a preference row
                         becomes two, a tie none
    layout "prompt":     {"prompt": [...], "reference": str}; the reference is the assistant's (good) answer, or ""

    `split` is "train", "held_out" or "all". Rows of files and of the hub are held out by a hash of their
    prompt, a share `held_out` of them, the same ones in every stage; what is built in has a split of its own. `say` is
    told the format of each source, and how many rows of it were left out, bad ones and repeats. Raises DataError (file
    and line) for a bad row (with an entry's `max_bad_rows`: for one more than these), ConfigError for a format that
    can't be used here, for a source without rows to train on, and where nothing at all is held out.
    """
    assert layout in LAYOUTS, layout
    found = [[Placed(*each) for each in placed_rows(entry, layout, split, held_out, say)] for entry in entries]
    kept = without_repeats(entries, found, say) if split == "train" else found
    for entry in entries:  # said, not refused: a stage may have the entry from the one it starts from
        idle = [name for name, set_ in (("deduplicate", entry.deduplicate), ("weight", entry.weight != 1)) if set_]
        if idle and split != "train":
            say(f"{entry.source}: {' and '.join(idle)} left out of account, for rows to train on alone")
    rows: list[Row] = []
    counts: list[int] = []
    for entry, own, read in zip(entries, kept, found, strict=True):
        weight = entry.weight if split == "train" else 1.0
        taken = [each.row for each in own for _ in range(copies(prompt_key(each.row), weight))]
        rows += taken
        counts.append(len(taken))
        is_last = entry is entries[-1]
        if not taken and len(own) == len(read) and (split != "held_out" or (is_last and not rows)):
            raise ConfigError(
                f"no {split.replace('_', '-')} row in this source",
                where=entry.source,
                mend="name a source with more rows, raise its `limit`, or change the held-out share",
            )
    if split == "train" and any(entry.weight != 1 for entry in entries):
        shares = zip(entries, counts, strict=True)
        say("mixture: " + ", ".join(f"{e.source} × {e.weight:g}: {n:,} rows, {n / len(rows):.0%}" for e, n in shares))
    return rows


def placed_rows(
    entry: DataEntry, layout: str, split: Split, held_out: float, say: Callable[[str], None]
) -> Iterator[tuple[Row, str]]:
    """The rows of one entry, once each, with where they stand (`file:line`): read, put into the layout, divided."""
    check_rows_entry(entry)
    bad = BadRows(entry.max_bad_rows)
    for count, (rows, where) in enumerate(canonical_rows(entry, layout, split, bad, say), start=1):
        for row in rows:
            is_held_out = entry.source not in BUILT_IN and share(prompt_key(row)) < held_out
            if split == "all" or entry.source in BUILT_IN or is_held_out == (split == "held_out"):
                yield row, where
        if count == entry.limit:
            break
    if bad.first:
        say(left_out(entry.source, bad.count, bad.first))


def canonical_rows(
    entry: DataEntry, layout: str, split: Split, bad: BadRows, say: Callable[[str], None]
) -> Iterator[tuple[list[Row], str]]:
    """The rows of one entry in the layout: what each row of the source becomes, and where that stands."""
    if entry.source in BUILT_IN:
        found = pydocs_rows(layout, split) if entry.source == PYDOCS else arithmetic_rows(layout, split)
        for number, rows in enumerate(found, start=1):
            yield rows, f"{entry.source} {split} row {number}"
        return
    chosen = named_format(entry)
    for row, where in read_source_rows(entry, bad):
        try:
            if chosen is None:
                chosen = recognise(row, where)
                say(f"{entry.source}: {chosen} rows ({', '.join(KEYS[chosen])})")
            rows = to_layout(row, chosen, layout, where)
        except DataError as error:
            bad(error)
            continue
        yield rows, where


def named_format(entry: DataEntry) -> str | None:
    """The format that an entry names, None without one; ConfigError for `text`, which holds no rows."""
    if entry.format == "text":
        mend = f"one of {', '.join(KEYS)}, or none: it is recognised; text is for `tokenize`"
        raise ConfigError("`format: text` is of documents, and these are rows", where=entry.source, mend=mend)
    return entry.format


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


def pydocs_rows(layout: str, split: Split) -> Iterator[list[Row]]:
    """The embedded rows, divided as pydocs divides itself."""
    from pipeline.data import pydocs

    if layout in ("preference", "ranked", "unpaired"):
        rows: Iterator[Row] = pydocs.preference_rows(split)
        chosen = "preference"
    else:
        rows = pydocs.instruction_rows(split)
        chosen = "messages"
    for number, row in enumerate(rows, start=1):
        yield to_layout(row, chosen, layout, f"pydocs {split} row {number}")


def arithmetic_rows(layout: str, split: Split) -> Iterator[list[Row]]:
    """Questions and answers, divided as `arithmetic` divides itself; it has no preferences."""
    from pipeline.data import arithmetic

    for number, row in enumerate(arithmetic.instruction_rows(split), start=1):
        yield to_layout(row, "messages", layout, f"arithmetic {split} row {number}")


def to_layout(row: Row, chosen: str, layout: str, where: str) -> list[Row]:
    """A row of format `chosen` in canonical `layout`: one row; where pairs or lists are taken apart more, or none."""
    for key in KEYS[chosen]:
        if row.get(key) is None:
            raise DataError(
                f"field `{key}` of a {chosen} row is missing", where=where, mend="add it, or take the row out"
            )
    _check_use(chosen, layout, where)
    tools = tools_in(row, where)
    return [with_tools(found, tools) for found in _canonical(row, chosen, layout, where)]


def _canonical(row: Row, chosen: str, layout: str, where: str) -> list[Row]:
    """What `to_layout` makes of a row, its `tools` left out of account."""
    if chosen in PAIRS:
        pair = preference(row, chosen, where)
        if layout == "unpaired":
            return as_unpaired(pair)
        reference = {"prompt": pair["prompt"], "reference": pair["chosen"][0]["content"]}
        if layout == "ranked":
            return [as_ranked(pair, row)]
        return [pair if layout == "preference" else reference]
    if chosen == "ranked":
        found = ranked(row, where)
        if layout == "preference":
            return as_pairs(found)
        reference = {"prompt": found["prompt"], "reference": found["answers"][0][0]["content"]}
        return [found if layout == "ranked" else reference]
    if chosen == "unpaired":
        lone = unpaired(row, where)
        answer = lone["completion"][0]["content"] if lone["label"] else ""
        return [lone if layout == "unpaired" else {"prompt": lone["prompt"], "reference": answer}]
    messages = demonstration(row, chosen, where)
    check_conversation(messages, where)
    if layout == "messages":
        if messages[-1]["role"] != "assistant":
            raise DataError(
                f"the last message is from {messages[-1]['role']}: nothing answers it",
                where=where,
                mend="end the row with an assistant's message",
            )
        if all(message.get("weight") == "0" for message in messages if message["role"] == "assistant"):
            raise DataError("every answer has weight 0: nothing is trained", where=where, mend="take the row out")
        return [{"messages": messages}]
    if messages[-1]["role"] == "assistant":
        return [{"prompt": checked_prompt(messages[:-1], where), "reference": messages[-1]["content"]}]
    return [{"prompt": checked_prompt(messages, where), "reference": ""}]


def _check_use(chosen: str, layout: str, where: str) -> None:
    """ConfigError for rows of a format that the layout cannot be made of."""
    if chosen in JUDGED and layout == "messages":
        mend = f"name rows of one of {', '.join(name for name in KEYS if name not in JUDGED)}"
        if chosen == "unpaired":
            mend = "where `label` says nothing of good and bad, `format: prompt_completion`; else " + mend
        raise ConfigError(f"these are {chosen} rows, and demonstrations are needed here", where=where, mend=mend)
    if layout == "unpaired" and chosen == "ranked":
        what = "these are ranked rows, and lone answers with a label are needed here"
        raise ConfigError(what, where=where, mend=f"name rows with {', '.join(KEYS['unpaired'])}")
    if (layout in ("preference", "ranked") and chosen not in COMPARED) or (
        layout == "unpaired" and chosen not in JUDGED
    ):
        what = "preferences or answers with a label" if layout == "unpaired" else "preferences"
        mend = f"name rows with {', '.join(KEYS['preference'])}"
        if layout == "unpaired":
            mend += f" or with {', '.join(KEYS['unpaired'])}"
        raise ConfigError(f"these are {chosen} rows, and {what} are needed here", where=where, mend=mend)


def demonstration(row: Row, chosen: str, where: str) -> list[Message]:
    """The conversation of a row that is no preference row."""
    if chosen == "messages":
        return behind_system(row, messages_of(row["messages"], "messages", ROLES, where), where)
    if chosen == "sharegpt":
        return behind_system(row, messages_of(row["conversations"], "conversations", SHAREGPT_ROLES, where), where)
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
    prompt, completion = side(row, "prompt", "user", where), side(row, "completion", "assistant", where)
    if repeats(prompt, completion):  # as both sides of a preference may: it is taken once, as the completion has it
        prompt, completion = [], joined(systems_of(prompt), completion, where)
    return behind_system(row, prompt + completion, where)


def prompt_key(row: Row) -> str:
    """What decides on which side of the split a row falls: what the user says first.

    So all rows about one question fall on one side, in sft, reward, dpo and evaluation alike, whatever the
    system message, the answer and the later turns.
    """
    messages: list[Message] = row["messages"] if "messages" in row else row["prompt"]
    first = next((message for message in messages if message["role"] == "user"), messages[0])
    return first["content"].strip()
