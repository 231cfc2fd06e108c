"""Causal language models: drawn, loaded, saved as Hugging Face folders, counted."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.pytorch_utils import Conv1D

from pipeline.artifacts import runs_code_of
from pipeline.errors import ConfigError, MismatchError
from pipeline.model.sharding import cut_like

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def initialise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Weights of a preset, from `generator` alone: matrices N(0, 1/fan_in), embeddings and heads N(0, 0.02), what
    writes into the residual stream zero; norms and biases as the family has them. A zero projection makes every block
    the identity at the start (Zhang et al. 2019, "Fixup"; the same choice as in modded-nanogpt), which trains faster
    at equal tokens than N(0, 0.02) everywhere.
    """
    embeddings = {id(parameter) for parameter in embedding_parameters(model)}
    transposed = {id(module.weight) for module in model.modules() if isinstance(module, Conv1D)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                continue
            fan_in = parameter.shape[0] if id(parameter) in transposed else parameter.shape[-1]
            std = 0.02 if id(parameter) in embeddings else fan_in**-0.5
            if re.search(r"\b(o_proj|down_proj|c_proj)\b", name):
                std = 0.0
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.copy_(drawn * std)


def embedding_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The tables of embeddings (of tokens and of positions) and the weights of output heads, each once."""
    found = [
        parameter
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding)
        for parameter in module.parameters()
    ]
    heads = [module for name, module in model.named_modules() if name.rpartition(".")[2] in ("lm_head", "score")]
    if isinstance(model, PreTrainedModel):
        heads.append(model.get_output_embeddings())  # whatever the family calls it
    for head in heads:
        found += [] if head is None else list(head.parameters())
    return list({id(parameter): parameter for parameter in found}.values())


def head_weight(model: PreTrainedModel) -> torch.Tensor | None:
    """The output head's matrix, None without one."""
    head = model.get_output_embeddings()
    return None if head is None else head.weight


ATTENTION_NAMES = ("attn", "self_attn", "attention", "self_attention")
"""What families call the attention of a block."""


def load_causal_lm(folder: Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model in a Hugging Face folder, in `dtype` whatever it was saved in."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=runs_code_of(folder))
    assert isinstance(model, PreTrainedModel)
    return model


def reach(folder: Path) -> int | None:
    """Tokens that the positions of the model in `folder` reach; see `reach_of`."""
    return reach_of(AutoConfig.from_pretrained(folder, trust_remote_code=runs_code_of(folder)))


def reach_of(config: PreTrainedConfig) -> int | None:
    """Tokens that a model's positions reach; None where nothing bounds them (BLOOM, Mamba)."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if found is None or found < 1 else int(found)  # XLNet's is -1


def check_reach(model: PreTrainedModel, length: int, whose: str, where: str) -> None:
    """ConfigError where the model's positions do not reach `length` tokens."""
    reach = reach_of(model.config)
    if reach is not None and reach < length:
        mend = f"--set {where}={reach}"
        raise ConfigError(f"{length} is more than {whose} context of {reach}", where=where, mend=mend)


def recompute_activations(model: PreTrainedModel) -> None:
    """Keep only what goes into each block, and run it again in the backward pass. Dropout stays as it is."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.training = True  # transformers recomputes in training mode only; not recursive, so no dropout wakes


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """In evaluation mode and not compiled (rows of other lengths would compile anew) for a while; then every module as
    it was."""
    modes = {module: (module.training, module._compiled_call_impl) for module in model.modules()}
    model.eval()
    for module in modes:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, (mode, compiled) in modes.items():
            module.training, module._compiled_call_impl = mode, compiled


def save_model(
    model: PreTrainedModel,
    folder: Path,
    tokenizer_from: Path,
    stop_ids: list[int],
    pad_id: int,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write the model's folder: safetensors, the tokenizer and chat template of `tokenizer_from`, greedy generation
    that ends at `stop_ids`. `state` in place of the model's own, where that is in shards."""
    _end_at(model, stop_ids, pad_id)
    model.save_pretrained(folder, state_dict=state)
    _name_code_by_its_file(folder / "config.json")
    copy_tokenizer(tokenizer_from, folder)


def save_without_weights(
    model: PreTrainedModel, folder: Path, tokenizer_from: Path, stop_ids: list[int], pad_id: int
) -> None:
    """The folder that `save_model` will fill, all but the weights: what a checkpoint needs to be a model."""
    _end_at(model, stop_ids, pad_id)
    model.config.architectures = [type(model).__name__]
    if model._auto_class is not None:  # a class of the user's own: its file, and its name in the config
        folder.mkdir(parents=True, exist_ok=True)
        custom_object_save(model, folder, config=model.config)
    model.config.save_pretrained(folder)
    assert model.generation_config is not None
    model.generation_config.save_pretrained(folder)
    _name_code_by_its_file(folder / "config.json")
    copy_tokenizer(tokenizer_from, folder)


def _end_at(model: PreTrainedModel, stop_ids: list[int], pad_id: int) -> None:
    """Greedy generation that ends at `stop_ids`."""
    stops = stop_ids[0] if len(stop_ids) == 1 else stop_ids
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=pad_id, do_sample=False)
    model.config.pad_token_id = pad_id
    model.config.eos_token_id = stops


def _name_code_by_its_file(file: Path) -> None:
    """A user's class was imported under a made-up name; transformers looks for the file that it has copied."""
    config = json.loads(file.read_text(encoding="utf-8"))
    if "auto_map" not in config:
        return
    for role, reference in config["auto_map"].items():
        module, _, name = reference.rpartition(".")
        if module in sys.modules:
            config["auto_map"][role] = f"{Path(str(sys.modules[module].__file__)).stem}.{name}"
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files as they are: their bytes, and so their hashes, stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def check_vocabulary(model: PreTrainedModel, vocab: int, where: str) -> None:
    """MismatchError where the tokenizer has ids that the model has no row for."""
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < vocab:
        raise MismatchError(
            f"the tokenizer has {vocab:,} tokens and the model's embedding {rows:,} rows",
            where=where,
            mend="take the tokenizer the model was trained with",
        )


def unique_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Name -> parameter that is trained, each once: tied weights under their first name. What a checkpoint keeps."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def persistent_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Name -> buffer that is saved with the model (running statistics, say): a forward in training may change it."""
    kept = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def load_buffers(model: torch.nn.Module, tensors: dict[str, torch.Tensor], prefix: str) -> None:
    """Copy `prefix.<name>` of `tensors` into the persistent buffers, in place."""
    for name, buffer in persistent_buffers(model).items():
        buffer.copy_(tensors[f"{prefix}.{name}"])


def load_parameters(model: torch.nn.Module, tensors: dict[str, torch.Tensor], prefix: str) -> None:
    """Copy `prefix.<name>` of `tensors`, which are whole, into the parameters that are trained, in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(cut_like(tensors[f"{prefix}.{name}"], parameter))


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """(all parameters, N of the FLOPs formula: what a token passes through, with the output head, without the input
    embedding, and of a layer's experts as many as a token is sent to)."""
    total = sum(parameter.numel() for parameter in model.parameters())
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is embedding
    config = model.config.get_text_config()
    experts, top_k = count_experts(config), getattr(config, "num_experts_per_tok", None) or 0
    routed = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name) if experts else 0
    idle = routed * (experts - top_k) // experts if experts else 0
    return total, total - idle - (0 if tied else embedding.numel())


def count_experts(config: Any) -> int:
    """Experts of a layer that tokens are routed to; 0 for a dense model."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return next((int(getattr(config, name)) for name in names if getattr(config, name, None)), 0)


def flops_per_token(model: PreTrainedModel, length: int) -> float:
    """FLOPs of a training step a token: 6 N + 12 · layers · heads · head_dim · T (PaLM, appendix B), over the layers
    that attend, as if each saw all T tokens."""
    config = model.config.get_text_config()
    each = config.per_layer_config[:] if config.is_heterogeneous else [config]  # Gemma 4's layers differ
    channels = sum(_attention_channels(layer) for layer in each) / len(each)
    layers = sum(name.rpartition(".")[2] in ATTENTION_NAMES for name, _ in model.named_modules())
    return 6.0 * count_parameters(model)[1] + 12.0 * layers * channels * length


def _attention_channels(config: Any) -> float:
    """Channels of all heads of a layer."""
    heads = getattr(config, "num_attention_heads", None) or 0
    return float(heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)) if heads else 0.0
