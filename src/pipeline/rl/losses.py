"""The clipped losses of PPO, and the entropy of a distribution.

Letters: B rows, T response tokens, N tokens, V vocabulary. `weights_BT` is what each token counts in the mean over the
whole optimiser step, all its microbatches and all ranks: the losses and figures of the parts then add up to those of
the whole, and a token weighs the same wherever it was computed.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pipeline.rl.kl import LOG_RATIO_LIMIT, k3


class PolicyLoss(NamedTuple):
    """Scalars, each this part's share of the mean over the optimiser step."""

    loss: Tensor
    clip_fraction: Tensor
    """Share of tokens whose gradient the clip has cut off."""
    approx_kl: Tensor
    """KL(old policy || policy) by k3, nats a token."""
    max_ratio_error: Tensor
    """max |ratio - 1| of this part (a maximum, not a share)."""


class ValueLoss(NamedTuple):
    """Scalars, each this part's share of the mean over the optimiser step."""

    loss: Tensor
    clip_fraction: Tensor
    """Share of tokens for which the clipped error was the greater."""


def token_weights(
    mask_BT: Tensor, how: Literal["token", "sequence", "constant"], *, tokens: float, rows: float, longest: int
) -> Tensor:
    """What each token counts in the loss; zero outside the mask. [batch, response length]

    token      1 / tokens: every token alike (PPO, DAPO)
    sequence   1 / (rows x tokens of its row): every response alike (GRPO, GSPO)
    constant   1 / (rows x longest): as `token`, but a step of longer responses weighs more (Dr. GRPO, RLOO)

    `tokens` under the mask and `rows` are those of the whole optimiser step, over all ranks: for `sequence` the rows
    with any, for `constant` all of them. `longest` is the greatest length a response may have.
    """
    mask_BT = mask_BT.float()
    if how == "token":
        return mask_BT / tokens
    if how == "sequence":
        return mask_BT / (rows * mask_BT.sum(dim=1, keepdim=True).clamp(min=1))
    return mask_BT / (rows * longest)


def policy_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    weights_BT: Tensor,
    *,
    cliprange: float,
    clip_higher: float | None = None,
    dual_clip: float | None = None,
    level: Literal["token", "sequence"] = "token",
    correction_BT: Tensor | None = None,
) -> PolicyLoss:
    """The clipped surrogate objective, negated (Schulman et al. 2017, eq. 7).

        L = -sum w min(rho A, clip(rho, 1 - eps, 1 + eps_high) A),   rho = exp(log pi - log pi_old)

    `clip_higher` is eps_high (DAPO, 0.28), None means eps. `dual_clip` c > 1 bounds the loss of tokens with
    A < 0 by -c A (Ye et al. 2020, eq. 5), None leaves it out. log rho is clamped to +-20. At the `level` of a
    sequence, rho is the geometric mean of its tokens' (GSPO, Zheng et al. 2025, eq. 7). `correction_BT` (see
    `rollout_correction`) multiplies each token's loss. All tensors [batch, response length], gradients flow into
    `logprobs_BT` only; what has no weight has no part.
    """
    mask_BT = weights_BT > 0
    log_ratio_BT = torch.where(mask_BT, logprobs_BT - old_logprobs_BT.detach(), 0)
    token_log_ratio_BT = log_ratio_BT.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if level == "sequence":
        counts_B1 = mask_BT.sum(dim=1, keepdim=True).clamp(min=1)
        log_ratio_BT = (log_ratio_BT.sum(dim=1, keepdim=True) / counts_B1).expand_as(log_ratio_BT)
    ratio_BT = log_ratio_BT.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    upper = cliprange if clip_higher is None else clip_higher
    advantages_BT = advantages_BT.detach()

    unclipped_BT = -advantages_BT * ratio_BT
    clipped_BT = -advantages_BT * ratio_BT.clamp(1 - cliprange, 1 + upper)
    losses_BT = torch.maximum(unclipped_BT, clipped_BT)
    is_clipped_BT = clipped_BT > unclipped_BT
    if dual_clip is not None:
        ceiling_BT = -advantages_BT * dual_clip
        is_over_BT = (advantages_BT < 0) & (losses_BT > ceiling_BT)
        losses_BT = torch.where(is_over_BT, ceiling_BT, losses_BT)
        is_clipped_BT = is_clipped_BT | is_over_BT
    if correction_BT is not None:
        losses_BT = losses_BT * correction_BT

    with torch.no_grad():
        approx_kl_BT = k3(torch.zeros_like(token_log_ratio_BT), token_log_ratio_BT)
        clip_fraction = weighted_sum(is_clipped_BT.to(ratio_BT.dtype), weights_BT)
        approx_kl = weighted_sum(approx_kl_BT, weights_BT)
        max_ratio_error = torch.where(mask_BT, token_log_ratio_BT.exp() - 1, 0).abs().max()
    return PolicyLoss(weighted_sum(losses_BT, weights_BT), clip_fraction, approx_kl, max_ratio_error)


def weighted_sum(values_BT: Tensor, weights_BT: Tensor) -> Tensor:
    """Sum of weight x value; what has no weight (a NaN included) never counts. Scalar."""
    return torch.where(weights_BT > 0, values_BT * weights_BT, 0).sum()


def rollout_correction(old_logprobs_BT: Tensor, rollout_logprobs_BT: Tensor, cap: float) -> Tensor:
    """min(pi_old / pi_rollout, cap): the truncated importance weight of tokens that another engine has drawn.

    (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training".) [B, T]
    """
    log_ratio_BT = (old_logprobs_BT - rollout_logprobs_BT).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return log_ratio_BT.exp().clamp(max=cap)


def value_loss(
    values_BT: Tensor,
    old_values_BT: Tensor,
    returns_BT: Tensor,
    weights_BT: Tensor,
    *,
    cliprange_value: float | None,
) -> ValueLoss:
    """Squared error to the returns, clipped around the values of the rollout.

        L = 1/2 sum w max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2)

    With the factor 1/2 and the maximum, as in OpenAI baselines' ppo2 and lm-human-preferences;
    `cliprange_value` None gives the plain 1/2 (V - R)^2. All tensors [batch, response length], gradients
    flow into `values_BT` only.
    """
    old_values_BT, returns_BT = old_values_BT.detach(), returns_BT.detach()
    errors_BT = (values_BT - returns_BT).square()
    is_clipped_BT = torch.zeros_like(errors_BT, dtype=torch.bool)
    if cliprange_value is not None:
        near_BT = old_values_BT + (values_BT - old_values_BT).clamp(-cliprange_value, cliprange_value)
        clipped_BT = (near_BT - returns_BT).square()
        is_clipped_BT = clipped_BT > errors_BT
        errors_BT = torch.maximum(errors_BT, clipped_BT)
    with torch.no_grad():
        clip_fraction = weighted_sum(is_clipped_BT.to(values_BT.dtype), weights_BT)
    return ValueLoss(0.5 * weighted_sum(errors_BT, weights_BT), clip_fraction)


def entropy(logprobs_NV: Tensor) -> Tensor:
    """Entropy of each distribution from its log-probs, nats: H = -sum p log p, 0 where p is 0. [N, V] -> [N]"""
    return -torch.where(logprobs_NV == -torch.inf, 0, logprobs_NV.exp() * logprobs_NV).sum(dim=-1)
