"""Causal language models: built from an architecture and a depth, or loaded; saved as Hugging Face folders."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedModel

from pipeline.errors import ConfigError, MismatchError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def llama_config(
    *, depth: int, width: int, heads: int, kv_heads: int, mlp_width: int, context: int, vocab: int, tied: bool
) -> LlamaConfig:
    """A Llama of `depth` layers. Raises ConfigError where the heads do not divide the width."""
    if width % heads or heads % kv_heads or (width // heads) % 2:
        raise ConfigError(
            f"hidden_size {width} over {heads} heads ({kv_heads} for keys and values) does not come out even",
            where="pretrain.model",
            mend="take a hidden_size that is an even multiple of num_attention_heads",
        )
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=mlp_width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=tied,
        initializer_range=0.02,
        use_cache=True,
    )


def initialise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Weights drawn from `generator` alone: matrices N(0, 1/fan_in), embeddings N(0, 0.02), what writes into the
    residual stream zero, norms one. A zero projection makes every block the identity at the start (Zhang et al. 2019,
    "Fixup"; the same choice as in modded-nanogpt), which trains faster at equal tokens than N(0, 0.02) everywhere.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            std = 0.02 if "embed" in name or "lm_head" in name else parameter.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std = 0.0
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.copy_(drawn * std)


def load_causal_lm(folder: Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model in a Hugging Face folder, in `dtype` whatever it was saved in."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    assert isinstance(model, PreTrainedModel)
    return model


def choose_attention(model: PreTrainedModel, bf16: bool, longest: int) -> None:
    """Attention as plain products where that is the faster: on a CPU in bf16, for rows of up to 256 tokens.

    Forward and backward of torch's fused kernel take 3.5 times as long there at 64 tokens and 1.7 times at 256; in
    fp32 it is the faster one. Memory grows with the square of a row, hence the bound.
    """
    if model.device.type == "cpu" and bf16 and longest <= 256:
        model.set_attn_implementation("eager")


def save_model(model: PreTrainedModel, folder: Path, tokenizer_from: Path, stop_ids: list[int], pad_id: int) -> None:
    """Write the model's folder: safetensors, the tokenizer and chat template of `tokenizer_from`, greedy generation
    that ends at `stop_ids`."""
    model.generation_config = GenerationConfig(
        eos_token_id=stop_ids[0] if len(stop_ids) == 1 else stop_ids, pad_token_id=pad_id, do_sample=False
    )
    model.config.pad_token_id = pad_id
    model.config.eos_token_id = stop_ids[0] if len(stop_ids) == 1 else stop_ids
    model.save_pretrained(folder)
    copy_tokenizer(tokenizer_from, folder)


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
    """Name -> parameter, each once: tied weights under their first name. What a checkpoint keeps."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def load_parameters(model: torch.nn.Module, tensors: dict[str, torch.Tensor], prefix: str) -> None:
    """Copy `prefix.<name>` of `tensors` into the model's parameters in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"{prefix}.{name}"])


def trunk_and_head(model: PreTrainedModel) -> tuple[Any, torch.Tensor]:
    """The model without its head, and the head's weight [vocabulary, width]; for losses that never make all logits."""
    head = model.get_output_embeddings()
    assert head is not None
    return model.base_model, head.weight


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """(all parameters, N of the FLOPs formula: with the output head, without the input embedding)."""
    total = sum(parameter.numel() for parameter in model.parameters())
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is embedding
    return total, total - (0 if tied else embedding.numel())


def flops_per_token(model: PreTrainedModel, length: int) -> float:
    """FLOPs of a training step a token: 6 N + 12 · layers · heads · head_dim · T (PaLM, appendix B)."""
    config = model.config
    attention = 12.0 * float(config.num_hidden_layers) * float(config.hidden_size) * length
    return 6.0 * count_parameters(model)[1] + attention
