"""Near-duplicates and shared runs of words against sets worked out by hand and by brute force."""

import random

import numpy as np
import pytest

from pipeline.data.duplicates import (
    ALIKE,
    Words,
    grams,
    jaccard,
    near_duplicates,
    near_matches,
    shared_runs,
    shingles,
    signatures,
)


def words(count: int, start: int = 0) -> list[str]:
    return [f"w{i}" for i in range(start, start + count)]


def text(*parts: list[str]) -> str:
    return " ".join(word for part in parts for word in part)


def brute_force(a: str, b: str) -> float:
    """The definition, with Python's own sets of words."""
    sets = []
    for each in (a.lower().split(), b.lower().split()):
        n = min(5, len(each))
        sets.append({tuple(each[i : i + n]) for i in range(len(each) - n + 1)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_words_have_no_case_and_no_punctuation() -> None:
    table = Words()
    assert table.hashes("The King, it's   said: No!").tolist() == table.hashes("the king it s said no").tolist()
    assert len(table.hashes("東京は, ok")) == 4  # written without spaces: three words and one
    assert table.hashes("?!").tolist() != table.hashes("...").tolist()  # without words: the text as it stands


def test_grams_are_runs_in_order() -> None:
    table = Words()
    assert len(grams(table.hashes("a b a b a b"), 2)) == 2  # a b, b a
    assert len(np.intersect1d(grams(table.hashes("a b c"), 2), grams(table.hashes("c b a"), 2))) == 0
    assert len(grams(table.hashes("a b"), 3)) == 0


def test_similarity_by_hand() -> None:
    table = Words()
    # 12 words hold 8 runs of five; with one more at the end 9, of which 8 are shared: 8 / 9
    a, b = (shingles(table.hashes(text(words(n)))) for n in (12, 13))
    assert jaccard(a, b) == pytest.approx(8 / 9)


def test_minima_agree_as_often_as_the_sets_do() -> None:
    draw = np.random.default_rng(0)
    both, one, other = (draw.integers(0, 2**64, size=n, dtype=np.uint64) for n in (600, 200, 200))
    a, b = np.unique(np.concatenate([both, one])), np.unique(np.concatenate([both, other]))
    found = signatures([a, b, one])
    assert abs((found[0] == found[1]).mean() - 0.6) < 0.15  # 600 / 1000; 120 draws, standard deviation 0.045
    assert (found[1] == found[2]).mean() < 0.05
    assert np.array_equal(signatures([one])[0], found[2])  # alone or among others


def test_near_duplicates_are_those_of_the_definition() -> None:
    draw = random.Random(0)
    texts = []
    for _ in range(60):
        base = [draw.choice("abcdefghijklmnop") * draw.randrange(1, 4) for _ in range(draw.randrange(4, 60))]
        texts.append(" ".join(base))
        for changes in (0, 1, 3):
            copy = list(base)
            for _ in range(changes):
                copy[draw.randrange(len(copy))] = "zz"
            texts.append(" ".join(copy).upper())
    draw.shuffle(texts)
    kept: list[int] = []
    expected = {}
    for place, each in enumerate(texts):
        like = next((other for other in kept if brute_force(each, texts[other]) >= ALIKE), None)
        if like is None:
            kept.append(place)
        else:
            expected[place] = (like, brute_force(each, texts[like]))
    found = {place: (match.place, match.similarity) for place, match in near_duplicates(texts).items()}
    assert len(expected) > 60
    assert found == expected


def test_below_the_threshold_is_not_alike() -> None:
    base = words(100)  # 96 runs; one changed word in the middle takes 5 of them: 91 / 101 = 0.90
    once = text(base[:50], ["x"], base[51:])
    thrice = text(base[:20], ["x"], base[21:50], ["y"], base[51:80], ["z"], base[81:])  # 81 / 111 = 0.73
    assert near_duplicates([text(base), once, thrice]).keys() == {1}
    assert near_duplicates([text(base), once])[1].similarity == pytest.approx(91 / 101)
    assert near_duplicates([]) == {}


def test_matches_between_two_sets() -> None:
    corpus = ["the sky is blue today", text(words(40)), text(words(40)), "one two"]
    texts = ["The sky is blue, today!", text(words(39)), "one three", text(words(20, 100))]
    found = near_matches(texts, corpus)
    assert {place: match.place for place, match in found.items()} == {0: 0, 1: 1}
    assert found[1].similarity == pytest.approx(35 / 36)
    assert near_matches(texts, []) == near_matches([], corpus) == {}


def test_a_run_of_thirteen_words_and_not_of_twelve() -> None:
    run = words(13)
    corpus = [["unrelated " * 20], [text(["before"], run, ["after"])]]
    shared = shared_runs([[text(words(5, 50), run, words(5, 60))], [text(run[:12], words(9, 70))], ["short"]], corpus)
    assert shared.matches == {0: 1}
    assert shared.too_short == 1
    # the run lies across two parts of the text: no run
    assert shared_runs([[text(run[:6]), text(run[6:])]], corpus).matches == {}
    assert shared_runs([], corpus).matches == {}


def test_what_more_than_ten_texts_hold_is_a_phrase() -> None:
    phrase, copies = text(words(13)), text(words(13, 200))
    ten = [[f"{phrase} number {i}"] for i in range(10)]
    asked = [[phrase], [copies]]
    assert shared_runs(asked, ten).matches == {0: 0}
    assert shared_runs(asked, [*ten, [f"{phrase} number 10"]]).matches == {}
    assert shared_runs(asked, [[copies]] * 30).matches == {1: 0}  # thirty copies of one text are one text
