"""The one adapter to TRL's trainers: fields through, rows in our order, progress, stop, checkpoints.

A stage makes tokens, asks `pipeline.schedule` which row stands where, builds TRL's config with `trainer_arguments` and
TRL's trainer with `building`, and hands both to `train`. What TRL and transformers are not asked to do:

- order: the run is unrolled to steps × batch rows, whose order is a pure function of the seed and the rows' lengths,
  and read in sequence. So an epoch has no short tail and a resume needs the step alone.
- checkpoints: the Trainer's folder counts only once `Checkpoints.adopt` has put its marker there. Every line of
  metrics ends at a checkpoint, so that a resumed run writes the lines an undisturbed one would.
- evaluation: the stage measures after it has saved.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import datasets
import huggingface_hub
import numpy as np
import numpy.typing as npt
import torch
import transformers
from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
)
from trl import DPOTrainer, RewardTrainer, SFTTrainer

from pipeline.artifacts import need_disk
from pipeline.checkpoint import Checkpoint
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import ConfigError, MachineError
from pipeline.hardware import peak_flops
from pipeline.model.adapters import lora
from pipeline.model.attention import restore_attention, use_plain_products
from pipeline.model.build import flops_per_token, load_causal_lm, reach
from pipeline.model.four_bit import merged_onto
from pipeline.model.optim import muon
from pipeline.runtime import Runtime, share_batch
from pipeline.schedule import Row, Schedule, Unrolled
from pipeline.trainer_config import TrainerConfig
from pipeline.trainer_options import inexact, problem_with
from pipeline.trainer_watch import OWES, Watch

__all__ = [
    "DPOTrainer",
    "RewardTrainer",
    "SFTTrainer",
    "lora",
]  # imported with this module: before a stage is forked off

Arguments = TypeVar("Arguments")


def quieten() -> None:
    """No bars, advice or telemetry of the libraries: what there is to say, the stage says."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    warnings.filterwarnings("ignore", category=FutureWarning)


# ---- TRL's config and trainer ----


def trainer_arguments(
    kind: Callable[..., Arguments],
    config: TrainerConfig,
    plan: Schedule,
    out: Path,
    runtime: Runtime,
    own: Mapping[str, Any],
) -> Arguments:
    """TRL's config of this `kind`: the recipe's fields, the stage's `own`, then the recipe's `trainer:` mapping.

    Raises ConfigError for a key of `trainer:` that TRL's config lacks, that has a field of its own in the recipe, or
    that is the frame's to decide; and for a value TRL refuses.
    """
    passed = {**{name: getattr(config, name) for name in SHARED_NAMES}, **_decided(config, plan, out, runtime), **own}
    _check_passed_on(config, passed, {each.name for each in dataclasses.fields(kind) if each.init})  # type: ignore[arg-type]
    with building(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = kind(**passed, **config.trainer)
    if runtime.world_size == 1 and runtime.device.type == "cuda":
        arguments._n_gpu = 1  # type: ignore[attr-defined]  # one process is one GPU, never DataParallel
    return arguments


SHARED_NAMES = (
    "learning_rate", "max_length", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm",
    "gradient_checkpointing", "logging_steps", "save_steps", "seed",
)  # fmt: skip
"""Fields that a recipe and TRL call alike."""


def _decided(config: TrainerConfig, plan: Schedule, out: Path, runtime: Runtime) -> dict[str, Any]:
    """What the frame decides: this process's share of the batch, the device, and all that a resume hangs on."""
    batch_rows, micro_steps = share_batch(
        config.per_device_train_batch_size,
        config.gradient_accumulation_steps,
        runtime.world_size,
        "per_device_train_batch_size",
    )
    return {
        "per_device_train_batch_size": batch_rows,
        "gradient_accumulation_steps": micro_steps,
        "max_steps": plan.steps,
        "bf16": is_bf16(config, runtime),
        "use_cpu": runtime.device.type == "cpu",
        "output_dir": str(out / "checkpoints"),
        "train_sampling_strategy": "sequential",
        "eval_strategy": "no",
        "save_strategy": "steps",
        "save_total_limit": None,
        "logging_strategy": "steps",
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": runtime.device.type == "cuda",
    }


def _check_passed_on(config: TrainerConfig, passed: Mapping[str, Any], known: set[str]) -> None:
    """ConfigError for a key of the recipe's `trainer:` that is set elsewhere or unknown to TRL."""
    for key in config.trainer:
        problem = problem_with(key, known, type(config).model_fields)
        if not problem and key in passed:
            problem = "set by the stage"
        if problem:
            raise ConfigError(f"`{key}`: {problem}", where="trainer")


@contextmanager
def building() -> Iterator[None]:
    """Turns what TRL refuses while a config or trainer is made into a ConfigError."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise ConfigError(f"TRL refuses this: {error}", where="the stage's fields and `trainer`") from error


def adapters_of(trainer: Any) -> PeftModel:
    """What is trained by `peft`, before `trained_model` merges it."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    assert isinstance(model, PeftModel)
    return model


def trained_model(trainer: Any, plain: PreTrainedModel | None = None) -> PreTrainedModel:
    """The trained model without the trainer's wrappers: adapters merged, in evaluation mode, attention as loaded.
    `plain`: the model that adapters are added to, where the trainer's holds its weights in four bits."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if plain is not None:
        return merged_onto(plain, model.get_base_model()).eval()
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    restore_attention(model)
    return model.eval()


def longest_row(folder: Path, max_length: int, runtime: Runtime) -> int:
    """Tokens of a row at most: `max_length`, lowered to what the positions of the model in `folder` reach."""
    most = reach(folder)
    if most is None or most >= max_length:
        return max_length
    runtime.say(f"the model reaches {most:,} tokens: max_length is lowered to that")
    return most


def load_padded_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer, eos standing in for a missing pad: masks come from lengths, so eos is trained all the same."""
    tokenizer = load_tokenizer(folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(folder: Path, config: TrainerConfig, runtime: Runtime) -> PreTrainedModel:
    """The language model in `folder` on the runtime's device, without dropout, in evaluation mode."""
    model = load_causal_lm(folder, dtype=getattr(torch, config.dtype)).to(runtime.device)
    no_dropout(model)
    return model.eval()


def no_dropout(model: PreTrainedModel) -> None:
    """Dropout off for good; an adapter's own, asked for by `peft.lora_dropout`, comes later and stays."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def fit_attention(trainer: Any, longest: int) -> None:
    """The faster attention for training on rows of up to `longest` tokens, until `trained_model` puts the loaded one
    back; call before any forward of it. Rows that are laid end to end count as one."""
    model = trainer.model.get_base_model() if isinstance(trainer.model, PeftModel) else trainer.model
    end_to_end = trainer.args.per_device_train_batch_size if getattr(trainer, "padding_free", False) else 1
    use_plain_products(model, trainer.args.bf16, longest * end_to_end)


def autocast(config: TrainerConfig, runtime: Runtime) -> torch.autocast:
    """The precision of the training steps, for what is computed beside them."""
    return torch.autocast(runtime.device.type, dtype=torch.bfloat16, enabled=is_bf16(config, runtime))


def is_bf16(config: TrainerConfig, runtime: Runtime) -> bool:
    """Whether the products of the training steps are in bf16."""
    return runtime.bf16 if config.bf16 is None else config.bf16


def describe(trainer: Any, plan: Schedule, rows: int) -> str:
    """One line on what is about to run."""
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    per_epoch = f"{rows:,} rows, {len(plan.order) / rows:.2f} epochs"
    kind = "bf16" if trainer.args.bf16 else "fp32"
    return f"{trainable / 1e6:.1f} M trainable parameters, {plan.steps:,} steps of {plan.batch} ({per_epoch}), {kind}"


def training_flops(trainer: Any, plan: Schedule, plain: PreTrainedModel | None = None) -> float:
    """FLOPs of the whole run: 6 a token and parameter; 4 where only adapters are trained, 2 for what is frozen below
    what is trained. `plain`: the model to count by, where the trainer's holds its weights in four bits."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    is_adapted = isinstance(model, PeftModel)
    base = plain or (model.get_base_model() if is_adapted else model)
    sizes = [(p.numel(), p.requires_grad) for p in base.parameters()]
    trained = sum(size for size, is_trained in sizes if is_trained) / sum(size for size, _ in sizes)
    share = 2 / 3 if is_adapted else (1 + 2 * trained) / 3
    return float(plan.tokens[-1]) * flops_per_token(base, _mean_length(plan)) * share


def forward_flops(model: PreTrainedModel, plan: Schedule, tokens: int | None = None) -> float:
    """FLOPs of a model that only reads: 2 a token and parameter; all tokens of the run unless their number is given."""
    return float(plan.tokens[-1] if tokens is None else tokens) * flops_per_token(model, _mean_length(plan)) / 3


def _mean_length(plan: Schedule) -> int:
    return int(plan.tokens[-1] / len(plan.order))


def over_ranks(
    runtime: Runtime, shape: tuple[int, ...], compute: Callable[[list[int]], npt.ArrayLike]
) -> npt.NDArray[np.float64]:
    """`compute` of the indices below `shape[0]`, each rank a share of them; every rank gets all values, in `shape`."""
    own = list(range(runtime.rank, shape[0], runtime.world_size))
    values = torch.zeros(shape, dtype=torch.float64)
    values[own] = torch.as_tensor(np.asarray(compute(own)), dtype=torch.float64)
    if runtime.world_size > 1:
        values = values.to(runtime.device)
        torch.distributed.all_reduce(values)
    return values.cpu().numpy()


# ---- the run ----


def train(
    trainer: Any,
    config: TrainerConfig,
    rows: Sequence[Row],
    plan: Schedule,
    runtime: Runtime,
    checkpoint: Checkpoint | None,
    *,
    phase: str,
    shown: Mapping[str, str],
    state: Mapping[str, Any],
    measure: Callable[[], Mapping[str, float]] | None = None,
    measure_steps: int = 0,
    more: Callable[[], Mapping[str, float]] = dict,
    member: int = 0,
    tokens_before: int = 0,
) -> None:
    """Train to the plan's last step, from `checkpoint` (`runtime.checkpoints.latest()`) if there is one.

    `shown`: label -> TRL's name of the key figures of the progress line. `state` is kept with every checkpoint.
    `measure` gives figures of the model as it stands, logged every `measure_steps` steps (0: never) but the last.
    `more`: further figures for every line of metrics, asked on all ranks. Of several models trained one after another
    by one stage `member` says which this is (they take as many steps each), and `tokens_before` what those before it
    have read: metrics and checkpoints count on.

    Raises TrainingError for a loss that is not finite, MachineError for a package that `trainer:` needs and is
    not there, Stopped or Interrupted after saving when asked to stop.
    """
    need_disk(Path(trainer.args.output_dir).parent, _bytes_to_write(trainer.model), "saving and checkpoints")
    trainer.remove_callback(PrinterCallback)
    trainer.train_dataset = Unrolled(rows, plan.order)
    if config.optimizer == "muon":
        embedding_rate = config.embedding_learning_rate or config.learning_rate
        trainer.optimizer = muon(trainer.model, config.learning_rate, embedding_rate, config.weight_decay)
    for key, why in inexact(config.trainer).items():
        runtime.say(f"trainer.{key}: resumed, the run may differ in its last bits from an undisturbed one: {why}")
    if checkpoint is not None:
        runtime.say(f"resumed at step {checkpoint.step:,}")
    with runtime.progress(phase, plan.steps) as bar:
        watch = Watch(
            plan, runtime, bar, shown, state, more, _share_of_peak(trainer, plan, runtime), member, tokens_before
        )
        watch.measure, watch.measure_steps = measure, measure_steps
        watch.owes = checkpoint is not None and bool(checkpoint.state.get(OWES))
        trainer.add_callback(watch)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
        except ImportError as error:  # what `trainer: {optim: …}` asks for is looked for when it is made
            mend = 'pip install "llmpipe[gpu]", or another option'
            raise MachineError(str(error).strip().splitlines()[0], where="trainer", mend=mend) from error
    if watch.is_stopping and trainer.state.global_step < plan.steps:
        runtime.stop(trainer.state.global_step + member * plan.steps)


def _share_of_peak(trainer: Any, plan: Schedule, runtime: Runtime) -> float:
    """The model FLOPs utilisation (PaLM, appendix B) of one token a second, all processes together."""
    peak = runtime.world_size * peak_flops(runtime.device.type, trainer.args.bf16)
    return training_flops(trainer, plan) / float(plan.tokens[-1]) / peak


def _bytes_to_write(model: torch.nn.Module) -> int:
    """Three checkpoints (two are kept while a third is written: adapters or the whole model, and AdamW's moments of
    what is trained) and the model."""
    parameters = list(model.parameters())
    whole = sum(p.numel() * p.element_size() for p in parameters)
    trained = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    kept = trained if isinstance(model, PeftModel) else whole
    return 3 * (kept + 2 * trained) + whole
