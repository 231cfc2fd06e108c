"""Preference and reward accuracy, the length-only scorer beside them, by kind of negative."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data.chat import encode_messages
from pipeline.evals import length_only, pairs, preference_accuracy, reward_accuracy
from pipeline.evals.subject import Subject, chat_request


def row(question: str, chosen: str, rejected: str, kind: str = "") -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "kind": kind,
        "margin": 0.0,
        "preference": 1.0,
    }


ROWS = [
    row("sum?", "Return the sum.", "Open the door.", "other"),
    row("read?", "Read a file.", "Read", "truncated"),
    row("sort?", "Sort a list " * 30, "Sort", "truncated"),  # too long for the model
    row("open?", "Open the door.", "Open the door. Read a file.", "rambling"),
]


def test_scores_of_a_policy_are_those_of_its_rows(chat_subject: Subject) -> None:
    items = preference_accuracy.score(chat_subject, ROWS)
    assert [item["item"] for item in items] == [0, 1, 3]
    request = chat_request(
        chat_subject.tokenizer, ROWS[3]["prompt"], [{"role": "assistant", "content": "Open the door. Read a file."}]
    )
    ids = torch.tensor([[*request.prompt, *request.completion]])
    labels = ids.clone()
    labels[0, : len(request.prompt)] = -100
    with torch.inference_mode():
        expected = -float(chat_subject.model(input_ids=ids, labels=labels).loss) * len(request.completion)
    assert items[2]["rejected"] == pytest.approx(expected, rel=1e-5)
    assert (items[2]["chosen_chars"], items[2]["rejected_chars"]) == (14, 27)


def test_implicit_reward_by_hand() -> None:
    """Margins 1 - 3 = -2, 2 - 1 = 1, 0 - 0 = 0: wrong, right, a tie; the fourth row the reference could not read."""
    chars = {"chosen_chars": 1, "rejected_chars": 1}
    kinds = ["other", "other", "cut", "cut"]
    items = [
        {"item": i, "row": i, "kind": k, "chosen": c, "rejected": r} | chars
        for i, (k, c, r) in enumerate(zip(kinds, [-5.0, -4.0, -3.0, 0.0], [-6.0, -6.0, -3.0, -9.0], strict=True))
    ]
    reference = [
        {"item": i, "row": i, "kind": "", "chosen": c, "rejected": r} | chars
        for i, (c, r) in enumerate(zip([-4.0, -5.0, -3.0], [-7.0, -6.0, -3.0], strict=True))
    ]
    found = preference_accuracy.figures(items, reference, length_only.fit([1], [1]), 0)
    values = {name: (estimate.value, estimate.n) for name, estimate in found.items()}
    assert values["accuracy"] == (0.5, 3)
    assert values["accuracy/other"] == (0.5, 2)
    assert values["accuracy/cut"] == (0.5, 1)
    assert values["length_only"] == (0.5, 3)


def test_rows_without_a_kind_are_not_split() -> None:
    items = [{"kind": "", "chosen_chars": 1, "rejected_chars": 2}]
    assert set(pairs.accuracies([1.0], items, length_only.fit([1], [2]), 0)) == {"accuracy", "length_only"}


def test_lengths_alone_find_the_best_length_not_only_a_direction() -> None:
    """Chosen answers have 10 characters, rejected ones 5 or 20: shorter and longer are both worse."""
    scorer = length_only.fit([10] * 100, [5] * 50 + [20] * 50)
    scores = scorer([5, 10, 20])
    assert scores[1] > scores[0]
    assert scores[1] > scores[2]


def test_lengths_alone_know_nothing_where_lengths_are_alike() -> None:
    lengths = np.random.default_rng(0).integers(10, 60, size=4000)
    scorer = length_only.fit(lengths[:2000].tolist(), lengths[2000:].tolist())
    held_out = np.random.default_rng(1).integers(10, 60, size=(2, 4000))
    right = (np.sign(scorer(held_out[0]) - scorer(held_out[1])) + 1) / 2
    assert right.mean() == pytest.approx(0.5, abs=0.03)


def test_lengths_alone_without_training_rows_are_all_ties() -> None:
    assert length_only.fit([], [])([1, 100]).tolist() == [0.0, 0.0]


@dataclass
class Counting:
    """Scores a row by its tokens' sum, padding and all that lies behind the length left out."""

    shapes: list[tuple[int, int]]
    std: float = 1.0

    def score(self, input_ids_BT: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(input_ids_BT.shape))
        is_real = torch.arange(input_ids_BT.shape[1]) < lengths_B[:, None]
        return (input_ids_BT * is_real).sum(1).float()


def test_rewards_come_back_in_order_whatever_the_batch() -> None:
    rows = [[5], [1, 2, 3], [7, 7], [1] * 9]
    for budget, batches in ((1, 4), (18, 2), (1000, 1)):
        reward = Counting([])
        found = reward_accuracy.rewards(reward, rows, token_budget=budget, tick=lambda: None)
        assert found == [5.0, 6.0, 14.0, 9.0]
        assert len(reward.shapes) == batches


def test_reward_rows_end_at_the_stop_token(chat_subject: Subject) -> None:
    items = reward_accuracy.score(
        Counting([]),
        chat_subject.tokenizer,
        ROWS,
        max_length=64,
        token_budget=256,
        tick=lambda: None,
    )
    ids = encode_messages(chat_subject.tokenizer, [*ROWS[0]["prompt"], *ROWS[0]["chosen"]]).input_ids
    assert items[0]["chosen"] == sum(ids)
    found = reward_accuracy.figures(items, length_only.fit([], []), 0)
    assert found["accuracy/rambling"].value == 0.0  # a longer row has the larger sum
    assert found["accuracy/truncated"].value == 1.0
    assert found["accuracy"].n == 3
