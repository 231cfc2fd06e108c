"""Pairs taken apart and put together again."""

from typing import Any

import pytest

from pipeline.data.preferences import as_unpaired, kind_of, pairs_of, preference
from pipeline.errors import DataError

S, Q, A, B, T = (
    {"role": role, "content": text}
    for role, text in (("system", "S"), ("user", "Hi"), ("assistant", "a"), ("assistant", "b"), ("user", "And?"))
)


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


GIVEN_AND_REPEATED: dict[str, tuple[Any, list[dict[str, str]], list[dict[str, str]]]] = {
    "with a system message": ("Hi", [S, Q], [S, Q]),
    "with white space": ("Hi ", [Q], [Q]),
    "as it stands": ("Hi", [Q], [Q]),
    "and gone on from": ("Hi", [Q, A, T], [Q, A, T]),
    "as the last question": ("And?", [S, Q, A, T], [S, Q, A, T]),
    "its system message left out": ([S, Q], [Q], [S, Q]),
    "not at all": ("Hi", [], [Q]),
    "by an assistant's going on": ("Hi", [A, Q], [Q, A, Q]),
    "not, and another question follows": ("Hi", [A, T], [Q, A, T]),
}


@pytest.mark.parametrize("name", GIVEN_AND_REPEATED)
def test_a_prompt_that_both_sides_repeat_is_taken_once(name: str) -> None:
    prompt, begun, expected = GIVEN_AND_REPEATED[name]
    row = {"prompt": prompt, "chosen": [*begun, A], "rejected": [*begun, B]}
    found = preference(row, "preference", "rows.jsonl:1")
    assert (found["prompt"], found["chosen"], found["rejected"]) == (expected, [A], [B])


def test_a_system_message_behind_the_prompt_is_refused() -> None:
    row = {"prompt": "Hi", "chosen": [S, T, A], "rejected": [S, T, B]}
    with pytest.raises(DataError, match="a system message of both sides comes after `prompt`"):
        preference(row, "preference", "rows.jsonl:1")
    other = {"prompt": [{**S, "content": "other"}, Q], "chosen": [S, Q, A], "rejected": [S, Q, B]}
    with pytest.raises(DataError, match="two system messages that differ"):
        preference(other, "preference", "rows.jsonl:1")
