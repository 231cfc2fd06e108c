"""ppo: the policy optimised against a reward model, or a reward function, by proximal policy optimisation.

Schulman et al. 2017 for the algorithm, Ouyang et al. 2022 (InstructGPT) for its use on language models, Huang et al.
2024 ("The N+ implementation details of RLHF with PPO") for what they leave out. A step: the policy answers a batch of
prompts; the reward model scores the answers; log-probs of policy and reference and the critic's values are taken;
rewards become advantages; policy and critic are updated. docs/ppo.md explains every field.

Departures: one batch, one epoch, one minibatch unless told otherwise, so that the update is on-policy; the critic is a
model of its own, started from the reward model with its head, and reads its values in the reward's normalised units;
a response without a stop token has its score replaced by -1; the score lies on the last real token, not after it.
"""

from __future__ import annotations

import copy
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import ConfigError
from pipeline.recipe import Data, Ref, StageConfig, field

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

    from pipeline.data.shown import ShownRow
    from pipeline.rl.prompts import Prompts
    from pipeline.rl.rollouts import Experience, Rollout
    from pipeline.runtime import Runtime


class PPOConfig(StageConfig):
    """What ppo can be told. Names are those of TRL's PPOConfig where it had them."""

    init: Ref = field("sft", "the policy's start, and the reference that KL is measured to")
    reward: Ref = field("reward", "a reward model, or a function of your own: ./rewards.py:exact")
    data: Data | None = field(None, "rows whose prompts are answered; those sft was trained on unless set")
    held_out: float = field(0.05, "share of the rows (by a hash of the prompt) that is left out", ge=0, lt=1)
    max_prompt_length: int | None = field(None, "leave out longer prompts, chat template included", unit="tokens", gt=0)

    total_episodes: int | None = field(None, "responses to learn from; by `num_train_epochs` unless set", gt=0)
    num_train_epochs: float = field(1.0, "passes over the prompts", gt=0)
    batch_size: int = field(64, "responses a step, over all processes", unit="episodes", gt=0)
    num_ppo_epochs: int = field(1, "passes over the responses of a step", gt=0)
    num_mini_batches: int = field(1, "optimiser steps a pass", gt=0)
    per_device_train_batch_size: int = field(16, "responses a forward and backward; no result depends on it", gt=0)
    local_rollout_forward_batch_size: int = field(64, "responses a forward without gradients, and of a decode", gt=0)
    response_length: int = field(128, "tokens of a response at most", unit="tokens", gt=0)
    temperature: float = field(1.0, "of sampling, and of every log-prob", gt=0)

    learning_rate: float = field(3e-6, "the policy's", gt=0)
    value_learning_rate: float | None = field(None, "the critic's; three times the policy's unless set", gt=0)
    lr_scheduler_type: Literal["linear", "constant"] = field("linear", "both rates fall to 0, or stay")
    adam_epsilon: float = field(1e-5, "AdamW's epsilon", gt=0)
    weight_decay: float = field(0.0, "AdamW's decay of the weights", ge=0)
    max_grad_norm: float = field(1.0, "clip each model's gradient norm to this", gt=0)
    bf16: bool | None = field(None, "autocast to bf16; where the hardware gains by it unless set")

    gamma: float = field(1.0, "discount a token", ge=0, le=1)
    lam: float = field(0.95, "lambda of GAE: 0 trusts the critic, 1 the rewards", ge=0, le=1)
    whiten_advantages: bool = field(True, "advantages of a step to mean 0 and variance 1")
    whiten_rewards: bool = field(False, "rewards of a step to variance 1, their mean kept")
    cliprange: float = field(0.2, "the ratio is held above 1 - this, and below 1 + this", gt=0, lt=1)
    clip_higher: float | None = field(None, "the upper bound of its own (DAPO: 0.28)", gt=0)
    dual_clip: float | None = field(None, "loss of a bad token at most this times its advantage (verl: 3)", gt=1)
    cliprange_value: float | None = field(0.2, "values stay this near to the rollout's; null for no clip", gt=0)
    vf_coef: float = field(0.1, "weight of the value loss, which has a factor 1/2", gt=0)
    target_kl: float | None = field(None, "skip the rest of a step's updates above this KL", unit="nats a token", gt=0)

    kl_coef: float = field(0.05, "price of KL to the reference", unit="reward a nat", ge=0)
    adaptive_kl: bool = field(False, "steer the price to a target; `kl_coef` is then unused")
    init_kl_coef: float = field(0.15, "adaptive_kl: the first price", unit="reward a nat", gt=0)
    adaptive_kl_target: float = field(6.0, "adaptive_kl: KL to hold", unit="nats a response", gt=0)
    adaptive_kl_horizon: float = field(10_000, "adaptive_kl: how slowly the price moves", unit="episodes", gt=0)
    score_clip: float | None = field(10.0, "scores are held within plus and minus this; null for no clip", gt=0)
    missing_eos_rule: Literal["replace", "subtract", "keep"] = field(
        "replace", "a response without a stop token scores -penalty, its score - penalty, or its score"
    )
    missing_eos_penalty: float = field(1.0, "the penalty of that rule", ge=0)

    save_steps: int = field(50, "steps between checkpoints", unit="steps", gt=0, run_only=True)


INPUTS = {"init": "causal-lm", "reward": "reward-model"}
KIND = "causal-lm"
RESULT_VERSION = 1
DEFAULTS = {"data": "demonstrations"}

HEALTHY_GAP = 0.01  # mean |p(rollout) - p(training)| a token above which the two forwards don't agree
SHOWN = ("reward", "kl", "length", "ended", "samples_per_second")
RECENT = 10  # steps that the closing figures are the mean of


def run(config: PPOConfig, inputs: dict[str, Any], out: Path, runtime: Runtime) -> dict[str, float]:
    """Train the policy; returns its reward in the first step and in the last ones, and the KL it took."""
    from transformers.utils import logging

    from pipeline.data.tokenizers import load_tokenizer
    from pipeline.rl.learners import write_policy

    logging.set_verbosity_error()  # no report that a critic's new head is new

    # 1. prompts, in the order of the whole run
    _check(config, runtime)
    tokenizer = load_tokenizer(inputs["init"].model)
    prompts = _prompts(config, inputs, tokenizer, runtime)
    steps = len(prompts.order) // config.batch_size

    # 2. policy, reference, reward model and critic, from the checkpoint if there is one
    loop = _Loop(config, inputs, tokenizer, prompts, runtime)
    step = loop.resume()
    if runtime.is_main:
        write_policy(loop.policy.model, out / "model", inputs["init"].model, loop.stop_id, weights=False)

    # 3. rollouts and updates
    runtime.say(f"{steps:,} steps of {config.batch_size} responses, {len(prompts.ids):,} prompts")
    with runtime.progress("ppo", steps) as bar:
        bar.start_at(step)
        while step < steps:
            figures = loop.step(step, step / steps)
            step += 1
            runtime.metrics.log(step, loop.tokens, **figures)
            bar.advance(1, **{name: figures[name] for name in SHOWN})
            stopping = runtime.stop_requested()
            if step % config.save_steps == 0 or stopping or step == steps:
                loop.save(step)
            if stopping and step < steps:
                runtime.stop(step)

    # 4. the policy, as its start was
    if runtime.is_main:
        write_policy(loop.policy.model, out / "model", inputs["init"].model, loop.stop_id)
    runtime.barrier()
    return loop.summary()


def preview(config: PPOConfig, inputs: dict[str, Any], count: int) -> list[ShownRow]:
    """The first prompts; the policy writes the rest."""
    from pipeline.data.chat import encode_prompt
    from pipeline.data.formats import read_rows
    from pipeline.data.shown import ShownRow
    from pipeline.data.tokenizers import load_tokenizer

    assert config.data is not None
    tokenizer = load_tokenizer(inputs["init"].model)
    rows = read_rows(config.data, "prompt", held_out=config.held_out)[:count]
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in rows]
    return [ShownRow(f"prompt {place}", ids, [False] * len(ids)) for place, ids in enumerate(prompts, 1)]


def _check(config: PPOConfig, runtime: Runtime) -> None:
    """ConfigError for a batch that its minibatches or processes don't divide."""
    for name, parts in (("num_mini_batches", config.num_mini_batches), ("processes", runtime.world_size)):
        if config.batch_size % parts:
            raise ConfigError(
                f"a batch of {config.batch_size} is not divisible by {parts} {name}",
                where="ppo.batch_size",
                mend=f"--set ppo.batch_size={math.ceil(config.batch_size / parts) * parts}",
            )


def _prompts(
    config: PPOConfig, inputs: dict[str, Any], tokenizer: PreTrainedTokenizerFast, runtime: Runtime
) -> Prompts:
    """The prompts the run comes to, episode by episode."""
    from pipeline.data.chat import encode_prompt
    from pipeline.data.formats import read_rows
    from pipeline.model.build import reach
    from pipeline.rl.prompts import order_prompts

    assert config.data is not None
    rows = read_rows(config.data, "prompt", split="train", held_out=config.held_out, say=runtime.say)
    episodes = config.total_episodes or max(1, round(config.num_train_epochs * len(rows)))
    context = reach(inputs["init"].model)
    prompts = order_prompts(
        rows,
        math.ceil(episodes / config.batch_size) * config.batch_size,
        encode=lambda row: encode_prompt(tokenizer, row["prompt"]),
        generator=lambda epoch: runtime.generator("prompts", epoch),
        longest=config.max_prompt_length,
        room=None if context is None else context - config.response_length,
    )
    runtime.check_stop()
    if prompts.left_out:
        runtime.say(f"{prompts.left_out:,} prompts of more than {config.max_prompt_length} tokens are left out")
    return prompts


class _Loop:
    """The models of the loop, and what one step does with them. B is this rank's share of the batch."""

    def __init__(
        self,
        config: PPOConfig,
        inputs: dict[str, Any],
        tokenizer: PreTrainedTokenizerFast,
        prompts: Prompts,
        runtime: Runtime,
    ) -> None:
        from pipeline.data.chat import stop_token_id
        from pipeline.model.attention import use_plain_products
        from pipeline.model.build import check_vocabulary, load_causal_lm
        from pipeline.rl.learners import Learner
        from pipeline.rl.masking import alone, sum_over_ranks
        from pipeline.rl.scoring import load_scorer
        from pipeline.rl.updates import Objective

        self.config, self.prompts, self.runtime, self.device = config, prompts, runtime, runtime.device
        self.bf16 = runtime.bf16 if config.bf16 is None else config.bf16
        self.stop_id = stop_token_id(tokenizer)
        self.pad_id = self.stop_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.own = config.batch_size // runtime.world_size
        self.reduce = alone if runtime.world_size == 1 else sum_over_ranks

        init = inputs["init"]
        policy = load_causal_lm(init.model).to(self.device).eval()  # eval: no dropout, in training either
        check_vocabulary(policy, len(tokenizer), "ppo.init")
        self.reference = copy.deepcopy(policy).requires_grad_(False)
        self.scorer = load_scorer(
            config.reward,
            inputs.get("reward"),
            init,
            tokenizer,
            stop_id=self.stop_id,
            pad_id=self.pad_id,
            batch_size=config.local_rollout_forward_batch_size,
            bf16=self.bf16,
            runtime=runtime,
        )
        critic = self.scorer.critic(init, config.seed).to(self.device).eval()
        models = [policy, critic, self.reference, *([self.scorer.model.model] if self.scorer.model else [])]
        for model in models:
            use_plain_products(model, self.bf16, prompts.longest + config.response_length)
        self.policy, self.critic = (
            Learner(model, config.adam_epsilon, config.weight_decay, config.max_grad_norm) for model in (policy, critic)
        )
        self.objective = Objective(
            temperature=config.temperature,
            cliprange=config.cliprange,
            clip_higher=config.clip_higher,
            dual_clip=config.dual_clip,
            cliprange_value=config.cliprange_value,
            vf_coef=config.vf_coef,
            value_mean=self.scorer.scale[0],
            value_std=self.scorer.scale[1],
            target_kl=config.target_kl,
        )
        self.kl_coef, self.tokens = config.init_kl_coef if config.adaptive_kl else config.kl_coef, 0
        self.history: list[dict[str, float]] = []  # the first step and the last few: what the summary is made of

    def step(self, step: int, done: float) -> dict[str, float]:
        """One step, `done` being the share of the run before it. Returns its figures."""
        from pipeline.rl.kl import adaptive_kl_coef
        from pipeline.rl.updates import check_finite

        config = self.config
        first = step * config.batch_size + self.runtime.rank * self.own
        rows = self.prompts.order[first : first + self.own]
        times = [self._clock()]
        rollout, sampled_BT = self.roll_out(step, rows)
        times.append(self._clock())
        scores_B = self.scorer.score(rollout, [self.prompts.rows[row] for row in rows])
        times.append(self._clock())
        experience, figures = self.appraise(rollout, sampled_BT, scores_B)
        check_finite(figures)
        times.append(self._clock())
        figures |= self.update(step, experience, done)
        times.append(self._clock())

        if config.adaptive_kl:
            steering = {"target": config.adaptive_kl_target, "horizon": config.adaptive_kl_horizon}
            self.kl_coef = adaptive_kl_coef(self.kl_coef, figures["kl"], episodes=config.batch_size, **steering)
        if step == 0 and figures["rollout_gap"] > HEALTHY_GAP:
            self.runtime.say(
                f"rollout and training differ by {figures['rollout_gap']:.3f} a token: one of them is wrong"
            )
        tokens = round(figures["length"] * config.batch_size)
        self.tokens += tokens
        phases = ("generate", "score", "reference", "train")
        figures |= {f"seconds_{phase}": end - start for phase, start, end in zip(phases, times, times[1:])}
        figures["samples_per_second"] = config.batch_size / (times[-1] - times[0])
        figures["tokens_per_second"] = tokens / (times[-1] - times[0])
        self.history = [*self.history[:1], *self.history[1:][1 - RECENT :], figures]
        return figures

    def roll_out(self, step: int, rows: list[int]) -> tuple[Rollout, Tensor]:
        """The policy's responses to the prompts of `rows`, and their log-probs as they were sampled.

        Random numbers are drawn for the whole batch, so that a row's do not depend on how many ranks share it.
        """
        from pipeline.model.generation import draw_uniforms
        from pipeline.rl.forwards import precision
        from pipeline.rl.rollouts import roll_out

        config, first = self.config, self.runtime.rank * self.own
        uniforms_BT = draw_uniforms(config.batch_size, config.response_length, self.runtime.generator("sampling", step))
        with precision(self.device, self.bf16):
            return roll_out(
                self.policy.model,
                [self.prompts.ids[row] for row in rows],
                uniforms_BT[first : first + self.own],
                stop_id=self.stop_id,
                pad_id=self.pad_id,
                temperature=config.temperature,
                batch_size=config.local_rollout_forward_batch_size,
            )

    def appraise(self, rollout: Rollout, sampled_BT: Tensor, scores_B: Tensor) -> tuple[Experience, dict[str, float]]:
        """Log-probs of policy and reference, values; from them rewards, advantages and returns."""
        from pipeline.rl import kl
        from pipeline.rl.advantages import explained_variance, gae
        from pipeline.rl.forwards import precision, response_logprobs, response_values, sweep, sweep_policy
        from pipeline.rl.masking import means, whiten
        from pipeline.rl.rewards import clip_scores, missing_eos, token_rewards
        from pipeline.rl.rollouts import Experience

        config, objective, mask_BT = self.config, self.objective, rollout.response_mask_BT
        size, mean, std = config.local_rollout_forward_batch_size, objective.value_mean, objective.value_std
        with precision(self.device, self.bf16):
            logprobs_BT, entropies_BT = sweep_policy(self.policy.model, rollout, size, config.temperature)
            reference_BT = sweep(rollout, size, lambda r: response_logprobs(self.reference, r, config.temperature))
            values_BT = sweep(rollout, size, lambda r: response_values(self.critic.model, r, mean, std))

        kl_BT = kl.k1(logprobs_BT, reference_BT)
        clipped_B, penalty = clip_scores(scores_B, config.score_clip), config.missing_eos_penalty
        rewards_B = missing_eos(clipped_B, rollout.is_ended_B, penalty=penalty, rule=config.missing_eos_rule)
        rewards_BT = token_rewards(rewards_B, kl_BT, rollout.lengths_B, kl_coef=self.kl_coef)
        if config.whiten_rewards:
            rewards_BT = whiten(rewards_BT, mask_BT, shift_mean=False, reduce=self.reduce)
        advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, gamma=config.gamma, lam=config.lam)
        explained = explained_variance(values_BT, returns_BT, mask_BT, self.reduce).item()
        if config.whiten_advantages:
            advantages_BT = whiten(advantages_BT, mask_BT, reduce=self.reduce)

        of_rows = {
            "reward": rewards_B,
            "score": scores_B,
            "kl": kl.sequence_kl(kl_BT, mask_BT),
            "length": rollout.lengths_B,
            "ended": rollout.is_ended_B,
        }
        of_tokens = {"entropy": entropies_BT, "rollout_gap": (logprobs_BT.exp() - sampled_BT.exp()).abs()}
        figures = means(of_rows, of_tokens, rollout.lengths_B, self.reduce)
        figures |= {"explained_variance": explained, "kl_coef": self.kl_coef}
        figures["sqrt_kl"] = math.sqrt(max(0.0, figures["kl"]))
        return Experience(rollout, logprobs_BT, values_BT, advantages_BT, returns_BT), figures

    def update(self, step: int, experience: Experience, done: float) -> dict[str, float]:
        """The optimiser steps of this step. Minibatches are cut from the whole batch, whatever ranks share it."""
        import torch

        from pipeline.rl.updates import update

        config = self.config
        share = 1.0 - done if config.lr_scheduler_type == "linear" else 1.0
        orders = [
            torch.randperm(config.batch_size, generator=self.runtime.generator("minibatches", step, epoch))
            for epoch in range(config.num_ppo_epochs)
        ]
        figures = update(
            self.policy,
            self.critic,
            experience,
            self.objective,
            [order - self.runtime.rank * self.own for order in orders],
            minibatches=config.num_mini_batches,
            microbatch=config.per_device_train_batch_size,
            rates=(share * config.learning_rate, share * (config.value_learning_rate or 3 * config.learning_rate)),
            bf16=self.bf16,
            reduce=self.reduce,
        )
        return figures | {"learning_rate": share * config.learning_rate}

    def _clock(self) -> float:
        """Seconds, when all that was asked of the device is done."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def resume(self) -> int:
        """Put back the newest checkpoint; the step it was made at, 0 without one."""
        from pipeline.rl.learners import restore

        checkpoint = self.runtime.checkpoints.latest()
        if checkpoint is None:
            return 0
        state = checkpoint.state
        restore({"policy": self.policy, "critic": self.critic}, checkpoint.tensors(), state["optimizers"])
        self.kl_coef, self.tokens, self.history = state["kl_coef"], state["tokens"], state["history"]
        self.runtime.say(f"resumed at step {checkpoint.step:,}")
        return checkpoint.step

    def save(self, step: int) -> None:
        """A checkpoint of `step`: policy, critic, both optimizers, the KL controller; prompts follow from the step."""
        from pipeline.rl.learners import saved

        tensors, optimizers = saved({"policy": self.policy, "critic": self.critic})
        state = {"kl_coef": self.kl_coef, "tokens": self.tokens, "history": self.history, "optimizers": optimizers}
        self.runtime.checkpoints.save(step, tensors, state)

    def summary(self) -> dict[str, float]:
        """Figures of the first step and the means of the last ones."""
        from pipeline.model.build import count_parameters

        last = self.history[-RECENT:]
        names = ("reward", "kl", "ended", "length", "entropy", "explained_variance", "samples_per_second")
        means = {name: sum(figures[name] for figures in last) / len(last) for name in names}
        # Five forwards (decode, reward, policy, reference, critic) and two updates of 6 N, every model taken for alike.
        passes = 5 * 2 + 2 * 6 * self.config.num_ppo_epochs
        read = self.tokens + sum(len(self.prompts.ids[row]) for row in self.prompts.order)
        flops = float(passes * count_parameters(self.policy.model)[1] * read)
        return {"reward_first": self.history[0]["reward"], **means, "flops": flops}
