"""Scores of responses: by a reward model, or by a function of the user's own, called and its answer checked."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pipeline.artifacts import Artifact
from pipeline.errors import MismatchError, TrainingError
from pipeline.model.build import check_vocabulary
from pipeline.model.reward import RewardModel, build_reward_model, load_reward_model
from pipeline.rl.rollouts import Rollout, closed_rows, microbatches, pad_right
from pipeline.runtime import Runtime
from pipeline.usercode import load_member

RewardFunction = Callable[[list[str], list[str], list[dict[str, Any]]], Sequence[float]]
CONTRACT = "f(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float], one finite number a response"


@dataclass(frozen=True)
class Scorer:
    """What gives a response its score: `model`, or `function` where there is none."""

    reference: str
    model: RewardModel | None
    function: RewardFunction | None
    tokenizer: PreTrainedTokenizerFast
    pad_id: int
    batch_size: int

    @property
    def scale(self) -> tuple[float, float]:
        """(mean, std) that the raw number of the reward model, and of its critic, is normalised by."""
        return (self.model.mean, self.model.std) if self.model else (0.0, 1.0)

    def score(self, rollout: Rollout, rows: list[dict[str, Any]]) -> Tensor:
        """The score of each response, float32 [B]; `rows` are those of its prompts."""
        if self.model is not None:
            return model_scores(self.model, rollout, pad_id=self.pad_id, batch_size=self.batch_size)
        assert self.function is not None
        lengths = (rollout.lengths_B - rollout.is_ended_B.long()).tolist()  # without the stop token
        ids = [ids[:length] for ids, length in zip(rollout.response_ids_BT.tolist(), lengths, strict=True)]
        prompts = [row["prompt"][-1]["content"] for row in rows]
        responses = self.tokenizer.batch_decode(ids)
        scores_B = function_scores(self.function, self.reference, prompts, responses, rows)
        return scores_B.to(rollout.ids_BL.device)

    def critic(self, init: Artifact, seed: int) -> PreTrainedModel:
        """The critic to start from: the reward model with its head.

        With a function there is none: the trunk of `init` with a head of zeros, so that its first values are 0.
        """
        if self.model is not None:
            return copy.deepcopy(self.model.model).requires_grad_(True)
        critic = build_reward_model(init.model, self.pad_id, seed)
        critic.score.weight.data.zero_()
        return critic


def load_scorer(
    reference: str,
    artifact: Artifact | None,
    init: Artifact,
    tokenizer: PreTrainedTokenizerFast,
    *,
    stop_id: int,
    pad_id: int,
    batch_size: int,
    bf16: bool,
    runtime: Runtime,
) -> Scorer:
    """The scorer: the reward model in `artifact`, or the function that `reference` names where that is None.

    Raises MismatchError for a reward model of another tokenizer, chat template or row end than the policy's.
    """
    if artifact is None:
        return Scorer(reference, None, load_member(reference), tokenizer, pad_id, batch_size)
    reward = replace(load_reward_model(artifact, runtime), bf16=bf16)
    reward.check_fits(init)
    check_vocabulary(reward.model, len(tokenizer), "ppo.reward")
    if reward.suffix_ids != (stop_id,):
        raise MismatchError(
            f"the reward model read rows that end in {list(reward.suffix_ids)}, and the policy's end in {[stop_id]}",
            where="ppo.reward",
            mend="train it again with `llmpipe reward` from the policy's sft model",
        )
    return Scorer(reference, reward, None, tokenizer, pad_id, batch_size)


def model_scores(reward: RewardModel, rollout: Rollout, *, pad_id: int, batch_size: int) -> Tensor:
    """The reward model's normalised scores, float32 [B]; a response that was cut off is read with its suffix put on."""
    texts = closed_rows(rollout, reward.suffix_ids)
    lengths_B = torch.tensor([len(text) for text in texts])
    scores_B = torch.zeros(len(texts))
    for rows in microbatches(lengths_B, batch_size):
        ids_BL = pad_right([texts[row] for row in rows.tolist()], pad_id)
        scores_B[rows] = reward.score(ids_BL, lengths_B[rows]).cpu()
    if not scores_B.isfinite().all():
        raise TrainingError("the reward model gave a score that is not finite", mend="look at its training's figures")
    return scores_B.to(rollout.ids_BL.device)


def function_scores(
    function: RewardFunction, reference: str, prompts: list[str], responses: list[str], rows: list[dict[str, Any]]
) -> Tensor:
    """The scores of `function`, float32 [B]; `reference` (`/folder/rewards.py:exact`) names it in errors.

    Raises TrainingError where it raises, or gives another number of scores, or one that is not finite.
    """
    mend = f"its contract: {CONTRACT}"
    try:
        scores = [float(score) for score in function(prompts, responses, rows)]
    except Exception as error:
        what = f"the reward function raised {type(error).__name__}: {error}"
        raise TrainingError(what, where=reference, mend=mend) from error
    if len(scores) != len(responses):
        what = f"the reward function gave {len(scores)} scores for {len(responses)} responses"
        raise TrainingError(what, where=reference, mend=mend)
    for score, response in zip(scores, responses, strict=True):
        if not math.isfinite(score):
            what = f"the reward function gave {score} for the response {response[:80]!r}"
            raise TrainingError(what, where=reference, mend=mend)
    return torch.tensor(scores, dtype=torch.float32)
