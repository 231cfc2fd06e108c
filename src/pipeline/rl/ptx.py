"""PPO-ptx: the pretraining loss beside the policy's (Ouyang et al. 2022, section 3.5, eq. 2).

    L = L_ppo + ptx_coef * mean over tokens of -log pi(token)

on text the model was pretrained on, so that what it knew is not forgotten for the reward. Which rows an optimiser step
takes follows from its number alone. Letters: B rows of this rank, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from pipeline.artifacts import Artifact
from pipeline.data.packing import Windows
from pipeline.data.shards import TokenFile
from pipeline.errors import ConfigError, MismatchError
from pipeline.model.build import check_reach
from pipeline.model.next_token import NextToken
from pipeline.rl.forwards import precision
from pipeline.rl.place import Place
from pipeline.runtime import derive_seed


@dataclass(frozen=True)
class PretrainingText:
    """Rows of text, and what they weigh."""

    windows: Windows
    loss: NextToken
    coef: float
    rows: int
    """Of an optimiser step, over all ranks."""
    microbatch: int
    place: Place

    def add_gradient(self, number: int) -> dict[str, float]:
        """The gradient of optimiser step `number` (counted from the run's first), added to the policy's; the loss
        without its coefficient, mean nats a token over all ranks. A collective where there are ranks."""
        positions = range(number * self.rows, (number + 1) * self.rows)[self.place.rank :: self.place.world_size]
        device = self.loss.model.device
        tokens = self.rows * self.windows.length
        total = torch.zeros((), device=device)
        for start in range(0, len(positions), self.microbatch):
            rows_BT = torch.from_numpy(self.windows.batch(positions[start : start + self.microbatch])).to(device)
            with precision(device, self.place.bf16):
                nats, _ = self.loss.loss_sum(rows_BT[:, :-1].contiguous(), rows_BT[:, 1:].contiguous())
            (self.coef * nats / tokens).backward()  # type: ignore[no-untyped-call]
            total += nats.detach()
        return {"ptx_loss": (self.place.reduce(total) / tokens).item()}


def load_text(
    tokens: Artifact | None,
    init: Artifact,
    policy: PreTrainedModel,
    place: Place,
    *,
    coef: float,
    rows: int,
    length: int,
    microbatch: int,
    seed: int,
) -> PretrainingText:
    """The text of a tokenize stage's artifact for a policy that began as `init`.

    ConfigError where no text is named or its rows are longer than the policy's context, MismatchError where it was made
    with another tokenizer.
    """
    if tokens is None:
        raise ConfigError(
            "ptx_coef weighs a loss on pretraining text, and no text is named",
            where="ppo.ptx_tokens",
            mend="--set ppo.ptx_tokens=tokenize",
        )
    if tokens.tokenizer_hash != init.tokenizer_hash:
        raise MismatchError(
            f"{tokens.reference} was made with another tokenizer than {init.reference} has",
            where="ppo.ptx_tokens",
            mend="name the tokenize stage that the policy was pretrained on",
        )
    check_reach(policy, length, "the policy's", "ppo.ptx_length")
    windows = Windows(TokenFile(tokens.path / "train.ds").tokens, length, derive_seed(seed, "pretraining text"))
    return PretrainingText(windows, NextToken(policy), coef, rows, microbatch, place)
