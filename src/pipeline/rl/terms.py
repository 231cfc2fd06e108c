"""What the terms of a reward are in numbers: an ensemble's one score, length, repetition, the weighted sum.

Letters: B responses, M members of an ensemble. A higher score is better, so a penalty is below zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mean_minus_std(scores_MB: Tensor, std_weight: float) -> Tensor:
    """mean - std_weight * std over the members, std with M below (the population's). [M, B] -> [B]

    What the members don't agree on is worth less. Coste et al. 2023 ("Reward Model Ensembles Help Mitigate
    Overoptimization", UWO) take off the variance; the standard deviation keeps the score's unit.
    """
    return scores_MB.mean(dim=0) - std_weight * scores_MB.std(dim=0, correction=0)


def worst_case(scores_MB: Tensor) -> Tensor:
    """The lowest score any member gives (Coste et al. 2023, WCO). [M, B] -> [B]"""
    return scores_MB.amin(dim=0)


def lower_bound(scores_MB: Tensor) -> Tensor:
    """What one name stands for: a lone model's own score, an ensemble's mean - std. [M, B] -> [B]"""
    return scores_MB[0] if len(scores_MB) == 1 else mean_minus_std(scores_MB, 1.0)


def length_over(lengths_B: Tensor, target: int) -> Tensor:
    """-max(0, tokens - target): what a response is too long by, its stop token counted. [B] -> float32 [B]"""
    return -(lengths_B - target).clamp(min=0).float()


def repeated(ids: Sequence[int], n: int) -> float:
    """-(1 - distinct / all) of the n-grams of `ids`: minus the share that have stood before. 0 below n tokens."""
    grams = [tuple(ids[place : place + n]) for place in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) - 1.0 if grams else 0.0


def weighted_sum(scores: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i * score_i. [B] each -> [B]"""
    return torch.stack([weight * scores_B for weight, scores_B in zip(weights, scores, strict=True)]).sum(dim=0)
