"""reward: a model that gives an answer a number, from preferences, by TRL's RewardTrainer.

Bradley-Terry: the loss of a pair is -log sigmoid(r(chosen) - r(rejected) - m) (Stiennon et al. 2020; the margin m,
0 without `margin_weight`: Touvron et al. 2023, equation 2), plus `center_rewards_coefficient` × (r(chosen) +
r(rejected))² (Eisenstein et al. 2023, equation 2), which keeps the numbers near zero. Of a list of K answers it is the
mean over its K(K − 1)/2 pairs, all in one batch (Ouyang et al. 2022, equation 1). The model is the sft model's trunk
with a new head, read at the row's stop token.

Departures: the score is read at a row's last token by its length, so that a pad token that is also the stop token does
no harm; it is given out as (raw - mean) / std over the sft demonstrations (InstructGPT shifts by the mean alone), and a
reward model without both is refused wherever one is used. A tie is kept, with each side's loss at one half.
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import model_validator

from pipeline.errors import DataError
from pipeline.recipe import Data, Ref, field, is_user_code
from pipeline.trainer_config import TrainerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from pipeline.artifacts import Artifact
    from pipeline.checkpoint import Checkpoint
    from pipeline.data.messages import Message
    from pipeline.data.shown import ShownRow
    from pipeline.evals.reward_accuracy import HeldOut
    from pipeline.model.reward import RewardModel
    from pipeline.runtime import Runtime
    from pipeline.schedule import Row, Schedule

SCORED_TOKENS = 4096
"""Tokens of a batch that is only scored, padding included."""
GOLD = ("rouge_l", "exact", "number")
SCALE = ("mean", "std")
SHOWN = ("accuracy", "ece", "length_spearman")
"""The figures that `llmpipe status` shows in a line."""
WITH_INTERVAL = (*SHOWN, "length_pearson", "gold_agreement")


class RewardConfig(TrainerConfig):
    """What reward can be told."""

    TRL = "RewardConfig"
    IGNORED = {"label_smoothing_factor": "a row with `preference` below 1 says how sure it is"}

    init: Ref = field("sft", "the model whose trunk it starts from; the policy's tokenizer and chat template")
    data: Data = field(..., "preferences: rows with a chosen and a rejected answer, or a list of answers, best first")
    demonstrations: Data | None = field(None, "rows whose scores get mean 0 and deviation 1; sft's data unless set")
    demonstration_rows: int = field(512, "of those, drawn at random", unit="rows", gt=1)
    learning_rate: float = field(1e-4, "peak rate", gt=0)
    center_rewards_coefficient: float | None = field(0.01, "weight of the squared sum of a pair's scores", ge=0)
    margin_weight: float = field(0.0, "what a row's `margin` is multiplied by before it is asked of raw scores", ge=0)
    ensemble: int = field(1, "models trained one after another, with the seeds from `seed` on", unit="models", gt=0)
    gold: str | None = field(
        None, "what held-out scores are compared with: rouge_l, exact, number, or your own: ./rewards.py:name"
    )

    @model_validator(mode="after")
    def _has_a_gold(self) -> RewardConfig:
        if self.gold is not None and self.gold not in GOLD and not is_user_code(self.gold):
            raise ValueError(f"gold {self.gold!r} is none of {', '.join(GOLD)}, and no ./file.py:name")
        if self.gold is not None and not self.held_out:
            raise ValueError("gold is compared on held-out rows, and held_out is 0: keep some, or take gold out")
        return self


INPUTS = {"init": "causal-lm"}
KIND = "reward-model"
TRAINS_ON = "preferences"
DEFAULTS = {"demonstrations": "demonstrations"}
RESULT_VERSION = 2


@dataclass(frozen=True)
class Taught:
    """What every member of an ensemble learns from and is measured on."""

    tokenizer: PreTrainedTokenizerFast
    stop_id: int
    length: int
    lists: list[Row]
    """Canonical ranked rows."""
    rows: list[Row]
    """Those that fit the length, as the trainer takes them."""
    held: HeldOut
    scaled_on: list[list[Message]]
    """The demonstrations whose scores set the scale; the best answers where there are none."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, all its answers together."""
        from pipeline.data.answer_ids import answers_of

        return [sum(len(ids) for ids in answers_of(row)) for row in self.rows]


def run(config: RewardConfig, inputs: dict[str, Any], out: Path, runtime: Runtime) -> dict[str, float]:
    """Train on preferences; returns held-out figures, accuracy by kind of negative beside what lengths alone reach."""
    from pipeline import trainer as adapter
    from pipeline.model.reward import member_folder
    from pipeline.schedule import schedule
    from pipeline.trainer_watch import checkpoint_step

    adapter.quieten()
    checkpoint = runtime.checkpoints.latest()
    init = inputs["init"]

    # 1. preferences as tokens
    taught = _read(config, init, runtime)

    # 2. the members one after another: train, set the scale of the scores, save, score what is held out
    done: list[dict[str, Any]] = checkpoint.state.get("members", []) if checkpoint else []
    for member in range(len(done), config.ensemble):
        own = config.model_copy(update={"seed": config.seed + member})
        here = copy(runtime)
        here.seed = runtime.seed + member
        plan = schedule(taught.lengths, own, here)
        if config.ensemble > 1:
            runtime.say(f"member {member + 1} of {config.ensemble}, seed {own.seed}")
        if checkpoint is not None and checkpoint.step == checkpoint_step(plan, member, 0):
            checkpoint = None  # nothing of this member is there yet
        done = [*done, _member(own, taught, init, out, here, plan, checkpoint, done)]
        checkpoint = None
        if member + 1 < config.ensemble:
            made = member_folder(out, member)
            runtime.checkpoints.begin_anew(checkpoint_step(plan, member + 1, 0), {"members": done}, made)

    # 3. the figures
    steps, tokens = config.ensemble * plan.steps, sum(each["tokens"] for each in done)
    scales = {f"{name}/{member}" if member else name: each[name] for member, each in enumerate(done) for name in SCALE}
    figures = _held_out(config, taught, done, out, runtime) | scales
    figures |= {"rows": float(len(taught.rows)), "epochs": len(plan.order) / len(taught.rows)}
    runtime.metrics.log(steps, tokens, **figures)
    return {**figures, "flops": sum(each["flops"] for each in done)}


def preview(config: RewardConfig, inputs: dict[str, Any], count: int) -> list[ShownRow]:
    """The answers of the first pairs and lists; the token that the score is read at marked."""
    from pipeline.data.chat import encode_messages
    from pipeline.data.formats import read_rows
    from pipeline.data.shown import ShownRow
    from pipeline.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(inputs["init"].model)
    shown = []
    for place, row in enumerate(read_rows(config.data, "ranked", held_out=config.held_out)[:count], 1):
        names = [f"list {place}, rank {rank + 1}" for rank in row["ranks"]]
        if len(names) == 2:
            names = [f"pair {place}, chosen", f"pair {place}, rejected"]
        for name, answer in zip(names, row["answers"], strict=True):
            ids = encode_messages(tokenizer, [*row["prompt"], *answer]).input_ids
            shown.append(ShownRow(name, ids, [False] * (len(ids) - 1) + [True]))
    return shown


def _read(config: RewardConfig, init: Artifact, runtime: Runtime) -> Taught:
    """The data as tokens: what is trained on, and what is held out."""
    from pipeline import trainer as adapter
    from pipeline.data.answer_ids import encode_answers
    from pipeline.data.chat import stop_token_id
    from pipeline.data.formats import read_rows
    from pipeline.data.tokenizers import load_tokenizer
    from pipeline.evals import reward_accuracy

    tokenizer = load_tokenizer(init.model)
    length = adapter.longest_row(init.model, config.max_length, runtime)
    lists = read_rows(config.data, "ranked", held_out=config.held_out, say=runtime.say)
    held_out: list[Row] = []
    if config.held_out:
        held_out = read_rows(config.data, "ranked", split="held_out", held_out=config.held_out)[: config.eval_rows]
    if config.gold in GOLD and not all(row["reference"] for row in held_out):
        raise DataError(
            f"gold: {config.gold} compares with a row's `reference`, and a held-out row has none",
            where="reward.data",
            mend="rows with `reference`, or a gold function of your own: ./rewards.py:name",
        )
    rows = encode_answers(lists, tokenizer, length, config.margin_weight, runtime)
    held = reward_accuracy.encode(tokenizer, held_out, length)
    if config.demonstrations is None:
        runtime.say("no demonstrations: the chosen answers set the scale of the scores")
        scaled_on = [[*row["prompt"], *row["answers"][0]] for row in lists]
    else:
        found = read_rows(config.demonstrations, "messages", held_out=config.held_out)
        scaled_on = [row["messages"] for row in found]
    return Taught(tokenizer, stop_token_id(tokenizer), length, lists, rows, held, scaled_on)


def _member(
    config: RewardConfig,
    taught: Taught,
    init: Artifact,
    out: Path,
    runtime: Runtime,
    plan: Schedule,
    checkpoint: Checkpoint | None,
    before: list[dict[str, Any]],
) -> dict[str, Any]:
    """Train one model to the end and save it; returns its scale and its raw scores of the held-out answers."""
    import torch

    from pipeline import trainer as adapter
    from pipeline.data.answer_ids import answers_of
    from pipeline.evals.reward_accuracy import rewards
    from pipeline.model import reward as models
    from pipeline.runtime import derive_seed

    pad_id = models.pooling_pad_id(taught.tokenizer, taught.stop_id)
    head_seed = derive_seed(config.seed, "reward head")
    model = models.build_reward_model(init.model, pad_id, head_seed, dtype=getattr(torch, config.dtype)).to(
        runtime.device
    )
    adapter.no_dropout(model)
    trainer = _trainer(config, model, taught.rows, init, pad_id, plan, out, runtime)
    adapter.fit_attention(trainer, max(len(ids) for row in taught.rows for ids in answers_of(row)))
    runtime.say(adapter.describe(trainer, plan, len(taught.rows)))
    adapter.train(
        trainer, config, taught.rows, plan, runtime, checkpoint,
        phase="reward", shown={"loss": "loss", "acc": "accuracy", "margin": "margin"}, state={"members": before},
        member=len(before), tokens_before=sum(each["tokens"] for each in before),
    )  # fmt: skip
    flops = adapter.training_flops(trainer, plan)
    bf16 = runtime.bf16 if config.bf16 is None else config.bf16
    read = (taught.stop_id,), init.tokenizer_hash, init.template_hash
    folder = models.member_folder(out, len(before))
    if config.peft is not None and runtime.is_main:
        models.save_adapter(adapter.adapters_of(trainer), folder)
    raw = models.RewardModel(adapter.trained_model(trainer), 0.0, 1.0, *read, bf16)
    mean, std = _normaliser(config, raw, taught, runtime)
    if runtime.is_main:
        models.save_reward_model(raw.model, folder, init, mean=mean, std=std, suffix_ids=[taught.stop_id])
    runtime.barrier()
    scores = rewards(raw, taught.held.texts, token_budget=SCORED_TOKENS, tick=runtime.check_stop)
    return {"mean": mean, "std": std, "scores": scores, "tokens": int(plan.tokens[-1]), "flops": flops}


def _trainer(
    config: RewardConfig,
    model: PreTrainedModel,
    rows: list[Row],
    init: Artifact,
    pad_id: int,
    plan: Schedule,
    out: Path,
    runtime: Runtime,
) -> Any:
    """TRL's trainer of this config, with our loss where there are lists or ties; it makes `pad_id` its pad."""
    from functools import partial

    from datasets import Dataset
    from trl import RewardConfig as Arguments
    from trl import RewardTrainer

    from pipeline import trainer as adapter
    from pipeline.data.tokenizers import load_tokenizer
    from pipeline.ranked_trainer import RankedRewardTrainer, collate

    tokenizer = load_tokenizer(init.model)
    are_lists = "ids" in rows[0]
    own: dict[str, Any] = {
        "center_rewards_coefficient": config.center_rewards_coefficient,
        "pad_token": tokenizer.convert_ids_to_tokens(pad_id),
        "disable_dropout": False,
    }
    if are_lists:
        own["remove_unused_columns"] = False
    with adapter.building():
        return (RankedRewardTrainer if are_lists else RewardTrainer)(
            model=model,
            args=adapter.trainer_arguments(Arguments, config, plan, out, runtime, own),
            data_collator=partial(collate, pad_id=pad_id) if are_lists else None,
            train_dataset=Dataset.from_list(rows[:1]),
            processing_class=tokenizer,
            peft_config=adapter.lora(config.peft, "SEQ_CLS", modules_to_save=["score"]),
        )


def _normaliser(config: RewardConfig, raw: RewardModel, taught: Taught, runtime: Runtime) -> tuple[float, float]:
    """Mean and standard deviation of the raw scores of `taught.scaled_on`, drawn at random."""
    import numpy as np
    import torch

    from pipeline.data.chat import encode_messages
    from pipeline.evals.reward_accuracy import rewards

    order = torch.randperm(len(taught.scaled_on), generator=runtime.generator("demonstrations")).tolist()
    texts: list[list[int]] = []
    for index in order:
        ids = encode_messages(taught.tokenizer, taught.scaled_on[index]).input_ids
        if len(ids) <= taught.length:
            texts.append(ids)
        if len(texts) == config.demonstration_rows:
            break
    scores = np.array(rewards(raw, texts, token_budget=SCORED_TOKENS, tick=runtime.check_stop))
    mean, std = float(scores.mean()) if len(scores) else 0.0, float(scores.std()) if len(scores) else 0.0
    if std == 0:
        raise DataError(
            f"the scores of {len(texts):,} demonstrations do not vary, so they set no scale",
            where="reward.demonstrations",
            mend="name rows with different answers that fit max_length",
        )
    return mean, std


def _held_out(
    config: RewardConfig, taught: Taught, done: list[dict[str, Any]], out: Path, runtime: Runtime
) -> dict[str, float]:
    """The figures of the held-out pairs, `NAME_low` and `NAME_high` the ends of some one's interval; the reliability
    figure is written beside the model."""
    import numpy as np

    from pipeline.data.messages import words
    from pipeline.data.ranked import as_pairs
    from pipeline.evals import calibration, length_only, reward_accuracy
    from pipeline.evals.gold import gold_scores

    if not config.held_out:
        return {}
    if not taught.held.rows:
        runtime.say("no held-out pair fits the length: nothing is measured")
        return {}
    mean_M1, std_M1 = (np.array([[each[name]] for each in done]) for name in SCALE)
    values_MA = (np.array([each["scores"] for each in done]) - mean_M1) / std_M1
    items = reward_accuracy.items(taught.held, values_MA, std_M1[:, 0].tolist(), gold_scores(config.gold, taught.held))
    pairs = [pair for row in taught.lists for pair in as_pairs(row)]
    lengths = ([len(words(pair[side][0])) for pair in pairs] for side in ("chosen", "rejected"))
    found = reward_accuracy.figures(items, length_only.fit(*lengths), config.seed)
    found = {name: each for name, each in found.items() if math.isfinite(each.value)}
    if runtime.is_main:
        claims = ([item[name] for item in items] for name in ("probability", "preference"))
        title = f"ECE {found['ece'].value:.3f}, {len(items):,} held-out pairs"
        (out / "reliability.svg").write_text(calibration.figure(calibration.bins(*calibration.claims(*claims)), title))
    runtime.say("held out: " + "  ".join(f"{name} {each.value:.3f}" for name, each in found.items()))
    ends = {
        f"{name}_{end}": getattr(found[name], end) for name in WITH_INTERVAL if name in found for end in ("low", "high")
    }
    ends = {name: end for name, end in ends.items() if math.isfinite(end)}  # one held-out row has no interval
    first = {name: found[name].value for name in SHOWN if name in found}
    return first | {name: each.value for name, each in found.items()} | ends
