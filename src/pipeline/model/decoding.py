"""A model in the middle of writing: its cache and the forward of one more token a row.

Letters: B rows, P prompt length, L prompt and new tokens so far, W columns of the cache (L and some room), V
vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

BLOCK = 32
"""Columns by which the cache grows. All of its columns are attended to, the empty ones masked: products of a part of
each row's memory take three times as long on a CPU, and growing by one column copies everything at every token.
"""


def columns(written: int) -> int:
    """Columns of a cache that holds so many: the next multiple of BLOCK."""
    return -(-written // BLOCK) * BLOCK


def as_multiplied(states: Tensor) -> Tensor:
    """In the dtype that autocast multiplies in: else it would cast all keys again at every token."""
    device = states.device.type
    if states.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return states.to(torch.get_autocast_dtype(device))
    return states


class _BlockLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer, [B, heads, W, channels]: the columns written, and zeros up to a whole block."""

    def __init__(self) -> None:
        super().__init__()
        self.written = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new positions; all keys and values so far, with the room behind them."""
        begin, self.written = self.written, self.written + key_states.shape[2]
        if begin == 0:  # a prompt sees itself, without room
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = as_multiplied(key_states), as_multiplied(value_states)
            return key_states, value_states
        missing = columns(self.written) - self.keys.shape[2]
        if missing > 0:
            self.keys, self.values = (F.pad(states, (0, 0, 0, missing)) for states in (self.keys, self.values))
        self.keys[:, :, begin : self.written] = key_states
        self.values[:, :, begin : self.written] = value_states
        return self.keys, self.values

    def forget(self, kept: int) -> None:
        """Leave the first `kept` columns as the only ones written. What a torn `update` left behind them goes too."""
        if self.written > kept:
            self.written = kept
            self.keys, self.values = self.keys[:, :, :kept], self.values[:, :, :kept]

    def get_seq_length(self) -> int:
        """Columns written."""
        return self.written

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns that the next forward attends to, the first of them)."""
        return columns(self.written + query_length) if self.written else query_length, 0


def has_keys_alone(model: PreTrainedModel) -> bool:
    """Whether the model's cache is keys and values in every layer, all of them or those of a window."""
    try:
        layers = DynamicCache(config=model.config).layers
    except AttributeError:  # BLT's config is of several models: no layers are told
        return False
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


class Decoder:
    """A model in the middle of writing a batch: its cache, which columns are real, and where each row stands.

    `logits_BV` are those of the next token. Prompts are padded on the left, so that all rows write side by
    side. With `owners_B` row b answers prompt owners_B[b]: each prompt goes through the model once, then its keys and
    values (or states) are copied for its rows. So it is with `shared_S`, what stands before all prompts: padding then
    stands between it and a prompt, so that only models that see nothing but the mask and positions may be given it
    (`reach_of_masks` is infinite). `room` False: the cache holds what is written and no empty columns.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompt_ids_BP: Tensor,
        is_real_BP: Tensor,
        owners_B: Tensor | None = None,
        shared_S: Tensor | None = None,
        *,
        room: bool = True,
    ) -> None:
        parameters = inspect.signature(model.forward).parameters
        self.model = model
        self.cache = DynamicCache(config=model.config)
        # Where recurrent layers stand among the others, these read the mask by its last columns: no room there.
        self.has_room = room and has_keys_alone(model)
        if self.has_room:
            layers = self.cache.layers
            self.cache.layers = [_BlockLayer() if type(layer) is DynamicLayer else layer for layer in layers]
        self.takes_positions = "position_ids" in parameters  # not where positions are biases (BLOOM, MPT)
        self.is_recurrent = "cache_params" in parameters  # Mamba: a state a layer, no keys to mask
        before = 0 if shared_S is None else len(shared_S)
        self.is_real_BL = F.pad(is_real_BP.long(), (before, 0), value=1)
        positions_BL = (self.is_real_BL.cumsum(dim=1) - 1).clamp(min=0)
        self.positions_B = positions_BL[:, -1]
        if shared_S is not None:
            self._forward(shared_S[None], positions_BL[:1, :before], self.is_real_BL[:1, :before])
            self.cache.reorder_cache(torch.zeros(len(prompt_ids_BP), dtype=torch.long, device=shared_S.device))
        self.logits_BV = self._forward(
            prompt_ids_BP, positions_BL[:, before:], self._seen() if before else self.is_real_BL
        )
        if owners_B is not None:
            self.keep(owners_B)
            self.logits_BV = self.logits_BV[owners_B]

    def decode_one(self, ids_B: Tensor) -> None:
        """Write one token a row."""
        self.positions_B = self.positions_B + 1
        self.is_real_BL = F.pad(self.is_real_BL, (0, 1), value=1)
        self.logits_BV = self._forward(ids_B[:, None], self.positions_B[:, None], self._seen())

    @property
    def can_forget(self) -> bool:
        """Whether the end of what was read can be taken back and other tokens read in its place, as if it were new.

        Not with states or windows, which have lost the past, nor where positions depend on the length (dynamic and long
        rotary scaling), nor of a class of the user's own, which need not take several tokens behind a cache.
        """
        rope = str(self.model.config.to_dict().get("rope_parameters"))
        return (
            all(type(layer) is _BlockLayer for layer in self.cache.layers)
            and self.takes_positions
            and not self.is_recurrent
            and "'dynamic'" not in rope
            and "'longrope'" not in rope
            and type(self.model).__module__.startswith("transformers.")
        )

    def go_on(self, kept: int, ids_T: Tensor) -> None:
        """One row: forget all but its first `kept` tokens (`can_forget`), and read these behind them."""
        for layer in self.cache.layers:
            layer.forget(kept)
        length = kept + len(ids_T)
        self.is_real_BL = self.is_real_BL.new_ones(1, length)
        positions_BT = torch.arange(kept, length, device=ids_T.device)[None]
        self.positions_B = positions_BT[:, -1]
        room = columns(length) - length
        self.logits_BV = self._forward(ids_T[None], positions_BT, F.pad(self.is_real_BL, (0, room)))

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (indices into the present batch; one may come more than once). Their next token has
        been chosen."""
        self.cache.reorder_cache(rows)
        self.is_real_BL, self.positions_B = self.is_real_BL[rows], self.positions_B[rows]

    def _seen(self) -> Tensor:
        """Which columns of the cache, its room too, are there to be attended to. [B, W]"""
        length = self.is_real_BL.shape[1]
        return F.pad(self.is_real_BL, (0, columns(length) - length if self.has_room else 0))

    def _forward(self, ids_BT: Tensor, positions_BT: Tensor, is_real_BW: Tensor) -> Tensor:
        arguments: dict[str, Any]
        if self.is_recurrent:
            is_prefill = ids_BT.shape == is_real_BW.shape
            arguments = {"cache_params": self.cache, "attention_mask": is_real_BW if is_prefill else None}
        else:
            arguments = {"past_key_values": self.cache, "attention_mask": is_real_BW}
        if self.takes_positions:
            arguments["position_ids"] = positions_BT
        output = self.model(input_ids=ids_BT, use_cache=True, logits_to_keep=1, **arguments)
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids [B, P] with the padding on the left, and True where they are real, [B, P]."""
    longest = max(len(prompt) for prompt in prompts)
    ids_BP = torch.full((len(prompts), longest), pad_id)
    for row, prompt in enumerate(prompts):
        ids_BP[row, longest - len(prompt) :] = torch.tensor(prompt)
    lengths_B = torch.tensor([len(prompt) for prompt in prompts])
    return ids_BP, torch.arange(longest)[None, :] >= longest - lengths_B[:, None]
