"""LoRA adapters: peft's, for every stage that trains some, and several sets of them on one trunk."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from pipeline.errors import ConfigError, MismatchError
from pipeline.model.build import copy_tokenizer, head_weight, load_causal_lm
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
        use_dora=config.use_dora,
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


@contextmanager
def worn(adapters: PeftModel, name: str) -> Iterator[None]:
    """The adapters of this name as the active ones for a while, alone in requiring gradients."""
    others = adapters.active_adapter
    adapters.set_adapter(name)
    try:
        yield
    finally:
        adapters.set_adapter(others)


def add_adapter(adapters: PeftModel, name: str, config: LoraConfig, seed: int) -> None:
    """Further adapters on the same trunk, their first values a function of `seed`. The active ones stay it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapters.add_adapter(name, config)
    adapters.set_adapter(adapters.active_adapter)  # whose gradients alone are wanted


def add_saved_adapter(adapters: PeftModel, name: str, folder: Path) -> Tensor:
    """As `add_adapter`, of what a stage has saved of a model with a head of one number: its weight, [1, D]."""
    config = LoraConfig.from_pretrained(folder)
    config.modules_to_save, config.inference_mode = None, False
    add_adapter(adapters, name, config, 0)
    tensors = load_file(folder / "adapter_model.safetensors")
    heads = [key for key in tensors if key.endswith("score.weight")]
    assert len(heads) == 1, list(tensors)
    head = tensors.pop(heads[0])
    found = set_peft_model_state_dict(adapters, tensors, adapter_name=name)
    assert not found.unexpected_keys, found.unexpected_keys
    return head


def headed(model: PreTrainedModel, head: Tensor) -> PreTrainedModel:
    """A classifier of one label, [1, D] `head`, on the very trunk of `model`, in eval mode."""
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    with torch.device("meta"):  # its own trunk is never filled
        classifier = AutoModelForSequenceClassification.from_config(config)
    assert isinstance(classifier, PreTrainedModel)
    setattr(classifier, classifier.base_model_prefix, model.base_model)
    classifier.score = torch.nn.Linear(head.shape[1], 1, bias=False, device=model.device, dtype=torch.float32)
    with torch.no_grad():
        classifier.score.weight.copy_(head)
    return classifier.eval()


def merge_folder(adapter: Path, base: Path, out: Path) -> None:
    """Write the model in the folder `base`, peft's `adapter` folder added in, to `out`: added in float32, written in
    the base's own type, with the adapter folder's tokenizer where it has one. MismatchError where they do not fit."""
    dtype = AutoConfig.from_pretrained(base).dtype or torch.float32
    try:
        adapted = PeftModel.from_pretrained(load_causal_lm(base), str(adapter))
        merged = adapted.merge_and_unload()
    except (ValueError, RuntimeError, KeyError) as error:  # another shape, other names, a kind that cannot be merged
        problem = f"the adapter does not go into {base}: {str(error).splitlines()[0]}"
        raise MismatchError(problem, where=str(adapter), mend="--base with the model it was trained on") from error
    merged.to(dtype).save_pretrained(out)
    for folder in (base, adapter):
        copy_tokenizer(folder, out)
