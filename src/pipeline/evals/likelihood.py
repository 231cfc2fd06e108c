"""Log-likelihood of completions after prompts: what every likelihood task is made of.

Completions that share a prompt are laid behind it in one row, each seeing the prompt and itself only (a
block-causal mask, positions counted on from the prompt's end), so the prompt is computed once for all of them and
no completion is padded to its neighbour's length. An architecture that cannot be told masks and positions (state
spaces, ALiBi without position ids) gets one completion a row, plainly causal: same figures, more tokens.

Shapes: B rows, L tokens in a row (right-padded), V vocabulary, N predicted tokens of a batch, R requests.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.evals.statistics import Floats

TOKEN_BUDGET = 4096
"""Tokens of a batch, padding included."""
_LOGITS = 2**26
"""Logits held at a time (256 MB in float32): a large vocabulary makes the batches smaller."""
_ROW = 256
"""Tokens a row is filled up to with further completions of its prompt."""


@dataclass(frozen=True)
class Request:
    """Tokens whose log-probability is asked for, and the tokens before them; neither is empty."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    shared: int = 0
    """How many tokens at the prompt's beginning other prompts begin with too: they are read once for all."""


@dataclass(frozen=True)
class _Layout:
    """A batch of rows as tensors on the CPU."""

    ids_BL: Tensor
    position_BL: Tensor
    block_BL: Tensor
    """0 in the prompt, 1, 2, … in its completions, -1 in the padding."""
    source_N: Tensor
    """Flat place (row * L + column) of the token after which each predicted one comes."""
    target_N: Tensor
    owner_N: Tensor
    """Which completion of the batch each predicted token belongs to."""


@dataclass
class _Row:
    """A prompt with some of its completions behind it; the last token of a completion is only predicted."""

    prompt: tuple[int, ...]
    completions: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.prompt) + sum(len(completion) - 1 for completion in self.completions)


def log_likelihoods(
    model: PreTrainedModel,
    requests: Sequence[Request],
    *,
    token_budget: int = TOKEN_BUDGET,
    tick: Callable[[], None] = lambda: None,
) -> Floats:
    """Sum of log p(completion | prompt) in nats. Float64 [R], in the order of `requests`.

    Equal requests are computed once. The softmax is float32 whatever the model's type. `tick` is called after
    every batch.
    """
    shares = _takes_masks(model)
    values: dict[Request, float] = {}
    budget = max(1, min(token_budget, _LOGITS // model.config.get_text_config().vocab_size))
    for batch in _batches(_rows(requests, shares), budget):
        sums = _score(model, batch, shares)
        done = [Request(row.prompt, completion) for row in batch for completion in row.completions]
        values.update(zip(done, sums, strict=True))
        tick()
    return np.array([values[request] for request in requests], dtype=np.float64)


def _takes_masks(model: PreTrainedModel) -> bool:
    """Whether the model can be given a mask of who sees whom, and positions of our own."""
    has_positions = "position_ids" in inspect.signature(model.forward).parameters
    return has_positions and not model._is_stateful and model.config._attn_implementation == "sdpa"


def _rows(requests: Sequence[Request], shares: bool) -> list[_Row]:
    """Distinct requests as rows, the longest first, so that running out of memory happens at the start."""
    by_prompt: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
    for request in requests:
        by_prompt.setdefault(request.prompt, {})[request.completion] = None
    rows = []
    for prompt, completions in by_prompt.items():
        row = _Row(prompt)
        for completion in completions:
            if row.completions and (not shares or row.length + len(completion) > _ROW):
                rows.append(row)
                row = _Row(prompt)
            row.completions.append(completion)
        rows.append(row)
    return sorted(rows, key=lambda row: -row.length)


def _batches(rows: Sequence[_Row], budget: int) -> Iterator[list[_Row]]:
    """Consecutive rows whose padded size fits the budget; a row larger than that goes alone."""
    batch: list[_Row] = []
    for row in rows:
        if batch and (len(batch) + 1) * batch[0].length > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _lay_out(batch: Sequence[_Row]) -> _Layout:
    """The rows side by side, each as long as the first, which is the longest."""
    length = batch[0].length
    ids_BL = torch.zeros(len(batch), length, dtype=torch.long)
    position_BL = torch.zeros(len(batch), length, dtype=torch.long)
    block_BL = torch.full((len(batch), length), -1)
    sources: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    owner = 0
    for index, row in enumerate(batch):
        offset, end = index * length, len(row.prompt)
        ids, position, block = list(row.prompt), list(range(end)), [0] * end
        for number, completion in enumerate(row.completions, start=1):
            inner = len(completion) - 1
            sources += [offset + end - 1, *range(offset + len(ids), offset + len(ids) + inner)]
            targets += completion
            owners += [owner] * len(completion)
            owner += 1
            ids += completion[:-1]
            position += range(end, end + inner)
            block += [number] * inner
        ids_BL[index, : len(ids)] = torch.tensor(ids)
        position_BL[index, : len(ids)] = torch.tensor(position)
        block_BL[index, : len(ids)] = torch.tensor(block)
    numbers = (torch.tensor(values) for values in (sources, targets, owners))
    return _Layout(ids_BL, position_BL, block_BL, *numbers)


def _is_seen(block_BL: Tensor) -> Tensor:
    """[B, 1, query, key]: True where the key is not later, and is of the prompt or of the query's own block.

    Padding sees itself, so that no query is left without a key.
    """
    query, key = block_BL[:, :, None], block_BL[:, None, :]
    length = block_BL.shape[1]
    return (torch.ones(length, length, dtype=torch.bool).tril() & ((query == key) | (key == 0)))[:, None]


@torch.inference_mode()
def _score(model: PreTrainedModel, batch: Sequence[_Row], shares: bool) -> list[float]:
    """Sums of log-probabilities, in the order of rows and of completions within a row."""
    layout = _lay_out(batch)
    device = model.device
    ids_BL = layout.ids_BL.to(device)
    if shares:
        mask = _is_seen(layout.block_BL).to(device)
        position_BL = layout.position_BL.to(device)
        output = model(input_ids=ids_BL, attention_mask=mask, position_ids=position_BL, use_cache=False)
    else:
        output = model(input_ids=ids_BL, use_cache=False)
    logprob_N = _token_logprobs(output.logits.flatten(0, 1), layout.source_N, layout.target_N)
    sums = torch.zeros(int(layout.owner_N[-1]) + 1, dtype=torch.float64)
    return [float(value) for value in sums.index_add_(0, layout.owner_N, logprob_N.double())]


def _token_logprobs(logits: Tensor, source_N: Tensor, target_N: Tensor, rows: int = 1024) -> Tensor:
    """log p(target) at each source row of logits [B * L, V], in float32 on the CPU; few rows at a time."""
    parts = []
    for start in range(0, len(source_N), rows):
        chosen = logits[source_N[start : start + rows].to(logits.device)].float()
        targets = target_N[start : start + rows].to(logits.device)
        parts.append(-torch.nn.functional.cross_entropy(chosen, targets, reduction="none").cpu())
    return torch.cat(parts)
