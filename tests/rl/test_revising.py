"""Critique and revision: what is asked, what of a reply is used, which principles a constitution holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.rl.keeping import Answer, Group, Keeping, revising_figures
from pipeline.rl.masking import alone
from pipeline.rl.place import Place
from pipeline.rl.revising import CRITIQUE, REVISION, Reviser, filled, headings_of, principles_in, prompt_in, read_reply
from pipeline.rl.writing import Key, Reply, Step
from pipeline.runtime import derive_seed

PROMPT = [{"role": "user", "content": "How are you?"}]
HEADINGS = frozenset({"Question:", "Answer:", "Principle:"})


def generator(*keys: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(0, *keys))


class Script:
    """A writer that says what it is told to, and remembers what it was asked."""

    parameters = 0

    def __init__(self, *said: str | Reply) -> None:
        self.said = [each if isinstance(each, Reply) else Reply(each) for each in said]
        self.asked: list[tuple[Step, str, Key]] = []

    def write(self, step: Step, texts: Sequence[str], keys: Sequence[Key]) -> list[Reply]:
        self.asked += [(step, text, key) for text, key in zip(texts, keys, strict=True)]
        return [self.said.pop(0) for _ in texts]


def reviser(writer: Script, rounds: int = 1, principles: tuple[str, ...] = ("Be kind.",), **values: Any) -> Reviser:
    place = Place(torch.device("cpu"), False, 0, 1, alone, generator)
    return Reviser(writer, principles, rounds, place, values.pop("keeps_unfinished", False), **values)  # type: ignore[arg-type]


def test_what_is_asked():
    writer = Script("It is rude.", "I am well.")
    (found,) = reviser(writer).revise([((4, 1), PROMPT, "Go away {critique}")])
    assert writer.asked == [
        (
            "critique",
            "Question:\nHow are you?\n\nAnswer:\nGo away {critique}\n\nPrinciple:\nBe kind.\n\nIn a few sentences, say "
            "where the answer goes against the principle. If it does not, write NONE and no more.\n",
            (4, 1, 0),
        ),
        (
            "revision",
            "Question:\nHow are you?\n\nAnswer:\nGo away {critique}\n\nCritique:\nIt is rude.\n\nAnswer the question "
            "again so that the critique no longer holds. Write the new answer and nothing else.\n",
            (4, 1, 0),
        ),
    ]
    assert found.text == "I am well."
    assert found.rounds == [
        {"principle": "Be kind.", "outcome": "revised", "critique": "It is rude.", "revision": "I am well."}
    ]


def test_rounds_go_on_from_the_last_answer_by_another_principle():
    writer = Script("c0", "r0", "none.", "c2", "r2")
    (found,) = reviser(writer, 3, ("a", "b", "c")).revise([((0, 0), PROMPT, "first")])
    assert sorted(each["principle"] for each in found.rounds) == ["a", "b", "c"], "none twice before all were drawn"
    assert [each["outcome"] for each in found.rounds] == ["revised", "no fault", "revised"]
    assert "revision" not in found.rounds[1]
    assert [text.split("Answer:\n")[1].split("\n")[0] for _, text, _ in writer.asked] == [
        *("first", "first", "r0"),
        *("r0", "r0"),
    ]
    assert found.text == "r2"
    orders = {tuple(reviser(writer, 3, ("a", "b", "c")).order((place, 0))) for place in range(40)}
    assert len(orders) == 6, "drawn for each answer"


CASES = [
    ("Fine.", ("Fine.", "")),
    ("  Critique: It is rude.\n", ("It is rude.", "")),
    ("**Revised answer:** I am well.", ("I am well.", "")),
    ("**Revised answer**: I am well.", ("I am well.", "")),
    ("Answer: I am well.", ("I am well.", "")),
    (" \n", (None, "empty")),
    ("Critique:", (None, "empty")),
    (Reply("It is ru", is_ended=False), (None, "unfinished")),
    (Reply(None), (None, "too long")),
    ("I am well.\n\nPrinciple:\nBe kind.", (None, "unreadable")),
    ("The answer: it is in the principle: so.", ("it is in the principle: so.", "")),
]


@pytest.mark.parametrize(("reply", "expected"), CASES)
def test_what_of_a_reply_is_used(reply: str | Reply, expected: tuple[str | None, str]):
    assert read_reply(reply if isinstance(reply, Reply) else Reply(reply), HEADINGS, False) == expected
    assert headings_of(CRITIQUE) == HEADINGS
    assert headings_of(REVISION) == {"Question:", "Answer:", "Critique:"}
    assert headings_of("Say it of {answer}. By: {principle}\nA: {answer}") == {"A:"}


def test_cut_off_texts_count_where_they_are_kept():
    cut = Reply("It is ru", is_ended=False)
    assert read_reply(cut, HEADINGS, True) == ("It is ru", "")


def test_a_round_that_fails_changes_nothing_and_is_counted():
    writer = Script("", "c", "c", "r", Reply("x", is_ended=False), "b")
    asked = [((place, 0), PROMPT, text) for place, text in enumerate("abc")]
    found = reviser(writer).revise(asked)
    assert [each.text for each in found] == ["a", "r", "c"], "the first one's critique was empty: it asked for no more"
    assert [each.rounds[0]["outcome"] for each in found] == ["critique empty", "revised", "revision unfinished"]
    answers = [
        Answer(before, True, revised=each.text, rounds=each.rounds) for before, each in zip("abc", found, strict=True)
    ]
    group = Group(PROMPT, "", [*answers, Answer("d", True, revised="d", rounds=[{"outcome": "no fault"}])])
    figures = revising_figures([group])
    assert figures == {
        **{"rounds_critique_empty": 0.25, "rounds_no_fault": 0.25, "rounds_revised": 0.25},
        **{"rounds_revision_unfinished": 0.25, "changed": 0.25},
    }
    given: dict[str, Any] = {"against": "worst", "threshold": None, "min_margin": 0.0, "keeps_unfinished": False}
    rows, why = Keeping(keep="all", draw=lambda group, n: 0, **given).rows([group])
    assert [(row["original"], row["messages"][-1]["content"]) for row in rows] == [("b", "r"), ("d", "d")]
    assert +why == {"without a critique and revision of use": 2}
    rows, why = Keeping(keep="revised", draw=lambda group, n: 0, **given).rows([group])
    assert rows == [{"prompt": PROMPT, "chosen": "r", "rejected": "b", "revisions": found[1].rounds}]
    assert +why == {"without a critique and revision of use": 2, "equal to the other side": 1}


def test_a_revision_that_says_the_same():
    (found,) = reviser(Script("c", " first ")).revise([((0, 0), PROMPT, "first")])
    assert (found.text, found.rounds[0]["outcome"]) == ("first", "unchanged")


CONSTITUTION = """# Rules

What an answer should be:

- It is kind
  to everybody.
- It is short.

1. It is true.

And no more.
"""


def test_principles_are_items_or_paragraphs():
    assert principles_in(CONSTITUTION, "rules.md") == ("It is kind to everybody.", "It is short.", "It is true.")
    assert principles_in("# Rules\nBe kind\nand short.\n\nBe true.\n", "rules.md") == ("Be kind and short.", "Be true.")
    with pytest.raises(ConfigError, match="no principle in the constitution"):
        principles_in("# Rules\n\n", "rules.md")


def test_prompts_of_ones_own(tmp_path: Path):
    path = tmp_path / "critique.txt"
    path.write_text("{principle}? {answer}")
    assert filled(prompt_in(path, "critique"), {"principle": "{answer}", "answer": "x"}) == "{answer}? x"
    assert prompt_in(None, "revision") == REVISION
    for text, step, message in (
        ("Is it good? {answer}", "critique", "the critique's prompt has no {principle}"),
        ("Again.", "revision", "the revision's prompt has no {answer} and no {critique}"),
        ("{principle} {answer} {critique}", "critique", "there is none yet"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            prompt_in(path, step)  # type: ignore[arg-type]
