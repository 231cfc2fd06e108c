"""The layout of rollouts, and who stands in which microbatch."""

from __future__ import annotations

import torch

from pipeline.rl.rollouts import assemble, closed_rows, concatenate, in_cache, last_turns, microbatches

PROMPTS = [[5, 6, 7], [8]]
IDS_BT = torch.tensor([[20, 9, 0], [30, 31, 32]])
ROLLOUT = assemble(PROMPTS, IDS_BT, torch.tensor([2, 3]), torch.tensor([True, False]), pad_id=0)


def test_rows_are_prompt_and_response_padded_right():
    assert ROLLOUT.ids_BL.tolist() == [[5, 6, 7, 20, 9], [8, 30, 31, 32, 0]]
    assert ROLLOUT.prompt_lengths_B.tolist() == [3, 1]
    assert ROLLOUT.response_mask_BT.tolist() == [[True, True, False], [True, True, True]]
    assert ROLLOUT.targets_N.tolist() == [20, 9, 30, 31, 32]
    # The token before each response token, in the rows laid end to end: 7, 20 and 8, 30, 31.
    assert ROLLOUT.ids_BL.flatten()[ROLLOUT.before_N].tolist() == [7, 20, 8, 30, 31]
    assert ROLLOUT.spread(torch.arange(1.0, 6.0)).tolist() == [[1, 2, 0], [3, 4, 5]]


def test_pad_may_be_the_stop_token():
    """Masks are by length: a stop token that is also the pad stays a token of its response."""
    rollout = assemble(PROMPTS, IDS_BT.masked_fill(IDS_BT == 0, 9), torch.tensor([2, 3]), ROLLOUT.is_ended_B, pad_id=9)
    assert rollout.targets_N.tolist() == [20, 9, 30, 31, 32]


def test_select_keeps_the_response_columns():
    part = ROLLOUT.select(torch.tensor([1]))
    assert part.ids_BL.tolist() == [[8, 30, 31, 32]]
    assert part.response_ids_BT.shape == (1, 3)
    assert part.ids_BL.flatten()[part.before_N].tolist() == [8, 30, 31]


def test_a_cut_row_is_closed_before_it_is_scored():
    assert closed_rows(ROLLOUT, [9]) == [[5, 6, 7, 20, 9], [8, 30, 31, 32, 9]]


def test_forwards_without_gradients_are_cut_to_a_cpus_cache():
    lengths_B = torch.tensor([600, 700, 3000, 10])
    parts = in_cache(microbatches(lengths_B, 3), lengths_B)
    assert [part.tolist() for part in parts] == [[2], [1], [0], [3]]  # 2,048 tokens: less than one row of 3,000
    parts = in_cache(microbatches(lengths_B, 3, torch.tensor([0, 1, 3])), lengths_B)
    assert [part.tolist() for part in parts] == [[1, 0], [3]]  # two rows of 700
    assert in_cache([torch.tensor([0])], torch.ones(1, device="meta"))[0].tolist() == [0]  # no CPU: as it is


def test_microbatches_hold_rows_of_like_length():
    lengths_B = torch.tensor([3, 9, 1, 7, 5])
    assert [part.tolist() for part in microbatches(lengths_B, 2)] == [[1, 3], [4, 0], [2]]
    assert [part.tolist() for part in microbatches(lengths_B, 2, torch.tensor([2, 0, 3]))] == [[3, 0], [2]]
    assert microbatches(lengths_B, 2, torch.tensor([], dtype=torch.long)) == []


def test_a_token_budget_counts_the_padding():
    # Sorted 9 7 5 3 1 into 16 tokens: 9 (2 x 9 is too much); 7, 5 (2 x 7 = 14); 3, 1.
    lengths_B = torch.tensor([3, 9, 1, 7, 5])
    assert [part.tolist() for part in microbatches(lengths_B, 1, token_budget=16)] == [[1], [3, 4], [0, 2]]
    assert [part.tolist() for part in microbatches(lengths_B, 1, token_budget=2)] == [[1], [3], [4], [0], [2]]


def test_rollouts_are_joined_row_by_row():
    other = assemble([[1, 2, 3, 4, 5]], torch.tensor([[40]]), torch.tensor([1]), torch.tensor([True]), pad_id=0)
    joined = concatenate([ROLLOUT, other], pad_id=0)
    assert joined.ids_BL.tolist() == [[5, 6, 7, 20, 9, 0], [8, 30, 31, 32, 0, 0], [1, 2, 3, 4, 5, 40]]
    assert joined.response_ids_BT.tolist() == [[20, 9, 0], [30, 31, 32], [40, 0, 0]]
    assert joined.targets_N.tolist() == [20, 9, 30, 31, 32, 40]
    assert joined.ids_BL.flatten()[joined.before_N].tolist() == [7, 20, 8, 30, 31, 5]


def test_text_of_others_is_read_and_not_trained():
    """A tool's answer in the middle: no target, and the token after it is predicted from its last one."""
    mask_BT = torch.tensor([[True, False, True]])
    rollout = assemble(
        [[5, 6]], torch.tensor([[20, 21, 22]]), torch.tensor([3]), torch.tensor([True]), 0, response_mask_BT=mask_BT
    )
    assert rollout.targets_N.tolist() == [20, 22]
    assert rollout.ids_BL.flatten()[rollout.before_N].tolist() == [6, 21]
    assert rollout.spread(torch.tensor([1.0, 2.0])).tolist() == [[1.0, 0.0, 2.0]]


def test_a_row_that_a_stop_string_ended_lacks_the_stop_token():
    """Rows that end with 9 (the stop token), with 32 (of a stop string), and cut off: closed for a reward model where 9
    is not there; only 9 is no part of the words."""
    ids_BT, lengths_B = torch.tensor([[20, 9, 0], [30, 31, 32], [40, 41, 42]]), torch.tensor([2, 3, 3])
    rollout = assemble([[5], [6], [7]], ids_BT, lengths_B, torch.tensor([True, True, False]), pad_id=0, stop_id=9)
    assert rollout.is_stopped_B.tolist() == [True, False, False]
    assert closed_rows(rollout, [9]) == [[5, 20, 9], [6, 30, 31, 32, 9], [7, 40, 41, 42, 9]]
    assert last_turns(rollout) == [[20], [30, 31, 32], [40, 41, 42]]
    assert rollout.select(torch.tensor([1, 0])).is_stopped_B.tolist() == [False, True]
    assert concatenate([rollout, rollout], 0).is_stopped_B.tolist() == [True, False, False] * 2
