"""New causal language models by name: a family of transformers and a depth, a named size, or full fields.

A preset says how a family's own config follows from a depth and widths. Every other causal model of transformers is
built from the fields of its config as they are, and a class in a user's file from the config it asks for.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pipeline.errors import ConfigError, PipelineError
from pipeline.model.attention import check_looks_back
from pipeline.model.build import check_reach, initialise
from pipeline.reading import meant
from pipeline.recipe import is_user_code
from pipeline.usercode import load_member

WHERE = "pretrain.model"
EXAMPLE = "docs/pretrain.md has a whole one to start from"


@dataclass(frozen=True)
class Shape:
    """What a preset is made from. Sizes in channels, `context` in tokens, `vocab` in rows of the embedding."""

    depth: int
    width: int
    heads: int
    kv_heads: int
    mlp_width: int | None
    """None: the family's own share of the width."""
    context: int
    vocab: int
    tied: bool
    asked: tuple[str, ...] = ()
    """The sizes that the recipe sets, by the names of its fields."""

    @property
    def head_width(self) -> int:
        """Channels of an attention head."""
        return self.width // self.heads

    @property
    def gated_mlp_width(self) -> int:
        """The MLP's width, 8/3 of the model's to a multiple of 32 unless it is set: as many weights as 4 without
        a gate."""
        return self.mlp_width or 32 * math.ceil(self.width * 8 / 3 / 32)

    @property
    def common(self) -> dict[str, Any]:
        """The fields that most families call alike."""
        return {
            "vocab_size": self.vocab,
            "hidden_size": self.width,
            "intermediate_size": self.gated_mlp_width,
            "num_hidden_layers": self.depth,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": self.context,
            "tie_word_embeddings": self.tied,
        }


ROPE = {"rope_type": "default", "rope_theta": 10_000.0}


def gpt2(shape: Shape) -> dict[str, Any]:
    """Radford et al. 2019: learnt positions, LayerNorm, biases, GELU; no dropout, as is usual for one epoch."""
    return {
        "vocab_size": shape.vocab,
        "n_embd": shape.width,
        "n_inner": shape.mlp_width or 4 * shape.width,
        "n_layer": shape.depth,
        "n_head": shape.heads,
        "n_positions": shape.context,
        "tie_word_embeddings": shape.tied,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def llama(shape: Shape) -> dict[str, Any]:
    """Touvron et al. 2023: rotary positions, RMSNorm, SwiGLU, no biases."""
    return {**shape.common, "rope_parameters": ROPE}


def mistral(shape: Shape) -> dict[str, Any]:
    """Jiang et al. 2023: a Llama whose layers see a window, half of the context (4,096 of 8,192 there)."""
    return {**shape.common, "rope_parameters": ROPE, "sliding_window": max(1, shape.context // 2)}


def qwen3(shape: Shape) -> dict[str, Any]:
    """Qwen team 2025: a Llama with RMSNorm over each head's queries and keys."""
    return {**shape.common, "rope_parameters": ROPE, "head_dim": shape.head_width}


def gemma3(shape: Shape) -> dict[str, Any]:
    """Gemma team 2025: five layers that see a window, a quarter of the context, then one that sees all; the last one
    always sees all. Norms on both sides of each half, GeGLU, the embedding scaled."""
    last = shape.depth - 1
    kinds = ["full_attention" if (i + 1) % 6 == 0 or i == last else "sliding_attention" for i in range(shape.depth)]
    return {
        **shape.common,
        "head_dim": shape.head_width,
        "query_pre_attn_scalar": shape.head_width,
        "sliding_window": max(1, shape.context // 4),
        "layer_types": kinds,
    }


def qwen3_moe(shape: Shape) -> dict[str, Any]:
    """Qwen team 2025: a Qwen3 with 8 experts in each MLP, two of them, half as wide, for a token."""
    expert_width = 32 * math.ceil(shape.gated_mlp_width / 2 / 32)
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": expert_width}
    return {**qwen3(shape), **experts, "norm_topk_prob": True, "router_aux_loss_coef": 0.01}


PRESETS: dict[str, tuple[str, Callable[[Shape], dict[str, Any]]]] = {
    "gpt2": ("gpt2", gpt2),
    "llama": ("llama", llama),
    "mistral": ("mistral", mistral),
    "qwen3": ("qwen3", qwen3),
    "gemma3": ("gemma3_text", gemma3),
    "qwen3_moe": ("qwen3_moe", qwen3_moe),
}
"""Name -> transformers' model type, and the fields of its config."""


@dataclass(frozen=True)
class Size:
    """Depth and widths of a named size."""

    depth: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int | None = None
    tie_word_embeddings: bool = True


SIZES = {
    "10m": Size(8, 256, 4, 4),
    "30m": Size(10, 384, 6, 6),
    "60m": Size(14, 512, 8, 8),
    "124m": Size(12, 768, 12, 12),
    "350m": Size(24, 1024, 16, 16),
    "774m": Size(36, 1280, 20, 20),
    "1b": Size(16, 2048, 32, 8, 8192),
    "3b": Size(28, 3072, 24, 8, 8192),
    "8b": Size(32, 4096, 32, 8, 14336, tie_word_embeddings=False),
}
"""Named by the parameters of a Llama with a vocabulary of 16,384 (10m), 32,768 (30m, 60m), 50,304 (to 774m) or 128,256
(from 1b): the widths of GPT-2, Llama 3 and Llama 3.2."""


def shape_of(given: Mapping[str, Any], context: int, vocab: int) -> Shape:
    """The shape from the fields of a recipe's `model` that are set (None where not), `size` or `depth` among them.

    Raises ConfigError for an unknown size, for `depth` beside `size`, and where heads do not divide the width.
    """
    size = given.get("size")
    if size is not None and size not in SIZES:
        raise ConfigError(f"no size `{size}`{meant(size, SIZES)}", where=WHERE, mend=f"one of {', '.join(SIZES)}")
    if size is not None and given.get("depth") is not None:
        raise ConfigError("`size` and `depth` both set the depth", where=WHERE, mend="leave one out")
    named = dataclasses.asdict(SIZES[size]) if size else {}
    asked = {name: value for name, value in given.items() if value is not None}
    named |= asked
    depth = named.get("depth", 4)
    width = named.get("hidden_size", 64 * depth)
    heads = named.get("num_attention_heads", max(1, width // 64))
    kv_heads = named.get("num_key_value_heads", heads)
    if width % heads or heads % kv_heads or (width // heads) % 2:
        raise ConfigError(
            f"hidden_size {width} over {heads} heads ({kv_heads} for keys and values) does not come out even",
            where=WHERE,
            mend="take a hidden_size that is an even multiple of num_attention_heads",
        )
    tied = named.get("tie_word_embeddings", True)
    return Shape(depth, width, heads, kv_heads, named.get("intermediate_size"), context, vocab, tied, tuple(asked))


def build_config(architecture: str, shape: Shape, fields: Mapping[str, Any], pad_id: int = 0) -> PreTrainedConfig:
    """transformers' config of a preset with `fields` over it, or of another model type from `fields` alone.

    The vocabulary is the tokenizer's in either case, of the text's part where a model has others; so is the pad token,
    in families that have one of their own: its row is not trained, and RoBERTa's kin count positions from behind it.
    Raises ConfigError for an unknown architecture, for a size that would be lost on one that is no preset, for a field
    that its config lacks, and for values that transformers refuses.
    """
    model_type, preset = PRESETS.get(architecture, (architecture, None))
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ConfigError(
            f"transformers has no causal language model `{architecture}`"
            f"{meant(architecture, [*PRESETS, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES])}",
            where=f"{WHERE}.architecture",
            mend=f"{', '.join(PRESETS)}, a model_type of transformers, or ./gpt.py:GPT",
        )
    if preset is None and shape.asked:
        raise ConfigError(
            f"`{shape.asked[0]}` sizes presets, and `{architecture}` is none: it has its own fields",
            where=f"{WHERE}.{shape.asked[0]}",
            mend="set them in `config`, such as config: {num_hidden_layers: 8, hidden_size: 512}",
        )
    made = {**(preset(shape) if preset else {"vocab_size": shape.vocab}), **fields}
    kind = CONFIG_MAPPING[model_type]
    parameters = inspect.signature(kind).parameters
    _check_fields(kind, fields, set(parameters) | set(kind.attribute_map))
    if "pad_token_id" in parameters and parameters["pad_token_id"].default is not None:
        made["pad_token_id"] = pad_id
    if "text_config" in kind.sub_configs:
        given = fields.get("text_config") or {}
        _check_fields(kind.sub_configs["text_config"], given, set(given))
        made["text_config"] = {**given, "vocab_size": shape.vocab, "pad_token_id": pad_id}
    with _transformers_own(architecture):
        return AutoConfig.for_model(model_type, **made)


@contextmanager
def _transformers_own(architecture: str) -> Iterator[None]:
    """ConfigError for whatever transformers' own code of a family raises over a user's fields: it asserts, divides by
    zero, looks for what is not there."""
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        said = " ".join(str(error).split()) or "no word on it"
        raise ConfigError(
            f"transformers refuses this {architecture}: {said} ({type(error).__name__})",
            where=f"{WHERE}.config",
            mend=f"fields with which transformers' own {architecture} runs on tokens alone, or another architecture",
        ) from error


def build_model(architecture: str, shape: Shape, fields: Mapping[str, Any], pad_id: int = 0) -> PreTrainedModel:
    """A model with weights as transformers (or the user's class) draws them, from torch's global random state.

    Raises ConfigError as `build_config`, where its positions do not reach the context, and for one that could not be
    loaded again.
    """
    if is_user_code(architecture):
        model = _user_model(architecture, shape, fields)
    else:
        config = build_config(architecture, shape, fields, pad_id)
        with _transformers_own(architecture):
            model = AutoModelForCausalLM.from_config(config, dtype="float32")
        assert isinstance(model, PreTrainedModel)
        if model.config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            what = f"what transformers builds of it, a `{model.config.model_type}`, is none that it loads by itself"
            raise ConfigError(what, where=f"{WHERE}.architecture", mend="another architecture")
    check_reach(model, shape.context, "the model's", "pretrain.context_length")
    return model


def draw_model(
    architecture: str, shape: Shape, fields: Mapping[str, Any], seed: int, *, pad_id: int = 0, on_meta: bool = False
) -> PreTrainedModel:
    """A new model, its weights a function of `seed`: `initialise`'s for a preset, else those of `build_model`.

    ConfigError as there, for one that sees ahead, and for one that does not run. `pad_id`: the tokenizer's.

    `on_meta`: a preset without its weights, on the meta device, where another process is to give them.
    """
    if on_meta and architecture in PRESETS:
        with torch.device("meta"):
            return build_model(architecture, shape, fields, pad_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(architecture, shape, fields, pad_id)
    if architecture in PRESETS:
        initialise(model, torch.Generator().manual_seed(seed))
    else:
        with nullcontext() if is_user_code(architecture) else _transformers_own(architecture):
            check_looks_back(model, f"{WHERE}.architecture")
    return model


def _user_model(reference: str, shape: Shape, fields: Mapping[str, Any]) -> PreTrainedModel:
    """A model of the class in the user's file; the fields of its config that presets share follow from the shape.

    Raises ConfigError where it is not in the shape of transformers' causal models.
    """
    kind: Any = load_member(reference)
    if not _is_causal_model(kind):
        what = "a model of your own is a subclass of transformers' PreTrainedModel and GenerationMixin"
        raise ConfigError(what, where=reference, mend=EXAMPLE)
    config = kind.config_class
    known = set(inspect.signature(config).parameters)
    _check_fields(config, fields, known)
    config.register_for_auto_class()  # its code is saved with the model, so that the folder loads by itself
    kind.register_for_auto_class("AutoModelForCausalLM")
    follows = {name: value for name, value in shape.common.items() if name in known}
    model = kind(config(**{**follows, "vocab_size": shape.vocab, **fields}))
    assert isinstance(model, PreTrainedModel)
    try:
        model.get_input_embeddings()
    except NotImplementedError as error:
        mend = "call it `embed_tokens`, or define get_input_embeddings"
        raise ConfigError("transformers does not find its input embedding", where=reference, mend=mend) from error
    if model.base_model is model or model.get_output_embeddings() is None:
        what = "it is not a trunk (`base_model_prefix`) under an `lm_head`"
        raise ConfigError(what, where=reference, mend=EXAMPLE)
    return model


def _is_causal_model(kind: object) -> bool:
    return inspect.isclass(kind) and issubclass(kind, PreTrainedModel) and issubclass(kind, GenerationMixin)


def _check_fields(config: type, fields: Mapping[str, Any], known: Collection[str]) -> None:
    """ConfigError for a field that the config lacks, or that the tokenizer sets."""
    for name in ("vocab_size", "pad_token_id"):
        if name in fields:
            raise ConfigError(f"the tokenizer sets `{name}`", where=f"{WHERE}.config", mend="leave it out")
    for name in fields:
        if name not in known:
            raise ConfigError(f"{config.__name__} has no field `{name}`{meant(name, known)}", where=f"{WHERE}.config")
