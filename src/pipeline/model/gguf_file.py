"""A model as one GGUF file, and whether what is read back says the same.

The names and layouts are llama.cpp's: its `llama` (Llama, Mistral) has the rows of queries and keys in pairs of rotary
channels that lie beside each other, where transformers has them half a head apart; `qwen2` and `qwen3` keep them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import logging

from pipeline.data.gguf_tokens import Vocabulary, plain_template, vocabulary
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import ConfigError, MachineError, MismatchError

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""transformers' model type -> llama.cpp's architecture."""
TYPES = ("f32", "bf16", "f16", "q8_0")
READ_BY_TRANSFORMERS = ("gpt-2", "qwen2", "llama-bpe")
"""Ways of cutting text that transformers cuts as llama.cpp does when it reads a GGUF."""
PROBES = ("Hello, world! 1234", "def f(x):\n    return x + 1\n", "été  naïve — 東京 ☃")


def write_gguf(folder: Path, file: Path, dtype: str, name: str) -> None:
    """Write the model in a Hugging Face folder, chat template included. Raises ConfigError for an architecture, rotary
    positions or a tokenizer that can't be written, MachineError without the package gguf."""
    if find_spec("gguf") is None:
        raise MachineError("the package gguf is not installed", where="--to gguf", mend='pip install "llmpipe[gguf]"')
    if dtype not in TYPES:
        raise ConfigError(f"no such type: {dtype!r}", where="--dtype", mend=f"one of {', '.join(TYPES)}")
    import gguf

    logging.disable_progress_bar()
    # "auto" keeps the weights as they lie; numpy has no bf16, which is put into fp32 without loss
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    architecture = architecture_of(model, folder)
    words = vocabulary(folder, int(model.config.vocab_size))
    writer = gguf.GGUFWriter(file, architecture)
    _add_shape(writer, model.config, name)
    _add_words(writer, words, load_tokenizer(folder), stop_of(model))
    for key, value in tensors(model, architecture):
        keeps = value.ndim == 1 or dtype == "f32"
        if dtype == "q8_0" and value.shape[-1] % 32:
            raise ConfigError(f"{key} has rows of {value.shape[-1]}, no multiple of 32", where="--dtype", mend="f16")
        kind = gguf.GGMLQuantizationType.F32 if keeps else gguf.GGMLQuantizationType[dtype.upper()]
        writer.add_tensor(key, gguf.quants.quantize(value, kind), raw_dtype=kind)
    kinds = {"f32": "ALL_F32", "bf16": "MOSTLY_BF16", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[kinds[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def architecture_of(model: PreTrainedModel, folder: Path) -> str:
    """llama.cpp's architecture for the model; ConfigError where it has none of these, or positions of another kind."""
    config = model.config
    found = ARCHITECTURES.get(str(config.model_type))
    if found is None:
        what = f"{config.model_type} is none of {', '.join(ARCHITECTURES)}, which can be written"
        raise ConfigError(what, where=str(folder), mend="--to hf, and llama.cpp's convert_hf_to_gguf.py")
    rope = config.rope_parameters["rope_type"]
    layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if rope != "default" or (layers and config.model_type != "mistral"):
        what = f"rotary positions of type {rope}" if rope != "default" else f"layers of {', '.join(layers)}"
        raise ConfigError(f"{what} are not written", where=str(folder), mend="--to hf, and llama.cpp's converter")
    return found


def _add_shape(writer: Any, config: Any, name: str) -> None:
    """The model's sizes."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(name)
    writer.add_context_length(reach(config))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def reach(config: Any) -> int:
    """Tokens that the file's model reads at most. A Mistral's window, where it has one: llama.cpp has none for it, and
    within the window there is no difference."""
    window = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
    return int(min(config.max_position_embeddings, window or config.max_position_embeddings))


def _add_words(writer: Any, words: Vocabulary, tokenizer: PreTrainedTokenizerFast, stop: int | None) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    writer.add_token_merges(words.merges)
    opens = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] and tokenizer.bos_token_id is not None
    writer.add_add_bos_token(opens)
    for add, token in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id if stop is None else stop),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if token is not None:
            add(token)
    if tokenizer.chat_template:
        writer.add_chat_template(plain_template(str(tokenizer.chat_template)))


def stop_of(model: PreTrainedModel) -> int | None:
    """The token that ends an answer, by the generation config; the first of several."""
    found = model.generation_config.eos_token_id if model.generation_config else None
    return found[0] if isinstance(found, list) else found


def tensors(model: PreTrainedModel, architecture: str) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """llama.cpp's name and fp32 values of every weight; a head that is the embedding is left out."""
    import gguf

    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    for key, weight in model.state_dict().items():
        if key == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        base, _, end = key.rpartition(".")
        name = names.get_name(base)
        assert name is not None, key
        value = weight.detach().to(torch.float32).numpy()
        if architecture == "llama" and base.endswith(("q_proj", "k_proj")):
            is_query = base.endswith("q_proj")
            value = paired(value, model.config.num_attention_heads if is_query else model.config.num_key_value_heads)
        yield f"{name}.{end}", np.ascontiguousarray(value)


def paired(rows: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows of queries or keys, each head's (c, c + half a head) beside each other: 0 1 2 3 becomes 0 2 1 3."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


@torch.no_grad()
def read_back(folder: Path, file: Path, dtype: str, steps: int = 24) -> list[str]:
    """Load the file with transformers and compare it with the folder: tokens of texts, the chat template's rendering,
    and greedy tokens after each text. What was found the same, and what differs where that is no fault of the file;
    MismatchError where it is."""
    tokenizer = load_tokenizer(folder)
    again = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    notes = []
    pre = vocabulary(folder, len(tokenizer)).pre
    asked = [tokenizer(text).input_ids for text in PROBES]
    if any(again(text).input_ids != ids for text, ids in zip(PROBES, asked, strict=True)):
        if pre in READ_BY_TRANSFORMERS:
            raise MismatchError("the tokenizer that is read back makes other tokens", where=str(file))
        notes.append(f"transformers does not know the splitting `{pre}`, and makes other tokens; llama.cpp knows it")
    if tokenizer.chat_template:
        said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
        texts = [each.apply_chat_template(said, tokenize=False) for each in (tokenizer, again)]
        if texts[0] != texts[1]:
            raise MismatchError("the chat template that is read back writes other text", where=str(file))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # transformers takes a qwen3's heads for 128 wide, whatever the file says
    given = {"head_dim": plain.config.head_dim} if plain.config.model_type == "qwen3" else {}
    if given.get("head_dim", 128) != 128:
        notes.append(f"transformers reads it with from_pretrained(…, head_dim={given['head_dim']}) alone")
    _hush()
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, **given)
    most = reach(plain.config) // 2
    same = [greedy(plain, ids[:most], min(steps, most)) == greedy(read, ids[:most], min(steps, most)) for ids in asked]
    if not all(same):
        if dtype == "f32":
            raise MismatchError(f"greedy tokens differ after {same.count(False)} of {len(same)} texts", where=str(file))
        notes.append(f"{dtype} rounds: greedy tokens differ after {same.count(False)} of {len(same)} texts")
    return [*([f"read back: the same greedy tokens on {same.count(True)} texts"] if any(same) else []), *notes]


def _hush() -> None:
    """No bar of transformers' GGUF reader where stderr is no terminal (`disable=None`); it has no switch for it."""
    modeling_gguf_pytorch_utils.tqdm = functools.partial(tqdm, disable=None)


def greedy(model: PreTrainedModel, ids: list[int], steps: int) -> list[int]:
    """The most probable next tokens, one after the other; whole forwards, no stop token."""
    ids = [*ids]
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids
