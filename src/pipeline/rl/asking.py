"""Asking a model and pricing what it says: prompts to rollouts, rollouts to rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel

from pipeline.model.generation import GREEDY, Generation, Sampling, generate
from pipeline.rl.forwards import precision
from pipeline.rl.models import Models
from pipeline.rl.place import Place
from pipeline.rl.rewards import clip_scores, missing_eos, overlong_penalty
from pipeline.rl.rollouts import Rollout, rollout_of
from pipeline.rl.turns import Environment, converse
from pipeline.rl.vllm_engine import VLLMEngine


@dataclass(frozen=True)
class Asking:
    """How models are asked."""

    place: Place
    longest: int
    """Tokens of a response at most."""
    stop_id: int
    pad_id: int
    temperature: float
    batch_size: int
    environment: Environment | None = None
    """What replies to an answer, so that it has several turns."""
    engine: VLLMEngine | None = None
    """What answers in the model's place, with its weights."""
    stop_strings: tuple[str, ...] = ()
    """A response ends with the first token at which its text holds one of these, too."""
    decode: Callable[[list[int]], str] | None = None
    """Ids to text, where there are stop strings."""
    top_k: int = 0
    top_p: float = 1.0
    """With `top_k`: what is left of the distribution; these leave it whole."""

    def answers(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        uniforms_BT: Tensor | None,
        rows: list[dict[str, Any]],
        samples: int = 1,
    ) -> tuple[Rollout, list[dict[str, Any]]]:
        """What the model says to each prompt (ids), and the rows of the prompts, with the whole conversation as
        "messages" where there is an environment. `uniforms_BT` [B, longest] is all the randomness; without it the
        likeliest token is taken. Each prompt stands there `samples` times in a row, and is read once."""
        write = partial(self._write, model)
        with precision(self.place.device, self.place.bf16):
            if self.environment is None:
                written = write(prompts, uniforms_BT, self.longest, samples)
                return rollout_of(prompts, written, self.pad_id, model.device, stop_id=self.stop_id), rows
            written, is_policys_BT, rows = converse(
                write,
                prompts,
                rows,
                uniforms_BT,
                self.environment,
                longest=self.longest,
                pad_id=self.pad_id,
                samples=samples,
            )
        return rollout_of(prompts, written, self.pad_id, model.device, is_policys_BT), rows

    def _write(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        uniforms_BT: Tensor | None,
        steps: int,
        samples: int,
    ) -> Generation:
        if self.engine is not None:
            return self.engine.write(prompts, uniforms_BT, steps)
        return generate(
            model,
            prompts,
            max_new_tokens=steps,
            stop_ids=[self.stop_id],
            pad_id=self.pad_id,
            sampling=GREEDY if uniforms_BT is None else Sampling(self.temperature, self.top_k, self.top_p),
            uniforms_BT=uniforms_BT,
            batch_size=self.batch_size,
            samples_per_prompt=samples,
            stop_strings=self.stop_strings,
            decode=self.decode,
        )


@dataclass(frozen=True)
class Pricing:
    """What becomes of a score before it is learnt from."""

    score_clip: float | None
    missing_eos_rule: Literal["replace", "subtract", "keep"]
    missing_eos_penalty: float
    overlong_buffer: float | None
    longest: int

    def rewards(
        self, models: Models, rollout: Rollout, rows: list[dict[str, Any]]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(score, reward, terms) of each answer, [B] each: the reward is the score clipped, less what a long or
        unfinished one pays; the terms are what the score is the sum of, by the names of their figures."""
        with models.scoring() as scorer:
            scores_B, terms = scorer.score(rollout, rows)
        clipped_B = clip_scores(scores_B, self.score_clip)
        rule, penalty = self.missing_eos_rule, self.missing_eos_penalty
        rewards_B = missing_eos(clipped_B, rollout.is_ended_B, penalty=penalty, rule=rule)
        if self.overlong_buffer is not None:
            rewards_B = rewards_B + overlong_penalty(
                rollout.lengths_B, longest=self.longest, buffer=self.overlong_buffer
            )
        return scores_B, rewards_B, terms
