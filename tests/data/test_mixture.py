"""Mixtures: shares to the sample, caps, phases, and an order that is a pure function of the position."""

from fractions import Fraction

import numpy as np
import pytest

from pipeline.data.mixture import BLOCK, Mixture, Phase, allot, shares_by_label
from pipeline.data.packing import FittedRows, Windows
from pipeline.errors import ConfigError

LABELS = ["web", "books", "code"]


@pytest.mark.parametrize(
    ("shares", "most", "total", "expected"),
    [
        ((1, 1), (1000, 1000), 10, (5, 5)),
        ((3, 1), (1000, 1000), 10, (8, 2)),  # 7.5 and 2.5: the larger remainder first, the first of equals
        ((1, 0, 1), (9, 9, 9), 6, (3, 0, 3)),
        ((8, 1, 1), (20, 1000, 1000), 100, (20, 40, 40)),  # 60 that web lacks go to the others
        ((8, 1, 1), (20, 25, 1000), 100, (20, 25, 55)),  # and what books lacks to code
        ((1, 1, 1), (0, 0, 9), 9, (0, 0, 9)),
        ((0.2, 0.3, 0.5), (float("inf"),) * 3, 1000, (200, 300, 500)),
    ],
)
def test_draws_by_share_and_what_there_is(shares, most, total, expected) -> None:
    assert allot(shares, most, total, LABELS[: len(shares)]) == expected


def test_sources_that_have_too_few_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"takes 100 samples and the sources have 50 of them \(web 20, books 30\)"):
        allot((1, 1), (20, 30), 100, LABELS[:2])


def test_shares_are_read_by_label() -> None:
    assert shares_by_label({"code": 0.7, "web": 0.3}, LABELS, "here") == [0.3, 0.0, 0.7]
    with pytest.raises(ConfigError, match="no source `boks`; did you mean `books`"):
        shares_by_label({"boks": 1.0}, LABELS, "here")
    with pytest.raises(ConfigError, match="no source has a share above 0"):
        shares_by_label({"web": 0.0}, LABELS, "here")


def three() -> list[Windows]:
    """Tokens say which source they are of: thousands 0, 1 and 2. 99, 49 and 24 samples an epoch."""
    return [Windows(np.arange(n) + 1000 * i, 10, i) for i, n in enumerate((1000, 500, 250))]


@pytest.mark.slow
def test_each_source_is_read_in_its_own_order_and_epochs() -> None:
    sources = three()
    mixture = Mixture(sources, [Phase((3000, 1500, 500))], seed=3)
    rows = mixture.take(range(5000)).rows_BT
    for i, (count, source) in enumerate(zip((3000, 1500, 500), sources, strict=True)):
        own = rows[rows[:, 0] // 1000 == i]
        expected = source.batch(range(count))
        assert len(own) == count
        assert sorted(map(tuple, own.tolist())) == sorted(map(tuple, expected.tolist()))
    assert (rows[:50, 0] // 1000).tolist() != sorted((rows[:50, 0] // 1000).tolist())


def test_every_block_has_the_shares_of_the_whole() -> None:
    mixture = Mixture(three(), [Phase((3000, 1500, 500))], seed=3)
    sources, _ = mixture.places(range(5000))
    for start in range(0, 5000, BLOCK):
        here = np.bincount(sources[start : start + BLOCK], minlength=3)
        size = here.sum()
        assert all(abs(n - size * share) < 2 for n, share in zip(here, (0.6, 0.3, 0.1), strict=True))
    assert mixture.drawn(5000) == [3000, 1500, 500]
    for position in (0, 1, BLOCK, 2000, 4999):
        expected = [Fraction(position) * draw / 5000 for draw in (3000, 1500, 500)]
        assert all(abs(n - e) < 2 for n, e in zip(mixture.drawn(position), expected, strict=True))


def test_a_second_phase_goes_on_where_the_first_left_each_source() -> None:
    mixture = Mixture(three(), [Phase((40, 40, 0)), Phase((0, 10, 20))], seed=3)
    sources, indices = mixture.places(range(110))
    assert sorted(sources[:80]) == [0] * 40 + [1] * 40
    assert sorted(sources[80:]) == [1] * 10 + [2] * 20
    assert sorted(indices[sources == 1]) == list(range(50))  # none twice, none left out
    assert sorted(indices[80:][sources[80:] == 1]) == list(range(40, 50))
    assert mixture.drawn(80) == [40, 40, 0]
    assert mixture.drawn(110) == [40, 50, 20]


@pytest.mark.slow
def test_the_order_does_not_depend_on_the_batches() -> None:
    mixture = Mixture(three(), [Phase((1500, 900, 300)), Phase((0, 100, 400))], seed=0)
    whole = mixture.take(range(mixture.count)).rows_BT
    parts = [mixture.take(range(i, min(i + 7, mixture.count))).rows_BT for i in range(0, mixture.count, 7)]
    assert (np.concatenate(parts) == whole).all()
    assert (mixture.take([2699, 5, 1100]).rows_BT == whole[[2699, 5, 1100]]).all()
    assert mixture.targets(range(10)) == 100


def test_the_order_is_the_one_of_every_release() -> None:
    """Resuming a run with a newer llmpipe must go on with the same data: these numbers may not change."""
    mixture = Mixture(three(), [Phase((1500, 900, 300))], seed=1)
    assert mixture.places(range(12))[0].tolist() == [0, 2, 1, 0, 0, 0, 0, 1, 0, 0, 2, 0]
    assert mixture.places(range(12))[1].tolist() == [171, 40, 146, 120, 3, 364, 432, 139, 419, 397, 21, 324]


def test_fitted_rows_mix_too() -> None:
    ends = np.arange(5, 505, 5)
    sources = [FittedRows(np.arange(500) + 1000 * i, ends, 12, i, separator=9, first_document=100 * i) for i in (0, 1)]
    mixture = Mixture(sources, [Phase((30, 10))], seed=0)
    batch = mixture.take(range(40))
    assert batch.is_target_BT is not None
    assert mixture.targets(range(40)) == int(batch.is_target_BT.sum())
    documents = {
        int(t - 1000 * (t // 1000)) // 5 + 100 * int(t // 1000) for t in batch.rows_BT[:, 1:][batch.is_target_BT]
    }
    assert mixture.documents(range(40)) == sorted(documents)
