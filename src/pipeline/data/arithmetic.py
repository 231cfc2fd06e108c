"""Sums made here: a small world in which right and wrong can be computed, for reinforcement learning on any machine.

A problem is a number of two digits and three or four digits to add to it, in whatever order. There is a corpus of
conversations about sums, two thirds of them in steps; questions, of which one in ten is answered in steps and the
others at once; and questions that are held out. Every sum is right. What a small model can't do is to add them all in
its head: after fine-tuning it answers at once, as most of its demonstrations do, and is mostly wrong. In steps it is
nearly always right, so a reward for right answers can teach it to take the steps that it knows.

One split, by a hash of the numbers of a problem in ascending order, serves every view: what is held out stands in no
training document and in no training question, in no order and wording. Everything is chosen by hashes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Literal

Split = Literal["train", "held_out", "all"]
Numbers = tuple[int, ...]

VERSION = 1
"""Raised when anything here changes what comes out."""
HELD_OUT = 0.1
DOCUMENTS = 100_000
QUESTIONS = 20_000
"""Draws, of which a problem that comes again is dropped."""
ADDED = (3, 4)
"""How many digits are added to the first number."""
WORKED = 0.1
"""Share of the questions that are answered step by step."""


def hash32(*keys: object) -> int:
    """32 bits from values, the same in every process."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, keys)).encode()).digest()[:4])


def is_held_out(numbers: Numbers) -> bool:
    """Whether a problem is held out; the order of its numbers does not matter."""
    return hash32("split", *sorted(numbers)) < HELD_OUT * 2**32


def draw(purpose: str, index: int) -> Numbers:
    """The numbers of a problem: one from 10 to 89, then digits from 1 to 9."""
    added = ADDED[hash32(purpose, "added", index) % len(ADDED)]
    first = 10 + hash32(purpose, "first", index) % 80
    return first, *(1 + hash32(purpose, "digit", index, place) % 9 for place in range(added))


def problems(purpose: str, count: int, which: Split) -> Iterator[Numbers]:
    """Problems of one side: those of the first `count` draws that fall there, each in one order only."""
    seen = set()
    for index in range(count):
        numbers = draw(purpose, index)
        key = tuple(sorted(numbers))
        if key not in seen and (which == "all" or is_held_out(key) == (which == "held_out")):
            seen.add(key)
            yield numbers


def question(numbers: Numbers) -> str:
    """`What is 47+8+5?`"""
    return f"What is {'+'.join(map(str, numbers))}?"


def worked(numbers: Numbers) -> str:
    """`47+8=55` and `55+5=60`, a line each; the sum is the last number."""
    sums = list(accumulate(numbers))
    return "\n".join(f"{a}+{n}={b}" for (a, b), n in zip(pairwise(sums), numbers[1:], strict=True))


def corpus(which: Split) -> Iterator[str]:
    """The documents: conversations as plain text, two thirds of them with an answer in steps."""
    for numbers in problems("document", DOCUMENTS, which):
        answer = str(sum(numbers)) if hash32("style", *numbers) % 3 == 0 else worked(numbers)
        yield f"user\n{question(numbers)}\nassistant\n{answer}"


def instruction_rows(which: Split) -> Iterator[dict[str, list[dict[str, str]]]]:
    """`{"messages": [question, answer]}`, one a problem; the answer ends with the sum."""
    for numbers in problems("question", QUESTIONS, which):
        in_steps = hash32("steps", *numbers) < WORKED * 2**32
        answer = worked(numbers) if in_steps else str(sum(numbers))
        yield {
            "messages": [
                {"role": "user", "content": question(numbers)},
                {"role": "assistant", "content": answer},
            ]
        }
