"""Whether what is optimised still stands for what is wanted: marks on held-out prompts, the best of them, a warning.

The same prompts and the same random numbers at every evaluation, for the policy's start too, so that each answer is
compared with the start's to the same prompt. The measure is the gold reward where there is one, else the reward itself
on prompts that are not trained on. Letters: B rows of this rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.rl.masking import Reduce


@dataclass(frozen=True)
class Marks:
    """What the answers of one evaluation are worth, [B] each."""

    reward_B: Tensor
    gold_B: Tensor | None
    kl_B: Tensor
    length_B: Tensor
    ended_B: Tensor
    entropy_B: Tensor
    """Mean over the tokens of the answer, nats."""

    @property
    def measure_B(self) -> Tensor:
        """What the best policy has most of."""
        return self.reward_B if self.gold_B is None else self.gold_B


def report(marks: Marks, start: Marks, reduce: Reduce) -> dict[str, float]:
    """Means over all ranks, with the standard errors that the warning takes; `start` are the start's marks.

    The gain is what the policy's answers are worth more than the start's to the same prompts; at the same length, the
    part of it that their lengths do not account for: the intercept of gain over difference of lengths, by least squares
    over the prompts (after the length-controlled win rates of Dubois et al. 2024).
    """
    gain_B = (marks.measure_B > start.measure_B).float() + 0.5 * (marks.measure_B == start.measure_B).float()
    rows = {
        "eval_reward": marks.reward_B,
        "eval_kl": marks.kl_B,
        "eval_length": marks.length_B,
        "eval_ended": marks.ended_B,
        "eval_entropy": marks.entropy_B,
        "eval_win_rate": gain_B,
    }
    if marks.gold_B is not None:
        rows["eval_gold"] = marks.gold_B
    gains_B, longer_B = marks.measure_B - start.measure_B, (marks.length_B - start.length_B).float()
    rows |= {"eval_gain": gains_B, "longer": longer_B, "both": gains_B * longer_B}
    values = torch.stack([column.float() for column in rows.values()]).double()
    ones = torch.ones(1, values.shape[1], dtype=torch.float64, device=values.device)
    sums = reduce(torch.cat([ones, values, values.square()]).sum(dim=1)).tolist()
    count, totals, squares = sums[0], sums[1 : 1 + len(rows)], sums[1 + len(rows) :]
    figures = {name: total / count for name, total in zip(rows, totals, strict=True)}
    for name, total, square in zip(rows, totals, squares, strict=True):
        if name in ("eval_reward", "eval_gold", "eval_win_rate"):
            variance = max(0.0, square / count - (total / count) ** 2)
            figures[f"{name}_se"] = math.sqrt(variance / max(1.0, count - 1))
    spread = squares[list(rows).index("longer")] / count - figures["longer"] ** 2
    slope = (figures.pop("both") - figures["eval_gain"] * figures["longer"]) / spread if spread > 1e-9 else 0.0
    figures["eval_gain_same_length"] = figures["eval_gain"] - slope * figures.pop("longer")
    figures["eval_sqrt_kl"] = math.sqrt(max(0.0, figures["eval_kl"]))
    return figures


@dataclass
class Standing:
    """The best evaluation so far, of which the start's is the first."""

    step: int
    reward: float
    reward_se: float
    measure: float
    measure_se: float
    since: int = 0
    """Evaluations since then that were no better."""

    @classmethod
    def of(cls, step: int, figures: Mapping[str, float]) -> Standing:
        """What `report` gave at a step."""
        name = "eval_gold" if "eval_gold" in figures else "eval_reward"
        reward, measure = (figures["eval_reward"], figures["eval_reward_se"]), (figures[name], figures[f"{name}_se"])
        return cls(step, *reward, *measure)

    def saved(self) -> dict[str, Any]:
        """Plain JSON; `Standing(**saved)` is it again."""
        return asdict(self)

    def after(self, step: int, figures: Mapping[str, float]) -> Standing:
        """The best one with this evaluation known."""
        new = Standing.of(step, figures)
        if new.measure > self.measure:
            return new
        self.since += 1
        return self

    def warning(self, figures: Mapping[str, float]) -> str:
        """What to say where the reward has risen since the best evaluation while gold has fallen, each by more than two
        standard errors of the difference; empty elsewhere."""
        if "eval_gold" not in figures:
            return ""
        risen, fallen = figures["eval_reward"] - self.reward, self.measure - figures["eval_gold"]
        of_reward = 2 * math.hypot(self.reward_se, figures["eval_reward_se"])
        of_gold = 2 * math.hypot(self.measure_se, figures["eval_gold_se"])
        if risen <= of_reward or fallen <= of_gold:
            return ""
        return (
            f"since step {self.step:,} the reward has risen by {risen:.3g} and gold fallen by {fallen:.3g}: the reward "
            "is being gamed; a higher kl_coef, or load_best_model_at_end"
        )
