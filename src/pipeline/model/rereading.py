"""A model without a cache that could be used here, in the middle of writing.

Letters: B rows, P prompt length, L prompt and new tokens so far, V vocabulary.
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.model.decoding import Decoder, has_keys_alone


def begin(
    model: PreTrainedModel,
    prompt_ids_BP: Tensor,
    is_real_BP: Tensor,
    owners_B: Tensor | None = None,
    shared_S: Tensor | None = None,
) -> Decoder | Rereader:
    """What writes behind the prompts: see `Decoder`. Its cache, or every row read again where the model has none.

    A model of keys and values alone is written with by its cache, and what fails there is an error. With states it is
    found out by trying: some have a cache of the family's own (xLSTM, MiniMax), or layers of states alone, where
    transformers counts keys.
    """
    given = (model, prompt_ids_BP, is_real_BP, owners_B, shared_S)
    parameters = inspect.signature(model.forward).parameters
    if "past_key_values" in parameters and has_keys_alone(model):
        return Decoder(*given)
    if "past_key_values" not in parameters and "cache_params" not in parameters:
        return Rereader(*given)
    try:
        return Decoder(*given)
    except (AttributeError, ValueError):
        return Rereader(*given)


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
