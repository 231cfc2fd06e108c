"""The order of samples: every token once an epoch, the same whatever the batches, another one for another seed."""

import numpy as np
import pytest

from pipeline.data.packing import Windows, hash_of, mix, permuted
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
    windows = Windows(stream, 5, 1)
    for position in range(epochs * windows.count):
        expected = sorted(set(windows.batch([position])[0].tolist()))
        assert windows.documents([position], np.cumsum(lengths)) == expected
    assert windows.documents(range(windows.count), np.cumsum(lengths)) == list(range(6))
