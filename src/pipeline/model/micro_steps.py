"""The gradient of a whole batch, in micro-steps over this rank's share of it.

Every micro-step's loss is divided by the tokens that the whole batch predicts, over all ranks and micro-steps, before
its backward: gradients are sums, and how the batch is split is nowhere in them but in float order.

Letters of shapes: B rows of a micro-step, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from pipeline.data.infilling import Order
from pipeline.errors import ConfigError, MachineError
from pipeline.model.feed import Feed, MicroBatch, micro_batch
from pipeline.model.next_token import NextToken

CACHED_TOKENS = 2048
"""Tokens of a forward and backward on a CPU, at most, so that their activations stay in its cache: 4 × 8 rows of 256
for 32 at once, the same gradient in 4 % less time. (A GPU takes the micro-step whole.)"""


class MicroSteps:
    """Forward and backward of a run's batches on this rank.

    `rows` and `count` are this rank's micro-step and how many of them a step has; `is_split`, that all ranks have a
    part of each micro-step instead of some of them whole. `starts` is where they begin in a step's samples. ConfigError
    for a model of experts whose micro-steps were to be halved.
    """

    def __init__(
        self,
        losses: NextToken,
        samples: Order,
        *,
        steps: int,
        batch: int,
        length: int,
        rows: int,
        count: int,
        is_split: bool,
        rank: int,
        world_size: int,
        device: torch.device,
        autocast: Callable[[], torch.autocast],
        halves_on_out_of_memory: bool,
        say: Callable[[str], None],
    ) -> None:
        if halves_on_out_of_memory and losses.has_experts:
            problem = "experts are balanced over a micro-step's rows, which smaller ones would change"
            raise ConfigError(problem, where="pretrain.auto_find_batch_size", mend="leave it out")
        self.losses, self.samples, self.steps, self.batch = losses, samples, steps, batch
        self.rows, self.world_size, self.device = rows, world_size, device
        share = rows * count
        self.starts = list(
            range(rank * rows, batch, rows * world_size) if is_split else range(rank * share, (rank + 1) * share, rows)
        )
        self.autocast, self.halves, self.say = autocast, halves_on_out_of_memory, say
        losses.splits_rows = is_split
        while (
            device.type == "cpu"
            and not losses.has_experts
            and self.rows % 2 == 0
            and self.rows * length > CACHED_TOKENS
        ):
            self._divide(2)  # experts are balanced over the rows of a micro-step, which therefore stays whole
        self.routing = torch.zeros(2, device=device)
        self.feed = self._feed()

    def gradients(self, step: int) -> Tensor:
        """Adds the gradients of this rank's share of `step` (0-based); returns its part of the loss, nats a token.

        MachineError where the memory does not hold a micro-step, which is halved first where that was asked for.
        """
        while True:
            routing, tally = self.routing.clone(), self.losses.teacher.tally.clone() if self.losses.teacher else None
            try:
                return self._gradients(step)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                if not self.halves or self.rows == 1:
                    mend = "gradient_checkpointing, a smaller per_device_train_batch_size (with more accumulation), or "
                    mend += "auto_find_batch_size; `llmpipe plan` says what fits"
                    raise MachineError(f"out of memory: {error}", where=f"step {step + 1:,}", mend=mend) from error
            # past the handler, so that the failed forward's tensors are let go
            self.losses.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._divide(next(n for n in range(2, self.rows + 1) if self.rows % n == 0))
            self.say(f"out of memory: {len(self.starts)} micro-steps of {self.rows} rows from here, the same batch")
            self.routing = routing
            if self.losses.teacher is not None and tally is not None:
                self.losses.teacher.tally = tally
            self.feed.close()
            self.feed = self._feed()

    def rehearse(self) -> Tensor:
        """Forward and backward of the run's first rows, as a micro-step: its loss, nats a token. Gradients are added to
        the model's; nothing else of it is counted."""
        routing, tally = self.routing.clone(), self.losses.teacher.tally.clone() if self.losses.teacher else None
        batch = micro_batch(self.samples.take(range(self.rows))).to(self.device)
        loss = self._forward_backward(batch, self.samples.targets(range(self.rows)))
        self.routing = routing
        if self.losses.teacher is not None and tally is not None:
            self.losses.teacher.tally = tally
        return loss

    def look(self, steps: int) -> dict[str, float]:
        """Of models of experts, over all ranks and the `steps` steps since the last look: the mean balance loss, and
        the busiest expert's share of the choices against an even one."""
        if not self.losses.has_experts:
            return {}
        if self.world_size > 1:
            torch.distributed.all_reduce(self.routing)
        balance, busiest = (self.routing / max(1, steps)).tolist()
        self.routing.zero_()
        return {"balance_loss": balance, "busiest_expert": busiest} if busiest else {}

    def pending(self) -> dict[str, list[float]]:
        """Plain JSON for a checkpoint: what is counted for the next look, over all ranks. A collective."""
        counts = [self.routing] + ([self.losses.teacher.tally] if self.losses.teacher else [])
        over_all = torch.cat(counts)
        if self.world_size > 1:
            torch.distributed.all_reduce(over_all)
        return {"counted": over_all.tolist()}

    def restore(self, state: Mapping[str, list[float]], is_main: bool) -> None:
        """Put back what `pending` gave; it is rank 0's to add."""
        if is_main:
            counted = torch.tensor(state["counted"], device=self.device)
            self.routing = counted[:2].clone()
            if self.losses.teacher:
                self.losses.teacher.tally = counted[2:].clone()

    def close(self) -> None:
        """End the thread that reads ahead."""
        self.feed.close()

    def _gradients(self, step: int) -> Tensor:
        total = torch.zeros((), device=self.device)
        targets = self.samples.targets(range(step * self.batch, (step + 1) * self.batch))
        for ready in self.feed.step(step):
            total += self._forward_backward(ready.to(self.device), targets)
        return total

    def _forward_backward(self, batch: MicroBatch, targets: int) -> Tensor:
        """Adds the gradients of a micro-step; its part of the loss of a batch that predicts so many tokens."""
        with self.autocast():
            nats, routing = self.losses(batch.inputs_BT, batch.targets_BT, batch.positions_BT)
        loss = nats / targets
        part: Tensor = loss.detach()
        if routing is not None:
            share = self.rows / self.batch
            loss = loss + self.losses.balance_weight * share * routing.balance_loss
            self.routing += share * torch.stack([routing.balance_loss.detach(), routing.busiest])
        loss.backward()
        return part

    def _divide(self, parts: int) -> None:
        """Every micro-step into so many, each inside its own rows: another rank's stay what they are."""
        self.rows //= parts
        self.starts = [start + part * self.rows for start in self.starts for part in range(parts)]

    def _feed(self) -> Feed:
        return Feed(
            self.samples.take,
            steps=self.steps,
            batch=self.batch,
            rows=self.rows,
            starts=self.starts,
            device=self.device,
        )
