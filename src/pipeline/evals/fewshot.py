"""Examples before a question, the same ones before every question (of its subject), so that they are read once.

A base model reads one text: description, examples, question, each set off by an empty line, as lm-eval writes them. A
chat model gets every example as a turn of the user and one of the assistant, the description in front of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pipeline.data.chat import encode_messages, encode_prompt
from pipeline.data.tokenizers import encode_text
from pipeline.evals.likelihood import Request
from pipeline.evals.subject import Subject

BETWEEN = "\n\n"


@dataclass(frozen=True)
class Shown:
    """What stands before the questions of one subject: a description, and examples as (question, answer)."""

    description: str
    examples: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Asker:
    """Words into tokens for one model."""

    subject: Subject
    in_template: bool
    begun: dict[Shown, list[int]] = field(default_factory=dict)
    """The tokens that questions begin with, once they were written."""
    last: dict[tuple[Shown, str], tuple[tuple[int, ...], int]] = field(default_factory=dict)
    """The prompt that was written last: its choices come one after the other."""

    def prompt(self, shown: Shown, question: str) -> tuple[tuple[int, ...], int]:
        """(the tokens before an answer, how many of them every question shares)."""
        if (shown, question) not in self.last:
            self.last.clear()
            self.last[shown, question] = self._prompt(shown, question)
        return self.last[shown, question]

    def _prompt(self, shown: Shown, question: str) -> tuple[tuple[int, ...], int]:
        tokenizer = self.subject.tokenizer
        if self.in_template:
            ids = encode_prompt(tokenizer, self._turns(shown, question))
        else:
            ids = [self.subject.start_token, *encode_text(tokenizer, self._text(shown) + question)]
        return tuple(ids), shared_length(ids, self._beginning(shown)[:-1])  # the last may be joined to what follows

    def _beginning(self, shown: Shown) -> list[int]:
        if shown not in self.begun:
            if not self.in_template:
                ids = [self.subject.start_token, *encode_text(self.subject.tokenizer, self._text(shown))]
            elif shown.examples:
                ids = encode_messages(self.subject.tokenizer, self._turns(shown, "")[:-1]).input_ids
            else:
                ids = []
            self.begun[shown] = ids
        return self.begun[shown]

    def request(self, shown: Shown, question: str, answer: str) -> Request:
        """`answer` begins with a space where the question does not end with one; a template writes its own."""
        prompt, shared = self.prompt(shown, question)
        if self.in_template:
            turns = [*self._turns(shown, question), {"role": "assistant", "content": answer.strip()}]
            row = encode_messages(self.subject.tokenizer, turns).input_ids
            assert tuple(row[: len(prompt)]) == prompt, "the row does not begin with its own prompt"
            return Request(prompt, tuple(row[len(prompt) :]), shared)
        whole = encode_text(self.subject.tokenizer, self._text(shown) + question + answer)
        end = min(len(prompt) - 1, len(whole) - 1)
        return Request((self.subject.start_token, *whole[:end]), tuple(whole[end:]), min(shared, end))

    def _text(self, shown: Shown) -> str:
        description = [shown.description] if shown.description else []
        parts = [*description, *(question + answer for question, answer in shown.examples)]
        return "".join(f"{part}{BETWEEN}" for part in parts)

    def _turns(self, shown: Shown, question: str) -> list[dict[str, str]]:
        said = [(role, text) for pair in shown.examples for role, text in zip(("user", "assistant"), pair)]
        said.append(("user", question))
        if shown.description:
            said[0] = ("user", f"{shown.description}{BETWEEN}{said[0][1]}")
        return [{"role": role, "content": text.strip()} for role, text in said]


def shared_length(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(ids, others))
    return next((place for place, (ours, theirs) in pairs if ours != theirs), min(len(ids), len(others)))


def shown_for(description: str, examples: Sequence[tuple[str, str, str]], count: int) -> Callable[[str], Shown]:
    """subject -> what stands before its questions: the first `count` examples (subject, question, answer) of the same
    subject, or of all where none has one."""
    made: dict[str, Shown] = {}

    def find(subject: str) -> Shown:
        if subject not in made:
            own = [each for each in examples if each[0] == subject] or list(examples)
            text = description.replace("{subject}", subject.replace("_", " "))
            made[subject] = Shown(text, tuple((question, answer) for _, question, answer in own[:count]))
        return made[subject]

    return find
