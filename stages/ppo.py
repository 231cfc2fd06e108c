"""ppo: the policy optimised against a reward by proximal policy optimisation, or by one of its family.

Schulman et al. 2017 for the algorithm, Ouyang et al. 2022 (InstructGPT) for its use on language models, Huang et al.
2024 ("The N+ implementation details of RLHF with PPO") for what they leave out. A step: the policy answers a batch of
prompts; the answers are scored; log-probs of policy and reference and the critic's values are taken; rewards become
advantages; policy and critic are updated. `algorithm` names the methods that are small changes of the same loop and do
without a critic (pipeline/rl/family.py): GRPO, Dr. GRPO, DAPO, RLOO, REINFORCE++, ReMax, GSPO. docs/ppo.md explains
every field.

Departures: one batch, one epoch, one minibatch unless told otherwise, so that the update is on-policy; the critic is a
model of its own, started from the reward model with its head, and reads its values in the reward's normalised units;
a response without a stop token has its score replaced by -1; the score lies on the last real token, not after it.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from pipeline.errors import ConfigError
from pipeline.recipe import Data, PeftConfig, Ref, StageConfig, field, is_user_code
from pipeline.reward_config import Reward
from pipeline.rl.family import PRESETS, Algorithm, Estimator, needs_a_group

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from pipeline.data.shown import ShownRow
    from pipeline.rl.appraisal import Appraisal
    from pipeline.rl.asking import Asking, Pricing
    from pipeline.rl.batches import Batches
    from pipeline.rl.examiner import Examiner
    from pipeline.rl.loop import Loop
    from pipeline.rl.models import Models
    from pipeline.rl.prompts import PromptReader, Prompts
    from pipeline.rl.ptx import PretrainingText
    from pipeline.rl.scoring import Scorer
    from pipeline.rl.updates import Objective
    from pipeline.rl.vllm_engine import VLLMEngine
    from pipeline.runtime import Runtime


class PPOConfig(StageConfig):
    """What ppo can be told. Names are those of TRL's PPOConfig and GRPOConfig where they have them."""

    algorithm: Algorithm = field(
        "ppo", "sets the fields below as that method has them, where the recipe doesn't", preset=True
    )
    init: Ref = field("sft", "the policy's start, and the reference that KL is measured to")
    reward: Reward = field("reward", "a reward model, a function of your own (./rewards.py:exact), or a list of terms")
    gold: Reward | None = field(None, "what evaluations measure and nothing is trained on, in the same forms")
    data: Data | None = field(None, "rows whose prompts are answered; those sft was trained on unless set")
    held_out: float = field(0.05, "share of the rows (by a hash of the prompt) that is left out", ge=0, lt=1)
    max_prompt_length: int | None = field(None, "leave out longer prompts, chat template included", unit="tokens", gt=0)

    total_episodes: int | None = field(None, "responses to learn from; by `num_train_epochs` unless set", gt=0)
    num_train_epochs: float = field(1.0, "passes over the prompts", gt=0)
    batch_size: int = field(64, "responses a step, over all processes", unit="episodes", gt=0)
    num_generations: int = field(1, "responses to each prompt of a step", unit="responses", gt=0)
    dynamic_sampling: bool = field(False, "prompts whose answers all got the same are left out, others asked instead")
    max_sampling_rounds: int = field(4, "dynamic_sampling: batches generated for one step at most", gt=0)
    num_ppo_epochs: int = field(1, "passes over the responses of a step", gt=0)
    num_mini_batches: int = field(1, "optimiser steps a pass", gt=0)
    per_device_train_batch_size: int = field(16, "responses a forward and backward; no result depends on it", gt=0)
    token_budget: int | None = field(
        None, "forwards hold this many tokens instead, padding included", unit="tokens", gt=0
    )
    local_rollout_forward_batch_size: int = field(64, "responses a forward without gradients, and of a decode", gt=0)
    response_length: int = field(128, "tokens of a response at most", unit="tokens", gt=0)
    stop_strings: tuple[str, ...] = field((), "a response also ends with the token that completes one of these")
    temperature: float = field(1.0, "of sampling, and of every log-prob", gt=0)
    environment: str | None = field(None, "a function of your own that replies to answers: ./tools.py:reply")
    rollout_engine: Literal["native", "vllm"] = field("native", "what writes the responses that are learnt from")
    vllm_gpu_memory_utilization: float = field(0.3, "vllm: share of the device's memory it may take", gt=0, lt=1)
    max_turns: int = field(4, "environment: turns of the policy at most", unit="turns", gt=0)

    learning_rate: float = field(3e-6, "the policy's", gt=0)
    value_learning_rate: float | None = field(None, "the critic's; three times the policy's unless set", gt=0)
    lr_scheduler_type: Literal["linear", "constant"] = field("linear", "both rates fall to 0, or stay")
    adam_epsilon: float = field(1e-5, "AdamW's epsilon", gt=0)
    weight_decay: float = field(0.0, "AdamW's decay of the weights", ge=0)
    max_grad_norm: float = field(1.0, "clip each model's gradient norm to this", gt=0)
    bf16: bool | None = field(None, "autocast to bf16; where the hardware gains by it unless set")
    peft: PeftConfig | None = field(None, "train LoRA adapters: the reference is the policy without them")
    load_in_4bit: bool = field(False, "peft: the policy's frozen weights in four bits (bitsandbytes, CUDA)")
    shared_trunk: bool = field(
        False, "peft: critic, and a reward model trained by peft from `init`, are adapters on the policy's frozen trunk"
    )
    offload: bool = field(
        False, "reference and reward models are on the device only while they are read", run_only=True
    )
    ema_decay: float | None = field(
        None, "what is written is the policy's moving average (InstructGPT: 0.992)", gt=0, lt=1
    )

    advantage_estimator: Estimator = field("gae", "how rewards become advantages; all but gae do without a critic")
    gamma: float = field(1.0, "discount a token", ge=0, le=1)
    lam: float = field(0.95, "lambda of GAE: 0 trusts the critic, 1 the rewards", ge=0, le=1)
    whiten_advantages: bool = field(True, "advantages of a step to mean 0 and variance 1")
    whiten_rewards: bool = field(False, "rewards of a step to variance 1, their mean kept")
    cliprange: float = field(0.2, "the ratio is held above 1 - this, and below 1 + this", gt=0, lt=1)
    clip_higher: float | None = field(None, "the upper bound of its own (DAPO: 0.28)", gt=0)
    dual_clip: float | None = field(None, "loss of a bad token at most this times its advantage (verl: 3)", gt=1)
    cliprange_value: float | None = field(0.2, "values stay this near to the rollout's; null for no clip", gt=0)
    vf_coef: float = field(0.1, "weight of the value loss, which has a factor 1/2", gt=0)
    loss_aggregation: Literal["token", "sequence", "constant"] = field(
        "token", "mean over tokens, over responses of their means, or tokens over batch × response_length"
    )
    importance_sampling_level: Literal["token", "sequence"] = field("token", "the ratio: of a token, or of a response")
    entropy_coef: float = field(0.0, "weight of the entropy bonus", ge=0)
    mask_truncated_completions: bool = field(False, "responses without a stop token are not trained on")
    ptx_coef: float = field(0.0, "weight of the pretraining loss beside the policy's (InstructGPT: 27.8)", ge=0)
    ptx_tokens: Ref | None = field(None, "the token files that it is of: a tokenize stage")
    ptx_ratio: float = field(8.0, "rows of that text for each response", gt=0)
    ptx_length: int = field(256, "their length", unit="tokens", gt=0)
    importance_sampling_cap: float | None = field(
        2.0, "vllm: the ratio of training's and rollout's probability weighs a token, up to this; null for none", gt=0
    )
    target_kl: float | None = field(None, "skip the rest of a step's updates above this KL", unit="nats a token", gt=0)

    kl_coef: float = field(0.05, "price of KL to the reference", unit="reward a nat", ge=0)
    kl_loss: Literal["k2", "k3"] | None = field(
        None, "KL as a part of the loss, by this estimator; of the reward unless set"
    )
    adaptive_kl: bool = field(False, "steer the price to a target; `kl_coef` is then unused")
    init_kl_coef: float = field(0.15, "adaptive_kl: the first price", unit="reward a nat", gt=0)
    adaptive_kl_target: float = field(6.0, "adaptive_kl: KL to hold", unit="nats a response", gt=0)
    adaptive_kl_horizon: float = field(10_000, "adaptive_kl: how slowly the price moves", unit="episodes", gt=0)
    score_clip: float | None = field(10.0, "scores are held within plus and minus this; null for no clip", gt=0)
    missing_eos_rule: Literal["replace", "subtract", "keep"] = field(
        "replace", "a response without a stop token scores -penalty, its score - penalty, or its score"
    )
    missing_eos_penalty: float = field(1.0, "the penalty of that rule", ge=0)
    overlong_buffer: float | None = field(
        None, "share of response_length at its end in which up to 1 is taken off", gt=0, le=1
    )

    eval_steps: int | None = field(
        None, "steps between evaluations on held-out prompts; a fifth of the run unless set, 0 for none", ge=0
    )
    eval_prompts: int = field(64, "held-out prompts answered at an evaluation", unit="prompts", gt=0)
    early_stopping_patience: int | None = field(None, "end after so many evaluations that were not the best", gt=0)
    load_best_model_at_end: bool = field(False, "what is written is the policy of the best evaluation")
    save_steps: int = field(50, "steps between checkpoints", unit="steps", gt=0, run_only=True)

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        """The fields that the algorithm sets and the recipe doesn't."""
        if not isinstance(values, dict):
            return values
        return PRESETS.get(str(values.get("algorithm", "ppo")), {}) | values

    @model_validator(mode="after")
    def _goes_together(self) -> PPOConfig:
        if self.environment is not None and not is_user_code(self.environment):
            raise ValueError(f"environment {self.environment!r} is not a function of your own: ./tools.py:reply")
        if self.peft is None and (self.shared_trunk or self.load_in_4bit):
            what = "shared_trunk" if self.shared_trunk else "load_in_4bit"
            raise ValueError(f"{what} is of what adapters stand on, and there are none: set peft")
        if self.load_in_4bit and self.rollout_engine == "vllm":
            raise ValueError("weights in four bits are not sent to vLLM: rollout_engine native, or no load_in_4bit")
        return self


INPUTS = {
    "init": "causal-lm",
    "reward": "reward-model",
    "reward.model": "reward-model",
    "reward.models": "reward-model",
    "reward.judge": "causal-lm",
    "gold": "reward-model",
    "gold.model": "reward-model",
    "gold.models": "reward-model",
    "gold.judge": "causal-lm",
    "ptx_tokens": "tokens",
}
KIND = "causal-lm"
RESULT_VERSION = 1
DEFAULTS = {"data": "demonstrations"}

SHOWN = ("reward", "kl", "length", "ended", "samples_per_second")
SUMMARY = ("reward", "kl", "ended", "length", "entropy", "explained_variance", "samples_per_second", "mfu")


def run(config: PPOConfig, inputs: dict[str, Any], out: Path, runtime: Runtime) -> dict[str, float]:
    """Train the policy; returns its reward in the first step and in the last ones, and the KL it took."""
    from transformers.utils import logging

    from pipeline.data.tokenizers import load_tokenizer
    from pipeline.rl.learners import write_policy

    logging.set_verbosity_error()  # no report that a critic's new head is new

    # 1. prompts, in the order of the whole run
    _check(config, runtime)
    tokenizer = load_tokenizer(inputs["init"].model)
    prompts, held_out, steps = _read(config, inputs, tokenizer, runtime)
    every = steps if held_out is None else config.eval_steps or math.ceil(steps / 5)

    # 2. policy, reference, what scores and critic, from the checkpoint if there is one
    parts = _Parts(config, inputs, tokenizer, prompts, held_out, runtime)
    loop = parts.loop()
    step = loop.resume()
    if runtime.is_main:
        write_policy(loop.models.policy.model, out / "model", inputs["init"].model, parts.stop_id, weights=False)

    # 3. rollouts and updates
    runtime.say(f"{steps:,} steps of {config.batch_size} responses, {len(prompts.ids):,} prompts")
    with runtime.progress("ppo", steps) as bar:
        bar.start_at(step)
        while step < steps and not loop.is_exhausted:
            figures = loop.step(step, step / steps)
            step += 1
            if held_out is not None and (step % every == 0 or step == steps):
                figures |= loop.evaluate(step)
            runtime.metrics.log(step, loop.progress.tokens, **figures)
            bar.advance(1, **{name: figures[name] for name in SHOWN})
            stopping = runtime.stop_requested()
            is_last = step == steps or loop.is_exhausted
            if step % config.save_steps == 0 or stopping or is_last:
                loop.save(step)
            if stopping and not is_last:
                runtime.stop(step)
    if step < steps:
        runtime.say(
            f"ended at step {step:,}: {config.early_stopping_patience} evaluations were no better than the best"
        )

    # 4. the policy, as its start was
    summary = loop.summary(SUMMARY)
    policy = _merged(config, inputs["init"].model, loop)
    if runtime.is_main:
        write_policy(policy, out / "model", inputs["init"].model, parts.stop_id)
    runtime.barrier()
    return summary


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
    """ConfigError for a batch that cannot be cut as it is told, and for settings that don't go together."""
    from pipeline.runtime import check_batch

    if config.rollout_engine == "vllm":
        from pipeline.rl.vllm_engine import check_vllm

        check_vllm()
    if config.load_in_4bit:
        from pipeline.model.four_bit import check_four_bit

        check_four_bit(runtime.device, "ppo.load_in_4bit")
    if config.stop_strings and ("" in config.stop_strings or config.environment or config.rollout_engine != "native"):
        raise ConfigError(
            "a stop string is text, looked for by the native engine in answers of one turn",
            where="ppo.stop_strings",
            mend="leave out the empty one, or the environment, or rollout_engine: vllm",
        )
    if config.whiten_rewards and config.advantage_estimator != "gae":
        raise ConfigError(
            "whitened rewards keep their mean at every token: summed over a response they would pay its length",
            where="ppo.whiten_rewards",
            mend="leave it out; it is for advantage_estimator: gae",
        )
    group = config.num_generations
    check_batch(config.batch_size, config.num_mini_batches, group, runtime.world_size, "ppo.batch_size")
    if group == 1 and (needs_a_group(config.advantage_estimator) or config.dynamic_sampling):
        what = "dynamic_sampling" if config.dynamic_sampling else f"advantage_estimator {config.advantage_estimator}"
        raise ConfigError(
            f"{what} compares the answers to one prompt, and there is one",
            where="ppo.num_generations",
            mend="--set ppo.num_generations=8",
        )


def _read(
    config: PPOConfig, inputs: dict[str, Any], tokenizer: PreTrainedTokenizerFast, runtime: Runtime
) -> tuple[Prompts, Prompts | None, int]:
    """(the prompts of the run, those of its evaluations, its steps); each has what the reward compares with."""
    from pipeline.data.chat import encode_prompt
    from pipeline.rl.functions import check_references
    from pipeline.rl.prompts import PromptReader
    from pipeline.rl.scoring import context_of

    context = context_of(inputs, INPUTS)
    reading = PromptReader(
        encode=lambda row: encode_prompt(tokenizer, row["prompt"]),
        longest=config.max_prompt_length,
        room=None if context is None else context - config.response_length,
        generator=runtime.generator,
    )
    prompts, steps = _prompts(config, reading, runtime)
    held_out = _held_out(config, reading, runtime)
    asked = [each.rows[row] for each in (prompts, held_out) if each is not None for row in each.ids]
    check_references(config.reward, asked)
    if config.gold is not None and held_out is not None:
        check_references(config.gold, [held_out.rows[row] for row in held_out.ids])
    return prompts, held_out, steps


def _prompts(config: PPOConfig, reading: PromptReader, runtime: Runtime) -> tuple[Prompts, int]:
    """The prompts the run comes to, one after the other, and the number of its steps."""
    from pipeline.data.formats import read_rows

    assert config.data is not None
    rows = read_rows(config.data, "prompt", split="train", held_out=config.held_out, say=runtime.say)
    group = config.num_generations
    episodes = config.total_episodes or max(1, round(config.num_train_epochs * len(rows) * group))
    steps = math.ceil(episodes / config.batch_size)
    rounds = config.max_sampling_rounds if config.dynamic_sampling else 1
    prompts = reading.take(rows, steps * rounds * config.batch_size // group, "prompts")
    runtime.check_stop()
    if prompts.left_out:
        runtime.say(f"{prompts.left_out:,} prompts of more than {config.max_prompt_length} tokens are left out")
    return prompts, steps


def _held_out(config: PPOConfig, reading: PromptReader, runtime: Runtime) -> Prompts | None:
    """The prompts of the evaluations; None where there are none, or no row was held out."""
    from pipeline.data.formats import read_rows

    assert config.data is not None
    wanted = config.early_stopping_patience is not None or config.load_best_model_at_end
    if config.eval_steps == 0 and wanted:
        raise ConfigError(
            "the best policy is found by evaluations, and there are none",
            where="ppo.eval_steps",
            mend="leave out `eval_steps: 0`",
        )
    if config.eval_steps == 0:
        return None
    try:
        rows = read_rows(config.data, "prompt", split="held_out", held_out=config.held_out)
    except ConfigError:  # a few rows of which none fell to the held-out share
        if config.eval_steps is not None or wanted:
            raise
        runtime.say("no prompt is held out: no evaluations (held_out, eval_steps)")
        return None
    found = reading.take(rows, min(config.eval_prompts, len(rows)), "held-out prompts").once()
    if len(found.order) < runtime.world_size:
        raise ConfigError(
            f"{len(found.order)} held-out prompts for {runtime.world_size} processes",
            where="ppo.eval_prompts",
            mend="raise eval_prompts or held_out, or eval_steps: 0",
        )
    return found


def _merged(config: PPOConfig, init: Path, loop: Loop) -> PreTrainedModel:
    """The policy with its adapters added in, from four bits into `init`'s own weights. Training is over."""
    from pipeline.model.build import load_causal_lm
    from pipeline.model.four_bit import merged_onto

    policy = loop.finish()
    if config.load_in_4bit:
        return merged_onto(load_causal_lm(init), policy)
    loop.models.policy.merge()
    return policy


class _Parts:
    """What the loop of a run is put together from, as the config says."""

    def __init__(
        self,
        config: PPOConfig,
        inputs: dict[str, Any],
        tokenizer: PreTrainedTokenizerFast,
        prompts: Prompts,
        held_out: Prompts | None,
        runtime: Runtime,
    ) -> None:
        from pipeline.data.chat import stop_token_id
        from pipeline.rl.forwards import Cut
        from pipeline.rl.place import Place

        self.config, self.inputs, self.tokenizer, self.runtime = config, inputs, tokenizer, runtime
        self.prompts, self.held_out = prompts, held_out
        self.place = Place.of(runtime, config.bf16)
        self.stop_id = stop_token_id(tokenizer)
        self.pad_id = self.stop_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.sweep_cut = Cut(config.local_rollout_forward_batch_size, config.token_budget)

    def loop(self) -> Loop:
        """The loop, at the run's start."""
        from pipeline.hardware import peak_flops
        from pipeline.rl.forwards import Cut
        from pipeline.rl.learners import Average
        from pipeline.rl.loop import Loop, Steering, Updates

        config, place = self.config, self.place
        asking, pricing, models = self.asking(), self.pricing(), self.models()
        average = None if config.ema_decay is None else Average(models.policy, config.ema_decay)
        return Loop(
            self.batches(models, asking, pricing),
            self.appraisal(),
            self.objective(models),
            Updates(
                config.num_ppo_epochs,
                config.num_mini_batches,
                Cut(config.per_device_train_batch_size, config.token_budget),
                (config.learning_rate, config.value_learning_rate or 3 * config.learning_rate),
                falls=config.lr_scheduler_type == "linear",
            ),
            Steering(config.adaptive_kl_target, config.adaptive_kl_horizon) if config.adaptive_kl else None,
            self.text(models) if config.ptx_coef else None,
            average,
            None if self.held_out is None else self.examiner(models, asking, pricing, self.held_out),
            self.runtime,
            patience=config.early_stopping_patience,
            peak=place.world_size * peak_flops(place.device.type, place.bf16),
        )

    def models(self) -> Models:
        """Policy, reference, what scores, and critic."""
        from pipeline.model.adapters import lora
        from pipeline.model.build import check_vocabulary, load_causal_lm
        from pipeline.model.four_bit import load_four_bit
        from pipeline.rl.models import Optimisation, prepare
        from pipeline.rl.offload import Offload

        config, place, init = self.config, self.place, self.inputs["init"]
        if config.load_in_4bit:
            policy = load_four_bit(init.model, place.device, bf16=place.bf16)
        else:
            policy = load_causal_lm(init.model).to(place.device)
        check_vocabulary(policy, len(self.tokenizer), "ppo.init")
        return prepare(
            policy,
            lambda trunk: self.scorer(config.reward, "reward", trunk),
            init,
            Optimisation(config.adam_epsilon, config.weight_decay, config.max_grad_norm),
            temperature=config.temperature,
            has_critic=config.advantage_estimator == "gae",
            adapters=lora(config.peft, "CAUSAL_LM"),
            of_critic=lora(config.peft, "SEQ_CLS", ["score"]),
            seed=config.seed,
            bf16=place.bf16,
            longest=config.response_length + max(each.longest for each in (self.prompts, self.held_out) if each),
            offload=Offload.of(place.device, config.offload),
            shares_trunk=config.shared_trunk,
        )

    def scorer(self, reward: Reward, role: str, trunk: PeftModel | None) -> Scorer:
        """What scores by `reward`, the field `role`; of the policy's adapters as `trunk` where it is shared."""
        from pipeline.rl.scoring import load_scorer

        return load_scorer(
            reward,
            self.inputs,
            self.tokenizer,
            stop_id=self.stop_id,
            pad_id=self.pad_id,
            batch_size=self.config.local_rollout_forward_batch_size,
            bf16=self.place.bf16,
            runtime=self.runtime,
            role=role,
            stop_strings=self.config.stop_strings,
            trunk=trunk,
        )

    def asking(self) -> Asking:
        """How the policy is asked, by our own engine."""
        from pipeline.rl.asking import Asking
        from pipeline.rl.scoring import context_of
        from pipeline.rl.turns import load_environment

        config = self.config
        return Asking(
            place=self.place,
            longest=config.response_length,
            stop_id=self.stop_id,
            pad_id=self.pad_id,
            temperature=config.temperature,
            batch_size=config.local_rollout_forward_batch_size,
            environment=load_environment(
                config.environment, self.tokenizer, config.max_turns, context_of(self.inputs, INPUTS)
            ),
            stop_strings=config.stop_strings,
            decode=self.tokenizer.decode if config.stop_strings else None,
        )

    def pricing(self) -> Pricing:
        """What becomes of a score."""
        from pipeline.rl.asking import Pricing

        config = self.config
        return Pricing(
            score_clip=config.score_clip,
            missing_eos_rule=config.missing_eos_rule,
            missing_eos_penalty=config.missing_eos_penalty,
            overlong_buffer=config.overlong_buffer,
            longest=config.response_length,
        )

    def batches(self, models: Models, asking: Asking, pricing: Pricing) -> Batches:
        """How the answers of a step are got."""
        from pipeline.rl.batches import Batches

        config = self.config
        return Batches(
            prompts=self.prompts,
            models=models,
            asking=dataclasses.replace(asking, engine=self.engine()),
            pricing=pricing,
            place=self.place,
            size=config.batch_size,
            group_size=config.num_generations,
            rounds=config.max_sampling_rounds if config.dynamic_sampling else None,
            greedy_baseline=config.advantage_estimator == "remax",
        )

    def engine(self) -> VLLMEngine | None:
        """What writes the responses in place of ours."""
        from pipeline.rl.vllm_engine import load_engine

        config = self.config
        if config.rollout_engine == "native":
            return None
        return load_engine(
            self.inputs["init"].model,
            self.place,
            self.prompts.ids[self.prompts.order[0]],
            longest=self.prompts.longest + config.response_length,
            stop_id=self.stop_id,
            pad_id=self.pad_id,
            temperature=config.temperature,
            seed=config.seed,
            memory=config.vllm_gpu_memory_utilization,
        )

    def appraisal(self) -> Appraisal:
        """How rewards become advantages."""
        from pipeline.rl.appraisal import Appraisal

        config = self.config
        return Appraisal(
            estimator=config.advantage_estimator,
            group_size=config.num_generations,
            gamma=config.gamma,
            lam=config.lam,
            whitens_rewards=config.whiten_rewards,
            whitens_advantages=config.whiten_advantages,
            rewards_hold_kl=config.kl_loss is None,
            skips_truncated=config.mask_truncated_completions,
            counts_turns=config.environment is not None,
            cut=self.sweep_cut,
        )

    def objective(self, models: Models) -> Objective:
        """What the update minimises, at the first price of KL."""
        from pipeline.rl.updates import Objective

        config = self.config
        mean, std = models.value_scale
        return Objective(
            reading=models.reading,
            aggregation=config.loss_aggregation,
            longest=config.response_length,
            level=config.importance_sampling_level,
            cliprange=config.cliprange,
            clip_higher=config.clip_higher,
            dual_clip=config.dual_clip,
            correction_cap=config.importance_sampling_cap if config.rollout_engine == "vllm" else None,
            entropy_coef=config.entropy_coef,
            kl_loss=config.kl_loss,
            kl_coef=config.init_kl_coef if config.adaptive_kl else config.kl_coef,
            cliprange_value=config.cliprange_value,
            vf_coef=config.vf_coef,
            value_mean=mean,
            value_std=std,
            target_kl=config.target_kl,
        )

    def text(self, models: Models) -> PretrainingText:
        """The pretraining text of PPO-ptx."""
        from pipeline.rl.ptx import load_text

        config = self.config
        return load_text(
            self.inputs.get("ptx_tokens"),
            self.inputs["init"],
            models.policy.model,
            self.place,
            coef=config.ptx_coef,
            rows=max(1, round(config.ptx_ratio * config.batch_size / config.num_mini_batches)),
            length=config.ptx_length,
            microbatch=config.per_device_train_batch_size,
            seed=config.seed,
        )

    def examiner(self, models: Models, asking: Asking, pricing: Pricing, held_out: Prompts) -> Examiner:
        """The evaluations."""
        from pipeline.rl.examiner import Exam, Examiner

        config = self.config
        trunk = models.policy.adapters if config.shared_trunk else None
        gold = None if config.gold is None else self.scorer(config.gold, "gold", trunk)
        models.offload.put_away([] if gold is None else gold.models)
        exam = Exam(held_out, asking, pricing, gold, self.sweep_cut, self.place)
        return Examiner(exam, models, keeps_best=config.load_best_model_at_end)
