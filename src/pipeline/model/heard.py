"""What a model has read of a conversation, kept between its answers: the next prompt begins like the last one, and that
beginning is not read again.

What is said is the same up to float order: in bf16 a near-tie may fall the other way (docs/notes.md). A model whose
cache cannot be cut back (`Decoder.can_forget`) reads every prompt from its first token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.model.decoding import Decoder
from pipeline.model.rereading import Rereader, begin


@dataclass
class Heard:
    """One row of tokens in one model's cache."""

    ids: list[int] = field(default_factory=list)
    """Tokens that every layer holds. Never more of them: an answer may be broken off in the middle of a forward."""
    decoder: Decoder | Rereader | None = None

    def read(self, model: PreTrainedModel, prompt: Sequence[int]) -> Decoder | Rereader:
        """The decoder of `model` behind the prompt, of which what it begins with like `ids` is not read again."""
        kept = min(alike(self.ids, prompt), len(prompt) - 1)  # the last token is read: the next one is told by it
        ids_T = torch.tensor(list(prompt), device=model.device)
        if isinstance(self.decoder, Decoder) and self.decoder.model is model and kept and self.decoder.can_forget:
            del self.ids[kept:]
            self.decoder.go_on(kept, ids_T[kept:])
        else:
            self.ids, self.decoder = [], None
            self.decoder = begin(model, ids_T[None], torch.ones_like(ids_T[None]))
        self.ids = list(prompt)
        return self.decoder

    def write(self, id_B: Tensor) -> None:
        """One more token, [1]."""
        assert self.decoder is not None, "nothing was read"
        self.decoder.decode_one(id_B)
        self.ids.append(int(id_B))


def alike(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))
