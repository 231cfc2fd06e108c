"""Critique and revision: an answer is held against a principle, found fault with, and written anew (Bai et al. 2022,
"Constitutional AI", section 3).

A round asks twice: what in the answer goes against one principle of the constitution, and for an answer that does not.
The next round is of the new answer and another principle. Where either reply can't be used the round changes nothing,
and says why:

    empty        no text, the label that some models begin with (`Critique:`) aside
    unfinished   cut off at its length, unless cut-off texts are kept
    unreadable   a line of it is a heading of what was asked: the model has written the form again, not filled it in
    too long     what would be asked does not fit the context

A critique of NONE finds no fault: the answer stands. A revision that says what stood there is `unchanged`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import ConfigError
from pipeline.rl.judge import question_of
from pipeline.rl.keeping import NO_FAULT, REVISED, UNCHANGED
from pipeline.rl.place import Place
from pipeline.rl.writing import Key, RemoteWriter, Reply, Step, Writer

Message = dict[str, str]
Round = dict[str, Any]
"""principle, outcome, and as far as it came `critique` and `revision`; plain JSON."""

CRITIQUE = (
    "Question:\n{question}\n\n"
    "Answer:\n{answer}\n\n"
    "Principle:\n{principle}\n\n"
    "In a few sentences, say where the answer goes against the principle. If it does not, write NONE and no more.\n"
)
"""What asks for a critique; `critique_prompt` names a file that stands in its place."""
REVISION = (
    "Question:\n{question}\n\n"
    "Answer:\n{answer}\n\n"
    "Critique:\n{critique}\n\n"
    "Answer the question again so that the critique no longer holds. Write the new answer and nothing else.\n"
)
"""What asks for a revision; `revision_prompt` names a file that stands in its place."""
PLACES = ("question", "answer", "principle", "critique")
NEEDED = {"critique": ("answer", "principle"), "revision": ("answer", "critique")}
PLACE = re.compile(r"\{(" + "|".join(PLACES) + r")\}")
LABEL = re.compile(
    r"\s*[*_#]*\s*(?:critique|(?:the )?(?:(?:new|revised|rewritten) )?answer|revision)\s*[*_]*:\s*[*_]*", re.I
)
FAULTLESS = re.compile(r"\W*(?:none|no (?:fault|critique|revision)s?(?: (?:is |are )?needed)?)\W*", re.I)
ITEM = re.compile(r"(?:[-*+]|\d+[.)])\s+")


@dataclass
class Revised:
    """An answer and what became of it."""

    text: str
    rounds: list[Round] = field(default_factory=list)
    tokens: int = 0


@dataclass(frozen=True)
class Reviser:
    """How answers are revised."""

    writer: Writer | RemoteWriter
    principles: tuple[str, ...]
    rounds: int
    place: Place
    keeps_unfinished: bool
    critique_prompt: str = CRITIQUE
    revision_prompt: str = REVISION

    def order(self, key: Key) -> list[int]:
        """An order of the principles for an answer, by the seed; begun again where there are more rounds."""
        found: list[int] = torch.randperm(
            len(self.principles), generator=self.place.generator("principles", *key)
        ).tolist()
        return found

    def revise(self, asked: Sequence[tuple[Key, Sequence[Message], str]]) -> list[Revised]:
        """(key, prompt, answer) of each -> the answer after all rounds, and what each round was.

        A key is the place of the prompt and the answer's number there: its random numbers are its own.
        """
        found = [Revised(text) for _, _, text in asked]
        orders = [self.order(key) for key, _, _ in asked]
        for number in range(self.rounds):
            for each, order in zip(found, orders, strict=True):
                each.rounds.append({"principle": self.principles[order[number % len(order)]], "outcome": ""})
            self._ask("critique", number, asked, found)
            self._ask("revision", number, asked, found)
        return found

    def _ask(
        self, step: Step, number: int, asked: Sequence[tuple[Key, Sequence[Message], str]], found: list[Revised]
    ) -> None:
        """One request for each answer whose round goes on, and what came of it."""
        template = self.critique_prompt if step == "critique" else self.revision_prompt
        headings = headings_of(template)
        going_on = [place for place, each in enumerate(found) if not each.rounds[-1]["outcome"]]
        texts: list[str] = []
        keys: list[Key] = []
        for place in going_on:
            key, prompt, _ = asked[place]
            values = {"question": question_of(prompt), "answer": found[place].text, **found[place].rounds[-1]}
            texts.append(filled(template, values))
            keys.append((*key, number))
        for place, reply in zip(going_on, self.writer.write(step, texts, keys) if texts else [], strict=True):
            found[place].tokens += reply.tokens
            text, why = read_reply(reply, headings, self.keeps_unfinished)
            if text is None:
                found[place].rounds[-1]["outcome"] = f"{step} {why}"
            elif step == "critique":
                found[place].rounds[-1] |= {"critique": text, "outcome": NO_FAULT if FAULTLESS.fullmatch(text) else ""}
            else:
                is_new = text != found[place].text.strip()
                found[place].rounds[-1] |= {"revision": text, "outcome": REVISED if is_new else UNCHANGED}
                found[place].text = text if is_new else found[place].text


def filled(template: str, values: dict[str, str]) -> str:
    """The template with its places filled, in one pass: braces in a value stay as they are."""
    return PLACE.sub(lambda place: values[place[1]].strip(), template)


def headings_of(template: str) -> frozenset[str]:
    """The lines that stand right over a place (`Answer:`), or before one in its line (`Answer: {answer}`)."""
    over = re.findall(r"^[^\S\n]*(\S[^\n{}]*:)\s*\{(?:" + "|".join(PLACES) + r")\}", template, re.M)
    return frozenset(heading.strip() for heading in over)


def read_reply(reply: Reply, headings: frozenset[str], keeps_unfinished: bool) -> tuple[str | None, str]:
    """(what a reply says, "") or (None, why it can't be used); the rule stands at the top of this file."""
    if reply.text is None:
        return None, "too long"
    label = LABEL.match(reply.text)
    text = reply.text[label.end() if label else 0 :].strip()
    if not text:
        return None, "empty"
    if not (reply.is_ended or keeps_unfinished):
        return None, "unfinished"
    if any(line.strip().startswith(heading) for line in text.splitlines() for heading in headings):
        return None, "unreadable"
    return text, ""


def principles_in(text: str, where: str) -> tuple[str, ...]:
    """The principles of a constitution: the items of its lists (`- …`, `1. …`), else its paragraphs; headings (`# …`)
    are none. ConfigError where there is none."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    has_items = any(ITEM.match(line.lstrip()) for line in lines)
    found: list[list[str]] = []
    is_open = False
    for line in map(str.strip, lines):
        item = ITEM.match(line)
        if item:
            found.append([line[item.end() :]])
        elif line and is_open:
            found[-1].append(line)
        elif line and not has_items:
            found.append([line])
        is_open = bool(line) and (bool(item) or is_open or not has_items)
    principles = tuple(" ".join(lines).strip() for lines in found)
    if not any(principles):
        raise ConfigError("no principle in the constitution", where=where, mend="one a paragraph, or one a `- ` item")
    return tuple(filter(None, principles))


def prompt_in(path: Path | None, step: Step) -> str:
    """The text of a prompt's file, the built-in one without; ConfigError where it lacks a place that it needs."""
    if path is None:
        return CRITIQUE if step == "critique" else REVISION
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"not UTF-8 text ({error.reason})", where=str(path)) from error
    places = PLACE.findall(text)
    lacks = [f"{{{name}}}" for name in NEEDED[step] if name not in places]
    if lacks:
        raise ConfigError(f"the {step}'s prompt has no {' and no '.join(lacks)}", where=str(path))
    if step == "critique" and "critique" in places:
        raise ConfigError("{critique} in the critique's own prompt: there is none yet", where=str(path))
    return text
