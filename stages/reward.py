"""reward: a model that gives an answer a number, from preferences, by TRL's RewardTrainer.

Bradley-Terry: the loss of a pair is -log sigmoid(r(chosen) - r(rejected)) (Stiennon et al. 2020; Ouyang et al. 2022,
equation 1), plus `center_rewards_coefficient` × (r(chosen) + r(rejected))² (Eisenstein et al. 2023, equation 2), which
keeps the numbers near zero. The model is the sft model's trunk with a new head, read at the row's stop token.

Departures: the score is read at a row's last token by its length, so that a pad token that is also the stop token does
no harm; it is given out as (raw - mean) / std over the sft demonstrations (InstructGPT shifts by the mean alone), and a
reward model without both is refused wherever one is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import DataError
from pipeline.recipe import Data, Ref, field
from pipeline.trainer_config import TrainerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from pipeline.data.shown import ShownRow
    from pipeline.model.reward import RewardModel
    from pipeline.runtime import Runtime
    from pipeline.schedule import Row, Schedule

SIDES = ("chosen", "rejected")
SCORED_TOKENS = 4096
"""Tokens of a batch that is only scored, padding included."""


class RewardConfig(TrainerConfig):
    """What reward can be told."""

    TRL = "RewardConfig"

    init: Ref = field("sft", "the model whose trunk it starts from; the policy's tokenizer and chat template")
    data: Data = field(..., "preferences: rows with a chosen and a rejected answer")
    demonstrations: Data | None = field(None, "rows whose scores get mean 0 and deviation 1; sft's data unless set")
    demonstration_rows: int = field(512, "of those, drawn at random", unit="rows", gt=1)
    learning_rate: float = field(1e-4, "peak rate", gt=0)
    center_rewards_coefficient: float | None = field(0.01, "weight of the squared sum of a pair's scores", ge=0)


INPUTS = {"init": "causal-lm"}
KIND = "reward-model"
TRAINS_ON = "preferences"
DEFAULTS = {"demonstrations": "demonstrations"}
RESULT_VERSION = 1


def run(config: RewardConfig, inputs: dict[str, Any], out: Path, runtime: Runtime) -> dict[str, float]:
    """Train on pairs; returns held-out accuracy, by kind of negative, beside what lengths alone reach."""
    import torch

    from pipeline import trainer as adapter
    from pipeline.data.chat import stop_token_id
    from pipeline.data.formats import read_rows
    from pipeline.data.tokenizers import load_tokenizer
    from pipeline.model.reward import (
        RewardModel,
        build_reward_model,
        pooling_pad_id,
        save_adapter,
        save_reward_model,
    )
    from pipeline.runtime import derive_seed
    from pipeline.schedule import schedule

    adapter.quieten()
    checkpoint = runtime.checkpoints.latest()
    init = inputs["init"]

    # 1. pairs as tokens
    tokenizer = load_tokenizer(init.model)
    stop_id = stop_token_id(tokenizer)
    length = adapter.longest_row(init.model, config.max_length, runtime)
    pairs = read_rows(config.data, "preference", held_out=config.held_out, say=runtime.say)
    rows = _encode(pairs, tokenizer, length, runtime)

    # 2. model
    pad_id = pooling_pad_id(tokenizer, stop_id)
    head_seed = derive_seed(config.seed, "reward head")
    model = build_reward_model(init.model, pad_id, head_seed, dtype=getattr(torch, config.dtype)).to(runtime.device)
    adapter.no_dropout(model)

    # 3. train
    plan = schedule([len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows], config, runtime)
    trainer = _trainer(config, model, rows, load_tokenizer(init.model), pad_id, plan, out, runtime)
    adapter.fit_attention(trainer, max(len(ids) for row in rows for ids in row.values()))
    runtime.say(adapter.describe(trainer, plan, len(rows)))
    shown = {"loss": "loss", "acc": "accuracy", "margin": "margin"}
    adapter.train(trainer, config, rows, plan, runtime, checkpoint, phase="reward", shown=shown, state={})

    # 4. the scale of its scores, then save, then evaluate
    flops = adapter.training_flops(trainer, plan)
    if config.peft is not None and runtime.is_main:
        save_adapter(adapter.adapters_of(trainer), out / "model")
    bf16 = runtime.bf16 if config.bf16 is None else config.bf16
    raw = RewardModel(
        adapter.trained_model(trainer), 0.0, 1.0, (stop_id,), init.tokenizer_hash, init.template_hash, bf16
    )
    mean, std = _normaliser(config, raw, tokenizer, pairs, length, runtime)
    if runtime.is_main:
        save_reward_model(raw.model, out / "model", init, mean=mean, std=std, suffix_ids=[stop_id])
    runtime.barrier()
    figures = {"mean": mean, "std": std, "rows": float(len(rows)), "epochs": len(plan.order) / len(rows)}
    if config.held_out:
        figures |= _held_out(config, raw, tokenizer, pairs, length, runtime)
    runtime.metrics.log(plan.steps, int(plan.tokens[-1]), **figures)
    return {**figures, "flops": flops}


def preview(config: RewardConfig, inputs: dict[str, Any], count: int) -> list[ShownRow]:
    """Both sides of the first pairs; the token that the score is read at marked."""
    from pipeline.data.chat import encode_messages
    from pipeline.data.formats import read_rows
    from pipeline.data.shown import ShownRow
    from pipeline.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(inputs["init"].model)
    shown = []
    for place, pair in enumerate(read_rows(config.data, "preference", held_out=config.held_out)[:count], 1):
        for side in SIDES:
            ids = encode_messages(tokenizer, [*pair["prompt"], *pair[side]]).input_ids
            shown.append(ShownRow(f"pair {place}, {side}", ids, [False] * (len(ids) - 1) + [True]))
    return shown


def _trainer(
    config: RewardConfig,
    model: PreTrainedModel,
    rows: list[Row],
    tokenizer: PreTrainedTokenizerFast,
    pad_id: int,
    plan: Schedule,
    out: Path,
    runtime: Runtime,
) -> Any:
    """TRL's trainer of this config; it makes `pad_id` the tokenizer's pad."""
    from datasets import Dataset
    from trl import RewardConfig as Arguments
    from trl import RewardTrainer

    from pipeline import trainer as adapter

    own = {
        "center_rewards_coefficient": config.center_rewards_coefficient,
        "pad_token": tokenizer.convert_ids_to_tokens(pad_id),
        "disable_dropout": False,
    }
    with adapter.building():
        return RewardTrainer(
            model=model,
            args=adapter.trainer_arguments(Arguments, config, plan, out, runtime, own),
            train_dataset=Dataset.from_list(rows[:1]),
            processing_class=tokenizer,
            peft_config=adapter.lora(config.peft, "SEQ_CLS", modules_to_save=["score"]),
        )


def _encode(pairs: list[Row], tokenizer: PreTrainedTokenizerFast, length: int, runtime: Runtime) -> list[Row]:
    """Both sides of each pair as ids, from the prompt to the stop token. A pair with a side too long is left out."""
    from pipeline.data.chat import encode_messages

    rows: list[Row] = []
    with runtime.progress("encode", len(pairs), "pairs") as bar:
        for pair in pairs:
            chosen, rejected = (encode_messages(tokenizer, [*pair["prompt"], *pair[side]]).input_ids for side in SIDES)
            if chosen == rejected:
                raise DataError(
                    f"chosen and rejected are the same tokens: {pair['chosen'][0]['content'][:60]!r}",
                    where="reward.data",
                    mend="take the row out",
                )
            if max(len(chosen), len(rejected)) <= length:
                rows.append({"chosen_ids": chosen, "rejected_ids": rejected})
            bar.advance()
            runtime.check_stop()
    if len(rows) < len(pairs):
        runtime.say(f"{len(pairs) - len(rows):,} pairs with a side longer than {length:,} tokens are left out")
    if not rows:
        raise DataError(f"every pair is longer than {length:,} tokens", where="reward.data", mend="a larger max_length")
    return rows


def _normaliser(
    config: RewardConfig,
    raw: RewardModel,
    tokenizer: PreTrainedTokenizerFast,
    pairs: list[Row],
    length: int,
    runtime: Runtime,
) -> tuple[float, float]:
    """Mean and standard deviation of the raw scores of demonstrations; of the chosen answers where there are none."""
    import numpy as np
    import torch

    from pipeline.data.chat import encode_messages
    from pipeline.data.formats import read_rows
    from pipeline.evals.reward_accuracy import rewards

    if config.demonstrations is None:
        runtime.say("no demonstrations: the chosen answers set the scale of the scores")
        messages = [[*pair["prompt"], *pair["chosen"]] for pair in pairs]
    else:
        found = read_rows(config.demonstrations, "messages", held_out=config.held_out)
        messages = [row["messages"] for row in found]
    order = torch.randperm(len(messages), generator=runtime.generator("demonstrations")).tolist()
    texts: list[list[int]] = []
    for index in order:
        ids = encode_messages(tokenizer, messages[index]).input_ids
        if len(ids) <= length:
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
    config: RewardConfig,
    raw: RewardModel,
    tokenizer: PreTrainedTokenizerFast,
    pairs: list[Row],
    length: int,
    runtime: Runtime,
) -> dict[str, float]:
    """Accuracy on held-out pairs, over all and by kind, and of a scorer that knows only how long the answers are."""
    from pipeline.data.formats import read_rows
    from pipeline.evals import length_only, reward_accuracy

    held_out = read_rows(config.data, "preference", split="held_out", held_out=config.held_out)[: config.eval_rows]
    items = reward_accuracy.score(
        raw, tokenizer, held_out, max_length=length, token_budget=SCORED_TOKENS, tick=runtime.check_stop
    )
    if not items:
        runtime.say("no held-out pair fits the length: nothing is measured")
        return {}
    lengths = ([len(pair[side][0]["content"]) for pair in pairs] for side in SIDES)
    found = reward_accuracy.figures(items, length_only.fit(*lengths), config.seed)
    runtime.say("held out: " + "  ".join(f"{name} {each.value:.3f}" for name, each in found.items()))
    return {name: each.value for name, each in found.items()}
