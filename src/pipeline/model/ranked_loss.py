"""The loss of ranked answers, of which a pair is the shortest list.

Letters of shapes: B lists, K answers of the longest (padding behind).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def ranked_loss(
    scores_BK: Tensor, ranks_BK: Tensor, preference_B: Tensor, margin_B: Tensor, centring: float = 0.0
) -> Tensor:
    """Loss of each list, [B], in nats: the mean over its K(K − 1)/2 pairs (Ouyang et al. 2022, equation 1), whose mean
    over the lists is to be minimised. So a list weighs 1, however long, and each answer is forwarded once.

        of a pair i before j:   −μ log σ(Δ − m) − (1 − μ) log σ(m − Δ) + c (s_i + s_j)²,   Δ = s_i − s_j

    with μ the probability that i is better (½ where both have one rank, `preference_B` else), m the margin (0 where
    both have one rank; Touvron et al. 2023, equation 2), c the centring (Eisenstein et al. 2023, equation 2). With two
    answers, μ = 1 and m = 0 it is Bradley and Terry's.

    ranks_BK: ints that never fall along a list, −1 behind its end. preference_B: ½ to 1. margin_B: in units of scores.
    """
    is_answer_BK = ranks_BK >= 0
    is_pair_BKK = (is_answer_BK[:, :, None] & is_answer_BK[:, None, :]).triu(1)
    is_better_BKK = ranks_BK[:, :, None] < ranks_BK[:, None, :]
    mu_BKK = 0.5 + (preference_B[:, None, None] - 0.5) * is_better_BKK
    delta_BKK = scores_BK[:, :, None] - scores_BK[:, None, :]
    gap_BKK = delta_BKK - margin_B[:, None, None] * is_better_BKK
    nats_BKK = -mu_BKK * F.logsigmoid(gap_BKK) - (1 - mu_BKK) * F.logsigmoid(-gap_BKK)
    nats_BKK = nats_BKK + centring * (scores_BK[:, :, None] + scores_BK[:, None, :]) ** 2
    return (nats_BKK * is_pair_BKK).sum(dim=(1, 2)) / is_pair_BKK.sum(dim=(1, 2))
