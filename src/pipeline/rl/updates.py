"""The update of policy and critic from one rollout: epochs of minibatches, each one optimiser step of both.

Letters: B rows of this rank, T response tokens. Gradients gather over microbatches and ranks; every response token
weighs one over the tokens of the whole minibatch, so neither how it is cut up nor how many ranks share it counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.errors import TrainingError
from pipeline.rl.forwards import precision, response_logprobs, response_values
from pipeline.rl.learners import Learner
from pipeline.rl.losses import policy_loss, value_loss
from pipeline.rl.masking import Reduce
from pipeline.rl.rollouts import Experience, microbatches

RATIO_TOLERANCE = {False: 1e-3, True: 0.1}
"""By bf16: how far from 1 the first minibatch's ratio may be by rounding alone."""


@dataclass(frozen=True)
class Objective:
    """The numbers of the losses, as in `policy_loss` and `value_loss`."""

    temperature: float
    cliprange: float
    clip_higher: float | None
    dual_clip: float | None
    cliprange_value: float | None
    vf_coef: float
    value_mean: float
    """The critic's raw number x is the value (x - value_mean) / value_std."""
    value_std: float
    target_kl: float | None
    """Nats a token: a minibatch on which the policy has moved further ends the update, before its own step."""


def update(
    policy: Learner,
    critic: Learner,
    experience: Experience,
    objective: Objective,
    orders: list[Tensor],
    *,
    minibatches: int,
    microbatch: int,
    rates: tuple[float, float],
    bf16: bool,
    reduce: Reduce,
) -> dict[str, float]:
    """Updates of one step; the means of their figures.

    `orders` holds, for each epoch, the rows of the whole batch in shuffled order, counted from this rank's first: rows
    of other ranks are below 0 or past the last. `rates` are the learning rates of policy and critic.
    Raises TrainingError for a first ratio that is not 1, and for a loss or gradient that is not finite.
    """
    rows_here = len(experience.rollout.lengths_B)
    done: list[dict[str, float]] = []
    for chosen in (part for order in orders for part in order.chunk(minibatches)):
        rows = chosen[(chosen >= 0) & (chosen < rows_here)].to(experience.logprobs_BT.device)
        figures, ratio_error = minibatch(
            policy.model, critic.model, experience, objective, rows, microbatch=microbatch, bf16=bf16, reduce=reduce
        )
        if not done:
            check_first_ratio(ratio_error, RATIO_TOLERANCE[bf16])
        elif objective.target_kl is not None and figures["approx_kl"] > objective.target_kl:
            policy.forget()
            critic.forget()
            break
        norms = policy.gather(reduce), critic.gather(reduce)
        figures |= {"policy_grad_norm": norms[0].item(), "value_grad_norm": norms[1].item()}
        check_finite(figures)
        for learner, norm, rate in zip((policy, critic), norms, rates, strict=True):
            learner.step(norm, rate)
        done.append(figures)
    return {name: sum(figures[name] for figures in done) / len(done) for name in done[0]} | {
        "updates": float(len(done))
    }


def minibatch(
    policy: PreTrainedModel,
    critic: PreTrainedModel,
    experience: Experience,
    objective: Objective,
    rows: Tensor,
    *,
    microbatch: int,
    bf16: bool,
    reduce: Reduce,
) -> tuple[dict[str, float], float]:
    """Forward and backward of both models on this rank's `rows` of a minibatch: its figures over all ranks, and the
    greatest |ratio - 1| on this one."""
    rollout = experience.rollout
    normaliser = reduce(rollout.lengths_B[rows].sum().float()).item()
    totals = torch.zeros(5, device=rows.device)
    ratio_error = 0.0
    for part in microbatches(rollout.prompt_lengths_B + rollout.lengths_B, microbatch, rows):
        here = experience.select(part)
        mask_BT = here.rollout.response_mask_BT
        with precision(rows.device, bf16):
            logprobs_BT = response_logprobs(policy, here.rollout, objective.temperature)
        of_policy = policy_loss(
            logprobs_BT,
            here.logprobs_BT,
            here.advantages_BT,
            mask_BT,
            normaliser=normaliser,
            cliprange=objective.cliprange,
            clip_higher=objective.clip_higher,
            dual_clip=objective.dual_clip,
        )
        of_policy.loss.backward()  # type: ignore[no-untyped-call]
        with precision(rows.device, bf16):
            values_BT = response_values(critic, here.rollout, objective.value_mean, objective.value_std)
        of_values = value_loss(
            values_BT,
            here.values_BT,
            here.returns_BT,
            mask_BT,
            normaliser=normaliser,
            cliprange_value=objective.cliprange_value,
        )
        (objective.vf_coef * of_values.loss).backward()  # type: ignore[no-untyped-call]
        totals += torch.stack([*of_policy[:3], *of_values]).detach()
        ratio_error = max(ratio_error, of_policy.max_ratio_error.item())
    names = ("policy_loss", "clip_fraction", "approx_kl", "value_loss", "value_clip_fraction")
    return dict(zip(names, reduce(totals).tolist(), strict=True)), ratio_error


def check_finite(figures: Mapping[str, float]) -> None:
    """TrainingError where one of them is not."""
    wrong = ", ".join(f"{name} {value}" for name, value in figures.items() if not math.isfinite(value))
    if wrong:
        raise TrainingError(f"not finite: {wrong}", mend="a lower learning_rate; the last checkpoint is kept")


def check_first_ratio(error: float, tolerance: float) -> None:
    """TrainingError where the first minibatch's ratio is not 1: its policy is that of the rollout."""
    if not error <= tolerance:
        raise TrainingError(
            f"the ratio of the first minibatch is off 1 by {error:.2g}: the policy that is trained is not the one "
            "whose log-probs were taken",
            mend="a model whose forward is deterministic; nothing may change the weights between rollout and update",
        )
