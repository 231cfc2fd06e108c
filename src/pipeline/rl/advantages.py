"""Advantages and returns of the tokens of a response, and how much of the returns the critic explains.

Letters: B rows, T response tokens. True in a mask is a token the policy wrote; the tokens of a response are
the first ones of its row, so nothing follows a False but more of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.rl.masking import Reduce, alone, masked_mean


def rewards_to_go(rewards_BT: Tensor, response_mask_BT: Tensor, gamma: float) -> Tensor:
    """Discounted sum of the rewards from each token on.

    G_t = r_t + gamma G_{t+1},   G after the end = 0.
    All float, [batch, response length]; zero outside the response.
    """
    rewards_BT = torch.where(response_mask_BT, rewards_BT, 0)
    returns_BT = torch.zeros_like(rewards_BT)
    following_B = torch.zeros_like(rewards_BT[:, 0])
    for t in reversed(range(rewards_BT.shape[1])):
        following_B = rewards_BT[:, t] + gamma * following_B
        returns_BT[:, t] = following_B
    return returns_BT


def gae(
    rewards_BT: Tensor, values_BT: Tensor, response_mask_BT: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16).

        A_t = delta_t + gamma lam A_{t+1},   delta_t = r_t + gamma V_{t+1} - V_t,   V after the end = 0.

    `values_BT` holds V of the text before each token. All float, [batch, response length].
    Returns (advantages_BT, returns_BT) with returns = advantages + values, both zero outside the response.
    """
    rewards_BT = torch.where(response_mask_BT, rewards_BT, 0)
    values_BT = torch.where(response_mask_BT, values_BT, 0)
    next_values_BT = torch.nn.functional.pad(values_BT[:, 1:], (0, 1))
    deltas_BT = rewards_BT + gamma * next_values_BT - values_BT
    # Outside the response all three are zero, so the recursion enters the last real token with A = 0.
    advantages_BT = rewards_to_go(deltas_BT, response_mask_BT, gamma * lam)
    return advantages_BT, advantages_BT + values_BT


def explained_variance(
    values_BT: Tensor, returns_BT: Tensor, response_mask_BT: Tensor, reduce: Reduce = alone
) -> Tensor:
    """1 - Var(returns - values) / Var(returns) under the mask, over all ranks.

    1 is a perfect critic, 0 one that is as good as a constant, less is worse than one. 0 where the returns
    do not vary. All [batch, response length]; scalar.
    """
    residuals_BT = returns_BT - values_BT
    unexplained = residuals_BT - masked_mean(residuals_BT, response_mask_BT, reduce)
    spread = returns_BT - masked_mean(returns_BT, response_mask_BT, reduce)
    unexplained_variance = masked_mean(unexplained.square(), response_mask_BT, reduce)
    variance = masked_mean(spread.square(), response_mask_BT, reduce)
    return torch.where(variance > 0, 1 - unexplained_variance / variance, 0)
