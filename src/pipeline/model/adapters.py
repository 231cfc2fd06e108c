"""LoRA adapters: peft's, for every stage that trains some."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from pipeline.errors import ConfigError
from pipeline.model.build import head_weight
from pipeline.recipe import PeftConfig


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


def adapt(
    model: PreTrainedModel, lora: LoraConfig, seed: int, *, train_rows: bool, stage: str = "pretrain"
) -> PeftModel:
    """Puts LoRA adapters into the model, in place, and freezes all the rest; with `train_rows` the embedding and the
    head are trained beside them, as new rows need it. The adapters' first values are a function of `seed`.

    `merge_and_unload` of what is returned makes the model a plain one again, the adapters added in. ConfigError where
    `target_modules` name nothing, or the embedding or the head: the one may be the other, and the loss takes the head's
    matrix as it is.
    """
    where, mend = f"{stage}.peft.target_modules", "all-linear: every matrix of the blocks"
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapted = get_peft_model(model, lora)
    except ValueError as error:  # peft finds no such module
        raise ConfigError(str(error).splitlines()[0], where=where, mend=mend) from error
    if any(isinstance(each, BaseTunerLayer) for each in (model.get_input_embeddings(), model.get_output_embeddings())):
        raise ConfigError("adapters on the embedding or the head are not trained here", where=where, mend=mend)
    if train_rows:
        for weight in (model.get_input_embeddings().weight, head_weight(model)):
            if weight is not None:
                weight.requires_grad_(True)
    return adapted
