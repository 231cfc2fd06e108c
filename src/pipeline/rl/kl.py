"""How far the policy is from its reference: estimators of KL(policy || reference), and what it costs.

Letters: B rows, T response tokens. Log-probs are of the sampled tokens, natural logarithm, float.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""exp(20) is 5e8: far outside every clip, and still a finite number with a finite square."""


def k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """log pi - log pi_ref. Unbiased under samples of pi, high variance, either sign; any shape.

    k1, k2, k3: Schulman, "Approximating KL divergence" (2020).
    """
    return logprobs - reference_logprobs


def k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """(log pi - log pi_ref)^2 / 2.

    Biased, never negative; its gradient is an unbiased one of the KL. The difference is held within +-20. Any shape.
    """
    return 0.5 * (logprobs - reference_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).square()


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """r - 1 - log r with r = pi_ref / pi. Unbiased, never negative, low variance near pi_ref. Any shape.

    Right as a term of the loss (GRPO) and as a figure to watch; as a reward its gradient is not that of the
    KL. log r is held within +-20.
    """
    log_ratio = (reference_logprobs - logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.expm1(log_ratio) - log_ratio


def sequence_kl(kl_BT: Tensor, response_mask_BT: Tensor) -> Tensor:
    """Sum of the per-token estimates over each response: [B, T] -> [B], nats a response."""
    return torch.where(response_mask_BT, kl_BT, 0).sum(dim=1)


def adaptive_kl_coef(kl_coef: float, kl: float, *, target: float, horizon: float, episodes: int) -> float:
    """The next coefficient of the KL penalty (Ziegler et al. 2019, section 2.2).

        e = clip(kl / target - 1, -0.2, 0.2)        coef <- coef * (1 + e * episodes / horizon)

    `kl` is summed over tokens and averaged over the samples of all ranks, `target` likewise (nats a
    response); `horizon` is in episodes, and `episodes` the number that `kl` was measured on.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * episodes / horizon)
