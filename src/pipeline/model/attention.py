"""How a model computes its attention: the fastest way that is there, found out by running it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.errors import ConfigError
from pipeline.model.build import evaluating
from pipeline.model.rereading import cache_of, in_doubt

APART = ("flex_attention",)
"""What skips the products between documents of a row that do not see each other; torch's own kernel takes a mask.
(FlashAttention 2 does too, but transformers hands it documents' borders in batches of one row only.)"""


def choose_attention(model: PreTrainedModel, bf16: bool, longest: int, *, asked: str, apart: bool) -> str:
    """Sets the attention for training on rows of up to `longest` tokens; what it is, where that is worth a word.

    "auto": on a CPU plain products for short rows in bf16; on a GPU, where documents of a row are kept `apart`, the
    first of APART that runs; else what the model was loaded with. ConfigError where what was `asked` for does not run.
    """
    if asked != "auto":
        reason = try_attention(model, asked, bf16, apart)
        if reason:
            mend = "leave it out, or sdpa"
            raise ConfigError(f"it does not run here: {reason}", where="pretrain.attn_implementation", mend=mend)
        return f"attention: {asked}"
    if model.device.type == "cpu":
        use_plain_products(model, bf16, longest)
        return ""
    return first_that_runs(model, APART, bf16, apart) if apart else ""


def first_that_runs(model: PreTrainedModel, names: Sequence[str], bf16: bool, apart: bool) -> str:
    """Sets the first attention of `names` that runs here; which, or why none does."""
    reasons = []
    for name in names:
        reason = try_attention(model, name, bf16, apart)
        if not reason:
            return f"attention: {name}"
        reasons.append(f"{name}: {reason}")
    return f"attention: {model.config._attn_implementation} ({'; '.join(reasons)})"


def use_plain_products(model: PreTrainedModel, bf16: bool, longest: int) -> None:
    """Attention as plain products where that is the faster: on a CPU in bf16, for rows of up to 256 tokens.

    Forward and backward of torch's fused kernel take 3.5 times as long there at 64 tokens and 1.7 times at 256; in
    fp32 it is the faster one. Memory grows with the square of a row, hence the bound.
    """
    is_fused = model.config._attn_implementation == "sdpa"
    if is_fused and model.device.type == "cpu" and bf16 and longest <= 256:
        model.set_attn_implementation("eager")


def restore_attention(model: PreTrainedModel) -> None:
    """Undo `use_plain_products`."""
    if model.config._attn_implementation == "eager" and model._supports_sdpa:
        model.set_attn_implementation("sdpa")


def try_attention(model: PreTrainedModel, name: str, bf16: bool, apart: bool) -> str:
    """Sets the attention `name`, forward and backward tried on two rows of 64 tokens; why not, and the attention as it
    was, where that fails or gives other outputs than before (by more than bf16 rounds)."""
    before = model.config._attn_implementation
    with drawn(model):
        expected_BTD = _tried(model, bf16, apart)
        try:
            model.set_attn_implementation(name)
            found_BTD = _tried(model, bf16, apart)
        except (ImportError, ValueError, NotImplementedError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        else:
            apart_by = float((found_BTD - expected_BTD).abs().max() / expected_BTD.abs().max())
            reason = f"its outputs differ by {apart_by:.1%}" if apart_by > 0.05 else ""
    model.zero_grad(set_to_none=True)
    if reason:
        model.set_attn_implementation(before)
    return reason


def _tried(model: PreTrainedModel, bf16: bool, apart: bool) -> Tensor:
    """The trunk's output on two rows, after a backward through it."""
    rows = model.get_input_embeddings().weight.shape[0]
    ids_BT = torch.arange(128, device=model.device).reshape(2, 64) % rows
    positions_BT = torch.arange(32, device=model.device).repeat(2, 2) if apart else None
    given = {} if positions_BT is None else {"position_ids": positions_BT}
    with evaluating(model), torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bf16):
        hidden_BTD: Tensor = model.base_model(ids_BT, use_cache=False, **given).last_hidden_state
    hidden_BTD.float().square().mean().backward()  # type: ignore[no-untyped-call]
    return hidden_BTD.detach().float()


@contextmanager
def drawn(model: PreTrainedModel) -> Iterator[None]:
    """Projections that begin at zero have a value for a while: at zero no block would do anything to be seen."""
    zeros = [weight for weight in model.parameters() if weight.dim() > 1 and not weight.any()]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in zeros:
            weight.copy_(0.02 * torch.randn(weight.shape, generator=generator))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight in zeros:
                weight.zero_()


def check_keeps_apart(models: Sequence[PreTrainedModel]) -> None:
    """ConfigError for a model that `keeps_documents_apart` finds not to."""
    for model in models:
        if not keeps_documents_apart(model):
            raise ConfigError(
                f"{type(model).__name__} does not keep the documents of a sample apart",
                where="pretrain.document_mask",
                mend="packing: document, or leave it out",
            )


@torch.no_grad()
def keeps_documents_apart(model: PreTrainedModel) -> bool:
    """Whether positions that begin again keep what stands before them out of sight: tried on two rows of eight tokens.

    transformers reads document borders off the positions where it makes the attention mask; families that make none
    (state spaces, ALiBi) see on. And whether a document says there what it says by itself: some count from another
    place than 0 (RoBERTa's kin).
    """
    ids_28 = torch.arange(16, device=model.device).reshape(2, 8) % model.get_input_embeddings().weight.shape[0]
    ids_28[1, 4:] = ids_28[0, 4:]
    positions_28 = torch.arange(4, device=model.device).repeat(2, 2)
    with drawn(model), evaluating(model), torch.autocast(model.device.type, enabled=False):
        try:
            found = model.base_model(ids_28, position_ids=positions_28, use_cache=False)
            alone = model.base_model(ids_28[:, :4], use_cache=False)
        except TypeError:  # a model of one's own that takes no positions
            return False
    hidden_28D, alone_24D = found.last_hidden_state, alone.last_hidden_state
    apart = torch.stack([hidden_28D[0, 4:] - hidden_28D[1, 4:], hidden_28D[0, :4] - alone_24D[0]])
    return bool(apart.abs().max() < 1e-4 * hidden_28D.abs().max())


def check_looks_back(model: PreTrainedModel, where: str) -> None:
    """ConfigError for a model that `sees_ahead`: it would copy what it is to predict."""
    if sees_ahead(model):
        raise ConfigError(
            f"{type(model).__name__} sees the tokens that it is to predict",
            where=where,
            mend="a causal model; of BERT's kin config: {is_decoder: true}",
        )


@torch.no_grad()
def sees_ahead(model: PreTrainedModel) -> bool:
    """Whether what a model says behind a token depends on later ones: tried on eight tokens, the last one changed. None
    is padding: XLM leaves out as many of the last ones as there are of it."""
    rows = model.get_input_embeddings().weight.shape[0]
    pad_id = getattr(model.config.get_text_config(), "pad_token_id", None)
    known = [token for token in range(min(rows, 10)) if token != pad_id]
    ids_28 = torch.tensor([[known[place % len(known)] for place in range(8)]] * 2, device=model.device)
    ids_28[1, -1] = known[8 % len(known)]
    with drawn(model), evaluating(model), torch.autocast(model.device.type, enabled=False):
        logits_28V = model(ids_28, use_cache=False).logits
    return bool((logits_28V[0, :-1] - logits_28V[1, :-1]).abs().max() > 1e-4 * logits_28V.abs().max())


_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


def reach_of_masks(model: PreTrainedModel) -> float:
    """Tokens of the longest row for which the model can be given a mask of who sees whom, and positions of our own;
    0 where it can't be, infinite where nothing bounds it.

    A mask that is given is the one of all layers, those that look back on a window (or see a chunk) too.
    """
    config = model.config.get_text_config()
    has_positions = "position_ids" in inspect.signature(model.forward).parameters
    kinds = set(getattr(config, "layer_types", None) or ())
    is_told = has_positions and not model._is_stateful and kinds <= _ATTENTION and not getattr(config, "alibi", False)
    if not is_told or model.config._attn_implementation != "sdpa":
        return 0
    parameters = inspect.signature(model.forward).parameters
    if "past_key_values" in parameters and in_doubt(model) and cache_of(model) == "none":  # positions mean other things
        return 0
    if kinds == {"full_attention"}:
        return math.inf
    bounds = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min((bound for bound in bounds if bound), default=math.inf)
