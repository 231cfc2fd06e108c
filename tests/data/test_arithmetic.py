"""arithmetic: every sum is right, what is held out is nowhere else, and the shares are those that are stated."""

import re
from collections.abc import Iterator
from itertools import permutations
from typing import Any

import pytest

from pipeline.data import arithmetic
from pipeline.data.corpus import pieces
from pipeline.data.formats import read_rows
from pipeline.data.sources import read_documents, source_fingerprint
from pipeline.data.units import cut
from pipeline.errors import ConfigError
from pipeline.recipe import DataEntry

ENTRY = DataEntry(source="arithmetic")


def numbers_in(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def problem_of(text: str) -> tuple[int, ...]:
    """The longest chain of numbers that are added in a text, in ascending order."""
    chains = [numbers_in(chain) for chain in re.findall(r"\d+(?:\+\d+)+", text)]
    return tuple(sorted(max(chains, key=len)))


def equations(text: str) -> Iterator[tuple[str, int]]:
    for left, right in re.findall(r"(\d+(?:\+\d+)+)=(\d+)", text):
        yield left, int(right)


def pair(row: dict[str, Any]) -> tuple[str, str]:
    question, answer = row["messages"]
    assert (question["role"], answer["role"]) == ("user", "assistant")
    return question["content"], answer["content"]


@pytest.fixture(scope="module")
def documents() -> dict[str, list[str]]:
    return {which: list(arithmetic.corpus(which)) for which in ("train", "held_out")}


@pytest.fixture(scope="module")
def rows() -> dict[str, list[tuple[str, str]]]:
    return {which: [pair(row) for row in arithmetic.instruction_rows(which)] for which in ("train", "held_out")}


def test_the_steps_by_hand():
    assert arithmetic.question((47, 8, 5, 9)) == "What is 47+8+5+9?"
    assert arithmetic.worked((47, 8, 5, 9)) == "47+8=55\n55+5=60\n60+9=69"


@pytest.mark.slow
def test_every_sum_is_right(documents: dict[str, list[str]], rows: dict[str, list[tuple[str, str]]]):
    for text in documents["train"] + documents["held_out"]:
        problem = problem_of(text)
        assert numbers_in(text)[-1] == sum(problem)
        assert all(sum(numbers_in(left)) == right for left, right in equations(text)), text
    for asked, answer in rows["train"] + rows["held_out"]:
        assert numbers_in(answer)[-1] == sum(numbers_in(asked))
        assert all(sum(numbers_in(left)) == right for left, right in equations(answer)), answer


@pytest.mark.slow
def test_what_is_held_out_is_nowhere_else(documents: dict[str, list[str]], rows: dict[str, list[tuple[str, str]]]):
    """All of it: problems as sets of numbers, so that another order or wording is the same problem."""
    seen = {problem_of(text) for text in documents["train"]} | {problem_of(asked) for asked, _ in rows["train"]}
    unseen = {problem_of(text) for text in documents["held_out"]} | {problem_of(asked) for asked, _ in rows["held_out"]}
    assert not seen & unseen
    assert len(seen) > 30_000
    assert len(unseen) > 3_000
    steps = {left for text in documents["train"] for left, _ in equations(text)}
    assert {left.count("+") for left in steps} == {1}  # a step is no problem: those have four numbers or five
    assert {len(problem) for problem in seen | unseen} == {4, 5}


def test_the_order_of_the_numbers_does_not_move_a_problem():
    for numbers in list(arithmetic.problems("question", 40, "all")):
        assert len({arithmetic.is_held_out(order) for order in permutations(numbers)}) == 1


@pytest.mark.slow
def test_a_problem_is_asked_once(rows: dict[str, list[tuple[str, str]]]):
    asked = [problem_of(question) for question, _ in rows["train"] + rows["held_out"]]
    assert len(set(asked)) == len(asked)


@pytest.mark.slow
def test_the_shares_are_those_that_are_stated(documents: dict[str, list[str]], rows: dict[str, list[tuple[str, str]]]):
    """A tenth held out, a tenth of the answers and two thirds of the documents in steps, within four deviations."""
    everything = rows["train"] + rows["held_out"]
    held_out = len(rows["held_out"]) / len(everything)
    in_steps = sum("=" in answer for _, answer in everything) / len(everything)
    documents_in_steps = sum("=" in text for text in documents["train"]) / len(documents["train"])
    assert held_out == pytest.approx(0.1, abs=4 * (0.09 / len(everything)) ** 0.5)
    assert in_steps == pytest.approx(0.1, abs=4 * (0.09 / len(everything)) ** 0.5)
    assert documents_in_steps == pytest.approx(2 / 3, abs=4 * (2 / 9 / len(documents["train"])) ** 0.5)


@pytest.mark.slow
def test_both_sides_are_all_of_it(rows: dict[str, list[tuple[str, str]]]):
    both = [pair(row) for row in arithmetic.instruction_rows("all")]
    assert sorted(both) == sorted(rows["train"] + rows["held_out"])
    assert list(map(pair, arithmetic.instruction_rows("train"))) == rows["train"]


@pytest.mark.slow
def test_as_a_source(rows: dict[str, list[tuple[str, str]]]):
    messages = read_rows([DataEntry(source="arithmetic", limit=3)], "messages")
    assert list(map(pair, messages)) == rows["train"][:3]
    prompts = read_rows([ENTRY], "prompt", split="held_out", held_out=0.9)  # it is divided by itself
    assert [(row["prompt"][0]["content"], row["reference"]) for row in prompts] == rows["held_out"]
    divided = [(piece.text, piece.is_held_out) for unit in cut([ENTRY], 0.5, 0.5, print) for piece in pieces(unit)]
    assert [text for text, is_held_out in divided if not is_held_out] == list(arithmetic.corpus("train"))
    assert [text for text, is_held_out in divided if is_held_out] == [
        document.text for document in read_documents(ENTRY, split="held_out")
    ]
    assert source_fingerprint(ENTRY, lambda path: "") == {"arithmetic": arithmetic.VERSION}


def test_what_it_is_not_for():
    with pytest.raises(ConfigError, match="messages rows, and preferences are needed"):
        read_rows([ENTRY], "preference")
    with pytest.raises(ConfigError, match="arithmetic is divided by llmpipe itself"):
        read_rows([DataEntry(source="arithmetic", split="train")], "messages")
