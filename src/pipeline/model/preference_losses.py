"""Losses of preferences: pure functions of an answer's log-probability.

B rows of a batch. Of an answer y to a prompt x with policy p and reference r: its log-probability log p(y | x) is the
sum over its tokens in nats, its log-ratio log p(y | x) - log r(y | x), and a mean is either of them / |y|. Every
function gives one loss a row, float [B]; w is the chosen answer, l the rejected one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

PAIRWISE = ("sigmoid", "hinge", "ipo", "sigmoid_norm")
"""TRL's losses that are functions of one difference between the sides, and so can be turned around."""
A_TOKEN = ("ipo", "sigmoid_norm")
"""Those of them whose difference is of means over an answer's tokens."""


def expected(loss: Callable[[Tensor], Tensor], delta_B: Tensor, preference_B: Tensor) -> Tensor:
    """The loss where chosen is the better answer with probability mu = preference_B (Mitchell 2023, "A note on DPO
    with noisy preferences"): of the pair as it stands and of the pair turned around.

        mu l(Delta) + (1 - mu) l(-Delta)
    """
    return preference_B * loss(delta_B) + (1 - preference_B) * loss(-delta_B)


def smoothed(preference_B: Tensor, label_smoothing: float) -> Tensor:
    """mu where a share epsilon = label_smoothing of the labels is the wrong way round: mu (1 - e) + (1 - mu) e."""
    return preference_B * (1 - label_smoothing) + (1 - preference_B) * label_smoothing


def dpo_losses(kind: str, delta_B: Tensor, beta: float, preference_B: Tensor, margin_B: Tensor) -> Tensor:
    """DPO and its kin by TRL's names. delta_B: log-ratio of chosen less that of rejected, of means for A_TOKEN.

        sigmoid, sigmoid_norm   -log sigmoid(beta Delta - m)    Rafailov et al. 2023, eq. 7; m: Amini et al. 2024
        hinge                   max(0, 1 - (beta Delta - m))    Zhao et al. 2023, eq. 10
        ipo                     (Delta - 1 / (2 beta))²         Azar et al. 2023, eq. 17; takes no margin

    margin_B: m, by how much the reward of chosen is to be above that of rejected; 0 for the plain losses.
    """
    if kind == "ipo":
        return expected(lambda delta_B: (delta_B - 1 / (2 * beta)) ** 2, delta_B, preference_B)
    if kind == "hinge":
        return expected(lambda delta_B: F.relu(1 - (beta * delta_B - margin_B)), delta_B, preference_B)
    assert kind in ("sigmoid", "sigmoid_norm"), kind
    return expected(lambda delta_B: -F.logsigmoid(beta * delta_B - margin_B), delta_B, preference_B)


def cpo_losses(delta_B: Tensor, beta: float, preference_B: Tensor) -> Tensor:
    """CPO's preference term (Xu et al. 2024, eq. 3): DPO with a uniform reference. The likelihood of chosen is added
    by the caller (`cpo_alpha`). delta_B: log p(w) - log p(l).

        -log sigmoid(beta Delta)
    """
    return expected(lambda delta_B: -F.logsigmoid(beta * delta_B), delta_B, preference_B)


def simpo_losses(delta_B: Tensor, beta: float, gamma: float, preference_B: Tensor) -> Tensor:
    """SimPO (Meng et al. 2024, eq. 6): the reward is the mean log-probability of a token, and chosen is to be ahead by
    gamma. delta_B: log p(w) / |w| - log p(l) / |l|.

        -log sigmoid(beta Delta - gamma)
    """
    return expected(lambda delta_B: -F.logsigmoid(beta * delta_B - gamma), delta_B, preference_B)


def orpo_losses(chosen_mean_B: Tensor, rejected_mean_B: Tensor, preference_B: Tensor) -> Tensor:
    """ORPO's odds ratio term (Hong et al. 2024, eq. 4 and 7), without its weight lambda. The likelihood of chosen is
    added by the caller. chosen_mean_B, rejected_mean_B: log P = log p(y) / |y|, below 0.

        -log sigmoid(log [odds(w) / odds(l)]),   odds = P / (1 - P)
    """
    log_odds_B = (
        chosen_mean_B - rejected_mean_B - (log_one_minus_exp(chosen_mean_B) - log_one_minus_exp(rejected_mean_B))
    )
    return expected(lambda log_odds_B: -F.logsigmoid(log_odds_B), log_odds_B, preference_B)


def log_one_minus_exp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0: by log1p below -ln 2 and by expm1 above, where the other cancels (Mächler 2012)."""
    is_small = x < -0.6931471805599453
    small = torch.where(is_small, x, -1.0)  # each branch only sees where it is used: no nan from the other's gradient
    large = torch.where(is_small, -0.5, x)
    return torch.where(is_small, torch.log1p(-small.exp()), torch.log(-torch.expm1(large)))


def kto_losses(
    ratio_B: Tensor,
    is_desirable_B: Tensor,
    kl: Tensor,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """KTO (Ethayarajh et al. 2024, eq. 7), of lone answers. ratio_B: their log-ratios; kl: z, the KL from the
    reference that gains and losses are counted from, a number at least 0 without gradients.

        w_d (1 - sigmoid(beta (ratio - z)))    of a desirable answer
        w_u (1 - sigmoid(beta (z - ratio)))    of an undesirable one
    """
    gain_B = torch.where(is_desirable_B, ratio_B - kl, kl - ratio_B)
    weight_B = torch.where(is_desirable_B, desirable_weight, undesirable_weight)
    return weight_B * (1 - torch.sigmoid(beta * gain_B))
