"""Which answers are kept, by hand."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from pipeline.data.formats import to_layout
from pipeline.rl.keeping import Answer, Group, Keeping, figures

PROMPT = [{"role": "user", "content": "q"}]


def group(*answers: tuple[str, float | None, bool], reference: str = "") -> Group:
    return Group(PROMPT, reference, [Answer(text, is_ended, score) for text, score, is_ended in answers])


def kept(groups: list[Group], keep: str, **fields: Any) -> tuple[list[dict[str, Any]], Counter[str]]:
    given = {"against": "worst", "threshold": None, "min_margin": 0.0, "keeps_unfinished": False}
    draw = fields.pop("draw", lambda number, n: 0)
    return Keeping(keep=keep, draw=draw, **(given | fields)).rows(groups)  # type: ignore[arg-type]


FOUR = group(("a", 0.5, True), ("b", 2.0, True), ("c", 3.0, False), ("d", -1.0, True))


def says(row: dict[str, Any]) -> str:
    return str(row["messages"][-1]["content"])


def test_all_that_ended_and_said_something():
    rows, why = kept([FOUR, group((" \n", 9.0, True))], "all")
    assert [(says(row), row["score"]) for row in rows] == [("a", 0.5), ("b", 2.0), ("d", -1.0)]
    assert rows[0]["messages"][:-1] == PROMPT
    assert +why == {"unfinished": 1, "empty": 1}
    assert [says(row) for row in kept([FOUR], "all", keeps_unfinished=True)[0]] == ["a", "b", "c", "d"]
    assert [says(row) for row in kept([FOUR], "all", threshold=0.5)[0]] == ["a", "b"], "the threshold itself is kept"


def test_the_best_that_ended():
    rows, _ = kept([FOUR, group(("x", 1.0, True), ("y", 1.0, True))], "best")
    assert [says(row) for row in rows] == ["b", "x"], "of equal ones the first"
    rows, why = kept([FOUR, group(("x", 1.0, True), ("y", 1.0, True))], "best", threshold=1.5)
    assert [says(row) for row in rows] == ["b"]
    assert why["below the threshold"] == 1


def test_the_best_over_the_worst_or_over_one_by_chance():
    rows, _ = kept([FOUR], "pairs")
    expected = {"prompt": PROMPT, "chosen": "b", "rejected": "d", "score_chosen": 2.0, "score_rejected": -1.0}
    assert rows == [expected | {"margin": 3.0}]
    asked = []

    def draw(number: int, n: int) -> int:
        asked.append((number, n))
        return 0

    rows, _ = kept([FOUR, FOUR], "pairs", against="random", draw=draw)
    assert [row["rejected"] for row in rows] == ["a", "a"]
    assert asked == [(0, 2), (1, 2)], "one of the two others that ended"
    assert to_layout(rows[0], "preference", "preference", "")[0]["chosen"][0]["content"] == "b"


@pytest.mark.parametrize(
    ("answers", "fields", "reason"),
    [
        ([("a", 1.0, True), ("b", 1.0, True)], {}, "tied"),
        ([("a", 1.0, True), ("b", 0.5, True)], {"min_margin": 0.5}, "tied"),
        ([("a", 1.0, True), ("a ", 0.0, True)], {}, "equal to the other side"),
        ([("a", 1.0, True), ("b", 0.0, False)], {}, "fewer than two answers"),
        ([("a", 1.0, True), ("b", 0.0, True)], {"threshold": 1.5}, "below the threshold"),
    ],
)
def test_no_pair(answers: list[tuple[str, float, bool]], fields: dict[str, Any], reason: str):
    rows, why = kept([group(*answers)], "pairs", **fields)
    assert rows == []
    assert why[reason] == 1


def test_the_datas_own_answer_over_each():
    told = group(("a", None, True), ("b ", None, True), ("c", None, True), reference="b")
    rows, why = kept([told, group(("a", None, True))], "reference")
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("b", "a"), ("b", "c")]
    assert +why == {"equal to the other side": 1, "no answer in the data": 1}


def test_figures_by_hand():
    found = figures([FOUR, group(*[("x", 1.0, True)] * 4)])
    assert found["ended"] == 7 / 8
    assert found["distinct"] == 5 / 8
    assert found["score"] == pytest.approx((0.5 + 2 + 3 - 1 + 4) / 8)
    deviation = (sum((value - 1.125) ** 2 for value in (0.5, 2, 3, -1)) / 4) ** 0.5
    assert found["score_std"] == pytest.approx(deviation / 2)
    assert found["score_best"] == 2.0
    assert figures([group(("a", None, False), ("a", None, True))]) == {"ended": 0.5, "distinct": 0.5}
