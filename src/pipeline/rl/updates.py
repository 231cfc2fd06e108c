"""The update of policy and critic from one rollout: epochs of minibatches, each one optimiser step of both.

Letters: B rows of this rank, T response tokens. Gradients gather over microbatches and ranks; what a token weighs is
settled for the whole minibatch, so neither how it is cut up nor how many ranks share it counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.errors import TrainingError
from pipeline.rl import kl
from pipeline.rl.forwards import Cut, Reading, logprobs_and_entropies, precision, response_values, token_logprobs
from pipeline.rl.learners import Average, Learner
from pipeline.rl.losses import (
    PolicyLoss,
    ValueLoss,
    policy_loss,
    rollout_correction,
    token_weights,
    value_loss,
    weighted_sum,
)
from pipeline.rl.masking import Reduce
from pipeline.rl.rollouts import Experience

RATIO_TOLERANCE = {False: 1e-3, True: 0.05}
"""By bf16: how far from 1 the first minibatch's ratio may be by rounding alone. In fp32 that of every token; in bf16,
whose logits are an eighth apart at 16, the root of the mean square of its logarithm."""

FIGURES = ("policy_loss", "clip_fraction", "approx_kl", "value_loss", "value_clip_fraction")
"""Of a minibatch, before the gradients' norms."""


@dataclass(frozen=True)
class Objective:
    """The numbers of the losses, as in `policy_loss`, `token_weights` and `value_loss`."""

    reading: Reading
    aggregation: Literal["token", "sequence", "constant"]
    longest: int
    """Greatest length of a response, tokens."""
    level: Literal["token", "sequence"]
    cliprange: float
    clip_higher: float | None
    dual_clip: float | None
    correction_cap: float | None
    """Importance weights of tokens that another engine has drawn are cut here; None leaves them out."""
    entropy_coef: float
    kl_loss: Literal["k2", "k3"] | None
    """Estimator of the KL to the reference that is part of the loss; None where it is part of the reward."""
    kl_coef: float
    """Its price; changes from step to step where it is adaptive."""
    cliprange_value: float | None
    vf_coef: float
    value_mean: float
    """The critic's raw number x is the value (x - value_mean) / value_std."""
    value_std: float
    target_kl: float | None
    """Nats a token: a minibatch on which the policy has moved further ends the update, before its own step."""


@dataclass(frozen=True)
class Setting:
    """What the update runs in."""

    cut: Cut
    bf16: bool
    reduce: Reduce
    rates: tuple[float, float]
    """Learning rates of policy and critic."""
    average: Average | None = None
    """The policy's, which follows every step."""
    also: Callable[[int], dict[str, float]] | None = None
    """(number of the optimiser step) -> figures: a further loss whose gradient is added to the policy's (PPO-ptx)."""


def update(
    policy: Learner, critic: Learner | None, experience: Experience, objective: Objective, parts: list[Tensor],
    setting: Setting,
) -> dict[str, float]:  # fmt: skip
    """Updates of one step; the means of their figures.

    `parts` are the minibatches, each this rank's rows of it (none is allowed: every rank takes every step).
    A minibatch without a token to train on any rank is passed over. Raises TrainingError for a first ratio that is not
    1, and for a loss or gradient that is not finite.
    """
    done: list[dict[str, float]] = []
    learners = [policy] if critic is None else [policy, critic]
    for rows in parts:
        figures, ratio_error = minibatch(policy, critic, experience, objective, rows, setting)
        if not figures:
            continue
        if not done:
            error = math.sqrt(2 * max(0.0, figures["approx_kl"])) if setting.bf16 else ratio_error
            check_first_ratio(error, RATIO_TOLERANCE[setting.bf16], setting.reduce, rows.device)
        elif objective.target_kl is not None and figures["approx_kl"] > objective.target_kl:
            for learner in learners:
                learner.forget()
            break
        if setting.also is not None:
            figures |= setting.also(len(done))
        norms = [learner.gather(setting.reduce) for learner in learners]
        figures |= {f"{name}_grad_norm": norm.item() for name, norm in zip(("policy", "value"), norms, strict=False)}
        check_finite(figures)
        for learner, norm, rate in zip(learners, norms, setting.rates, strict=False):
            learner.step(norm, rate)
        if setting.average is not None:
            setting.average.follow()
        done.append(figures)
    names = done[0] if done else FIGURES[: 3 if critic is None else 5]
    means = {name: sum(figures[name] for figures in done) / max(1, len(done)) for name in names}
    return means | {"updates": float(len(done))}


def minibatch(
    policy: Learner, critic: Learner | None, experience: Experience, objective: Objective, rows: Tensor,
    setting: Setting,
) -> tuple[dict[str, float], float]:  # fmt: skip
    """Forward and backward of both models on this rank's `rows` of a minibatch: its figures over all ranks (none where
    there is nothing to train), and the greatest |ratio - 1| on this one."""
    mask_BT = experience.is_trained_BT[rows]
    counts = torch.tensor([mask_BT.sum(), mask_BT.any(dim=1).sum(), len(rows)], dtype=torch.float, device=rows.device)
    tokens, with_any, all_rows = setting.reduce(counts).tolist()
    of_rows = all_rows if objective.aggregation == "constant" else with_any
    if tokens == 0:
        return {}, 0.0
    rows = rows[mask_BT.any(dim=1)]
    totals = torch.zeros(6, device=rows.device)
    ratio_error = 0.0
    for part in setting.cut.parts(experience.rollout, rows):
        here = experience.select(part)
        weights_BT = token_weights(
            here.is_trained_BT, objective.aggregation, tokens=tokens, rows=of_rows, longest=objective.longest
        )
        of_policy = policy_part(policy, here, objective, weights_BT, setting.bf16)
        figures = [*of_policy[:3], weights_BT.sum()]
        if critic is not None:
            of_values = critic_part(critic, here, objective, weights_BT, setting.bf16)
            figures += [*of_values]
        totals += torch.nn.functional.pad(torch.stack(figures).detach(), (0, 6 - len(figures)))
        ratio_error = max(ratio_error, of_policy.max_ratio_error.item())
    loss, clipped, moved, weight, of_value, value_clipped = setting.reduce(totals).tolist()
    found = (loss, clipped / weight, moved / weight, of_value, value_clipped / weight)
    return dict(zip(FIGURES[: 3 if critic is None else 5], found, strict=False)), ratio_error


def policy_part(policy: Learner, here: Experience, objective: Objective, weights_BT: Tensor, bf16: bool) -> PolicyLoss:
    """Forward and backward of the policy on some rows: the clipped loss, and what is asked for of KL and entropy."""
    entropies_BT: Tensor | None = None
    with precision(weights_BT.device, bf16):
        if objective.entropy_coef:
            logprobs_BT, entropies_BT = logprobs_and_entropies(policy.model, here.rollout, objective.reading)
        else:
            logprobs_BT = token_logprobs(policy.model, here.rollout, objective.reading)
    cap, sampled_BT = objective.correction_cap, here.rollout.sampled_BT
    found = policy_loss(
        logprobs_BT,
        here.logprobs_BT,
        here.advantages_BT,
        weights_BT,
        cliprange=objective.cliprange,
        clip_higher=objective.clip_higher,
        dual_clip=objective.dual_clip,
        level=objective.level,
        correction_BT=None if cap is None else rollout_correction(here.logprobs_BT, sampled_BT, cap),
    )
    loss = found.loss
    if objective.kl_loss is not None and objective.kl_coef:
        estimator = kl.k2 if objective.kl_loss == "k2" else kl.k3
        loss = loss + objective.kl_coef * weighted_sum(estimator(logprobs_BT, here.reference_BT), weights_BT)
    if entropies_BT is not None:
        loss = loss - objective.entropy_coef * weighted_sum(entropies_BT, weights_BT)
    loss.backward()  # type: ignore[no-untyped-call]
    return found._replace(loss=loss)


def critic_part(critic: Learner, here: Experience, objective: Objective, weights_BT: Tensor, bf16: bool) -> ValueLoss:
    """Forward and backward of the critic on some rows, the one as the other with its own adapters."""
    with critic.active() as model:
        with precision(weights_BT.device, bf16):
            values_BT = response_values(model, here.rollout, objective.value_mean, objective.value_std)
        found = value_loss(
            values_BT, here.values_BT, here.returns_BT, weights_BT, cliprange_value=objective.cliprange_value
        )
        (objective.vf_coef * found.loss).backward()  # type: ignore[no-untyped-call]
    return found


def check_finite(figures: Mapping[str, float]) -> None:
    """TrainingError where one of them is not."""
    wrong = ", ".join(f"{name} {value}" for name, value in figures.items() if not math.isfinite(value))
    if wrong:
        raise TrainingError(f"not finite: {wrong}", mend="a lower learning_rate; the last checkpoint is kept")


def check_first_ratio(error: float, tolerance: float, reduce: Reduce, device: torch.device) -> None:
    """TrainingError on every rank where the first minibatch's ratio is not 1 on one: its policy is the rollout's."""
    if reduce(torch.tensor(float(not error <= tolerance), device=device)) > 0:
        raise TrainingError(
            f"the ratio of the first minibatch is off 1 by {error:.2g}: the policy that is trained is not the one "
            "whose log-probs were taken",
            mend="a model whose forward is deterministic; nothing may change the weights between rollout and update",
        )
