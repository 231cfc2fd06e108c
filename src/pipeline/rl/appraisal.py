"""Answers appraised: what the models say of them, and the rewards, advantages and returns that follow.

Letters: B rows of this rank, T response tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.rl import kl
from pipeline.rl.advantages import estimate, explained_variance
from pipeline.rl.answers import Answers
from pipeline.rl.family import Estimator
from pipeline.rl.forwards import Cut, logprobs_and_entropies, precision, response_values, sweep, token_logprobs
from pipeline.rl.masking import means, whiten
from pipeline.rl.models import Models
from pipeline.rl.place import Place
from pipeline.rl.rewards import token_rewards
from pipeline.rl.rollouts import Experience, Rollout, turns


@dataclass(frozen=True)
class Appraisal:
    """How rewards become advantages, as in `estimate`."""

    estimator: Estimator
    group_size: int
    gamma: float
    lam: float
    whitens_rewards: bool
    whitens_advantages: bool
    rewards_hold_kl: bool
    """Whether the KL to the reference is paid out of the reward, token by token; it is part of the loss otherwise."""
    skips_truncated: bool
    """Whether answers without a stop token are left out of the training."""
    counts_turns: bool
    cut: Cut
    """Of the forwards."""


def appraise(
    answers: Answers, models: Models, appraisal: Appraisal, place: Place, kl_coef: float
) -> tuple[Experience, dict[str, float]]:
    """What is learnt from the answers, and its figures, means over all ranks. A nat of KL costs `kl_coef`."""
    rollout, mask_BT = answers.rollout, answers.rollout.response_mask_BT
    logprobs_BT, entropies_BT, reference_BT, values_BT = _readings(rollout, models, appraisal.cut, place)
    kl_BT = kl.k1(logprobs_BT, reference_BT)
    price = kl_coef if appraisal.rewards_hold_kl else 0.0
    rewards_BT = token_rewards(answers.rewards_B, kl_BT, mask_BT, kl_coef=price)
    if appraisal.whitens_rewards:
        rewards_BT = whiten(rewards_BT, mask_BT, shift_mean=False, reduce=place.reduce)
    advantages_BT, returns_BT = estimate(
        appraisal.estimator,
        rewards_BT,
        values_BT,
        mask_BT,
        answers.baselines_B,
        group_size=appraisal.group_size,
        gamma=appraisal.gamma,
        lam=appraisal.lam,
    )
    figures = means(
        {"kl": kl.sequence_kl(kl_BT, mask_BT)} | ({"turns": turns(mask_BT)} if appraisal.counts_turns else {}),
        {"entropy": entropies_BT, "rollout_gap": (logprobs_BT.exp() - rollout.sampled_BT.exp()).abs()},
        mask_BT,
        place.reduce,
    )
    figures |= {"kl_coef": kl_coef, "sqrt_kl": math.sqrt(max(0.0, figures["kl"]))}
    if models.critic is not None:
        figures["explained_variance"] = explained_variance(values_BT, returns_BT, mask_BT, place.reduce).item()
    is_trained_BT = mask_BT & rollout.is_ended_B[:, None] if appraisal.skips_truncated else mask_BT
    if appraisal.whitens_advantages and place.reduce(is_trained_BT.sum().float()) > 0:
        advantages_BT = whiten(advantages_BT, is_trained_BT, reduce=place.reduce)
    experience = Experience(rollout, is_trained_BT, logprobs_BT, reference_BT, advantages_BT, values_BT, returns_BT)
    return experience, figures


def _readings(rollout: Rollout, models: Models, cut: Cut, place: Place) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs and entropies of the policy, log-probs of the reference, values (zeros without a critic): [B, T]."""
    reading, policy = models.reading, models.policy.model
    with precision(place.device, place.bf16):
        logprobs_BT, entropies_BT = sweep(rollout, cut, 2, lambda part: logprobs_and_entropies(policy, part, reading))
        with models.reference() as reference:
            (reference_BT,) = sweep(rollout, cut, 1, lambda part: (token_logprobs(reference, part, reading),))
        if models.critic is None:
            return logprobs_BT, entropies_BT, reference_BT, torch.zeros_like(logprobs_BT)
        mean, std = models.value_scale
        with models.critic.active() as critic:
            (values_BT,) = sweep(rollout, cut, 1, lambda part: (response_values(critic, part, mean, std),))
    return logprobs_BT, entropies_BT, reference_BT, values_BT
