"""The feed: every position once, in order, whatever the ranks; faults reach the step that asked."""

import numpy as np
import pytest
import torch

from pipeline.data.packing import Batch
from pipeline.model.feed import Feed, micro_batch
from pipeline.model.losses import IGNORED

CPU = torch.device("cpu")


def numbered(positions: range) -> Batch:
    return Batch(np.array(positions)[:, None] * 10 + np.arange(3))


def feed(rank: int = 0, ranks: int = 1, steps: int = 4) -> Feed:
    share = 6 // ranks
    starts = range(rank * share, (rank + 1) * share, 2)
    return Feed(numbered, steps=steps, batch=6, rows=2, starts=starts, device=CPU)


def test_a_step_has_its_positions_in_micro_batches() -> None:
    batches = feed().step(2)
    assert [batch.inputs_BT.tolist() for batch in batches] == [
        [[10 * p, 10 * p + 1] for p in pair] for pair in ((12, 13), (14, 15), (16, 17))
    ]
    assert batches[0].targets_BT.tolist() == [[121, 122], [131, 132]]
    assert batches[0].positions_BT is None


def test_ranks_share_a_step() -> None:
    seen = [batch.inputs_BT[:, 0].tolist() for rank in range(3) for batch in feed(rank, 3).step(1)]
    assert seen == [[60, 70], [80, 90], [100, 110]]


def test_any_step_may_follow_any_other_and_nothing_is_read_beyond_the_end() -> None:
    asked: list[range] = []

    def take(positions: range) -> Batch:
        asked.append(positions)
        return numbered(positions)

    made = Feed(take, steps=3, batch=2, rows=2, starts=[0], device=CPU)
    firsts = [int(made.step(step)[0].inputs_BT[0, 0]) for step in (0, 2, 1, 2)]
    made.close()
    assert firsts == [0, 40, 20, 40]
    assert max(positions.stop for positions in asked) == 6


def test_a_fault_is_raised_by_the_step_that_wanted_the_samples() -> None:
    def take(positions: range) -> Batch:
        if 2 in positions:
            raise ValueError("unreadable")
        return numbered(positions)

    made = Feed(take, steps=3, batch=2, rows=2, starts=[0], device=CPU)
    made.step(0)
    with pytest.raises(ValueError, match="unreadable"):
        made.step(1)
    made.close()


def test_what_is_no_target_is_ignored() -> None:
    batch = micro_batch(Batch(np.array([[1, 2, 3]]), np.array([[False, True]]), np.array([[0, 0]])))
    assert batch.targets_BT.tolist() == [[IGNORED, 3]]
    assert batch.positions_BT is not None
    assert batch.positions_BT.tolist() == [[0, 0]]


def test_what_a_gpu_copies_lies_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's inputs and targets are views into it; from page-locked memory with gaps torch would copy by another way,
    through memory that is not."""
    pieces: list[torch.Tensor] = []

    def pinned(tensor: torch.Tensor) -> torch.Tensor:
        pieces.append(tensor)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    views = micro_batch(numbered(range(2)))
    made = views.pinned()
    assert not views.inputs_BT.is_contiguous()
    assert len(pieces) == 2
    assert all(piece.is_contiguous() for piece in pieces)
    assert made.inputs_BT.tolist() == [[0, 1], [10, 11]]
    assert made.targets_BT.tolist() == [[1, 2], [11, 12]]
