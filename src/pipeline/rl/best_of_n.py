"""Best of n in numbers: what the best of n answers is worth, and how far that policy is from the one that wrote them.

The best-of-n policy writes n answers and gives the one with the highest score. Nothing is trained: from N answers to a
prompt follow the figures for every n up to N. Letters: P prompts, N answers to each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def winning_chances(scores_N: npt.ArrayLike, n: int) -> Floats:
    """The chance of each answer to be the best of n drawn from these N without putting back, [N]; they sum to 1.

        P(the i-th lowest wins) = C(i - 1, n - 1) / C(N, n)        equal scores share theirs

    The mean of any figure under these chances is an unbiased estimate of that figure of the best of n (Nakano et al.
    2021, WebGPT, appendix I).
    """
    scores = np.asarray(scores_N, dtype=np.float64)
    assert 1 <= n <= len(scores), "n is at most the number of answers"
    of_rank = np.array([math.comb(i, n - 1) / math.comb(len(scores), n) for i in range(len(scores))])
    _, group, count = np.unique(scores, return_inverse=True, return_counts=True)
    chances = np.empty(len(scores))
    chances[np.argsort(scores, kind="stable")] = of_rank
    return np.asarray((np.bincount(group, weights=chances) / count)[group])


def kl_bound(n: int) -> float:
    """log n - (n - 1) / n: KL(best of n || policy) in nats where no two answers have one score, else its upper bound
    (Stiennon et al. 2020, appendix G.3; Beirami et al. 2024)."""
    return math.log(n) - (n - 1) / n


def exact_kl(probabilities: Sequence[float], n: int) -> float:
    """KL(best of n || policy), nats, of a policy over a few answers, given from the worst to the best.

    P(best of n = y) = F(y)^n - F(y-)^n,   F(y) the probability of an answer no better than y
    """
    above = np.cumsum(np.asarray(probabilities, dtype=np.float64))
    won = above**n - np.concatenate([[0.0], above[:-1]]) ** n
    return float(sum(w * math.log(w / p) for w, p in zip(won, probabilities, strict=True) if w > 0))


def estimated_kl(scores_N: npt.ArrayLike, logprobs_N: npt.ArrayLike, others_M: npt.ArrayLike, n: int) -> float:
    """An estimate of KL(best of n || policy), nats, from answers to one prompt that the policy sampled.

        log P(best of n = y) / p(y) = log n + (n - 1) log F + log[(1 - (1 - q)^n) / (n q)],   q = p(y) / F

    averaged over the answers by their `winning_chances`. F, the probability of an answer no better than y, is of other
    samples: with k of these M scored no higher than y, log F is estimated by H_k - H_M, H the harmonic numbers, whose
    bias is of order (1 - F)^M. p(y) is the policy's own, from `logprobs_N` (of whole answers); where every answer is
    improbable the last term is 0, and it is below 0 where the best are answers that the policy often gives.
    """
    scores, others = np.asarray(scores_N, dtype=np.float64), np.sort(np.asarray(others_M, dtype=np.float64))
    harmonic = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, len(others) + 1))])
    log_f = harmonic[np.searchsorted(others, scores, side="right")] - harmonic[-1]
    q = np.exp(np.minimum(np.asarray(logprobs_N, dtype=np.float64) - log_f, 0.0))
    kept = -np.expm1(n * np.log1p(-np.minimum(q, 1.0 - 1e-12)))  # 1 - (1 - q)^n
    log_ratio = math.log(n) + (n - 1) * log_f + np.log(kept / (n * q))
    return float(winning_chances(scores, n) @ log_ratio)
