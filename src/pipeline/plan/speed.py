"""How fast this machine does a stage's work: measured on steps of the very model, in the very shape.

A share of a matrix product says little of a small model, whose time goes into starting operations; some real steps say
it within a second. GPUs are not probed: what they reach hangs on kernels that would be compiled first.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pipeline.hardware import Device
from pipeline.model.build import count_parameters, flops_per_token
from pipeline.model.optim import build_optimizers

How = Literal["train", "read", "write"]
SHARES = {
    "cpu": {"train": 0.3, "read": 0.3, "write": 0.1},
    "cuda": {"train": 0.3, "read": 0.3, "write": 0.02},
    "mps": {"train": 0.3, "read": 0.3, "write": 0.02},
}
"""Of the matrix product's FLOP/s: what is reached where nothing was measured. A token at a time is bound by memory. On
GPUs these are guesses: others' runs of 124 M to 8 B on H100 reached 33 % as they are and 38 to 50 % with compiled
blocks."""
COMPILED = 0.4
"""The same for training with compiled blocks on a GPU."""
PROBED_SECONDS = 0.15
"""That a probe's step may take by these shares: its rows are so many fewer."""
LONGEST_STEP = 1.5
"""Seconds of one row above which nothing is measured."""
BYTES_A_PARAMETER = 16
"""Weights, gradients and moments."""


@dataclass(frozen=True)
class Work:
    """A part of what a stage does."""

    how: How
    model: PreTrainedModel
    """Without weights: on the meta device."""
    flops: float
    rows: int
    """Of a step in one process."""
    length: int
    """Tokens of a row; of `write`, those before the token that is written."""
    bf16: bool
    head: float = 1.0
    """Share of the positions whose logits are worked out."""
    optimizer: str = "adamw"
    is_compiled: bool = False
    """Whether its blocks will be compiled, on a GPU."""


def usual_share(device: Device, how: How, is_compiled: bool) -> float:
    """The share of the product that is taken for work of which nothing was measured."""
    return COMPILED if is_compiled and how == "train" and device.kind == "cuda" else SHARES[device.kind][how]


class Probe:
    """FLOP/s of work on a device that is here; each model and shape is measured once."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._found: dict[tuple[object, ...], float | None] = {}

    def rate(self, work: Work) -> float | None:
        """FLOP/s by the formula that plans count in; None where a step would take too long, or there is no CPU."""
        shape = (work.how, work.rows, work.length, work.bf16, round(work.head, 1), work.optimizer)
        key = (work.model.config.to_json_string(), *shape)
        if key not in self._found:
            self._found[key] = self._measure(work)
        return self._found[key]

    def _measure(self, work: Work) -> float | None:
        is_plain = work.model.get_output_embeddings() is not None and work.model.base_model is not work.model
        too_large = BYTES_A_PARAMETER * count_parameters(work.model)[0] > self.device.memory / 4
        if self.device.kind != "cpu" or not self.device.is_here or not is_plain or too_large:
            return None
        a_row = flops_of_step(work, 1) / SHARES["cpu"][work.how] / self.device.flops_per_second
        if a_row > LONGEST_STEP:
            return None
        rows = max(1, min(work.rows, int(PROBED_SECONDS / a_row)))
        model = _with_weights(work.model)
        if work.how == "train":
            pass_, update = _training(model, work, rows)
            seconds = timed(pass_) * work.rows / rows + timed(update)
        else:
            step = _reading(model, work, rows) if work.how == "read" else _writing(model, work, rows)
            seconds = timed(step) * work.rows / rows
        return flops_of_step(work, work.rows) / seconds


def flops_of_step(work: Work, rows: int) -> float:
    """FLOPs of one step of `rows` rows, by `flops_per_token`; without the head where no logits are worked out."""
    a_token = flops_per_token(work.model, work.length)
    if not work.head:
        a_token -= head_flops(work.model)
    tokens = rows if work.how == "write" else rows * work.length
    return tokens * a_token * (1.0 if work.how == "train" else 1 / 3)


def head_flops(model: PreTrainedModel) -> float:
    """FLOPs of a training step a token in the output head, which a reward model has none of; 0 without one."""
    head = model.get_output_embeddings()
    return 0.0 if head is None else 6.0 * head.weight.numel()


def timed(step: Callable[[], object]) -> float:
    """Seconds of a step: the best of three to nine after a first one, in which kernels are made ready.

    On a busy machine threads that wait for a core wait for each other, up to thirty times as long as they work: no more
    is believed there than the processor time of one thread alone.
    """
    step()
    taken: list[float] = []
    while len(taken) < 3 or (len(taken) < 9 and sum(taken) < PROBED_SECONDS):
        began = time.monotonic()
        step()
        taken.append(time.monotonic() - began)
    return min(min(taken), _on_one_thread(step)) if _is_busy() else min(taken)


def _is_busy() -> bool:
    return os.getloadavg()[0] > (os.cpu_count() or 1) / 2


def _on_one_thread(step: Callable[[], object]) -> float:
    """Processor seconds of a step on one thread, the better of two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        began = time.process_time()
        step()
        half = time.process_time()
        step()
        return min(half - began, time.process_time() - half)
    finally:
        torch.set_num_threads(threads)


def _with_weights(model: PreTrainedModel) -> PreTrainedModel:
    """The model on the CPU with small numbers in it: no special values, which some processors are slow with."""
    model = model.to_empty(device="cpu")
    model.tie_weights()
    numbers = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.normal_(0, 0.02, generator=numbers)
    return model


def _ids(model: PreTrainedModel, rows: int, length: int) -> Tensor:
    vocab = model.get_input_embeddings().weight.shape[0]
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(0))


def _forward(model: PreTrainedModel, work: Work, ids_BT: Tensor) -> Tensor:
    """A loss: cross-entropy of the share of positions that have logits, or a mean without any."""
    with torch.autocast("cpu", torch.bfloat16, enabled=work.bf16):
        hidden_BTD = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
        count = round(work.head * work.length)
        if not count:
            loss: Tensor = hidden_BTD.float().mean()
            return loss
        logits_BNV = model.get_output_embeddings()(hidden_BTD[:, -count:])
    return F.cross_entropy(logits_BNV.float().flatten(0, 1), ids_BT[:, -count:].flatten())


def _training(model: PreTrainedModel, work: Work, rows: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """(forward and backward of some rows, the optimizer's step)."""
    optimizers = build_optimizers(
        model.train(),
        kind="muon" if work.optimizer == "muon" else "adamw",
        learning_rate=1e-6,
        embedding_rate=1e-6,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.0,
    )
    ids_BT = _ids(model, rows, work.length)

    def learn() -> None:
        torch.autograd.backward(_forward(model, work, ids_BT))

    return learn, lambda: [each.step() for each in optimizers]


def _reading(model: PreTrainedModel, work: Work, rows: int) -> Callable[[], object]:
    ids_BT = _ids(model.eval(), rows, work.length)

    @torch.no_grad()
    def step() -> None:
        _forward(model, work, ids_BT)

    return step


def _writing(model: PreTrainedModel, work: Work, rows: int) -> Callable[[], object]:
    """One more token to each row, after `length` that are in the cache."""
    ids_BT, cache = _ids(model.eval(), rows, work.length), DynamicCache()

    @torch.no_grad()
    def step(ids: Tensor = ids_BT[:, :1]) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=work.bf16):
            model(input_ids=ids, past_key_values=cache, use_cache=True)

    step(ids_BT)
    return step
