"""A user's reward function: what it is given, and every way it can be wrong."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.errors import TrainingError
from pipeline.rl.functions import function_scores

PROMPTS, RESPONSES = ["one", "two"], ["a", "bb"]
ROWS: list[dict[str, Any]] = [{"reference": "a"}, {"reference": "b"}]


def scores(function: Any) -> list[float]:
    return function_scores(function, "/x/rewards.py:f", PROMPTS, RESPONSES, ROWS).tolist()


def test_it_sees_prompts_responses_and_rows():
    def exact(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
        assert prompts == PROMPTS
        return [float(response == row["reference"]) for response, row in zip(responses, rows, strict=True)]

    assert scores(exact) == [1.0, 0.0]
    assert scores(lambda prompts, responses, rows: [True, 3]) == [1.0, 3.0]


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (lambda p, r, rows: [1.0], "gave 1 scores for 2 responses"),
        (lambda p, r, rows: [1.0, float("nan")], "gave nan for the response 'bb'"),
        (lambda p, r, rows: [float("inf"), 0.0], "gave inf for the response 'a'"),
        (lambda p, r, rows: 1 / 0, "raised ZeroDivisionError"),
        (lambda p, r, rows: [None, None], "raised TypeError"),
        (lambda p, r: [1.0, 2.0], "raised TypeError"),
        (lambda p, r, rows: None, "raised TypeError"),
    ],
)
def test_what_is_wrong_is_said(function: Any, what: str):
    with pytest.raises(TrainingError, match=what) as caught:
        scores(function)
    assert caught.value.where == "/x/rewards.py:f"
    assert "list[float]" in caught.value.mend
