"""Pairs taken apart and put together again."""

from typing import Any

from pipeline.data.preferences import as_unpaired, kind_of, pairs_of


def pair(question: str, chosen: str, rejected: str, **own: Any) -> dict[str, Any]:
    sides = {
        key: [{"role": "assistant", "content": text}] for key, text in (("chosen", chosen), ("rejected", rejected))
    }
    prompt = [{"role": "user", "content": question}]
    return {"prompt": prompt, **sides, "kind": "k", "margin": 0.0, "preference": 1.0} | own


def test_what_was_taken_apart_comes_together_again_in_its_order() -> None:
    pairs = [pair("Q", "a", "b"), pair("R", "c", "d"), pair("Q", "e", "f")]
    assert pairs_of([row for each in pairs for row in as_unpaired(each)]) == pairs


def test_an_answer_without_a_partner_and_a_partner_that_says_the_same_are_left_out() -> None:
    good, bad = as_unpaired(pair("Q", "a", "b"))
    other = as_unpaired(pair("R", "c", "d"))[1]
    assert pairs_of([good, other, good, bad]) == [pair("Q", "a", "b")]
    assert pairs_of([good, {**bad, "completion": good["completion"]}]) == []


def test_the_kind_is_the_rows_own_else_its_subset() -> None:
    """A table's empty cell (null) is no kind."""
    assert kind_of({"kind": "caps", "subset": "donotanswer"}) == "caps"
    assert kind_of({"kind": None, "subset": "donotanswer"}) == "donotanswer"
    assert kind_of({"subset": "donotanswer"}) == "donotanswer"
    assert kind_of({"kind": None}) == kind_of({}) == kind_of({"kind": 3}) == ""
