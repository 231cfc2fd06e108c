"""The clipped losses of PPO, and the entropy of a distribution.

Letters: B rows, T response tokens, N tokens, V vocabulary. `normaliser` is the number of response tokens of
the whole optimiser step, over all its microbatches and all ranks: the losses and figures of the parts then
add up to those of the whole, and every token weighs the same wherever it was computed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.rl.kl import k3
from pipeline.rl.masking import masked_sum

LOG_RATIO_LIMIT = 20.0
"""exp(20) is 5e8: far outside every clip, and still a finite number with a finite square."""


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


def policy_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    response_mask_BT: Tensor,
    *,
    normaliser: float,
    cliprange: float,
    clip_higher: float | None = None,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """The clipped surrogate objective, negated (Schulman et al. 2017, eq. 7).

        L = -1/N sum min(rho A, clip(rho, 1 - eps, 1 + eps_high) A),   rho = exp(log pi - log pi_old)

    `clip_higher` is eps_high (DAPO, 0.28), None means eps. `dual_clip` c > 1 bounds the loss of tokens with
    A < 0 by -c A (Ye et al. 2020, eq. 5), None leaves it out. log rho is clamped to +-20. All tensors
    [batch, response length], gradients flow into `logprobs_BT` only; what lies outside the mask has no
    part.
    """
    log_ratio_BT = torch.where(response_mask_BT, logprobs_BT - old_logprobs_BT.detach(), 0)
    log_ratio_BT = log_ratio_BT.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio_BT = log_ratio_BT.exp()
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

    loss = masked_sum(losses_BT, response_mask_BT) / normaliser
    with torch.no_grad():
        approx_kl_BT = k3(torch.zeros_like(log_ratio_BT), log_ratio_BT)
        return PolicyLoss(
            loss=loss,
            clip_fraction=masked_sum(is_clipped_BT.to(ratio_BT.dtype), response_mask_BT) / normaliser,
            approx_kl=masked_sum(approx_kl_BT, response_mask_BT) / normaliser,
            max_ratio_error=torch.where(response_mask_BT, ratio_BT - 1, 0).abs().max(),
        )


def value_loss(
    values_BT: Tensor,
    old_values_BT: Tensor,
    returns_BT: Tensor,
    response_mask_BT: Tensor,
    *,
    normaliser: float,
    cliprange_value: float | None,
) -> ValueLoss:
    """Squared error to the returns, clipped around the values of the rollout.

        L = 1/2 1/N sum max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2)

    With the factor 1/2 and the maximum, as in OpenAI baselines' ppo2 and lm-human-preferences;
    `cliprange_value` None gives the plain 1/2 (V - R)^2. All tensors [batch, response length], gradients
    flow into `values_BT` only.
    """
    old_values_BT, returns_BT = old_values_BT.detach(), returns_BT.detach()
    errors_BT = (values_BT - returns_BT).square()
    is_clipped_BT = torch.zeros_like(response_mask_BT)
    if cliprange_value is not None:
        near_BT = old_values_BT + (values_BT - old_values_BT).clamp(-cliprange_value, cliprange_value)
        clipped_BT = (near_BT - returns_BT).square()
        is_clipped_BT = clipped_BT > errors_BT
        errors_BT = torch.maximum(errors_BT, clipped_BT)
    loss = 0.5 * masked_sum(errors_BT, response_mask_BT) / normaliser
    with torch.no_grad():
        return ValueLoss(loss, masked_sum(is_clipped_BT.to(values_BT.dtype), response_mask_BT) / normaliser)


def entropy(logprobs_NV: Tensor) -> Tensor:
    """Entropy of each distribution from its log-probs, nats: H = -sum p log p, 0 where p is 0. [N, V] -> [N]"""
    return -torch.where(logprobs_NV == -torch.inf, 0, logprobs_NV.exp() * logprobs_NV).sum(dim=-1)
