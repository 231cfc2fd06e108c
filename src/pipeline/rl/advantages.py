"""Advantages and returns of the tokens of a response, and how much of the returns the critic explains.

Letters: B rows, T response tokens, G samples of a prompt. True in a mask is a token the policy wrote. What lies between
such tokens (the output of a tool) is stepped over: the token before it is followed by the one after it.

GAE is of tokens and needs a critic. The others are of whole responses: from the return of each, the sum of its tokens'
rewards, they take off what the prompt is worth by itself. Rows of a prompt stand together, G at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.rl.family import Estimator
from pipeline.rl.masking import Reduce, alone, masked_mean


def rewards_to_go(rewards_BT: Tensor, response_mask_BT: Tensor, gamma: float) -> Tensor:
    """Discounted sum of the rewards from each token on.

    G_t = r_t + gamma G_{t+1},   G after the end = 0.
    All float, [batch, response length]; zero outside the mask.
    """
    rewards_BT = torch.where(response_mask_BT, rewards_BT, 0)
    returns_BT = torch.zeros_like(rewards_BT)
    following_B = torch.zeros_like(rewards_BT[:, 0])
    for t in reversed(range(rewards_BT.shape[1])):
        following_B = torch.where(response_mask_BT[:, t], rewards_BT[:, t] + gamma * following_B, following_B)
        returns_BT[:, t] = following_B
    return torch.where(response_mask_BT, returns_BT, 0)


def gae(
    rewards_BT: Tensor, values_BT: Tensor, response_mask_BT: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16).

        A_t = delta_t + gamma lam A_{t+1},   delta_t = r_t + gamma V_{t+1} - V_t,   V after the end = 0.

    `values_BT` holds V of the text before each token. All float, [batch, response length].
    Returns (advantages_BT, returns_BT) with returns = advantages + values, both zero outside the mask.
    """
    values_BT = torch.where(response_mask_BT, values_BT, 0)
    deltas_BT = torch.where(
        response_mask_BT, rewards_BT + gamma * _following(values_BT, response_mask_BT) - values_BT, 0
    )
    advantages_BT = rewards_to_go(deltas_BT, response_mask_BT, gamma * lam)
    return advantages_BT, advantages_BT + values_BT


def _following(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """For every token the value of the next one under the mask, 0 where none follows."""
    found_BT = torch.zeros_like(values_BT)
    next_B = torch.zeros_like(values_BT[:, 0])
    for t in reversed(range(values_BT.shape[1])):
        found_BT[:, t] = next_B
        next_B = torch.where(mask_BT[:, t], values_BT[:, t], next_B)
    return found_BT


def grpo(returns_B: Tensor, group_size: int) -> Tensor:
    """A = (R - mean of the group) / (std of the group + 1e-4)    (Shao et al. 2024, DeepSeekMath, section 4.1.2)

    The deviation divides by G - 1, as in TRL and verl. Zero where all of a group are alike. [B] -> [B]
    """
    groups_PG = returns_B.view(-1, group_size)
    centred_PG = groups_PG - groups_PG.mean(dim=1, keepdim=True)
    return (centred_PG / (groups_PG.std(dim=1, keepdim=True) + 1e-4)).flatten()


def dr_grpo(returns_B: Tensor, group_size: int) -> Tensor:
    """A = R - mean of the group    (Liu et al. 2025, "Understanding R1-Zero-Like Training", section 3.2). [B] -> [B]"""
    groups_PG = returns_B.view(-1, group_size)
    return (groups_PG - groups_PG.mean(dim=1, keepdim=True)).flatten()


def rloo(returns_B: Tensor, group_size: int) -> Tensor:
    """A = R - mean of the others of the group    (Ahmadian et al. 2024, "Back to Basics", eq. 8). [B] -> [B]"""
    groups_PG = returns_B.view(-1, group_size)
    others_PG = (groups_PG.sum(dim=1, keepdim=True) - groups_PG) / (group_size - 1)
    return (groups_PG - others_PG).flatten()


def remax(returns_B: Tensor, greedy_returns_B: Tensor) -> Tensor:
    """A = R - R of the greedy answer to the same prompt    (Li et al. 2024, ReMax, eq. 5). [B], [B] -> [B]"""
    return returns_B - greedy_returns_B


def varies(returns_B: Tensor, group_size: int) -> Tensor:
    """True for the rows of a group whose returns are not all the same: those that have something to say. [B] -> [B]"""
    groups_PG = returns_B.view(-1, group_size)
    return (groups_PG != groups_PG[:, :1]).any(dim=1, keepdim=True).expand_as(groups_PG).flatten()


def estimate(
    estimator: Estimator,
    rewards_BT: Tensor,
    values_BT: Tensor,
    response_mask_BT: Tensor,
    baselines_B: Tensor,
    *,
    group_size: int,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns) by name, [B, T] each, zero outside the mask.

    All but GAE and REINFORCE++ (Hu et al. 2025: the rewards to go, whitened over the batch) take a response for one
    action, whose return is the sum of its rewards; `baselines_B` are what the greedy answers got (ReMax).
    """
    if estimator == "gae":
        return gae(rewards_BT, values_BT, response_mask_BT, gamma=gamma, lam=lam)
    if estimator == "reinforce++":
        returns_BT = rewards_to_go(rewards_BT, response_mask_BT, gamma)
        return returns_BT, returns_BT
    returns_B = rewards_BT.sum(dim=1)
    if estimator == "grpo":
        advantages_B = grpo(returns_B, group_size)
    elif estimator == "dr_grpo":
        advantages_B = dr_grpo(returns_B, group_size)
    elif estimator == "rloo":
        advantages_B = rloo(returns_B, group_size)
    else:
        advantages_B = remax(returns_B, baselines_B)
    return torch.where(response_mask_BT, advantages_B[:, None], 0), torch.where(response_mask_BT, returns_B[:, None], 0)


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
