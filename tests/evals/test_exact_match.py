"""Right or wrong: what counts as right, and the figures by hand."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.evals import exact_match, samples
from pipeline.evals.subject import Subject

Item = dict[str, Any]


def answered(monkeypatch: pytest.MonkeyPatch, answers: list[tuple[str, str, bool]], match: exact_match.Match) -> Any:
    """`correct` of answers (text, reference, whether it ended) that no model had to write."""
    said = [
        {"item": number, "answer": text, "reference": reference, "ended": ended, "length": 3, "gold": 0.5}
        for number, (text, reference, ended) in enumerate(answers)
    ]
    monkeypatch.setattr(samples, "score", lambda *_, **__: said)
    items = exact_match.score(None, [], match=match, max_new_tokens=8)  # type: ignore[arg-type]
    assert all("gold" not in item for item in items)
    return [item["correct"] for item in items]


def test_numbers_are_compared_by_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [
        ("47+8=55, 55+5=60", "60", True),
        ("60", "47+8=55, 55+5=60", True),
        ("60, or 61", "60", True),
        ("sixty", "60", True),
        ("60", "60", False),
        ("It is 1,234.", "So #### 1234", True),
    ]
    assert answered(monkeypatch, answers, "number") == [1.0, 1.0, 0.0, 0.0, 0.0, 1.0]


def test_texts_are_compared_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [("a cat", "a cat", True), ("a cat.", "a cat", True), ("a cat", "a cat", False), ("060", "60", True)]
    assert answered(monkeypatch, answers, "exact") == [1.0, 0.0, 0.0, 0.0]


def test_a_model_is_asked_greedily(chat_subject: Subject) -> None:
    """The answers are those of the task `greedy`; the model's own answer as the reference is right if it ended."""
    rows = [
        {"prompt": [{"role": "user", "content": text}], "reference": "x"} for text in ("sum?", "sort", "open " * 60)
    ]
    greedy = samples.score(chat_subject, rows, max_new_tokens=12, uniforms_NT=None, baseline=None, rewards=None)
    rows = [rows[item["item"]] | {"reference": item["answer"]} for item in greedy]
    assert len(rows) == 2
    items = exact_match.score(chat_subject, rows, match="exact", max_new_tokens=12)
    assert [item["answer"] for item in items] == [item["answer"] for item in greedy]
    assert [item["correct"] for item in items] == [float(item["ended"]) for item in items]


def item(number: int, correct: float, length: int = 4) -> Item:
    return {"item": number, "correct": correct, "length": length, "ended": True}


def test_figures_by_hand() -> None:
    """Two of three right. Both answered items 0 and 1: 1 - 0 and 0 - 0, a half. Items are paired by number."""
    ours = [item(0, 1.0, 2), item(1, 0.0, 4), item(3, 1.0, 6)]
    theirs = [item(1, 0.0), item(0, 0.0), item(2, 1.0)]
    found = {name: estimate.value for name, estimate in exact_match.figures(ours, theirs, 0).items()}
    assert found == {"accuracy": pytest.approx(2 / 3), "length": 4.0, "ended": 1.0, "difference": 0.5}
    difference = exact_match.figures(ours, theirs, 0)["difference"]
    assert (difference.low, difference.high, difference.n) == (0.0, 1.0, 2)


def test_the_baseline_is_not_compared_with_itself() -> None:
    assert set(exact_match.figures([item(0, 1.0)], None, 0)) == {"accuracy", "length", "ended"}
