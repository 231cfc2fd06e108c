"""From one score a response to one reward a token.

Letters: B rows, T response tokens. A response has at least one token, and ends with the stop token unless
it was cut off at the greatest length.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def clip_scores(scores_B: Tensor, limit: float | None) -> Tensor:
    """Scores held within [-limit, limit], in the reward's own standard deviations; None leaves them. [B]"""
    return scores_B if limit is None else scores_B.clamp(-limit, limit)


def missing_eos(
    scores_B: Tensor, is_ended_B: Tensor, *, penalty: float, rule: Literal["replace", "subtract", "keep"]
) -> Tensor:
    """The score of a response that was cut off before its stop token. [B]

    replace   -penalty, whatever the score was (Stiennon et al. 2020; the reward model saw no such text)
    subtract  score - penalty (TRL)
    keep      the score as it is
    """
    if rule == "keep":
        return scores_B
    cut_B = torch.full_like(scores_B, -penalty) if rule == "replace" else scores_B - penalty
    return torch.where(is_ended_B, scores_B, cut_B)


def overlong_penalty(lengths_B: Tensor, *, longest: int, buffer: float) -> Tensor:
    """DAPO's soft punishment of long responses, to be added to the score (Yu et al. 2025, eq. 13). [B], in [-1, 0]

        0 up to longest - cache,   (longest - cache - length) / cache within the cache,   cache = buffer x longest

    `buffer` is a share of the greatest length. A response of the greatest length gets -1.
    """
    cache = buffer * longest
    return ((longest - cache - lengths_B.float()) / cache).clamp(-1.0, 0.0)


def token_rewards(scores_B: Tensor, kl_BT: Tensor, response_mask_BT: Tensor, *, kl_coef: float) -> Tensor:
    """The reward of each token: the price of its KL, and the score on the last token the policy wrote.

        r_t = -kl_coef * KL_t + [t = last] * score

    Ziegler et al. 2019, eq. 2; Ouyang et al. 2022, eq. 2, there for the whole response. The last token is the stop
    token, or the last one of a response that was cut off. One slot later (the pad after it) the advantage of the stop
    token would be right at lambda = 1 only. `scores_B` float, `kl_BT` float (k1, nats); the mask has a True in every
    row. Returns [B, T], zero outside the mask.
    """
    positions_T = torch.arange(kl_BT.shape[1], device=kl_BT.device)
    last_B = torch.where(response_mask_BT, positions_T, -1).max(dim=1).values
    rewards_BT = torch.where(response_mask_BT, -kl_coef * kl_BT, 0)
    return rewards_BT + torch.where(positions_T == last_B[:, None], scores_B[:, None], 0)
