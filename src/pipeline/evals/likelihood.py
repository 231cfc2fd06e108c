"""Log-likelihood of completions after prompts: what every likelihood task is made of.

Completions that share a prompt are laid behind it in one row, each seeing the prompt and itself only (a
block-causal mask, positions counted on from the prompt's end), so the prompt is computed once for all of them and
no completion is padded to its neighbour's length. An architecture that cannot be told masks and positions (state
spaces, ALiBi) gets one completion a row, plainly causal: same figures, more tokens. So do requests longer than the
window of a model whose layers look back so far only (Mistral, Gemma 3): a mask of ours takes the place of the window's.

Prompts may begin alike (`Request.shared`: the examples before every question). Such a beginning goes through the model
once, its keys and values are kept, and the rest of the prompts lie in one row behind it, each seeing the beginning, its
own prompt and its own completion.

Shapes: B rows, L tokens in a row (right-padded), P tokens of a shared beginning, V vocabulary, N predicted tokens of a
batch, R requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pipeline.evals.statistics import Floats
from pipeline.model.attention import reach_of_masks

TOKEN_BUDGET = 4096
"""Tokens of a batch, padding included."""
_LOGITS = 2**26
"""Logits held at a time (256 MB in float32): a large vocabulary makes the batches smaller."""
_ROW = 256
"""Tokens a row is filled up to with further completions of its prompt."""


_LINE = {"cpu": 256}
"""Tokens behind a shared beginning that go through the model at a time: more of them see each other in vain, and fewer
leave a device idle."""
_LINE_ELSEWHERE = 2048
_WORTH = 16
"""Tokens that a shared beginning has at least."""


@dataclass(frozen=True)
class Request:
    """Tokens whose log-probability is asked for, and the tokens before them; neither is empty."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    shared: int = 0
    """How many tokens at the prompt's beginning other prompts begin with too: they are read once for all."""

    @property
    def length(self) -> int:
        """Tokens that the model reads: the last one is only predicted."""
        return len(self.prompt) + len(self.completion) - 1


@dataclass
class Beginning:
    """The keys and values of the shared beginning that was read last; kept between calls, it is read once."""

    ids: tuple[int, ...] = ()
    cache: DynamicCache | None = None


@dataclass(frozen=True)
class _Layout:
    """A batch of rows as tensors on the CPU."""

    ids_BL: Tensor
    position_BL: Tensor
    owner_BL: Tensor
    """Which prompt of the row a token belongs to, -1 in the padding."""
    block_BL: Tensor
    """0 in a prompt, 1, 2, … in its completions, -1 in the padding."""
    source_N: Tensor
    """Flat place (row * L + column) of the token after which each predicted one comes."""
    target_N: Tensor
    owner_N: Tensor
    """Which completion of the batch each predicted token belongs to."""


@dataclass
class _Row:
    """A prompt (without a shared beginning) with some of its completions behind it; the last token of a completion is
    only predicted."""

    prompt: tuple[int, ...]
    completions: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.prompt) + sum(len(completion) - 1 for completion in self.completions)


_Line = list[_Row]
"""What lies in one row of a batch: a prompt, or behind a shared beginning several."""


def log_likelihoods(
    model: PreTrainedModel,
    requests: Sequence[Request],
    *,
    token_budget: int = TOKEN_BUDGET,
    tick: Callable[[], None] = lambda: None,
    beginning: Beginning | None = None,
) -> Floats:
    """Sum of log p(completion | prompt) in nats. Float64 [R], in the order of `requests`.

    Equal requests are computed once. The softmax is float32 whatever the model's type. `tick` is called after
    every batch. `beginning` is what an earlier call has read, and what this one leaves.
    """
    reach = reach_of_masks(model)
    values: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
    budget = max(1, min(token_budget, _LOGITS // model.config.get_text_config().vocab_size))
    beginning = Beginning() if beginning is None else beginning
    for (begin, shares), own in _by_beginning(requests, reach).items():
        rows = _rows(own, len(begin), shares)
        line = min(budget, _LINE.get(model.device.type, _LINE_ELSEWHERE))
        for batch in _lines(rows, line) if begin else _batches(rows, budget):
            if begin and beginning.ids != begin:
                _read(model, begin, beginning)
            sums = _score(model, batch, shares, beginning if begin else None)
            done = [(begin + row.prompt, each) for line in batch for row in line for each in row.completions]
            values.update(zip(done, sums, strict=True))
            tick()
    return np.array([values[request.prompt, request.completion] for request in requests], dtype=np.float64)


def _by_beginning(requests: Sequence[Request], reach: float) -> dict[tuple[tuple[int, ...], bool], list[Request]]:
    """Requests by (the beginning they share with others, whether they are given masks); the beginning is () where they
    share none worth keeping, and of what is longer than `reach`."""
    found: dict[tuple[tuple[int, ...], bool], list[Request]] = {}
    for request in requests:
        length = min(request.shared, len(request.prompt) - 1)  # the completion comes after a token of its own row
        masked = request.length <= reach
        found.setdefault((request.prompt[:length] if masked and length >= _WORTH else (), masked), []).append(request)
    lone = {key for key, own in found.items() if key[0] and len({each.prompt for each in own}) == 1}
    merged: dict[tuple[tuple[int, ...], bool], list[Request]] = {}
    for key, own in found.items():
        merged.setdefault(((), True) if key in lone else key, []).extend(own)
    return merged


def _rows(requests: Sequence[Request], skipped: int, shares: bool) -> list[_Row]:
    """Distinct requests as rows, the longest first, so that running out of memory happens at the start.

    skipped: tokens of the shared beginning.
    """
    by_prompt: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
    for request in requests:
        by_prompt.setdefault(request.prompt[skipped:], {})[request.completion] = None
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


def _batches(rows: Sequence[_Row], budget: int) -> Iterator[list[_Line]]:
    """Consecutive rows whose padded size fits the budget; a row larger than that goes alone."""
    batch: list[_Line] = []
    for row in rows:
        if batch and (len(batch) + 1) * batch[0][0].length > budget:
            yield batch
            batch = []
        batch.append([row])
    if batch:
        yield batch


def _lines(rows: Sequence[_Row], budget: int) -> Iterator[list[_Line]]:
    """Consecutive rows in one line that fits the budget; a row larger than that goes alone."""
    line: _Line = []
    for row in rows:
        if line and sum(each.length for each in line) + row.length > budget:
            yield [line]
            line = []
        line.append(row)
    if line:
        yield [line]


def _lay_out(batch: Sequence[_Line], skipped: int) -> _Layout:
    """The lines side by side, each padded to the longest. Positions count on from the `skipped` tokens before."""
    length = max(sum(row.length for row in line) for line in batch)
    ids_BL = torch.zeros(len(batch), length, dtype=torch.long)
    position_BL = torch.zeros(len(batch), length, dtype=torch.long)
    owner_BL, block_BL = (torch.full((len(batch), length), -1) for _ in range(2))
    sources: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    owner = 0
    for index, line in enumerate(batch):
        start = 0
        for place, row in enumerate(line):
            offset, end = index * length + start, len(row.prompt)
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
            here = slice(start, start + len(ids))
            ids_BL[index, here] = torch.tensor(ids)
            position_BL[index, here] = torch.tensor(position) + skipped
            owner_BL[index, here] = place
            block_BL[index, here] = torch.tensor(block)
            start += len(ids)
    numbers = (torch.tensor(values) for values in (sources, targets, owners))
    return _Layout(ids_BL, position_BL, owner_BL, block_BL, *numbers)


def _is_seen(owner_BL: Tensor, block_BL: Tensor, skipped: int = 0) -> Tensor:
    """[B, 1, query, skipped + key]: True where the key is of the beginning, or is not later, of the same prompt's, and
    of the prompt itself or of the query's own block.

    Padding sees itself, so that no query is left without a key.
    """
    query, key = block_BL[:, :, None], block_BL[:, None, :]
    rows, length = block_BL.shape
    earlier = torch.ones(length, length, dtype=torch.bool).tril() & (owner_BL[:, :, None] == owner_BL[:, None, :])
    seen = earlier & ((query == key) | (key == 0))
    return torch.cat([torch.ones(rows, length, skipped, dtype=torch.bool), seen], dim=2)[:, None]


@torch.inference_mode()
def _read(model: PreTrainedModel, ids: tuple[int, ...], beginning: Beginning) -> None:
    """Put the keys and values of `ids` into `beginning`."""
    beginning.ids, beginning.cache = (), None  # what it held is let go first
    cache = DynamicCache()
    model.base_model(input_ids=torch.tensor([ids], device=model.device), past_key_values=cache, use_cache=True)
    beginning.ids, beginning.cache = ids, cache


@torch.inference_mode()
def _score(model: PreTrainedModel, batch: Sequence[_Line], shares: bool, beginning: Beginning | None) -> list[float]:
    """Sums of log-probabilities, in the order of lines, of rows and of completions within a row."""
    skipped = 0 if beginning is None else len(beginning.ids)
    layout = _lay_out(batch, skipped)
    device = model.device
    ids_BL = layout.ids_BL.to(device)
    if shares:
        mask = _is_seen(layout.owner_BL, layout.block_BL, skipped).to(device)
        position_BL = layout.position_BL.to(device)
        cache = None if beginning is None else beginning.cache
        output = model(
            input_ids=ids_BL,
            attention_mask=mask,
            position_ids=position_BL,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        if cache is not None:
            cache.crop(-ids_BL.shape[1])  # these tokens are off it again
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
