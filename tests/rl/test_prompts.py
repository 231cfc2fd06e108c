"""The order of prompts, and which are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.errors import DataError
from pipeline.rl.prompts import Prompts, order_prompts

ROWS = [{"prompt": [{"role": "user", "content": "x" * (row + 1)}]} for row in range(10)]


def order(episodes: int, **changes: Any) -> Prompts:
    encoded: list[int] = []

    def encode(row: dict[str, Any]) -> list[int]:
        encoded.append(len(row["prompt"][0]["content"]))
        return [1] * encoded[-1]

    def generator(epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(1000 + epoch)

    arguments = {"encode": encode, "generator": generator, "longest": None, "room": None} | changes
    prompts = order_prompts(ROWS, episodes, **arguments)
    assert len(encoded) == len(set(encoded)), "a row was encoded twice"
    return prompts


def test_every_epoch_is_a_shuffle_of_its_own():
    found = order(25).order
    assert sorted(found[:10]) == sorted(found[10:20]) == list(range(10))
    assert found[:10] != found[10:20]
    assert found[:10] == torch.randperm(10, generator=torch.Generator().manual_seed(1000)).tolist()


def test_a_shorter_run_is_the_beginning_of_a_longer_one():
    assert order(4).order == order(25).order[:4]
    assert sorted(order(4).ids) == sorted(order(4).order)


def test_long_prompts_are_left_out_and_counted():
    prompts = order(12, longest=6)
    assert sorted(prompts.order[:6]) == sorted(prompts.order[6:]) == list(range(6))
    assert prompts.left_out == 4
    with pytest.raises(DataError, match="all 10 prompts are longer than 0"):
        order(12, longest=0)


def test_once_leaves_each_prompt_at_its_first_place():
    prompts = order(12, longest=6)
    assert prompts.once().order == prompts.order[:6]
    assert prompts.once().ids == prompts.ids


def test_a_prompt_that_leaves_no_room_is_refused():
    with pytest.raises(DataError, match="response_length leaves 9") as caught:
        order(20, room=9)
    assert "max_prompt_length=9" in caught.value.mend
    with pytest.raises(DataError, match="leaves 0 of the context") as caught:
        order(20, room=-3)
    assert caught.value.mend == "lower ppo.response_length"
    assert order(20, room=9, longest=9).left_out == 1
    assert order(20, room=10).left_out == 0


@pytest.mark.parametrize("said", ["", "  \n"])
def test_an_empty_prompt_is_refused(said: str):
    rows = [{"prompt": [{"role": "user", "content": said}]}]
    with pytest.raises(DataError, match="an empty prompt"):
        order_prompts(
            rows, 1, encode=lambda row: [1, 2], generator=lambda epoch: torch.Generator(), longest=None, room=None
        )
