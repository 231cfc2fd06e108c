"""The batches of a run: the next prompts asked, and the answers priced.

Letters: B rows of this rank, T response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pipeline.model.generation import draw_uniforms
from pipeline.rl.answers import Answers, Asked, gather
from pipeline.rl.asking import Asking, Pricing
from pipeline.rl.models import Models
from pipeline.rl.phases import Clock
from pipeline.rl.place import Place
from pipeline.rl.prompts import Prompts, Row
from pipeline.rl.rollouts import Rollout


@dataclass(frozen=True)
class Batches:
    """How the batch of a step is got. `size` responses over all ranks, `group_size` to each prompt."""

    prompts: Prompts
    models: Models
    asking: Asking
    pricing: Pricing
    place: Place
    size: int
    group_size: int
    rounds: int | None
    """Dynamic sampling: batches generated for a step at most; None without it."""
    greedy_baseline: bool
    """Whether the likeliest answer to each prompt is priced too (ReMax)."""

    def gather(self, step: int, asked: int, clock: Clock) -> tuple[Answers, dict[str, float], int]:
        """(the answers of step `step`, `asked` prompts having been asked before it; figures; prompts asked by now)."""
        groups, place, engine = self.size // self.group_size, self.place, self.asking.engine
        own, rounds = groups // place.world_size, 0

        if engine is not None:
            engine.sync(self.models.policy.model)
            clock.lap("sync")

        def ask(number: int) -> Asked:
            nonlocal rounds
            first = asked + number * groups + place.rank * own
            rounds = number + 1
            return self._ask((step, number) if number else (step,), self.prompts.order[first : first + own], clock)

        answers, figures = gather(
            ask,
            group_size=self.group_size,
            groups=groups,
            rank=place.rank,
            world_size=place.world_size,
            rounds=self.rounds,
            pad_id=self.asking.pad_id,
            reduce=place.reduce,
        )
        if engine is not None:
            engine.rest()
        return answers, figures, asked + rounds * groups

    def _ask(self, number: tuple[int, ...], prompts: Sequence[int], clock: Clock) -> Asked:
        rollout, rows = self._roll_out(prompts, self.group_size, self._uniforms(number))
        clock.lap("generate")
        scores_B, rewards_B, terms = self.pricing.rewards(self.models, rollout, rows)
        baselines_B = rewards_B.new_zeros(len(rewards_B))
        clock.lap("score")
        if self.greedy_baseline:
            greedy, rows = self._roll_out(prompts, 1, None)
            clock.lap("generate")
            _, greedy_B, _ = self.pricing.rewards(self.models, greedy, rows)
            baselines_B = greedy_B.repeat_interleave(self.group_size)
            clock.lap("score")
        return Asked(rollout, scores_B, rewards_B, baselines_B, terms)

    def _roll_out(self, prompts: Sequence[int], samples: int, uniforms_BT: Tensor | None) -> tuple[Rollout, list[Row]]:
        repeated = [row for row in prompts for _ in range(samples)]
        ids, rows = [self.prompts.ids[row] for row in repeated], [self.prompts.rows[row] for row in repeated]
        return self.asking.answers(self.models.policy.model, ids, uniforms_BT, rows, samples)

    def _uniforms(self, number: tuple[int, ...]) -> Tensor:
        """This rank's random numbers. They are drawn for the whole batch, so that a row's do not depend on how many
        ranks share it."""
        drawn_BT = draw_uniforms(self.size, self.asking.longest, self.place.generator("sampling", *number))
        rows = self.size // self.place.world_size
        return drawn_BT[self.place.rank * rows : (self.place.rank + 1) * rows]
