"""What sft, reward and dpo share: the fields of TRL's trainers that a recipe can set by their own names.

Needs no torch: a recipe is checked before anything heavy loads. `pipeline.trainer` hands the values on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import ValidationError, ValidationInfo, field_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from pipeline.recipe import PeftConfig, StageConfig, field
from pipeline.trainer_options import config_fields, problem_with


class TrainerConfig(StageConfig):
    """Fields of transformers' `TrainingArguments`; a step is `per_device_train_batch_size` ×
    `gradient_accumulation_steps` rows, shared by the processes there are."""

    TRL: ClassVar[str] = ""
    """TRL's config of the stage, whose fields `trainer` may hold; checked here where it is named, else by the stage."""
    IGNORED: ClassVar[Mapping[str, str]] = {}
    """Fields of TRL's config that the stage's losses would ignore, with what to do instead."""

    learning_rate: float = field(2e-5, "peak rate", gt=0)
    per_device_train_batch_size: int = field(8, "rows a micro-step; several processes share them", unit="rows", gt=0)
    gradient_accumulation_steps: int = field(1, "micro-steps an optimiser step", gt=0)
    num_train_epochs: float = field(1.0, "passes over the rows; the last step is filled from the next pass", gt=0)
    max_steps: int = field(-1, "optimiser steps; by `num_train_epochs` where -1", unit="steps", ge=-1)
    max_length: int = field(1024, "tokens of a row at most", unit="tokens", gt=1)
    train_sampling_strategy: Literal["group_by_length", "random"] = field(
        "group_by_length", "batches of rows about equally long (less padding), or of any; shuffled by the seed"
    )
    lr_scheduler_type: str = field("linear", "shape of the rate after the warmup; transformers' names")
    warmup_steps: float = field(0.03, "steps of warmup, or their share when below 1", ge=0)
    optimizer: Literal["trainer", "muon"] = field(
        "trainer",
        "trainer: transformers' (`trainer: {optim: …}`, AdamW unless set); muon: Muon on the blocks' matrices",
    )
    embedding_learning_rate: float | None = field(
        None, "muon: peak rate of embedding, heads and norms, which AdamW trains; learning_rate unless set", gt=0
    )
    weight_decay: float = field(0.0, "decay of the weights", ge=0)
    max_grad_norm: float = field(1.0, "clip the gradient's norm to this", gt=0)
    bf16: bool | None = field(None, "autocast to bf16; where the hardware gains by it unless set")
    dtype: Literal["float32", "bfloat16"] = field("float32", "type the weights are kept in while they are trained")
    gradient_checkpointing: bool = field(False, "recompute activations in the backward pass: less memory, slower")
    peft: PeftConfig | None = field(None, "train LoRA adapters, merged into the saved model")
    trainer: dict[str, Any] = field({}, "further fields of TRL's config, by their names there")
    held_out: float = field(0.05, "share of the rows (by a hash of the prompt) kept for measuring; 0: none", ge=0, lt=1)
    eval_rows: int = field(500, "held-out rows measured at most", unit="rows", gt=0)
    logging_steps: int = field(10, "optimiser steps between lines of metrics", unit="steps", gt=0, run_only=True)
    save_steps: int = field(200, "optimiser steps between checkpoints", unit="steps", gt=0, run_only=True)

    @field_validator("trainer")
    @classmethod
    def _known_options(cls, options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        """Each wrong key is an error of its own, at its own line of the recipe."""
        known = config_fields(cls.TRL) if options and cls.TRL else frozenset()
        problems = {key: problem_with(key, known, cls.model_fields) for key in options} if cls.TRL else {}
        problems |= {key: f"the loss would ignore it: {cls.IGNORED[key]}" for key in options if key in cls.IGNORED}
        if "optim" in options and info.data.get("optimizer") == "muon":
            problems["optim"] = "says nothing beside optimizer: muon"
        errors = [
            InitErrorDetails(type=PydanticCustomError("trainer_option", problem), loc=(key,), input=options[key])
            for key, problem in problems.items()
            if problem
        ]
        if errors:
            raise ValidationError.from_exception_data("trainer", errors)
        return options
