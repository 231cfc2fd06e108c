"""Answers: their figures by hand, and their log-probabilities against the model's own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pipeline.data.chat import encode_prompt, stop_token_id
from pipeline.evals import samples
from pipeline.evals.likelihood import Request
from pipeline.evals.subject import Subject
from pipeline.model.sampling import draw_uniforms

ROWS = [
    {"prompt": [{"role": "user", "content": text}], "reference": "return the sum of two numbers"}
    for text in ("sum?", "read a file", "sort", "open the door " * 20)
]


def sampled(subject: Subject, baseline: Subject | None, seed: int = 0) -> list[dict[str, Any]]:
    uniforms_NT = draw_uniforms(len(ROWS), 12, torch.Generator().manual_seed(seed))
    return samples.score(
        subject,
        ROWS,
        max_new_tokens=12,
        uniforms_NT=uniforms_NT,
        baseline=baseline,
        rewards=lambda rows: [0.5] * len(rows),
    )


def test_prompts_that_leave_no_room_are_left_out(chat_subject: Subject) -> None:
    assert [item["item"] for item in sampled(chat_subject, None)] == [0, 1, 2]


def test_the_same_seed_gives_the_same_answers_and_another_gives_others(chat_subject: Subject) -> None:
    first = sampled(chat_subject, None)
    assert sampled(chat_subject, None) == first
    assert sampled(chat_subject, None, seed=1) != first


def test_log_probabilities_of_what_was_said(chat_subject: Subject, other_subject: Subject) -> None:
    items = sampled(chat_subject, other_subject)
    assert {"reward", "logprob", "baseline_logprob"} <= items[0].keys()
    same = sampled(chat_subject, chat_subject)
    assert [item["logprob"] for item in same] == pytest.approx([i["baseline_logprob"] for i in same], abs=1e-3)
    stop = stop_token_id(chat_subject.tokenizer)
    for item in items:
        answer = chat_subject.tokenizer.encode(item["answer"], add_special_tokens=False) + [stop] * bool(item["ended"])
        if len(answer) != item["length"]:
            continue  # sampled bytes that are no text do not come back as they were
        prompt = encode_prompt(chat_subject.tokenizer, ROWS[item["item"]]["prompt"])
        expected = other_subject.log_likelihoods([Request(tuple(prompt), tuple(answer))])[0]
        assert item["baseline_logprob"] == pytest.approx(expected, abs=1e-3)


def test_greedy_has_no_kl(chat_subject: Subject, other_subject: Subject) -> None:
    items = samples.score(chat_subject, ROWS, max_new_tokens=8, uniforms_NT=None, baseline=other_subject, rewards=None)
    assert "logprob" not in items[0]
    assert "reward" not in items[0]
    assert "kl" not in samples.figures(items, items, 0)


def item(number: int, gold: float, reward: float, logprob: float = 0.0, baseline: float = 0.0) -> dict[str, Any]:
    said = {"item": number, "length": 4, "ended": gold > 0, "gold": gold, "reward": reward}
    return said | {"logprob": logprob, "baseline_logprob": baseline}


def test_figures_by_hand() -> None:
    """KL: (2 + 1) / 2. Gold: a win and a tie. Baseline's rewards 0 and 2: deviation √2; differences 3 and 1."""
    ours = [item(0, 0.9, 3.0, -1.0, -3.0), item(1, 0.0, 3.0, -2.0, -3.0)]
    theirs = [item(0, 0.4, 0.0), item(1, 0.0, 2.0), item(2, 1.0, 9.0)]
    found = {name: estimate.value for name, estimate in samples.figures(ours, theirs, 0).items()}
    assert found == {
        "length": 4.0,
        "ended": 0.5,
        "gold": pytest.approx(0.45),
        "reward": 3.0,
        "kl": 1.5,
        "gold_win_rate": 0.75,
        "gold_difference": pytest.approx(0.25),
        "reward_sd": pytest.approx(2 / math.sqrt(2)),
    }


def test_the_baseline_is_not_compared_with_itself() -> None:
    assert set(samples.figures([item(0, 0.9, 3.0)], None, 0)) == {"length", "ended", "gold", "reward"}
