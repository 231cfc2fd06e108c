"""Text from a causal language model: batched, cached, exact, and the same whatever leaves the batch.

Small functions that nest: logits to a token (sampling.py), decode one token (decoding.py), generate a batch, generate.
Works on any transformers causal LM. Letters: B rows, P prompt length, T new tokens, V vocabulary.

Randomness is one number in [0, 1) a row and step, drawn before anything is generated. What a row says then depends on
neither its batch nor the ranks it was split over, and a row that has ended can leave the batch without changing the
others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.model.attention import reach_of_masks
from pipeline.model.decode_attention import fast_decoding
from pipeline.model.decoding import pad_left
from pipeline.model.heard import Heard
from pipeline.model.rereading import begin
from pipeline.model.sampling import GREEDY, Sampling, choose, draw_uniforms
from pipeline.model.stop_strings import StopStrings

__all__ = ["GREEDY", "Generation", "Sampling", "draw_uniforms", "generate", "stream"]

SHRINK_BELOW = 0.8
"""Ended rows leave when no more than this share of the batch is unfinished: leaving copies the cache of all
others.
"""


@dataclass(frozen=True)
class Generation:
    """What was written, a row a prompt, on the CPU."""

    ids_BT: Tensor
    """Token ids, padded right with the pad id; T is the greatest number of new tokens."""
    lengths_B: Tensor
    """Tokens written, the one that ended the row included; at least 1."""
    is_ended_B: Tensor
    """True where the row ended with a stop token or stop string; False where it was cut off."""
    logprobs_BT: Tensor
    """Log-probability of each token under the distribution it was drawn from (0 when greedy), 0 after the
    end.
    """
    whole_logprobs_BT: Tensor
    """Log-probability of each token under softmax(logits / temperature) with nothing cut off by top_k or top_p, and
    under softmax(logits) when greedy; 0 after the end. Without top_k and top_p it is `logprobs_BT`.
    """

    def responses(self) -> list[list[int]]:
        """The written ids of each row, without padding."""
        return [ids[:length] for ids, length in zip(self.ids_BT.tolist(), self.lengths_B.tolist(), strict=True)]


class _Written:
    """The rows of a batch as they are written, on the model's device."""

    def __init__(self, rows: int, steps: int, pad_id: int, device: torch.device, stop_ids: Sequence[int]) -> None:
        self.pad_id = pad_id
        self.stops_S = torch.tensor(stop_ids, device=device)
        self.ids_BT = torch.full((rows, steps), pad_id, device=device)
        self.logprobs_BT = torch.zeros(rows, steps, device=device)
        self.whole_logprobs_BT = torch.zeros(rows, steps, device=device)
        self.lengths_B = torch.full((rows,), steps, device=device)
        self.is_ended_B = torch.zeros(rows, dtype=torch.bool, device=device)
        self.texts: list[list[int]] = [[] for _ in range(rows)]  # for stop strings only

    def add(
        self, t: int, rows_B: Tensor, chosen: tuple[Tensor, Tensor, Tensor], stop_strings: StopStrings | None
    ) -> None:
        """The tokens of step t; `rows_B` are the rows still in the batch, of which some may have ended."""
        ids_B, self.logprobs_BT[rows_B, t], self.whole_logprobs_BT[rows_B, t] = chosen
        self.ids_BT[rows_B, t] = ids_B
        ends_B = torch.isin(ids_B, self.stops_S)
        if stop_strings is not None:
            ends_B = ends_B | self._found(rows_B, ids_B, stop_strings)
        was_ended_B = self.is_ended_B[rows_B]  # chosen by masks of whole rows: places of a mask are asked of the device
        self.lengths_B[rows_B] = self.lengths_B[rows_B].masked_fill(ends_B & ~was_ended_B, t + 1)
        self.is_ended_B[rows_B] = was_ended_B | ends_B

    def _found(self, rows_B: Tensor, ids_B: Tensor, stop_strings: StopStrings) -> Tensor:
        is_ended = self.is_ended_B[rows_B].tolist()
        found = [False] * len(is_ended)
        for place, (row, token) in enumerate(zip(rows_B.tolist(), ids_B.tolist(), strict=True)):
            if not is_ended[place]:
                self.texts[row].append(token)
                found[place] = stop_strings.found(self.texts[row])
        return torch.tensor(found, device=rows_B.device)

    def generation(self) -> Generation:
        """What was written, without what ended rows wrote after their end."""
        steps_T = torch.arange(self.ids_BT.shape[1], device=self.ids_BT.device)
        is_after_BT = steps_T[None, :] >= self.lengths_B[:, None]
        return Generation(
            ids_BT=self.ids_BT.masked_fill(is_after_BT, self.pad_id).cpu(),
            lengths_B=self.lengths_B.cpu(),
            is_ended_B=self.is_ended_B.cpu(),
            logprobs_BT=self.logprobs_BT.masked_fill(is_after_BT, 0).cpu(),
            whole_logprobs_BT=self.whole_logprobs_BT.masked_fill(is_after_BT, 0).cpu(),
        )


@torch.no_grad()
def generate_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    owners: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    stop_strings: StopStrings | None,
    pad_id: int,
    sampling: Sampling,
    uniforms_BT: Tensor | None,
    shared: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> Generation:
    """As `generate`, for rows that go through the model side by side; row b answers prompts[owners[b]]."""
    device, rows = model.device, len(owners)
    own = [prompt[shared:] for prompt in prompts]
    prompt_ids_NP, is_real_NP = (tensor.to(device) for tensor in pad_left(own, pad_id))
    shared_S = torch.tensor(prompts[0][:shared], device=device) if shared else None
    owners_B = None if len(prompts) == rows else torch.tensor(owners, device=device)
    uniforms_BT = None if uniforms_BT is None else uniforms_BT.to(device)
    written = _Written(rows, max_new_tokens, pad_id, device, stop_ids)
    decoder = begin(model, prompt_ids_NP, is_real_NP, owners_B, shared_S)
    present_B = torch.arange(rows, device=device)  # the rows still in the batch
    for t in range(max_new_tokens):
        chosen = choose(decoder.logits_BV, sampling, None if uniforms_BT is None else uniforms_BT[present_B, t])
        written.add(t, present_B, chosen, stop_strings)
        next_B = chosen[0]
        if t + 1 == max_new_tokens:
            break
        going = (~written.is_ended_B[present_B]).nonzero().squeeze(1)
        if len(going) == 0:
            break
        if len(going) <= SHRINK_BELOW * len(present_B):
            decoder.keep(going)
            present_B, next_B = present_B[going], next_B[going]
        tick()
        decoder.decode_one(next_B)
    return written.generation()


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    sampling: Sampling = GREEDY,
    uniforms_BT: Tensor | None = None,
    batch_size: int = 64,
    samples_per_prompt: int = 1,
    stop_strings: Sequence[str] = (),
    decode: Callable[[list[int]], str] | None = None,
    shared: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> Generation:
    """The model's answers to `prompts` (ids, none empty), in their order.

    `model` is any transformers causal LM in eval mode; `stop_ids` end a row and are part of it. `uniforms_BT`
    ([prompts, max_new_tokens], see `draw_uniforms`) is needed unless `sampling` is greedy. Prompts of like
    length go together, `batch_size` rows at a time. Precision is that of the caller's autocast.

    samples_per_prompt: G, where every G rows of `prompts` that follow each other are one prompt. It is read once and
    its cache copied for each of them; what comes out is the same up to float order.
    stop_strings: a row also ends with the first token at which the text of the row, `decode` of its ids, holds one of
    these. All of that token stays in the row, so that its text may go on for some letters behind the stop string
    (`stop_strings.before_stop` cuts it). Prompts are not looked at.
    shared: how many tokens all prompts begin with, fewer than the shortest has. They are read once a batch, where the
    architecture allows; what comes out is the same up to float order.
    tick: called before every further token; may raise.
    """
    assert all(prompts), "an empty prompt leaves nothing to predict from"
    assert (sampling.temperature == 0) == (uniforms_BT is None), "greedy takes no randomness, sampling needs it"
    assert uniforms_BT is None or len(uniforms_BT) == len(prompts), "one row of random numbers a row"
    assert not stop_strings or decode is not None, "stop strings are looked for in text"
    assert all(len(prompt) > shared and prompt[:shared] == prompts[0][:shared] for prompt in prompts), "not shared"
    shared = shared if shared and math.isinf(reach_of_masks(model)) else 0
    group = samples_per_prompt
    assert all(prompts[row] == prompts[row - row % group] for row in range(len(prompts))), f"not {group} rows a prompt"
    stops = None if not stop_strings or decode is None else StopStrings(stop_strings, decode)
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))  # stable: samples stay together
    parts = []
    with fast_decoding(model):
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            distinct = list(dict.fromkeys(row // group for row in chunk))
            part = generate_batch(
                model,
                [prompts[number * group] for number in distinct],
                [distinct.index(row // group) for row in chunk],
                max_new_tokens=max_new_tokens,
                stop_ids=stop_ids,
                stop_strings=stops,
                pad_id=pad_id,
                sampling=sampling,
                uniforms_BT=None if uniforms_BT is None else uniforms_BT[chunk],
                shared=shared if len(distinct) > 1 else 0,
                tick=tick,
            )
            parts.append(part)
    place = torch.tensor(order).argsort()
    joined = (torch.cat([getattr(part, field.name) for part in parts])[place] for field in fields(Generation))
    return Generation(*joined)


@torch.no_grad()
def stream(
    model: PreTrainedModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    sampling: Sampling = GREEDY,
    uniforms_T: Tensor | None = None,
    heard: Heard | None = None,
) -> Iterator[int]:
    """The ids of one answer as they are written, without the stop token. As `generate` otherwise.

    heard: what the model has read before, and afterwards this prompt and answer too.
    """
    assert (sampling.temperature == 0) == (uniforms_T is None), "greedy takes no randomness, sampling needs it"
    heard = Heard() if heard is None else heard
    decoder = heard.read(model, prompt)
    for t in range(max_new_tokens):
        next_B, _, _ = choose(decoder.logits_BV, sampling, None if uniforms_T is None else uniforms_T[t : t + 1])
        if int(next_B) in stop_ids:
            return
        yield int(next_B)
        if t + 1 < max_new_tokens:
            heard.write(next_B)
