"""dpo: preferences put into the policy directly, by TRL's DPOTrainer and its losses.

Direct Preference Optimization (Rafailov et al. 2023, equation 7): with the implicit reward r(y) = beta log [p(y | x) /
ref(y | x)], the loss of a pair is -log sigmoid(r(chosen) - r(rejected)). The reference is the model it starts from.
`loss_type` names any of TRL's losses, or several with `loss_weights`.

Departures: the reference's log-probabilities are computed once, before training and on the batches that will be trained
on, so that no second model is held; they are kept beside the model. The KL that is reported is exact over the
vocabulary, along held-out chosen answers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator

from pipeline.errors import DataError
from pipeline.recipe import Data, Ref, field
from pipeline.trainer_config import TrainerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from pipeline.data.shown import ShownRow
    from pipeline.evals.likelihood import Request
    from pipeline.evals.subject import Subject
    from pipeline.runtime import Runtime
    from pipeline.schedule import Row, Schedule

Loss = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Losses = Annotated[tuple[Loss, ...], BeforeValidator(_as_tuple)]
"""A list of TRL's names; a lone name is a list of one."""
SIDES = ("chosen", "rejected")
KL_ROWS = 128
"""Held-out answers along which the KL is taken, at most: two forwards each, one row at a time."""


class DPOConfig(TrainerConfig):
    """What dpo can be told."""

    init: Ref = field("sft", "the model to start from, which is also the reference")
    data: Data = field(..., "preferences: rows with a chosen and a rejected answer")
    learning_rate: float = field(1e-6, "peak rate", gt=0)
    beta: float = field(0.1, "how dear it is to leave the reference", gt=0)
    loss_type: Losses = field(("sigmoid",), "one of TRL's losses, or several")
    loss_weights: tuple[float, ...] | None = field(None, "weight of each loss; 1 unless set")
    label_smoothing: float = field(0.0, "share of pairs taken to be the wrong way round", ge=0, lt=0.5)


INPUTS = {"init": "causal-lm"}
KIND = "causal-lm"
TRAINS_ON = "preferences"
RESULT_VERSION = 1


def run(config: DPOConfig, inputs: dict[str, Any], out: Path, runtime: Runtime) -> dict[str, float]:
    """Train on pairs; returns held-out preference accuracy, by kind of negative, margin and KL from the reference."""
    from pipeline import trainer as adapter
    from pipeline.data.chat import stop_token_id
    from pipeline.data.formats import read_rows
    from pipeline.evals.preference_accuracy import score
    from pipeline.model.build import save_model
    from pipeline.schedule import schedule

    adapter.quieten()
    checkpoint = runtime.checkpoints.latest()
    init = inputs["init"]

    # 1. pairs as tokens
    tokenizer = adapter.load_padded_tokenizer(init.model)
    stop_id = stop_token_id(tokenizer)
    length = adapter.longest_row(init.model, config.max_length, runtime)
    pairs = read_rows(config.data, "preference", held_out=config.held_out, say=runtime.say)
    rows = _encode(pairs, tokenizer, length, runtime)
    held_out: list[Row] = []
    if config.held_out:
        held_out = read_rows(config.data, "preference", split="held_out", held_out=config.held_out)[: config.eval_rows]

    # 2. the model, and what it says of held-out answers before it is trained
    model = adapter.load_policy(init.model, config, runtime)
    with adapter.autocast(config, runtime):
        reference = score(_subject(model, tokenizer, length, runtime), held_out)

    # 3. train
    plan = schedule([_tokens(row) for row in rows], config, runtime)
    trainer = _trainer(config, model, rows, tokenizer, plan, out, runtime)
    adapter.fit_attention(
        trainer, max(len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows)
    )
    runtime.say(adapter.describe(trainer, plan, len(rows)))
    _add_reference(trainer, rows, plan, out / "reference.safetensors", runtime)
    shown = {"loss": "loss", "acc": "rewards/accuracies", "margin": "rewards/margins"}
    adapter.train(trainer, config, rows, plan, runtime, checkpoint, phase="dpo", shown=shown, state={})

    # 4. save, then evaluate
    flops = adapter.training_flops(trainer, plan)
    model = adapter.trained_model(trainer)
    if runtime.is_main:
        save_model(model, out / "model", init.model, [stop_id], tokenizer.pad_token_id)
    runtime.barrier()
    figures = {"rows": float(len(rows)), "epochs": len(plan.order) / len(rows)}
    if held_out:
        start = adapter.load_policy(init.model, config, runtime)
        with adapter.autocast(config, runtime):
            subject = _subject(model, tokenizer, length, runtime)
            figures |= _held_out(config, subject, start, held_out, reference, pairs, runtime)
    runtime.metrics.log(plan.steps, int(plan.tokens[-1]), **figures)
    return {**figures, "flops": flops}


def preview(config: DPOConfig, inputs: dict[str, Any], count: int) -> list[ShownRow]:
    """Both sides of the first pairs, the answers marked."""
    from pipeline.data.formats import read_rows
    from pipeline.data.shown import ShownRow
    from pipeline.data.tokenizers import load_tokenizer
    from pipeline.evals.subject import chat_request

    tokenizer = load_tokenizer(inputs["init"].model)
    shown = []
    for place, pair in enumerate(read_rows(config.data, "preference", held_out=config.held_out)[:count], 1):
        for side in SIDES:
            row = chat_request(tokenizer, pair["prompt"], pair[side][0]["content"])
            is_trained = [False] * len(row.prompt) + [True] * len(row.completion)
            shown.append(ShownRow(f"pair {place}, {side}", [*row.prompt, *row.completion], is_trained))
    return shown


def _trainer(
    config: DPOConfig,
    model: PreTrainedModel,
    rows: list[Row],
    tokenizer: PreTrainedTokenizerFast,
    plan: Schedule,
    out: Path,
    runtime: Runtime,
) -> Any:
    """TRL's trainer of this config."""
    from datasets import Dataset
    from trl import DPOConfig as Arguments

    from pipeline import trainer as adapter
    from pipeline.model.trained_positions import trim_head

    own = {
        "beta": config.beta,
        "loss_type": list(config.loss_type),
        "loss_weights": list(config.loss_weights) if config.loss_weights else None,
        "label_smoothing": config.label_smoothing,
        "precompute_ref_log_probs": True,
        "disable_dropout": False,
    }
    with adapter.building():
        trainer = adapter.GivenDPOTrainer(
            model=model,
            args=adapter.trainer_arguments(Arguments, config, plan, out, runtime, own),
            train_dataset=Dataset.from_list(rows[:1]),
            processing_class=tokenizer,
            peft_config=adapter.lora(config.peft, "CAUSAL_LM"),
        )
    if not config.trainer.get("use_weighting"):  # its weights need a figure of TRL's own head
        trim_head(trainer.model)
    return trainer


def _encode(pairs: list[Row], tokenizer: PreTrainedTokenizerFast, length: int, runtime: Runtime) -> list[Row]:
    """Each pair as the prompt's ids and both answers', stop tokens included. One with a side too long is left out."""
    from pipeline.evals.subject import chat_request

    rows: list[Row] = []
    with runtime.progress("encode", len(pairs), "pairs") as bar:
        for pair in pairs:
            chosen, rejected = (chat_request(tokenizer, pair["prompt"], pair[side][0]["content"]) for side in SIDES)
            if chosen == rejected:
                raise DataError(
                    f"chosen and rejected are the same tokens: {pair['chosen'][0]['content'][:60]!r}",
                    where="dpo.data",
                    mend="take the row out",
                )
            assert chosen.prompt == rejected.prompt
            answers = {"chosen_ids": list(chosen.completion), "rejected_ids": list(rejected.completion)}
            if len(chosen.prompt) + max(map(len, answers.values())) <= length:
                rows.append({"prompt_ids": list(chosen.prompt), **answers})
            bar.advance()
            runtime.check_stop()
    if len(rows) < len(pairs):
        runtime.say(f"{len(pairs) - len(rows):,} pairs with a side longer than {length:,} tokens are left out")
    if not rows:
        raise DataError(f"every pair is longer than {length:,} tokens", where="dpo.data", mend="a larger max_length")
    return rows


def _tokens(row: Row) -> int:
    """What a pair costs: both its rows."""
    return 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])


def _add_reference(trainer: Any, rows: list[Row], plan: Schedule, path: Path, runtime: Runtime) -> None:
    """Put the reference's log-probabilities of both answers into the rows that the run will read.

    They are computed by TRL's own forward on the very batches that will be trained on (a row's first, where there are
    several epochs), so that the first step's margins are zero in bf16 too. Kept at `path` for a resumed run.
    """
    import numpy as np
    from safetensors.numpy import load_file, save_file

    from pipeline import trainer as adapter

    if path.exists():
        kept = load_file(path)
    else:
        used, first = np.unique(plan.order, return_index=True)
        micro = trainer.args.per_device_train_batch_size
        batches = plan.order.reshape(-1, micro)
        needed = np.unique(first // micro)

        def compute(indices: list[int]) -> Any:
            found = []
            with runtime.progress("reference", len(indices), "batches") as bar:
                for index in indices:
                    batch = trainer.data_collator([rows[row] for row in batches[needed[index]]])
                    batch = {name: tensor.to(runtime.device) for name, tensor in batch.items()}
                    sides = trainer.compute_ref_log_probs(trainer.model, batch)
                    found.append(np.stack([side.float().cpu().numpy() for side in sides], axis=1))
                    bar.advance()
                    runtime.check_stop()
            return np.stack(found) if found else np.zeros((0, micro, 2))

        values = adapter.over_ranks(runtime, (len(needed), micro, 2), compute)
        places = np.searchsorted(needed, first // micro)
        kept = {"rows": used, "log_probs": values[places, first % micro].astype(np.float32)}
        if runtime.is_main:
            save_file(kept, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
    runtime.barrier()
    for row, (chosen, rejected) in zip(kept["rows"].tolist(), kept["log_probs"].tolist(), strict=True):
        rows[row] |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}


def _subject(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, length: int, runtime: Runtime) -> Subject:
    """The model as the evaluations take it."""
    from pipeline.evals.likelihood import TOKEN_BUDGET
    from pipeline.evals.subject import Subject

    return Subject("dpo", model, tokenizer, True, length, TOKEN_BUDGET, runtime.check_stop)


def _held_out(
    config: DPOConfig,
    subject: Subject,
    start: PreTrainedModel,
    held_out: list[Row],
    reference: list[Row],
    pairs: list[Row],
    runtime: Runtime,
) -> dict[str, float]:
    """Accuracy and margin of the implicit reward on held-out pairs, by kind and beside lengths; KL a token."""
    import numpy as np

    from pipeline.evals import length_only, preference_accuracy
    from pipeline.evals.subject import chat_request

    items = preference_accuracy.score(subject, held_out)
    if not items:
        runtime.say("no held-out pair fits the length: nothing is measured")
        return {}
    lengths = ([len(pair[side][0]["content"]) for pair in pairs] for side in SIDES)
    found = preference_accuracy.figures(items, reference, length_only.fit(*lengths), config.seed)
    margins = [
        (item["chosen"] - before["chosen"]) - (item["rejected"] - before["rejected"])
        for item, before in zip(items, reference, strict=True)
    ]
    kept = [held_out[item["item"]] for item in items[:KL_ROWS]]
    answers = [chat_request(subject.tokenizer, row["prompt"], row["chosen"][0]["content"]) for row in kept]
    runtime.say("held out: " + "  ".join(f"{name} {each.value:.3f}" for name, each in found.items()))
    return {
        **{name: each.value for name, each in found.items()},
        "margin": config.beta * float(np.mean(margins)),
        "kl_per_token": _mean_kl(subject.model, start, answers, runtime),
    }


def _mean_kl(policy: PreTrainedModel, start: PreTrainedModel, answers: list[Request], runtime: Runtime) -> float:
    """KL(policy || reference) of the next token in nats, over the whole vocabulary, mean over the answers' places."""
    import torch

    total, count = 0.0, 0
    with torch.inference_mode():
        for answer in answers:
            ids_1T = torch.tensor([[*answer.prompt, *answer.completion]], device=policy.device)
            places = slice(len(answer.prompt) - 1, ids_1T.shape[1] - 1)
            log_p_SV, log_q_SV = (
                model(input_ids=ids_1T, use_cache=False).logits[0, places].float().log_softmax(dim=-1)
                for model in (policy, start)
            )
            total += float((log_p_SV.exp() * (log_p_SV - log_q_SV)).sum())
            count += len(answer.completion)
            runtime.check_stop()
    return total / count
