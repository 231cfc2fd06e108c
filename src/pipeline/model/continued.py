"""Going on from a base model: rows for new tokens, and what it knew before.

Letters of shapes: V rows of an embedding, D width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pipeline.data.extend import is_extension, pieces
from pipeline.data.shards import TokenFile
from pipeline.data.tokenizers import encode_text, load_tokenizer, separator_id
from pipeline.errors import MismatchError
from pipeline.model.adapters import adapt, lora
from pipeline.model.build import check_reach, check_vocabulary, evaluating, head_weight, load_causal_lm
from pipeline.model.held_out import Ranks, bits_by_source
from pipeline.model.next_token import NextToken
from pipeline.recipe import PeftConfig
from pipeline.runtime import Runtime


@dataclass(frozen=True)
class Start:
    """What a run begins with."""

    model: PreTrainedModel
    adapted: PeftModel | None = None
    """The adapters on it, where only they are trained."""
    known: dict[str, float] = field(default_factory=dict)
    """`bits_per_byte/<label>` of the base on each source, where the run is not resumed."""


def start_from_base(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    valid: TokenFile,
    peft: PeftConfig | None,
    *,
    length: int,
    documents: int,
    seed: int,
    autocast: Callable[[], torch.autocast],
    runtime: Runtime,
) -> Start:
    """The base in `folder` with a row for every token of `tokenizer`, under adapters where `peft` is set (`seed` draws
    them), and what it knows of `documents` of each source of `valid`, unless the run is resumed."""
    adapters = lora(peft, "CAUSAL_LM")
    model, own = load_base(folder, tokenizer, length)
    known = {}
    if runtime.checkpoints.peek() is None:
        model.to(runtime.device)
        with autocast():
            ranks = Ranks(runtime.rank, runtime.world_size)
            known = measure_base(model, own, tokenizer, valid, length, documents, ranks, runtime.heed)
    new = fit_vocabulary(model, own, tokenizer)
    if new:
        runtime.say(f"{new:,} new tokens: rows for them from those of their parts")
    if adapters is None:
        return Start(model, None, known)
    return Start(model, adapt(model, adapters, seed, train_rows=new > 0), known)


def load_base(
    folder: Path, tokenizer: PreTrainedTokenizerFast, length: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model in `folder` and its own tokenizer. MismatchError where `tokenizer` is no extension of that, ConfigError
    where the model does not reach `length` tokens."""
    own = load_tokenizer(folder)
    check_extends(tokenizer, own)
    model = load_causal_lm(folder)
    check_vocabulary(model, len(own), "pretrain.init")
    check_reach(model, length, "the base's", "pretrain.context_length")
    return model, own


def check_extends(tokenizer: PreTrainedTokenizerFast, base: PreTrainedTokenizerFast) -> None:
    """MismatchError unless every id of `base` means the same token in `tokenizer`."""
    if not is_extension(base, tokenizer):
        raise MismatchError(
            "the shards are of a tokenizer that is neither the base's own nor an extension of it",
            where="pretrain.tokens",
            mend=f"tokenize with the base's: --set tokenize.tokenizer={base.name_or_path}",
        )


def fit_vocabulary(model: PreTrainedModel, base: PreTrainedTokenizerFast, tokenizer: PreTrainedTokenizerFast) -> int:
    """Gives the model a row for every token that `tokenizer` has and its own `base` has not; returns how many are new.

    A new token's rows (of the embedding, and of the head where it is not the same) are the mean of those of the base's
    tokens it is made of: at the start it stands for what its parts said (as Hewitt 2021, "Initializing new word
    embeddings", argues for the mean). A new special token's are the mean of all. Raises MismatchError where
    `tokenizer` does not extend `base`.
    """
    check_extends(tokenizer, base)
    new = pieces(base, tokenizer)
    table = model.get_input_embeddings().weight
    if len(tokenizer) > table.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tables = {id(t): t for t in (model.get_input_embeddings().weight, head_weight(model)) if t is not None}
    for weight in tables.values():
        fill_rows(weight, new, len(base))
    return len(new)


def measure_base(
    model: PreTrainedModel,
    own: PreTrainedTokenizerFast,
    tokenizer: PreTrainedTokenizerFast,
    valid: TokenFile,
    length: int,
    documents: int,
    ranks: Ranks,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """`bits_per_byte/<label>` of the base on each source, held out, the text in its `own` tokens, not the file's.
    A collective."""

    def own_ids(index: int) -> np.ndarray[Any, Any]:
        text = tokenizer.decode(valid.document(index)[:-1])
        return np.array([*encode_text(own, text), separator])

    separator = separator_id(own)
    is_other = separator != valid.metadata.separator_id or any(pieces(own, tokenizer).values())
    with evaluating(model):
        losses = NextToken(model)
        return bits_by_source(losses, valid, length, documents, own_ids if is_other else None, separator, ranks, tick)


@torch.no_grad()
def fill_rows(weight_VD: Tensor, parts: Mapping[int, Sequence[int]], known: int) -> None:
    """Row i becomes the mean of the rows `parts[i]`, or of the first `known` where there are none; in place."""
    mean_D = weight_VD[:known].float().mean(dim=0)
    for row, ids in parts.items():
        weight_VD[row] = (weight_VD[list(ids)].float().mean(dim=0) if ids else mean_D).to(weight_VD.dtype)


def read_known(metrics: Path) -> dict[str, float]:
    """What the base knew, `bits_per_byte/<label>`: the first line of the run's metrics."""
    with metrics.open(encoding="utf-8") as file:
        line = json.loads(file.readline())
    found = {name: value for name, value in line.items() if name.startswith("bits_per_byte/")}
    return {name: math.nan if value is None else value for name, value in found.items()}


def forgetting(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """A table of the held-out bits per byte of each source, before and after; nothing without a before."""
    if not before:
        return []
    names = {name: name.partition("/")[2] for name in before}
    head = "bits per byte, held out"
    width = max(len(head), *map(len, names.values()))
    rows = [
        f"{label:{width}}  {before[name]:6.3f}  {after[name]:6.3f}  {after[name] - before[name]:+.3f}"
        for name, label in names.items()
    ]
    return [f"{head:{width}}  before   after", *rows]
