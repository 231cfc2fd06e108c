"""Documents that share runs of tokens with a text: scores by hand, places, blocks, borders."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.data import nearest as module
from pipeline.data.nearest import Near, nearest


def corpus(*documents: list[int]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([np.array(each, dtype="<u2") for each in documents]), np.cumsum([len(d) for d in documents])


def test_scores_by_hand():
    """Of [1 2 3 4] document 1 holds both grams, document 2 only the second, which two of three documents hold."""
    tokens, ends = corpus([9, 9, 9], [7, 1, 2, 3, 4], [2, 3, 4, 8])
    found = nearest(tokens, ends, [1, 2, 3, 4], [True] * 4, 10)
    assert [(each.document, each.begin, each.at, each.length) for each in found] == [(1, 1, 0, 4), (2, 0, 1, 3)]
    assert [each.score for each in found] == pytest.approx([math.log(1 + 3) + math.log(1 + 3 / 2), math.log(1 + 3 / 2)])


def test_only_grams_that_touch_what_is_sought_score():
    tokens, ends = corpus([1, 2, 3], [4, 5, 6])
    text = [1, 2, 3, 4, 5, 6]
    assert [each.document for each in nearest(tokens, ends, text, [False] * 5 + [True], 10)] == [1]
    assert [each.document for each in nearest(tokens, ends, text, [True] + [False] * 5, 10)] == [0]
    assert nearest(tokens, ends, text, [False] * 6, 10) == []


def test_a_gram_counts_once_a_document_however_often_it_stands_there_or_in_the_text():
    tokens, ends = corpus([1, 2, 3, 9, 1, 2, 3, 9, 1, 2, 3], [1, 2, 3])
    found = nearest(tokens, ends, [1, 2, 3, 5, 1, 2, 3], [True] * 7, 10)
    assert [each.score for each in found] == pytest.approx([math.log(2)] * 2)
    assert [each.document for each in found] == [0, 1]


def test_runs_do_not_cross_documents():
    tokens, ends = corpus([8, 1, 2], [3, 4, 8])
    assert nearest(tokens, ends, [1, 2, 3, 4], [True] * 4, 10) == [
        Near(0, pytest.approx(math.log(3)), 1, 0, 2),  # type: ignore[arg-type]
        Near(1, pytest.approx(math.log(3)), 0, 2, 2),  # type: ignore[arg-type]
    ]


def test_a_run_of_two_counts_only_where_there_is_none_of_three():
    tokens, ends = corpus([1, 2, 9], [2, 3, 4])
    assert [each.document for each in nearest(tokens, ends, [1, 2, 3, 4], [True] * 4, 10)] == [1]
    assert [each.document for each in nearest(tokens, ends, [1, 2, 5], [True] * 3, 10)] == [0]
    assert nearest(tokens, ends, [5, 6, 7], [True] * 3, 10) == []


@pytest.mark.parametrize("text", [[3], [3, 4]])
def test_a_text_shorter_than_a_gram(text: list[int]):
    tokens, ends = corpus([1, 2], [5, 3, 4])
    (found,) = nearest(tokens, ends, text, [True] * len(text), 10)
    assert (found.document, found.begin, found.length) == (1, 1, len(text))


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1000])
def test_like_a_search_by_hand_whatever_the_block(block: int, monkeypatch: pytest.MonkeyPatch):
    """A planted run of 12 in 3,000 random tokens, and every score against sets of tuples."""
    monkeypatch.setattr(module, "BLOCK", block)
    draw = np.random.default_rng(0)
    documents = [draw.integers(0, 6, size=30).tolist() for _ in range(100)]
    text = draw.integers(0, 6, size=12).tolist()
    documents[61][9:21] = text
    tokens, ends = corpus(*documents)
    found = nearest(tokens, ends, text, [True] * 12, 6, count=100)
    grams = {tuple(text[j : j + 3]) for j in range(10)}
    held = [grams & {tuple(each[i : i + 3]) for i in range(28)} for each in documents]
    idf = {gram: math.log1p(100 / sum(gram in each for each in held)) for gram in grams}
    assert {each.document: each.score for each in found} == {
        place: pytest.approx(sum(idf[gram] for gram in each)) for place, each in enumerate(held) if each
    }
    assert (found[0].document, found[0].begin, found[0].at, found[0].length) == (61, 9, 0, 12)


def test_what_was_not_read_does_not_count():
    """Neither as a find nor among the documents: of three, two were read, one of them with the gram."""
    tokens, ends = corpus([1, 2, 3], [1, 2, 3], [9, 9])
    (found,) = nearest(tokens, ends, [1, 2, 3], [True] * 3, 10, is_read_D=np.array([False, True, True]))
    assert (found.document, found.score) == (1, pytest.approx(math.log(1 + 2 / 1)))


def test_an_empty_corpus():
    assert nearest(np.zeros(0, "<u2"), np.zeros(0, "<u8"), [1, 2, 3], [True] * 3, 10) == []
