"""PPO-ptx: the pretraining loss beside the policy's (Ouyang et al. 2022, section 3.5, eq. 2).

    L = L_ppo + ptx_coef * mean over tokens of -log pi(token)

on text the model was pretrained on, so that what it knew is not forgotten for the reward. Which rows an optimiser step
takes follows from its number alone. Letters: B rows of this rank, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.data.packing import Windows
from pipeline.model.next_token import NextToken
from pipeline.rl.forwards import precision
from pipeline.rl.masking import Reduce


@dataclass(frozen=True)
class PretrainingText:
    """Rows of text, and what they weigh."""

    windows: Windows
    loss: NextToken
    coef: float
    rows: int
    """Of an optimiser step, over all ranks."""
    microbatch: int
    rank: int
    world_size: int
    bf16: bool
    reduce: Reduce

    def add_gradient(self, number: int) -> dict[str, float]:
        """The gradient of optimiser step `number` (counted from the run's first), added to the policy's; the loss
        without its coefficient, mean nats a token over all ranks. A collective where there are ranks."""
        positions = range(number * self.rows, (number + 1) * self.rows)[self.rank :: self.world_size]
        device = self.loss.model.device
        tokens = self.rows * self.windows.length
        total = torch.zeros((), device=device)
        for start in range(0, len(positions), self.microbatch):
            rows_BT = torch.from_numpy(self.windows.batch(positions[start : start + self.microbatch])).to(device)
            with precision(device, self.bf16):
                nats, _ = self.loss.loss_sum(rows_BT[:, :-1].contiguous(), rows_BT[:, 1:].contiguous())
            (self.coef * nats / tokens).backward()  # type: ignore[no-untyped-call]
            total += nats.detach()
        return {"ptx_loss": (self.reduce(total) / tokens).item()}
