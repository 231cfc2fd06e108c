"""A model without a cache that could be used here, in the middle of writing.

Letters: B rows, P prompt length, L prompt and new tokens so far, V vocabulary.
"""

from __future__ import annotations

import inspect
from typing import Literal
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.model.build import ATTENTION_NAMES, evaluating, reach_of
from pipeline.model.decoding import Decoder, has_keys_alone


def begin(
    model: PreTrainedModel,
    prompt_ids_BP: Tensor,
    is_real_BP: Tensor,
    owners_B: Tensor | None = None,
    shared_S: Tensor | None = None,
) -> Decoder | Rereader:
    """What writes behind the prompts: see `Decoder`. Its cache, or every row read again where the model has none.

    A model of keys and values alone is written with by its cache, and what fails there is an error; one `in_doubt` as
    `cache_of` finds. With states it is found out by trying: some have a cache of the family's own (xLSTM, MiniMax), or
    layers of states alone, where transformers counts keys.
    """
    given = (model, prompt_ids_BP, is_real_BP, owners_B, shared_S)
    parameters = inspect.signature(model.forward).parameters
    if "past_key_values" in parameters and has_keys_alone(model):
        cache = cache_of(model) if in_doubt(model) else "roomy"
        return Rereader(*given) if cache == "none" else Decoder(*given, room=cache == "roomy")
    if "past_key_values" not in parameters and "cache_params" not in parameters:
        return Rereader(*given)
    try:
        return Decoder(*given)
    except (AttributeError, ValueError):
        return Rereader(*given)


Cache = Literal["roomy", "tight", "none"]
"""What a model can be written with: a cache with empty columns (`Decoder`), one without, or none that is right."""

_FOUND: WeakKeyDictionary[PreTrainedModel, Cache] = WeakKeyDictionary()
"""What `cache_of` has found: it is the family's, whatever the weights have become."""


def in_doubt(model: PreTrainedModel) -> bool:
    """Whether the model may see other than what a mask and positions tell it.

    It makes masks of its own (GPT-Neo), takes no positions (BART's kin, BLOOM), has a table of them (RoBERTa's kin
    count from behind the pad id), or its config tells of fewer layers than keep keys.
    """
    config = model.config.get_text_config()
    tables = sum(isinstance(module, torch.nn.Embedding) for module in model.modules())
    attend = sum(name.rpartition(".")[2] in ATTENTION_NAMES for name, _ in model.named_modules())
    return (
        not model._supports_attention_backend
        or "position_ids" not in inspect.signature(model.forward).parameters
        or tables > 1
        or attend > config.num_hidden_layers
    )


def cache_of(model: PreTrainedModel) -> Cache:
    """The first with which the model writes what it says of the same rows read by themselves, by trying (once)."""
    if model not in _FOUND:
        kinds: tuple[Cache, ...] = ("roomy", "tight")
        _FOUND[model] = next((kind for kind in kinds if _is_right(model, room=kind == "roomy")), "none")
    return _FOUND[model]


@torch.no_grad()
def _is_right(model: PreTrainedModel, *, room: bool) -> bool:
    """Two rows of up to 12 tokens, the shorter one padded, the last three of each written one by one: the same logits
    as of each row by itself, up to a thousandth of the largest (a tenth where the weights have less than float32)."""
    reach, device = reach_of(model.config), model.device
    longest = max(4, min(12, reach or 12))
    ids_2L = (
        torch.arange(2 * longest, device=device).reshape(2, longest) * 7 % model.get_input_embeddings().weight.shape[0]
    )
    padding = (longest - 3) // 2
    is_real_2P = torch.ones(2, longest - 3, dtype=torch.bool, device=device)
    is_real_2P[1, :padding] = False
    with evaluating(model), torch.autocast(device.type, enabled=False):
        alone = [model(input_ids=row[None], use_cache=False).logits[0, -4:] for row in (ids_2L[0], ids_2L[1, padding:])]
        try:
            decoder = Decoder(model, ids_2L[:, :-3], is_real_2P, room=room)
            found = [decoder.logits_BV]
            for place in (-3, -2, -1):
                decoder.decode_one(ids_2L[:, place])
                found.append(decoder.logits_BV)
        except (AttributeError, IndexError, RuntimeError, ValueError):
            return False
    expected_24V, found_24V = torch.stack(alone).float(), torch.stack(found, dim=1).float()
    most = 1e-3 if model.dtype == torch.float32 else 0.1
    return bool((expected_24V - found_24V).abs().max() <= most * expected_24V.abs().max())


class Rereader:
    """As `Decoder`, by reading every row again for every token.

    Rows are padded on the right, where a causal model does not look: neither a mask nor positions have to be told.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompt_ids_BP: Tensor,
        is_real_BP: Tensor,
        owners_B: Tensor | None = None,
        shared_S: Tensor | None = None,
    ) -> None:
        self.model = model
        before = prompt_ids_BP.new_empty(0) if shared_S is None else shared_S
        rows = [torch.cat([before, ids[real]]) for ids, real in zip(prompt_ids_BP, is_real_BP.bool(), strict=True)]
        rows = rows if owners_B is None else [rows[owner] for owner in owners_B.tolist()]
        self.lengths_B = torch.tensor([len(row) for row in rows], device=prompt_ids_BP.device)
        self.ids_BL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        self.logits_BV = self._forward()

    def decode_one(self, ids_B: Tensor) -> None:
        """Write one token a row."""
        self.ids_BL = F.pad(self.ids_BL, (0, 1))
        self.ids_BL.scatter_(1, self.lengths_B[:, None], ids_B[:, None])
        self.lengths_B = self.lengths_B + 1
        self.logits_BV = self._forward()

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (indices into the present batch). Their next token has been chosen."""
        self.lengths_B = self.lengths_B[rows]
        self.ids_BL = self.ids_BL[rows, : int(self.lengths_B.max())]

    def _forward(self) -> Tensor:
        logits_BLV: Tensor = self.model(input_ids=self.ids_BL, use_cache=False).logits
        return logits_BLV[torch.arange(len(self.ids_BL), device=self.ids_BL.device), self.lengths_B - 1]
