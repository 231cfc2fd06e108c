"""The models of an RL run: policy, reference, critic and what scores; how few of them are held.

With all weights trained they are four: policy, reference (a copy of its start), critic (a copy of the reward model),
reward model. With adapters they are two: the reference is the policy with its adapters off, and the reward model the
critic with its own off. On a shared trunk they are one: policy, critic and a reward model that was trained by adapters
on the policy's start are sets of adapters in one frozen model. Without a critic (the group methods) there is one less.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel

from pipeline.artifacts import Artifact
from pipeline.model.adapters import adapt, add_adapter, headed, worn
from pipeline.model.attention import use_plain_products
from pipeline.model.next_token import has_plain_head
from pipeline.rl.forwards import Reading
from pipeline.rl.learners import Learner
from pipeline.rl.offload import Offload
from pipeline.rl.scoring import Scorer
from pipeline.runtime import derive_seed

SHARED = "critic"
"""The name of the critic's adapters on the policy's trunk."""


@dataclass(frozen=True)
class Optimisation:
    """What AdamW is told, for policy and critic alike."""

    eps: float
    weight_decay: float
    max_grad_norm: float


@dataclass(frozen=True)
class Models:
    """The models of a run, on the device, in eval mode (no dropout, in training either)."""

    policy: Learner
    critic: Learner | None
    scorer: Scorer
    reading: Reading
    start: PreTrainedModel | None
    """The policy's start, frozen; None where the policy without its adapters is it."""
    offload: Offload
    """Where `start` and the reward models are in between; not those that the critic stands on."""

    @contextmanager
    def reference(self) -> Iterator[PreTrainedModel]:
        """The reference, for a while."""
        if self.start is not None:
            with self.offload.brought([self.start]):
                yield self.start
        else:
            with self.policy.without_adapters() as model:
                yield model

    @contextmanager
    def scoring(self) -> Iterator[Scorer]:
        """What scores, for a while: where the critic stands on the reward model, with the critic's adapters off."""
        if self.critic is not None and _stands_on(self.critic, self.scorer):
            with self.critic.without_adapters():
                yield self.scorer
        else:
            with self.offload.brought(self.scorer.models):
                yield self.scorer

    @property
    def value_scale(self) -> tuple[float, float]:
        """(mean, std) that the critic's raw number is normalised by: the reward model's where it starts from that."""
        return (0.0, 1.0) if self.critic is not None and self.critic.adapter is not None else self.scorer.scale

    @property
    def learners(self) -> dict[str, Learner]:
        """What a checkpoint keeps, by name."""
        return {"policy": self.policy} | ({} if self.critic is None else {"critic": self.critic})


def prepare(
    policy: PreTrainedModel,
    load_scorer: Callable[[PeftModel | None], Scorer],
    init: Artifact,
    optimisation: Optimisation,
    *,
    temperature: float,
    has_critic: bool,
    adapters: LoraConfig | None,
    of_critic: LoraConfig | None,
    seed: int,
    bf16: bool,
    longest: int,
    offload: Offload,
    shares_trunk: bool = False,
) -> Models:
    """The models of a run that starts from `policy`, which is taken over. What scores is loaded when the policy has its
    adapters, and told them where its trunk is shared. `longest` is that of a whole row, tokens."""
    policy = policy.eval()
    reading = Reading(temperature, has_plain_head(policy))
    start, own = None, None
    if adapters is None:
        start = copy.deepcopy(policy).requires_grad_(False)
    else:
        own = adapt(policy, adapters, derive_seed(seed, "adapters"), train_rows=False, stage="ppo")
    scorer = load_scorer(own if shares_trunk else None)
    critic = None
    if has_critic and shares_trunk:
        assert own is not None
        critic = _critic_on(policy, own, optimisation, seed)
    elif has_critic:
        critic = _critic(scorer, init, optimisation, of_critic, seed, policy.device)
    models = [policy, start, None if critic is None or shares_trunk else critic.model, *scorer.models]
    for model in models:
        if model is not None:
            use_plain_products(model, bf16, longest)
    offload.put_away([] if start is None else [start])
    offload.put_away([] if critic is not None and _stands_on(critic, scorer) else scorer.models)
    return Models(_learner(policy, optimisation, own), critic, scorer, reading, start, offload)


def _stands_on(critic: Learner, scorer: Scorer) -> bool:
    """Whether the critic is adapters on the reward model."""
    return scorer.origin is not None and scorer.origin.model is critic.model


def _critic(
    scorer: Scorer,
    init: Artifact,
    optimisation: Optimisation,
    adapters: LoraConfig | None,
    seed: int,
    device: torch.device,
) -> Learner:
    """The critic: a copy of the reward model with its head, or adapters and a head of its own on the reward model."""
    if adapters is None:
        return _learner(scorer.critic(init, seed).to(device), optimisation, None)
    model = scorer.origin.model if scorer.origin is not None else scorer.critic(init, seed).to(device)
    own = adapt(model, adapters, derive_seed(seed, "critic's adapters"), train_rows=False, stage="ppo")
    return _learner(model, optimisation, own)


def _critic_on(policy: PreTrainedModel, adapters: PeftModel, optimisation: Optimisation, seed: int) -> Learner:
    """The critic as further adapters on the policy's trunk, with a head of zeros. The policy's stay the active ones."""
    width = policy.get_input_embeddings().weight.shape[1]
    critic = headed(policy, torch.zeros(1, width))
    own = copy.deepcopy(adapters.peft_config[adapters.active_adapter])  # with the modules that were found for it
    add_adapter(adapters, SHARED, own, derive_seed(seed, "critic's adapters"))
    with worn(adapters, SHARED):
        return _learner(critic, optimisation, adapters, SHARED)


def _learner(
    model: PreTrainedModel, optimisation: Optimisation, adapters: PeftModel | None, adapter: str | None = None
) -> Learner:
    model.eval()  # adapters come in training mode
    return Learner(model, optimisation.eps, optimisation.weight_decay, optimisation.max_grad_norm, adapters, adapter)
