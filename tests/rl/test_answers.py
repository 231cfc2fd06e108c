"""Which groups make the batch of a step, on one rank and on several; where their rows stand."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipeline.rl.answers import Answers, Asked, gather, own_rows
from pipeline.rl.masking import Reduce, alone
from pipeline.rl.rollouts import assemble

ROUNDS = [
    [[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [2.0, 2.0]],  # only the second group differs
    [[3.0, 3.0], [4.0, 4.0], [5.0, 6.0], [7.0, 8.0]],
    [[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [9.0, 8.0]],
]
"""Rewards of four groups of two a round."""


def asked(groups: list[list[float]], number: int, first: int) -> Asked:
    """A round's answers: the response of an answer is (round, group, answer) as ids, 1 to 3 tokens long."""
    rewards_B = torch.tensor([reward for group in groups for reward in group])
    rows = len(rewards_B)
    ids_BT = torch.tensor([[number, first + row // 2, row % 2][: number + 1] for row in range(rows)])
    lengths_B = torch.full((rows,), number + 1)
    rollout = assemble([[7]] * rows, ids_BT, lengths_B, torch.ones(rows, dtype=torch.bool), pad_id=0)
    return Asked(rollout, rewards_B + 10, rewards_B, rewards_B - 1)


def gathered(
    rank: int = 0, ranks: int = 1, reduce: Reduce = alone, rounds: int | None = 3
) -> tuple[Answers, dict[str, float]]:
    own = 4 // ranks

    def ask(number: int) -> Asked:
        return asked(ROUNDS[number][rank * own : (rank + 1) * own], number, rank * own)

    return gather(ask, group_size=2, groups=4, rank=rank, world_size=ranks, rounds=rounds, pad_id=0, reduce=reduce)


def on_two_ranks(function: Callable[[int, Reduce], None]) -> None:
    """Two threads whose `reduce` sums over both."""
    barrier, slots = threading.Barrier(2), [torch.zeros(0), torch.zeros(0)]

    def reducer(rank: int) -> Reduce:
        def reduce(tensor: Tensor) -> Tensor:
            slots[rank] = tensor
            barrier.wait(timeout=10)
            total = slots[0] + slots[1]
            barrier.wait(timeout=10)
            return total

        return reduce

    threads = [threading.Thread(target=function, args=(rank, reducer(rank))) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_without_dynamic_sampling_the_first_round_is_the_batch():
    answers, figures = gathered(rounds=None)
    assert answers.rewards_B.tolist() == [1, 1, 0, 1, 0, 0, 2, 2]
    assert answers.places_B.tolist() == list(range(8))
    assert (figures["varying_groups"], figures["episodes"], figures["reward"]) == (0.25, 8.0, 7 / 8)
    assert "sampling_rounds" not in figures


def test_groups_that_are_alike_are_replaced_by_the_next_that_differ():
    # Round 0 gives one group, round 1 two, round 2 four of which one is needed: three rounds.
    answers, figures = gathered()
    assert answers.rewards_B.tolist() == [0, 1, 5, 6, 7, 8, 1, 2]
    assert answers.places_B.tolist() == list(range(8))
    assert answers.baselines_B.tolist() == [-1, 0, 4, 5, 6, 7, 0, 1]
    assert answers.rollout.response_ids_BT.tolist()[:3] == [[0, 0, 0], [0, 0, 0], [1, 2, 0]]
    assert answers.rollout.lengths_B.tolist() == [1, 1, 2, 2, 2, 2, 3, 3]
    assert answers.rollout.response_mask_BT.sum(dim=1).tolist() == [1, 1, 2, 2, 2, 2, 3, 3]
    assert figures["sampling_rounds"] == 3.0
    assert figures["varying_groups"] == pytest.approx(7 / 12)
    everything = [reward for groups in ROUNDS for group in groups for reward in group]
    assert figures["reward"] == pytest.approx(sum(everything) / 24)
    assert figures["score"] == pytest.approx(sum(everything) / 24 + 10)
    assert figures["episodes"] == 24.0


def test_too_few_that_differ_are_filled_up_with_the_last_rounds_others():
    answers, figures = gathered(rounds=1)
    assert answers.rewards_B.tolist() == [0, 1, 1, 1, 0, 0, 2, 2]
    assert figures["sampling_rounds"] == 1.0


def test_two_ranks_keep_the_groups_that_one_would():
    """Rank 0 has group 1 of round 0 and group 0 of round 2, rank 1 both of round 1, at the places one process gives."""
    alone_, alone_figures = gathered()
    found: dict[int, tuple[Answers, dict[str, float]]] = {}
    on_two_ranks(lambda rank, reduce: found.update({rank: gathered(rank, 2, reduce)}))
    batch = torch.zeros(8)
    for rank, places in ((0, [0, 1, 6, 7]), (1, [2, 3, 4, 5])):
        answers, figures = found[rank]
        assert answers.places_B.tolist() == places
        batch[answers.places_B] = answers.rewards_B
        assert figures == pytest.approx(alone_figures)
    assert batch.tolist() == alone_.rewards_B.tolist()


def test_a_rank_may_be_left_without_rows():
    rewards = [[[1.0, 2.0], [1.0, 2.0], [0.0, 0.0], [0.0, 0.0]], [[1.0, 2.0], [3.0, 4.0], [0.0, 0.0], [5.0, 5.0]]]
    found: dict[int, Answers] = {}

    def one(rank: int, reduce: Reduce) -> None:
        def ask(number: int) -> Asked:
            return asked(rewards[number][rank * 2 : rank * 2 + 2], number, rank * 2)

        found[rank] = gather(ask, group_size=2, groups=4, rank=rank, world_size=2, rounds=2, pad_id=0, reduce=reduce)[0]

    on_two_ranks(one)
    assert [len(found[rank].rewards_B) for rank in (0, 1)] == [8, 0]
    assert found[1].rollout.ids_BL.shape[0] == 0
    assert own_rows([torch.arange(8)], 2, found[1].places_B)[0].tolist() == []


def test_minibatches_are_cut_from_the_batch_of_all_ranks():
    orders = [torch.tensor([3, 0, 2, 1]), torch.tensor([1, 2, 3, 0])]
    assert [part.tolist() for part in own_rows(orders, 2, torch.tensor([0, 1]))] == [[0], [1], [1], [0]]
    assert [part.tolist() for part in own_rows(orders, 2, torch.tensor([3, 2]))] == [[0], [1], [1], [0]]
    assert [part.tolist() for part in own_rows(orders, 1, torch.arange(4))] == [[3, 0, 2, 1], [1, 2, 3, 0]]
