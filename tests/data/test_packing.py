"""The order of samples: every token once an epoch, the same whatever the batches, another one for another seed."""

import numpy as np
import pytest

from pipeline.data.packing import FittedRows, Windows, best_fit, hash_of, mix, permuted
from pipeline.errors import ConfigError


def test_mix_is_splitmix64() -> None:
    # The first outputs of splitmix64 from seed 0, as in its reference implementation (Vigna 2015).
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [int(mix(np.zeros(1, dtype=np.uint64), k)[0]) for k in (1, 2, 3)] == expected


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 63, 64, 65, 1000, 4097])
def test_a_permutation_hits_every_place_once(count: int) -> None:
    assert sorted(permuted(np.arange(count), count, 17).tolist()) == list(range(count))


def test_a_permutation_is_spread_out() -> None:
    order = permuted(np.arange(10_000), 10_000, 3)
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.03  # standard deviation 0.01
    assert np.mean(order == permuted(np.arange(10_000), 10_000, 4)) < 0.002
    assert np.mean(np.abs(np.diff(order))) == pytest.approx(10_000 / 3, rel=0.05)  # of two uniform draws


def test_hash_of_depends_on_order_and_all() -> None:
    assert len({hash_of(1, 2), hash_of(2, 1), hash_of(1, 2, 0), hash_of(1), hash_of(-1)}) == 5


def test_the_first_epoch_has_every_window_once() -> None:
    windows = Windows(np.arange(101), 10, seed=0)
    assert windows.count == 10
    batch = windows.batch(range(10))
    assert batch.shape == (10, 11)
    assert batch.dtype == np.int64
    assert sorted(batch[:, 0].tolist()) == list(range(0, 100, 10))
    assert (batch - batch[:, :1] == np.arange(11)).all()
    assert sorted(batch[:, 1:].ravel().tolist()) == list(range(1, 101))  # every token but the first is a target


def test_later_epochs_cut_the_stream_elsewhere_and_go_round() -> None:
    windows = Windows(np.arange(105), 10, seed=0)
    for epoch in (1, 2, 3):
        batch = windows.batch(range(epoch * 10, epoch * 10 + 10))
        assert ((batch[:, 1:] - batch[:, :-1]) % 105 == 1).all()  # neighbours on the circle
        assert len(set(batch[:, 1:].ravel().tolist())) == 100  # no target twice
        assert windows.start(epoch) in batch[:, 0]
    assert windows.start(0) == 0
    assert len({windows.start(epoch) % 10 for epoch in range(6)}) > 1


def test_the_order_does_not_depend_on_the_batches() -> None:
    windows = Windows(np.arange(1, 1000), 7, seed=5)
    whole = windows.batch(range(300))  # two epochs of 142 and a bit of the third
    assert (np.concatenate([windows.batch(range(i, i + 13)) for i in range(0, 300, 13)])[:300] == whole).all()
    ranks = [windows.batch(range(rank, 300, 2)) for rank in (0, 1)]
    assert (np.stack(ranks, axis=1).reshape(300, 8) == whole).all()
    assert (windows.batch([250, 3]) == whole[[250, 3]]).all()


def test_the_order_is_the_one_of_every_release() -> None:
    """Resuming a run with a newer llmpipe must go on with the same data: these numbers may not change."""
    windows = Windows(np.arange(1000), 10, seed=1)
    assert windows.batch(range(6))[:, 0].tolist() == [920, 270, 670, 220, 210, 150]
    assert windows.batch(range(99, 103))[:, 0].tolist() == [572, 42, 142, 462]


def test_another_seed_is_another_order() -> None:
    first, second = (Windows(np.arange(1000), 10, seed).batch(range(99))[:, 0] for seed in (0, 1))
    assert np.mean(first == second) < 0.1


def test_a_stream_shorter_than_a_sample_is_refused() -> None:
    assert Windows(np.arange(11), 10, 0).batch([0, 1]).shape == (2, 11)
    with pytest.raises(ConfigError, match="10 tokens, fewer than one sample of 11"):
        Windows(np.arange(10), 10, 0)


@pytest.mark.parametrize("epochs", [1, 3])
def test_documents_of_a_sample_are_those_its_tokens_lie_in(epochs: int) -> None:
    """Documents named by their tokens: the stream's token is the number of its document."""
    lengths = [3, 1, 20, 7, 2, 9]
    stream = np.repeat(np.arange(len(lengths)), lengths)
    windows = Windows(stream, 5, 1, ends=np.cumsum(lengths), first_document=10)
    for position in range(epochs * windows.count):
        expected = sorted(set(windows.batch([position])[0].tolist()))
        assert windows.documents([position]) == [10 + document for document in expected]
    assert windows.documents(range(windows.count)) == list(range(10, 16))


def test_positions_begin_again_behind_each_separator() -> None:
    """0 is the separator; the document that a window begins in the middle of counts from the window's start."""
    windows = Windows(np.array([5, 6, 0, 7, 8, 9, 0, 0, 4, 3]), 9, 0, separator=0)
    batch = windows.take([0])
    assert batch.rows_BT.tolist() == [[5, 6, 0, 7, 8, 9, 0, 0, 4, 3]]
    assert batch.positions_BT is not None
    assert batch.positions_BT.tolist() == [[0, 1, 0, 1, 2, 3, 0, 0, 1]]
    assert batch.is_target_BT is None
    assert Windows(np.arange(20), 9, 0).take([0]).positions_BT is None


# Rows in which documents stay whole. Tokens are numbered through the stream (100 is the separator): each says where it
# comes from.

SEPARATOR = 100
LENGTHS = [3, 1, 20, 7, 2, 9, 11, 5, 5, 6, 4, 21]
"""Separators included."""


def numbered(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    stream = np.arange(sum(lengths)) + 1000
    ends = np.cumsum(lengths)
    stream[ends - 1] = SEPARATOR
    return stream, ends


def rows_of(alone: bool, apart: bool, length: int = 10) -> FittedRows:
    stream, ends = numbered(LENGTHS)
    return FittedRows(stream, ends, length, 1, separator=SEPARATOR, first_document=50, alone=alone, apart=apart)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("epoch", [0, 1])
def test_every_token_is_a_target_once_an_epoch_behind_its_own_predecessor(alone: bool, epoch: int) -> None:
    rows = rows_of(alone, apart=False)
    stream, ends = numbered(LENGTHS)
    positions = range(epoch * rows.count, (epoch + 1) * rows.count)
    batch = rows.take(positions)
    assert batch.is_target_BT is not None
    targets = batch.rows_BT[:, 1:][batch.is_target_BT]
    before = batch.rows_BT[:, :-1][batch.is_target_BT]
    assert sorted(targets.tolist()) == sorted(stream.tolist())
    expected = {int(token): int(stream[i - 1]) if i else SEPARATOR for i, token in enumerate(stream)}
    pairs = [(t, b) for t, b in zip(targets.tolist(), before.tolist(), strict=True) if t != SEPARATOR]
    assert all(expected[target] == lead for target, lead in pairs)
    assert rows.targets(positions) == len(stream)
    assert rows.documents(positions) == list(range(50, 50 + len(ends)))


def test_documents_that_fit_are_not_cut() -> None:
    rows = rows_of(alone=False, apart=False)
    where: dict[int, set[int]] = {}
    _, ends = numbered(LENGTHS)
    for position in range(rows.count):
        for start, _ in rows.pieces(int(rows.places([position])[0])):
            where.setdefault(int(np.searchsorted(ends, start, side="right")), set()).add(position)
    assert {document: len(found) for document, found in where.items()} == {
        document: -(-length // 10) for document, length in enumerate(LENGTHS)
    }


def test_padding_and_other_documents_are_a_start_of_their_own() -> None:
    rows = FittedRows(np.array([7, 8, 0, 9, 0]), np.array([3, 5]), 8, 0, separator=0, apart=True)
    batch = rows.take([0])
    assert batch.rows_BT.tolist() == [[0, 7, 8, 0, 0, 9, 0, 0, 0]]
    assert batch.is_target_BT is not None
    assert batch.positions_BT is not None
    assert batch.is_target_BT.astype(int).tolist() == [[1, 1, 1, 0, 1, 1, 0, 0]]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]


def test_one_document_a_row() -> None:
    rows = rows_of(alone=True, apart=False)
    assert rows.count == len(LENGTHS) + 1 + 1 + 2  # 20 is cut in two, 11 in two, 21 in three
    assert sorted(rows.filled.tolist()) == sorted([3, 1, 10, 10, 7, 2, 9, 10, 1, 5, 5, 6, 4, 10, 10, 1])


def test_best_fit_is_the_naive_one() -> None:
    """The fullest row that has room, largest first: the same rows as by looking at every row for each item."""
    sizes = np.random.default_rng(0).integers(2, 40, 500).tolist()
    found, count = best_fit(sizes, 64, 3)
    room: list[int] = []
    for item in sorted(range(500), key=lambda i: -sizes[i]):
        fits = [r for r in range(len(room)) if room[r] >= sizes[item]]
        if fits:
            best = min(fits, key=lambda r: room[r])
            room[best] -= sizes[item]
        else:
            room.append(64 - sizes[item])
    used = [64 - sum(sizes[i] for i in range(500) if found[i] == row) for row in range(3, count)]
    assert min(used) >= 0
    assert sorted(used) == sorted(room)
    assert sum(used) / 64 / (count - 3) < 0.01  # 99 % full


def test_the_order_of_fitted_rows_is_shuffled_and_does_not_depend_on_the_batches() -> None:
    rows = rows_of(alone=True, apart=False)
    whole = rows.take(range(2 * rows.count)).rows_BT
    parts = [rows.take(range(i, i + 5)).rows_BT for i in range(0, 2 * rows.count, 5)]
    assert (np.concatenate(parts)[: len(whole)] == whole).all()
    first, second = rows.places(range(rows.count)), rows.places(range(rows.count, 2 * rows.count))
    assert sorted(first) == sorted(second) == list(range(rows.count))
    assert first.tolist() != second.tolist()
