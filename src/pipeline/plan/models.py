"""The models of a recipe before they are there: on torch's meta device, without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pipeline.artifacts import Store, runs_code_of
from pipeline.data.extend import add_specials
from pipeline.data.tokenizers import SMALLEST_VOCAB, SPECIALS, complete, load_tokenizer
from pipeline.errors import MissingInputError
from pipeline.graph import Node, Recipe
from pipeline.model.presets import build_model, shape_of
from pipeline.roles import MODEL, TOKENIZER, input_of


def model_of(recipe: Recipe, store: Store, ref: str) -> PreTrainedModel | None:
    """The model that `ref` is or will be, without weights; None where it cannot be told."""
    if ref not in recipe.nodes:
        return empty_model(input_of(store, ref, MODEL).model)
    node = recipe.nodes[ref]
    if node.stage.type == "pretrain" and not node.inputs.get("init"):
        given = node.config.model  # type: ignore[attr-defined]
        vocab = _vocabulary(recipe, store, node)
        context = int(node.config.context_length)  # type: ignore[attr-defined]
        shape = shape_of(given.model_dump(exclude={"architecture", "config"}), context, vocab)
        with torch.device("meta"):
            return build_model(given.architecture, shape, given.config)
    above = node.inputs.get("init")
    return model_of(recipe, store, above[0]) if above else None


def empty_model(folder: Path) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=runs_code_of(folder))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=runs_code_of(folder))
    assert isinstance(model, PreTrainedModel)
    return model


def _vocabulary(recipe: Recipe, store: Store, node: Node) -> int:
    ref = node.inputs["tokens"][0]
    if ref not in recipe.nodes:
        return int(store.resolve(ref).manifest["metrics"]["vocab_size"])
    return tokenizer_size(recipe, store, ref)


def tokenizer_size(recipe: Recipe, store: Store, ref: str, added: tuple[str, ...] = ()) -> int:
    """Tokens of the tokenizer that `ref` is or will hold, once the special tokens `added` are added to it."""
    if ref not in recipe.nodes:
        tokenizer = load_tokenizer(input_of(store, ref, TOKENIZER).model)
        complete(tokenizer)
        add_specials(tokenizer, added)
        return len(tokenizer)
    node = recipe.nodes[ref]
    config: Any = node.config
    if {"vocab_size", "added_merges", "added_tokens"} <= set(type(config).model_fields):  # `tokenize` or a copy of it
        given = node.inputs["tokenizer"]
        added = (*config.added_tokens, *added)
        trained = SMALLEST_VOCAB if config.algorithm == "bytes" else int(config.vocab_size)
        size = trained + len({*added} - {*SPECIALS})
        return int(config.added_merges) + (tokenizer_size(recipe, store, given[0], added) if given else size)
    above = node.inputs.get("tokens") or node.inputs.get("init")
    if not above:
        raise MissingInputError(f"the tokenizer of `{ref}` cannot be told before it is made")
    return tokenizer_size(recipe, store, above[0], added)
