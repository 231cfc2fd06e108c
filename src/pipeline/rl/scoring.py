"""Scores of responses: a reward model's, a function's of the user's own, or a weighted sum of terms.

A term is a reward model, an ensemble of them, a function (`verifiable.py` or the user's), a penalty on length or
repetition, or a judge. Each gives one number a response; what is logged of it is its mean, before its weight.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pipeline.artifacts import Artifact
from pipeline.data.chat import encode_messages, encode_prompt
from pipeline.errors import ConfigError, MismatchError, TrainingError
from pipeline.model.build import check_vocabulary, reach
from pipeline.model.reward import (
    RewardModel,
    build_reward_model,
    load_reward_model,
    members_of,
    reward_model_on,
    stands_on,
)
from pipeline.model.stop_strings import before_stop
from pipeline.reward_config import FUNCTIONS, RewardTerm
from pipeline.rl import terms as math_of
from pipeline.rl.functions import RewardFunction, function_scores, verifier_of
from pipeline.rl.judge import load_judge
from pipeline.rl.judge_api import RemoteJudge
from pipeline.rl.rollouts import Rollout, assemble, closed_rows, in_cache, last_turns, microbatches, pad_right
from pipeline.runtime import Runtime
from pipeline.usercode import load_member

Row = dict[str, Any]


@dataclass(frozen=True)
class Responses:
    """What the policy said, as the terms read it; `rows` are those of their prompts."""

    rollout: Rollout
    rows: list[Row]
    tokenizer: PreTrainedTokenizerFast
    stop_strings: tuple[str, ...] = ()

    @cached_property
    def ids(self) -> list[list[int]]:
        """The tokens of each response without the stop token; of several turns, those of the last."""
        return last_turns(self.rollout)

    @cached_property
    def texts(self) -> list[str]:
        """Each response as text, up to its stop string where one has ended it."""
        texts: list[str] = self.tokenizer.batch_decode(self.ids)
        ended, stopped = self.rollout.is_ended_B.tolist(), self.rollout.is_stopped_B.tolist()
        return [
            before_stop(text, self.stop_strings) if is_ended and not is_stopped else text
            for text, is_ended, is_stopped in zip(texts, ended, stopped, strict=True)
        ]

    @property
    def prompts(self) -> list[str]:
        """The last message of each prompt."""
        return [row["prompt"][-1]["content"] for row in self.rows]

    @property
    def conversations(self) -> list[list[dict[str, str]]]:
        """All that stands before each response."""
        return [row["messages"][:-1] if "messages" in row else row["prompt"] for row in self.rows]

    @property
    def references(self) -> list[str]:
        """The answer in the data, "" without one."""
        return [row["reference"] for row in self.rows]


@dataclass(frozen=True)
class Term:
    """One term of the sum."""

    name: str
    weight: float
    score: Callable[[Responses], Tensor]
    """One number a response, float32 [B], on any device; True in a second row [2, B] where it could not be read."""
    models: tuple[RewardModel, ...] = ()


@dataclass(frozen=True)
class Scorer:
    """What gives a response its score: the weighted sum of `terms`."""

    terms: tuple[Term, ...]
    logs_terms: bool
    tokenizer: PreTrainedTokenizerFast
    pad_id: int
    stop_strings: tuple[str, ...] = ()

    @property
    def models(self) -> list[PreTrainedModel]:
        """The reward models, which read rows as the policy's; without those on its trunk."""
        return [reward.model for term in self.terms for reward in term.models if reward.adapter is None]

    @property
    def origin(self) -> RewardModel | None:
        """The reward model that the critic starts from: the only term, and better where it is higher; else None."""
        first = self.terms[0]
        return first.models[0] if len(self.terms) == len(first.models) == 1 and first.weight > 0 else None

    @property
    def scale(self) -> tuple[float, float]:
        """(mean, std) that the raw number of `origin`, and of its critic, is normalised by, the weight included."""
        return (0.0, 1.0) if self.origin is None else (self.origin.mean, self.origin.std / self.terms[0].weight)

    def score(self, rollout: Rollout, rows: list[Row]) -> tuple[Tensor, dict[str, Tensor]]:
        """The score of each response, float32 [B], and the figures of the terms, [B] each; `rows` are the prompts'.

        Figures are `reward_<name>`, before weights, and for a judge behind an address `reward_<name>_unread`.
        """
        said, device = Responses(rollout, rows, self.tokenizer, self.stop_strings), rollout.ids_BL.device
        scores: list[Tensor] = []
        figures: dict[str, Tensor] = {}
        for term in self.terms:
            found = term.score(said).to(device)
            scores.append(found if found.dim() == 1 else found[0])
            figures[f"reward_{term.name}"] = scores[-1]
            if found.dim() == 2:
                figures[f"reward_{term.name}_unread"] = found[1]
        total_B = math_of.weighted_sum(scores, [term.weight for term in self.terms])
        return total_B, figures if self.logs_terms else {}

    def critic(self, init: Artifact, seed: int) -> PreTrainedModel:
        """The critic to start from: the reward model with its head where one alone is the reward.

        Else the trunk of `init` with a head of zeros, so that its first values are 0.
        """
        if self.origin is not None:
            return copy.deepcopy(self.origin.model).requires_grad_(True)
        critic = build_reward_model(init.model, self.pad_id, seed)
        critic.score.weight.data.zero_()
        return critic


@dataclass(frozen=True)
class Loading:
    """What terms are loaded with."""

    init: Artifact
    tokenizer: PreTrainedTokenizerFast
    stop_id: int
    pad_id: int
    batch_size: int
    bf16: bool
    runtime: Runtime
    trunk: PeftModel | None = None
    """The policy's adapters, where reward models may stand beside them."""


def load_scorer(
    reward: str | tuple[RewardTerm, ...],
    inputs: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    *,
    stop_id: int,
    pad_id: int,
    batch_size: int,
    bf16: bool,
    runtime: Runtime,
    role: str = "reward",
    stop_strings: tuple[str, ...] = (),
    trunk: PeftModel | None = None,
) -> Scorer:
    """The scorer that the field `role` of a recipe says, of the artifacts in `inputs` (by role).

    With the policy's adapters as `trunk`, reward models that were trained by adapters on the policy's start are loaded
    as further adapters beside them. Raises MismatchError for a reward model of another tokenizer, chat template or row
    end than the policy's.
    """
    loading = Loading(inputs["init"], tokenizer, stop_id, pad_id, batch_size, bf16, runtime, trunk)
    if isinstance(reward, str):
        artifact = inputs.get(role)
        if artifact is None:
            term = Term("function", 1.0, partial(_of_function, load_member(reward), reward))
        else:
            term = _models("model", 1.0, [artifact], math_of.lower_bound, loading)
        return Scorer((term,), False, tokenizer, pad_id, stop_strings)
    held = {inner: iter(inputs.get(f"{role}.{inner}") or ()) for inner in ("model", "models", "judge")}
    return Scorer(tuple(_load(each, held, loading) for each in reward), True, tokenizer, pad_id, stop_strings)


def _load(term: RewardTerm, held: Mapping[str, Iterator[Artifact]], loading: Loading) -> Term:
    """The term, taking its artifacts from the lists of their roles, which are in the order of the terms."""
    name, weight = term.figure, term.weight
    if term.model is not None:
        return _models(name, weight, [next(held["model"])], math_of.lower_bound, loading)
    if term.models is not None:
        members = [next(held["models"]) for _ in term.models]
        if sum(len(members_of(artifact)) for artifact in members) < 2:
            what = f"`{term.models[0]}` is one reward model, and an ensemble has two or more"
            mend = "name several, or train it with `ensemble: 2` or more; for one alone `model`"
            raise ConfigError(what, where="models", mend=mend)
        lower = partial(math_of.mean_minus_std, std_weight=term.std_weight)
        return _models(name, weight, members, math_of.worst_case if term.combine == "min" else lower, loading)
    if term.function is not None:
        return Term(name, weight, _function(term, term.function))
    if term.length is not None:
        target = term.length
        return Term(name, weight, lambda said: math_of.length_over(said.rollout.response_mask_BT.sum(dim=1), target))
    if term.repetition is not None:
        n = term.repetition
        return Term(name, weight, lambda said: torch.tensor([math_of.repeated(ids, n) for ids in said.ids]))
    return Term(name, weight, _judge(term, held, loading))


def _function(term: RewardTerm, function: str) -> Callable[[Responses], Tensor]:
    """The score of a function by name, or of the user's own."""
    if function not in FUNCTIONS:
        return partial(_of_function, load_member(function), f"reward term `{term.figure}`, {function}")
    verify = verifier_of(term)
    return lambda said: torch.tensor(
        [verify(text, reference) for text, reference in zip(said.texts, said.references, strict=True)]
    )


def _of_function(function: RewardFunction, where: str, said: Responses) -> Tensor:
    return function_scores(function, where, said.prompts, said.texts, said.rows)


def _judge(term: RewardTerm, held: Mapping[str, Iterator[Artifact]], loading: Loading) -> Callable[[Responses], Tensor]:
    assert term.constitution is not None
    constitution = text_in(term.constitution)
    if term.judge_url is not None:
        assert term.judge_model is not None
        remote = RemoteJudge(term.judge_url, term.judge_model, constitution)
        return lambda said: torch.stack(remote.score(said.conversations, said.texts))
    judge = load_judge(
        next(held["judge"]), constitution, batch_size=loading.batch_size, bf16=loading.bf16, runtime=loading.runtime
    )
    return lambda said: judge.score(said.conversations, said.texts)


def text_in(constitution: Path) -> str:
    """What a file with a constitution says; ConfigError where it holds no text."""
    try:
        text = constitution.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"not UTF-8 text ({error.reason})", where=str(constitution)) from error
    if not text.strip():
        raise ConfigError("the constitution is empty", where=str(constitution), mend="write what a judge goes by")
    return text


def reward_models_of(inputs: Mapping[str, Any], roles: Mapping[str, str]) -> list[Artifact]:
    """All reward models among a stage's inputs; `roles` is its INPUTS: role -> kind."""
    found = [inputs.get(role) or () for role, kind in roles.items() if kind == "reward-model"]
    return [each for held in found for each in (held if isinstance(held, list | tuple) else (held,))]


def context_of(inputs: Mapping[str, Any], roles: Mapping[str, str]) -> int | None:
    """Tokens that prompt and answer may have: what the model `init` reaches, and what every reward model does with the
    stop token that it reads behind an answer without one. None where nothing bounds them."""
    reaches = [reach(inputs["init"].model)]
    reaches += [
        None if found is None else found - 1
        for found in (reach(each.model) for each in reward_models_of(inputs, roles))
    ]
    return min((found for found in reaches if found is not None), default=None)


def _models(
    name: str, weight: float, artifacts: list[Artifact], combine: Callable[[Tensor], Tensor], loading: Loading
) -> Term:
    models = tuple(load_fitting(member, loading) for artifact in artifacts for member in members_of(artifact))

    def score(said: Responses) -> Tensor:
        members = [
            model_scores(reward, said.rollout, pad_id=loading.pad_id, batch_size=loading.batch_size)
            for reward in models
        ]
        return combine(torch.stack(members))

    return Term(name, weight, score, models)


def load_fitting(artifact: Artifact, loading: Loading) -> RewardModel:
    """The reward model in `artifact`; MismatchError where it reads other rows than the policy writes."""
    if loading.trunk is not None and stands_on(artifact, loading.init):
        name = f"reward{len(loading.trunk.peft_config)}"
        reward = reward_model_on(loading.trunk, artifact, name, bf16=loading.bf16)
    else:
        reward = replace(load_reward_model(artifact, loading.runtime), bf16=loading.bf16)
    reward.check_fits(loading.init)
    check_vocabulary(reward.model, len(loading.tokenizer), "ppo.reward")
    if reward.suffix_ids != (loading.stop_id,):
        raise MismatchError(
            f"the reward model {artifact.reference} read rows that end in {list(reward.suffix_ids)}, and the policy's "
            f"end in {[loading.stop_id]}",
            where="ppo.reward",
            mend="train it again with `llmpipe reward` from the policy's sft model",
        )
    return reward


def model_scores(reward: RewardModel, rollout: Rollout, *, pad_id: int, batch_size: int) -> Tensor:
    """The reward model's normalised scores, float32 [B]; a response that was cut off is read with its suffix put on."""
    texts = closed_rows(rollout, reward.suffix_ids)
    lengths_B = torch.tensor([len(text) for text in texts])
    scores_B = torch.zeros(len(texts))
    for rows in in_cache(microbatches(lengths_B, batch_size), lengths_B.to(reward.model.device)):
        ids_BL = pad_right([texts[row] for row in rows.tolist()], pad_id)
        scores_B[rows] = reward.score(ids_BL, lengths_B[rows]).cpu()
    if not scores_B.isfinite().all():
        raise TrainingError("the reward model gave a score that is not finite", mend="look at its training's figures")
    return scores_B.to(rollout.ids_BL.device)


def answers_as_rollout(
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[list[dict[str, str]]],
    texts: Sequence[str],
    pad_id: int,
    stop_id: int,
) -> Rollout:
    """Written answers as a policy would have written them, each to its end; for `Scorer.score`."""
    asked = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    said = []
    for prompt, ids, text in zip(prompts, asked, texts, strict=True):
        row = encode_messages(tokenizer, [*prompt, {"role": "assistant", "content": text}]).input_ids
        assert row[: len(ids)] == ids, "a row begins with its own prompt"
        said.append(row[len(ids) :])
    lengths_B = torch.tensor([len(ids) for ids in said])
    return assemble(
        asked, pad_right(said, pad_id), lengths_B, torch.ones_like(lengths_B).bool(), pad_id, stop_id=stop_id
    )
