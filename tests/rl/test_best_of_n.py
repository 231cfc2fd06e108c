"""Best of n: its chances and its KL against enumeration of all draws, and the estimate against the exact number."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from pipeline.rl.best_of_n import estimated_kl, exact_kl, kl_bound, winning_chances


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_chances_are_those_of_all_subsets(n: int):
    scores = [0.3, -1.0, 2.0, 0.3, 0.0]  # two are equal: either may be taken
    won: Counter[int] = Counter()
    subsets = list(itertools.combinations(range(5), n))
    for subset in subsets:
        best = [i for i in subset if scores[i] == max(scores[j] for j in subset)]
        for i in best:
            won[i] += 1 / len(best)  # type: ignore[assignment]
    assert winning_chances(scores, n) == pytest.approx([won[i] / len(subsets) for i in range(5)], abs=1e-12)


def test_chances_worked_by_hand():
    """Of three answers the best of two: the lowest never, the middle in one of three pairs, the highest in two."""
    assert winning_chances([5.0, 1.0, 3.0], 2) == pytest.approx([2 / 3, 0.0, 1 / 3])


@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_exact_kl_is_that_of_all_draws(n: int):
    """Four answers, from the worst to the best: every sequence of n draws, its best one, the KL of that."""
    p = [0.1, 0.4, 0.2, 0.3]
    best = np.zeros(4)
    for draws in itertools.product(range(4), repeat=n):
        best[max(draws)] += math.prod(p[i] for i in draws)
    kl = sum(w * math.log(w / each) for w, each in zip(best, p))
    assert exact_kl(p, n) == pytest.approx(kl, abs=1e-12)
    assert exact_kl(p, n) <= kl_bound(n) + 1e-12


def test_the_formula_by_hand_and_as_the_limit_of_many_answers():
    assert kl_bound(1) == 0
    assert kl_bound(2) == pytest.approx(math.log(2) - 0.5)
    assert exact_kl([1e-4] * 10_000, 16) == pytest.approx(kl_bound(16), abs=1e-3)


def _estimates(draw, n: int, rounds: int = 300) -> tuple[float, float]:
    """Mean and standard error of the estimate from 48 answers and 48 others; `draw` gives (scores, logprobs) of 96."""
    found = []
    for _ in range(rounds):
        scores, logprobs = draw()
        found.append(estimated_kl(scores[:48], logprobs[:48], scores[48:], n))
    return float(np.mean(found)), float(np.std(found) / math.sqrt(rounds))


@pytest.mark.parametrize("n", [2, 8])
def test_the_estimate_is_the_formula_where_no_answer_comes_twice(n: int):
    rng = np.random.default_rng(0)
    mean, error = _estimates(lambda: (rng.random(96), np.full(96, -60.0)), n)
    assert mean == pytest.approx(kl_bound(n), abs=4 * error)
    assert error < 0.03


@pytest.mark.parametrize("n", [4, 8])
def test_the_estimate_is_below_the_formula_where_the_best_answer_is_common(n: int):
    rng = np.random.default_rng(0)
    p = np.array([0.2, 0.3, 0.5])

    def draw():
        answers = rng.choice(3, size=96, p=p)
        return answers, np.log(p[answers])

    mean, error = _estimates(draw, n)
    assert mean == pytest.approx(exact_kl(p.tolist(), n), abs=4 * error)
    assert kl_bound(n) - mean > 10 * error
