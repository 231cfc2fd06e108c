"""dpo: preferences put into the policy directly, in the loop of TRL's DPOTrainer.

`objective` says which loss. dpo is Direct Preference Optimization (Rafailov et al. 2023, equation 7): with the implicit
reward r(y) = beta log [p(y | x) / ref(y | x)], the loss of a pair is -log sigmoid(r(chosen) - r(rejected)). The
reference is the model it starts from. `loss_type` names any of TRL's losses, or several with `loss_weights`. kto
(Ethayarajh et al. 2024) takes lone answers with a label. orpo (Hong et al. 2024), simpo (Meng et al. 2024) and cpo (Xu
et al. 2024) take pairs and need no reference. The equations: pipeline/model/preference_losses.py.

Departures: the reference's log-probabilities are computed once, before training and on the batches that will be trained
on, so that no second model is held; they are kept beside the model. KTO's KL and the likelihood term of orpo and cpo
are of the whole optimiser step, however it is cut into micro-batches. orpo's likelihood is of the answer, not of the
prompt. The KL that is reported is exact over the vocabulary, along held-out chosen answers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, model_validator

from pipeline.errors import ConfigError, DataError
from pipeline.recipe import Data, Ref, field
from pipeline.trainer_config import TrainerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from pipeline.data.shown import ShownRow
    from pipeline.evals.implicit_reward import HeldOut
    from pipeline.evals.subject import Subject
    from pipeline.preference_trainer import Objective
    from pipeline.runtime import Runtime
    from pipeline.schedule import Row, Schedule

Loss = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
PAIRWISE = ("sigmoid", "hinge", "ipo", "sigmoid_norm")
"""Losses of one difference, which ties, smoothed labels and margins can be put into."""
SMOOTHED_BY_TRL = ("robust", "exo_pair", "aot", "aot_unpaired")


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Losses = Annotated[tuple[Loss, ...], BeforeValidator(_as_tuple)]
"""A list of TRL's names; a lone name is a list of one."""
SIDES = ("chosen", "rejected")
PRESETS: dict[str, dict[str, Any]] = {"simpo": {"beta": 2.0, "simpo_gamma": 1.0}, "cpo": {"cpo_alpha": 1.0}}
"""What an objective sets that the recipe does not."""
OF = {
    "loss_type": ("dpo",),
    "loss_weights": ("dpo",),
    "margin_weight": ("dpo",),
    "label_smoothing": ("dpo", "orpo", "simpo", "cpo"),
    "simpo_gamma": ("simpo",),
    "cpo_alpha": ("simpo", "cpo"),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}
"""Field -> the objectives it counts for."""


class DPOConfig(TrainerConfig):
    """What dpo can be told."""

    TRL = "DPOConfig"
    IGNORED = {"label_smoothing_factor": "the stage's field is `label_smoothing`"}

    init: Ref = field("sft", "the model to start from, which is also the reference")
    data: Data = field(..., "preferences: rows with a chosen and a rejected answer; kto: or answers with a label")
    objective: Literal["dpo", "kto", "orpo", "simpo", "cpo"] = field(
        "dpo", "the loss: dpo (which of them: loss_type), kto, or without a reference orpo, simpo, cpo", preset=True
    )
    learning_rate: float = field(1e-6, "peak rate", gt=0)
    beta: float = field(
        0.1, "dpo, kto: how dear it is to leave the reference; simpo (2), cpo: scale of the reward; orpo: lambda", gt=0
    )
    loss_type: Losses = field(("sigmoid",), "dpo: one of TRL's losses, or several")
    loss_weights: tuple[float, ...] | None = field(None, "dpo: weight of each loss; 1 unless set")
    label_smoothing: float = field(0.0, "share of pairs taken to be the wrong way round", ge=0, lt=0.5)
    margin_weight: float = field(0.0, "dpo: what a row's `margin` is multiplied by before it is asked for", ge=0)
    simpo_gamma: float = field(0.0, "simpo: how far chosen is to be ahead (1 with `objective: simpo`)", ge=0)
    cpo_alpha: float = field(
        0.0, "cpo, simpo: weight of the chosen answers' likelihood (1 with `objective: cpo`)", ge=0
    )
    desirable_weight: float = field(1.0, "kto: weight of the desirable answers", ge=0)
    undesirable_weight: float = field(1.0, "kto: weight of the undesirable answers", ge=0)
    eval_steps: int = field(
        0, "steps between evaluations on held-out rows; 0: at the end", unit="steps", ge=0, run_only=True
    )
    drift_prompts: int = field(64, "held-out prompts answered greedily at an evaluation; 0: none", unit="prompts", ge=0)
    max_new_tokens: int = field(64, "tokens of these answers at most", unit="tokens", gt=0)

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        """The fields that the objective sets and the recipe doesn't."""
        if not isinstance(values, dict):
            return values
        return PRESETS.get(str(values.get("objective", "dpo")), {}) | values

    @model_validator(mode="after")
    def _goes_together(self) -> DPOConfig:
        for name, objectives in OF.items():
            if self.objective not in objectives and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} does not count with objective {self.objective}: it is of {', '.join(objectives)}"
                )
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(f"{len(self.loss_weights)} loss_weights for {len(self.loss_type)} losses")
        pairwise = [name for name in self.loss_type if name in PAIRWISE]
        if self.label_smoothing and 0 < len(pairwise) < len(self.loss_type):
            raise ValueError(
                f"label_smoothing counts for all losses of {', '.join(PAIRWISE)} or for others, not for both"
            )
        if self.label_smoothing and not pairwise and not set(self.loss_type) & set(SMOOTHED_BY_TRL):
            raise ValueError(
                f"label_smoothing is of {', '.join((*PAIRWISE, *SMOOTHED_BY_TRL))}: other losses ignore it"
            )
        if self.margin_weight and ("ipo" in self.loss_type or len(pairwise) < len(self.loss_type)):
            raise ValueError("margin_weight is of the losses sigmoid, sigmoid_norm and hinge")
        if self.eval_steps and not self.held_out:
            raise ValueError("eval_steps measures held-out rows, and held_out: 0 keeps none")
        if "discopop_tau" in self.trainer and (self.objective != "dpo" or "discopop" not in self.loss_type):
            raise ValueError("trainer.discopop_tau is of loss_type discopop: other losses ignore it")
        return self

    @property
    def has_reference(self) -> bool:
        """Whether the loss looks at the reference."""
        return self.objective in ("dpo", "kto")


INPUTS = {"init": "causal-lm"}
KIND = "causal-lm"
TRAINS_ON = "preferences"
RESULT_VERSION = 2


def run(config: DPOConfig, inputs: dict[str, Any], out: Path, runtime: Runtime) -> dict[str, float]:
    """Train on pairs, or on lone answers; returns what held-out rows say of it (`pipeline.evals.implicit_reward`)."""
    from pipeline import preference_trainer
    from pipeline import trainer as adapter
    from pipeline.data.chat import stop_token_id
    from pipeline.data.formats import read_rows
    from pipeline.model.build import save_model
    from pipeline.schedule import schedule

    adapter.quieten()
    checkpoint = runtime.checkpoints.latest()
    init = inputs["init"]

    # 1. rows as tokens
    tokenizer = adapter.load_padded_tokenizer(init.model)
    stop_id = stop_token_id(tokenizer)
    length = adapter.longest_row(init.model, config.max_length, runtime)
    read = read_rows(config.data, _layout(config), held_out=config.held_out, say=runtime.say)
    rows = preference_trainer.encode(read, tokenizer, length, runtime)
    held_out = _held_out(config, read)

    # 2. the model, and what it says of held-out answers before it is trained
    model = adapter.load_policy(init.model, config, runtime)
    measure = _measuring(config, model, init.model, held_out, tokenizer, length, runtime)

    # 3. train
    plan = schedule([preference_trainer.tokens_of(row) for row in rows], config, runtime)
    figures = {"rows": float(len(rows)), "epochs": len(plan.order) / len(rows)}
    if config.objective == "kto":
        rows, plan = preference_trainer.mismatched(rows, plan, length)
    trainer = _trainer(config, _objective(config, rows), model, rows, tokenizer, plan, out, runtime)
    runtime.say(adapter.describe(trainer, plan, int(figures["rows"])))
    if config.has_reference:
        preference_trainer.add_reference(trainer, rows, plan, out / "reference.safetensors", runtime)
    shown = {"loss": "loss", "acc": "rewards/accuracies", "margin": "rewards/margins"}
    adapter.train(
        trainer, config, rows, plan, runtime, checkpoint, phase="dpo", shown=shown, state={},
        measure=lambda: preference_trainer.while_training(trainer, measure),
        measure_steps=config.eval_steps,
    )  # fmt: skip

    # 4. save, then evaluate
    flops = adapter.training_flops(trainer, plan)
    model = adapter.trained_model(trainer)
    if runtime.is_main:
        save_model(model, out / "model", init.model, [stop_id], tokenizer.pad_token_id)
    runtime.barrier()
    figures |= measure(model) if config.held_out else {}
    runtime.metrics.log(plan.steps, int(plan.tokens[-1]), **figures)
    read_only = preference_trainer.tokens_only_read(rows, plan, config.objective)
    return {**figures, "flops": flops + adapter.forward_flops(model, plan, read_only)}


def preview(config: DPOConfig, inputs: dict[str, Any], count: int) -> list[ShownRow]:
    """The answers of the first rows, marked: both sides of a pair, or the lone answers of kto."""
    from pipeline.data.formats import read_rows
    from pipeline.data.shown import ShownRow
    from pipeline.data.tokenizers import load_tokenizer
    from pipeline.evals.subject import chat_request

    tokenizer = load_tokenizer(inputs["init"].model)
    shown = []
    for place, row in enumerate(read_rows(config.data, _layout(config), held_out=config.held_out)[:count], 1):
        answers = {f"pair {place}, {side}": row[side] for side in SIDES if side in row}
        if not answers:
            answers = {f"answer {place}, {'desirable' if row['label'] else 'undesirable'}": row["completion"]}
        for title, answer in answers.items():
            request = chat_request(tokenizer, row["prompt"], answer)
            is_trained = [False] * len(request.prompt) + [True] * len(request.completion)
            shown.append(ShownRow(title, [*request.prompt, *request.completion], is_trained))
    return shown


def _layout(config: DPOConfig) -> str:
    return "unpaired" if config.objective == "kto" else "preference"


def _objective(config: DPOConfig, rows: list[Row]) -> Objective | None:
    """The loss of ours that is asked for; None where it is TRL's own."""
    from pipeline.preference_trainer import Objective

    if config.objective == "dpo":
        if config.margin_weight and not any(row["margin"] for row in rows):
            raise DataError(
                "margin_weight multiplies a row's `margin`, and no row has one",
                where="dpo.data",
                mend="rows with `margin`, by how much chosen is better; or margin_weight: 0",
            )
        is_unsure = any(row["preference"] < 1 for row in rows)
        if is_unsure and not set(config.loss_type) <= set(PAIRWISE):
            raise DataError(
                f"some rows are ties or uncertain (`preference` below 1), and {', '.join(config.loss_type)} takes none",
                where="dpo.data",
                mend=f"loss_type of {', '.join(PAIRWISE)}; or take these rows out",
            )
        is_smoothed = bool(config.label_smoothing) and set(config.loss_type) <= set(PAIRWISE)
        if not (is_unsure or is_smoothed or config.margin_weight):
            return None
    lost = sorted({"use_weighting", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef"} & set(config.trainer))
    if lost:
        raise ConfigError(
            f"`{lost[0]}` is of TRL's own losses, without label smoothing, margins and ties", where="dpo.trainer"
        )
    return Objective(
        name=config.objective,
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        loss_types=config.loss_type,
        loss_weights=config.loss_weights or (1.0,) * len(config.loss_type),
        margin_weight=config.margin_weight,
        simpo_gamma=config.simpo_gamma,
        nll_weight=1.0 if config.objective == "orpo" else config.cpo_alpha,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
    )


def _trainer(
    config: DPOConfig,
    objective: Objective | None,
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
    from pipeline.preference_trainer import PreferenceTrainer

    if config.objective == "kto" and plan.batch < 2:
        raise ConfigError(
            "kto takes its KL from other rows of the step, and there is one",
            where="dpo.per_device_train_batch_size",
            mend="--set dpo.per_device_train_batch_size=8",
        )
    own = {
        "beta": config.beta,
        "loss_type": list(config.loss_type),
        "loss_weights": list(config.loss_weights) if config.loss_weights else None,
        "label_smoothing": config.label_smoothing,
        "precompute_ref_log_probs": True,
        "disable_dropout": False,
        "remove_unused_columns": False,
    }
    with adapter.building():
        trainer = PreferenceTrainer(
            model=model,
            args=adapter.trainer_arguments(Arguments, config, plan, out, runtime, own),
            train_dataset=Dataset.from_list(rows[:1]),
            processing_class=tokenizer,
            peft_config=adapter.lora(config.peft, "CAUSAL_LM"),
        )
    if objective is not None:
        trainer.use(objective)
    if not config.trainer.get("use_weighting"):  # its weights need a figure of TRL's own head
        trim_head(trainer.model)
    adapter.fit_attention(
        trainer, max(len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows)
    )
    return trainer


def _held_out(config: DPOConfig, read: list[Row]) -> HeldOut:
    """The rows that are only measured, and what lengths alone say. A tie has no right answer: it is left out."""
    from pipeline.data.formats import read_rows
    from pipeline.data.messages import words
    from pipeline.data.preferences import TIE, pairs_of
    from pipeline.evals import length_only
    from pipeline.evals.implicit_reward import HeldOut

    is_kto = config.objective == "kto"
    rows: list[Row] = []
    if config.held_out:
        rows = read_rows(config.data, _layout(config), split="held_out", held_out=config.held_out)
        rows = [row for row in rows if is_kto or row["preference"] > TIE]
        rows = rows[: config.eval_rows * (2 if is_kto else 1)]  # as many answers, so that the same pairs are measured
    known = pairs_of(read) if is_kto else [row for row in read if row["preference"] > TIE]
    pairs = pairs_of(rows) if is_kto else rows
    lengths = ([len(words(pair[side][0])) for pair in known] for side in SIDES)
    return HeldOut(
        pairs=pairs,
        lone=rows if is_kto else [],
        drift_prompts=config.drift_prompts,
        max_new_tokens=config.max_new_tokens,
        length_only=length_only.fit(*lengths),
        beta=config.beta,
        seed=config.seed,
    )


def _measuring(
    config: DPOConfig,
    model: PreTrainedModel,
    init: Path,
    held_out: HeldOut,
    tokenizer: PreTrainedTokenizerFast,
    length: int,
    runtime: Runtime,
) -> Callable[[PreTrainedModel], dict[str, float]]:
    """What measures a policy against the start, of which `model` is listened to here, before it is trained."""
    from pipeline import trainer as adapter
    from pipeline.evals import implicit_reward

    with adapter.autocast(config, runtime):
        before = implicit_reward.listen(_subject(model, tokenizer, length, runtime.check_stop), held_out)

    def measure(policy: PreTrainedModel) -> dict[str, float]:
        start = adapter.load_policy(init, config, runtime)
        with adapter.autocast(config, runtime):
            subject = _subject(policy, tokenizer, length, runtime.check_stop)
            found = implicit_reward.figures(subject, start, held_out, before)
        runtime.say("held out: " + ("  ".join(f"{name} {value:.3f}" for name, value in found.items()) or "no row fits"))
        return found

    return measure


def _subject(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, length: int, tick: Callable[[], None]
) -> Subject:
    """The model as the evaluations take it."""
    from pipeline.evals.likelihood import TOKEN_BUDGET
    from pipeline.evals.subject import Subject

    return Subject("dpo", model, tokenizer, True, length, TOKEN_BUDGET, tick)
