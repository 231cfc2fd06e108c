"""The one adapter to TRL's trainers: fields through, rows in our order, progress, stop, checkpoints.

A stage makes tokens, asks `schedule` which row stands where, builds TRL's config with `trainer_arguments` and TRL's
trainer with `building`, and hands both to `train`. What TRL and transformers are not asked to do:

- order: the run is unrolled to steps × batch rows, whose order is a pure function of the seed and the rows' lengths,
  and read in sequence. So an epoch has no short tail and a resume needs the step alone.
- checkpoints: the Trainer's folder counts only once `Checkpoints.adopt` has put its marker there. Every line of
  metrics ends at a checkpoint, so that a resumed run writes the lines an undisturbed one would.
- evaluation: the stage measures after it has saved.
"""

from __future__ import annotations

import dataclasses
import math
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import datasets
import huggingface_hub
import numpy as np
import numpy.typing as npt
import torch
import transformers
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainerControl, TrainerState
from trl.trainer.utils import FusedCausalLMOutput

from pipeline.checkpoint import Checkpoint
from pipeline.errors import ConfigError, TrainingError
from pipeline.progress import Bar
from pipeline.reading import meant
from pipeline.recipe import PeftConfig
from pipeline.runtime import Runtime
from pipeline.trainer_config import TrainerConfig

Row = dict[str, Any]
Arguments = TypeVar("Arguments")

WINDOW = 64
"""Steps whose rows are sorted together by length: enough for little padding, few enough to stay shuffled."""
SMALL = 2**26
"""Logits (256 MB in float32) up to which the head is computed in one piece where there is no Triton."""


def quieten() -> None:
    """No bars, advice or telemetry of the libraries: what there is to say, the stage says."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    warnings.filterwarnings("ignore", category=FutureWarning)


# ---- which row stands where ----


@dataclass(frozen=True)
class Schedule:
    """The rows of a run in the order they are read, and what has been read after each step."""

    batch: int
    """Rows of an optimiser step, over all processes."""
    order: npt.NDArray[np.int64]
    """[steps × batch]: which row."""
    tokens: npt.NDArray[np.int64]
    """[steps]: tokens read up to and with the step."""

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return len(self.tokens)


def schedule(lengths: Sequence[int], config: TrainerConfig, runtime: Runtime) -> Schedule:
    """The order of a run over rows of these lengths (tokens): a pure function of the seed, the lengths and the batch.

    Every epoch is a new shuffle, joined to the one before without a gap. With "group_by_length" the rows of WINDOW
    steps are sorted by length and their batches shuffled.
    """
    count = len(lengths)
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * runtime.world_size
    steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * count / batch)
    epochs = [
        torch.randperm(count, generator=runtime.generator("order", epoch)).numpy()
        for epoch in range(math.ceil(steps * batch / count))
    ]
    order = np.concatenate(epochs)[: steps * batch]
    lengths_N = np.asarray(lengths, dtype=np.int64)
    if config.train_sampling_strategy == "group_by_length":
        windows = [
            _grouped(order[start : start + WINDOW * batch], lengths_N, batch, runtime.generator("window", start))
            for start in range(0, len(order), WINDOW * batch)
        ]
        order = np.concatenate(windows)
    return Schedule(batch, order, lengths_N[order].reshape(steps, batch).sum(axis=1).cumsum())


def _grouped(
    rows: npt.NDArray[np.int64], lengths_N: npt.NDArray[np.int64], batch: int, generator: torch.Generator
) -> npt.NDArray[np.int64]:
    """The rows sorted by length and cut into batches, the batches shuffled."""
    by_length = rows[np.argsort(lengths_N[rows], kind="stable")].reshape(-1, batch)
    return by_length[torch.randperm(len(by_length), generator=generator).numpy()].reshape(-1)


class _Unrolled(torch.utils.data.Dataset[Row]):
    """The run as one long epoch."""

    def __init__(self, rows: Sequence[Row], order: npt.NDArray[np.int64]) -> None:
        self.rows, self.order = rows, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Row:
        return self.rows[self.order[index]]


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
    passed = {
        "learning_rate": config.learning_rate,
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "max_steps": plan.steps,
        "max_length": config.max_length,
        "lr_scheduler_type": config.lr_scheduler_type,
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "gradient_checkpointing": config.gradient_checkpointing,
        "logging_steps": config.logging_steps,
        "save_steps": config.save_steps,
        "seed": config.seed,
        "bf16": runtime.bf16 if config.bf16 is None else config.bf16,
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
        **own,
    }
    known = {each.name for each in dataclasses.fields(kind) if each.init}  # type: ignore[arg-type]
    for key in config.trainer:
        if key in passed or key in type(config).model_fields:
            mend = "set the stage's own field" if key in type(config).model_fields else "leave it out"
            raise ConfigError(f"`{key}` is not taken from `trainer`: it is set elsewhere", where="trainer", mend=mend)
        if key not in known:
            raise ConfigError(f"TRL's config has no field `{key}`{meant(key, known)}", where="trainer")
    with building(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = kind(**passed, **config.trainer)
    if runtime.world_size == 1 and runtime.device.type == "cuda":
        arguments._n_gpu = 1  # type: ignore[attr-defined]  # one process is one GPU, never DataParallel
    return arguments


@contextmanager
def building() -> Iterator[None]:
    """Turns what TRL refuses while a config or trainer is made into a ConfigError."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise ConfigError(f"TRL refuses this: {error}", where="the stage's fields and `trainer`") from error


def lora(config: PeftConfig | None, task_type: str, modules_to_save: list[str] | None = None) -> LoraConfig | None:
    """peft's config of the recipe's `peft:` section; None without one."""
    if config is None:
        return None
    modules = config.target_modules
    return LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=modules if isinstance(modules, str) else list(modules),
        use_rslora=config.use_rslora,
        task_type=task_type,
        modules_to_save=modules_to_save,
    )


def trained_model(trainer: Any) -> PreTrainedModel:
    """The trained model without the trainer's wrappers: adapters merged, in evaluation mode."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    return model.eval()


# ---- the run ----


def train(
    trainer: Any,
    rows: Sequence[Row],
    plan: Schedule,
    runtime: Runtime,
    checkpoint: Checkpoint | None,
    *,
    phase: str,
    shown: Mapping[str, str],
    state: Mapping[str, Any],
) -> None:
    """Train to the plan's last step, from `checkpoint` (`runtime.checkpoints.latest()`) if there is one.

    `shown`: label -> TRL's name of the key figures of the progress line. `state` is kept with every checkpoint. Raises
    TrainingError for a loss that is not finite, Stopped or Interrupted after saving when asked to stop.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.train_dataset = _Unrolled(rows, plan.order)
    if checkpoint is not None:
        runtime.say(f"resumed at step {checkpoint.step:,}")
    with runtime.progress(phase, plan.steps) as bar:
        watch = _Watch(plan, runtime, bar, shown, state)
        trainer.add_callback(watch)
        trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
    if watch.is_stopping and trainer.state.global_step < plan.steps:
        runtime.stop(trainer.state.global_step)


class _Watch(TrainerCallback):  # type: ignore[misc]
    """What the Trainer tells after each step, turned into metrics, progress, stop and whole checkpoints."""

    def __init__(
        self, plan: Schedule, runtime: Runtime, bar: Bar, shown: Mapping[str, str], state: Mapping[str, Any]
    ) -> None:
        self.plan, self.runtime, self.bar, self.shown, self.state = plan, runtime, bar, shown, state
        self.is_stopping = False
        self.began, self.first = 0.0, 0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.began, self.first = time.monotonic(), state.global_step
        self.bar.start_at(state.global_step)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.is_stopping = self.runtime.stop_requested()
        if self.is_stopping:
            control.should_save = control.should_training_stop = True
        if control.should_save or state.global_step == self.plan.steps:
            control.should_log = True  # the line before it is saved: no figure spans a checkpoint, no NaN is kept

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        state.log_history.clear()  # metrics.jsonl is the record; this would be written into every checkpoint
        if "loss" not in logs:
            return
        step = state.global_step
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise TrainingError(
                    f"the {name} is {logs[name]}",
                    where=f"step {step:,}",
                    mend="a lower learning_rate or a longer warmup; the last checkpoint is kept",
                )
        tokens = int(self.plan.tokens[step - 1])
        before = int(self.plan.tokens[self.first - 1]) if self.first else 0
        speed = (tokens - before) / (time.monotonic() - self.began)
        figures = {name: value for name, value in logs.items() if name not in ("epoch", "num_tokens")}
        if self.runtime.device.type == "cuda":
            figures["peak_memory_bytes"] = float(torch.cuda.max_memory_allocated())
        self.runtime.metrics.log(step, tokens, **figures, tokens_per_second=speed)
        key = {label: logs[name] for label, name in self.shown.items() if name in logs}
        self.bar.advance(step - self.bar.done, **key, **{"tok/s": speed})

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.runtime.barrier()  # every rank has written its part
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.runtime.checkpoints.adopt(folder, state.global_step, self.state)


# ---- TRL's head without Triton ----


def trim_head(trainer: Any) -> None:
    """Where there is no Triton, let TRL's head work on the trained positions only.

    TRL's `add_fused_lm_head` projects every position there, prompt and padding included, and computes the logits again
    in the backward pass; on a tiny model that is half of the step. This puts a forward before it that gives the same
    outputs (a test compares them) from one [trained positions, vocabulary] matrix. Models that scale or cap their
    logits, and matrices larger than SMALL, are left to TRL.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    settings = model.config.get_text_config().to_dict()
    scales = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
    is_plain = all(settings.get(name) in (None, 1.0) for name in scales) and not settings.get("output_router_logits")
    if trainer.accelerator.device.type != "cpu" or not is_plain or model.get_output_embeddings().bias is not None:
        return
    trls = model.forward

    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        labels_BT = kwargs.get("labels")
        if not kwargs.get("fused_lm_head") or labels_BT is None:
            return trls(*args, **kwargs)
        is_trained_BS = labels_BT[:, 1:] != -100
        if int(is_trained_BS.sum()) * self.get_output_embeddings().weight.shape[0] > SMALL:
            return trls(*args, **kwargs)
        inner = {name: value for name, value in kwargs.items() if name not in ("fused_lm_head", "labels")}
        hidden_BSD = self.base_model(*args, **inner).last_hidden_state[:, :-1]
        logits_NV = self.get_output_embeddings()(hidden_BSD[is_trained_BS]).float()
        return _fused_output(logits_NV, labels_BT[:, 1:], is_trained_BS)

    forward.__signature__ = trls.__wrapped__ if False else None  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)


def _fused_output(logits_NV: Tensor, labels_BS: Tensor, is_trained_BS: Tensor) -> FusedCausalLMOutput:
    """TRL's output from the logits of the N trained positions; zero at the others."""
    targets_N1 = labels_BS[is_trained_BS][:, None]
    log_p_NV = logits_NV.log_softmax(dim=-1)
    log_p_N = log_p_NV.gather(1, targets_N1)[:, 0]
    with torch.no_grad():
        found = {
            "entropy": -(log_p_NV.exp() * log_p_NV).sum(dim=-1),
            "mean_logits": logits_NV.mean(dim=-1),
            "is_top1": log_p_NV.argmax(dim=-1) == targets_N1[:, 0],
        }

    def spread(values_N: Tensor) -> Tensor:
        return values_N.new_zeros(is_trained_BS.shape).masked_scatter(is_trained_BS, values_N)

    log_p_BS = spread(log_p_N)
    return FusedCausalLMOutput(
        loss=-log_p_BS.sum() / is_trained_BS.sum().clamp(min=1),
        log_probs=log_p_BS,
        label_mask=is_trained_BS,
        **{name: spread(values_N) for name, values_N in found.items()},
    )
