"""Held-out bits per byte of a model in training.

Each document stands alone: its tokens in windows of T, the first behind the separator, the others behind the token
before them, and the end of a document is not scored. So defined, `llmpipe eval` gives the same figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pipeline.data.shards import TokenFile
from pipeline.data.tokenizers import encode_text
from pipeline.errors import Halt
from pipeline.model.build import evaluating
from pipeline.model.generation import generate
from pipeline.model.losses import IGNORED
from pipeline.model.next_token import NextToken
from pipeline.model.sharding import gathered, is_sharded

TOKENS_A_BATCH = 8192
Ids = Callable[[int], "np.ndarray[Any, Any]"]


class Ranks(NamedTuple):
    """The processes that share the rows, and which of them this is."""

    rank: int
    world_size: int

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0


ALONE = Ranks(0, 1)


class HeldOut:
    """What a model in training makes of held-out text: the figures of `documents` documents in windows of `length`
    tokens, shared over the ranks, and continuations of `prompts` (see `continuations`) by `sample_tokens` tokens, which
    rank 0 makes, or all together where they share the model in shards.

    Between batches and tokens `heed` may raise Halt, on all ranks together, and `check_stop` on one that works alone:
    see Runtime.
    """

    def __init__(
        self,
        losses: NextToken,
        valid: TokenFile,
        tokenizer: PreTrainedTokenizerFast,
        autocast: Callable[[], torch.autocast],
        ranks: Ranks,
        *,
        length: int,
        documents: int,
        prompts: Sequence[str] | None,
        sample_tokens: int,
        heed: Callable[[], None] = lambda: None,
        check_stop: Callable[[], None] = lambda: None,
    ) -> None:
        self.losses, self.valid, self.tokenizer, self.autocast = losses, valid, tokenizer, autocast
        self.ranks = ranks
        self.length, self.documents, self.prompts, self.sample_tokens = length, documents, prompts, sample_tokens
        self.heed, self.check_stop = heed, check_stop

    def look(self) -> tuple[float, dict[str, str]]:
        """(bits per UTF-8 byte, `sample_1`, … -> what the model makes of a prompt, greedily: {} on a rank that makes
        none). A collective, which Halt ends on all ranks."""
        model, texts = self.losses.model, []
        with self.autocast(), evaluating(model), gathered(self.losses):  # in shards again, whatever ends it
            bits = bits_per_byte(self.losses, self.valid, self.length, self.documents, ranks=self.ranks, tick=self.heed)
            is_shared = is_sharded(self.losses)
            if self.ranks.is_main or is_shared:
                tick = self.heed if is_shared else self.check_stop
                given = (self.prompts, self.sample_tokens, self.length)
                with suppress(Halt):  # heard again below, by all
                    texts = continuations(model, self.tokenizer, self.valid, *given, tick=tick)
            self.heed()
        return bits, {f"sample_{place}": text for place, text in enumerate(texts, 1)}

    def by_source(self) -> dict[str, float]:
        """`bits_per_byte/<label>` of each source, over as many documents of its own. A collective."""
        with self.autocast(), evaluating(self.losses.model):
            return bits_by_source(
                self.losses, self.valid, self.length, self.documents, ranks=self.ranks, tick=self.heed
            )


def choose_documents(valid: TokenFile, count: int, source: int | None = None) -> list[int]:
    """The documents that are scored, of one source or of all: a fixed draw, the same for every model of the shards."""
    among = range(valid.metadata.documents) if source is None else valid.documents_of(source)
    order = np.random.default_rng(0).permutation(len(among))
    return [among[index] for index in order[:count]]


def windows(document: Any, separator: int, length: int) -> list[np.ndarray[Any, Any]]:
    """The document (its own separator left off) as windows of at most `length` targets, each with the token before."""
    stream = np.concatenate([[separator], document[:-1]]).astype(np.int64)
    return [stream[start : start + length + 1] for start in range(0, len(stream) - 1, length)]


def rows_at_once(rows: Sequence[np.ndarray[Any, Any]], ranks: int) -> int:
    """How many of these rows, sorted by length, go through the model at once: as many a rank as make TOKENS_A_BATCH
    with their padding, one at least."""
    share = 1
    while (
        share * ranks < len(rows) and (share + 1) * len(rows[min((share + 1) * ranks, len(rows)) - 1]) <= TOKENS_A_BATCH
    ):
        share += 1
    return share * ranks


def padded(rows: list[np.ndarray[Any, Any]]) -> tuple[Tensor, Tensor]:
    """(inputs, targets), both [rows, longest]; right-padded, targets IGNORED there (the mask is causal)."""
    longest = max(map(len, rows)) - 1
    inputs = torch.zeros(len(rows), longest, dtype=torch.int64)
    targets = torch.full((len(rows), longest), IGNORED, dtype=torch.int64)
    for index, row in enumerate(rows):
        inputs[index, : len(row) - 1] = torch.from_numpy(row[:-1])
        targets[index, : len(row) - 1] = torch.from_numpy(row[1:])
    return inputs, targets


@torch.no_grad()
def bits_by_source(
    losses: NextToken,
    valid: TokenFile,
    length: int,
    documents: int,
    ids_of: Ids | None = None,
    separator: int | None = None,
    ranks: Ranks = ALONE,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """`bits_per_byte/<label>` of each source, over `documents` of its own."""
    return {
        f"bits_per_byte/{source.label}": bits_per_byte(
            losses, valid, length, documents, source=place, ids_of=ids_of, separator=separator, ranks=ranks, tick=tick
        )
        for place, source in enumerate(valid.metadata.sources)
        if source.documents
    }


@torch.no_grad()
def bits_per_byte(
    losses: NextToken,
    valid: TokenFile,
    length: int,
    documents: int,
    *,
    source: int | None = None,
    ids_of: Ids | None = None,
    separator: int | None = None,
    ranks: Ranks = ALONE,
    tick: Callable[[], None] = lambda: None,
) -> float:
    """Bits a UTF-8 byte over `documents` held-out documents, of one source or of all: Σ nats / (ln 2 · Σ bytes).

    `ids_of` gives a document's tokens, its separator last, where they are another tokenizer's than the file's;
    `separator` is that one's then. Each of `ranks` scores its share of the rows, in as many forwards as the others, so
    that they may share the model in shards; the figure is that of all. `tick` is called after each, and may raise. A
    collective over several.
    """
    chosen = choose_documents(valid, documents, source)
    read = ids_of or valid.document
    before = valid.metadata.separator_id if separator is None else separator
    rows = [row for index in chosen for row in windows(read(index), before, length)]
    rows.sort(key=len)
    nats, start = 0.0, 0
    while start < len(rows):
        end = start + rows_at_once(rows[start:], ranks.world_size)
        own = rows[start + ranks.rank : end : ranks.world_size]
        inputs, targets = (part.to(losses.model.device) for part in padded(own or rows[:1]))
        found = losses.nats(inputs, targets)
        nats += float(found.cpu().double().sum()) if own else 0.0  # Apple's GPUs have no float64
        start = end
        tick()
    if ranks.world_size > 1:
        over_all = torch.tensor(nats, dtype=torch.float64, device=losses.model.device)
        torch.distributed.all_reduce(over_all)
        nats = float(over_all)
    total_bytes = sum(int(valid.document_bytes[index]) for index in chosen)
    return nats / math.log(2) / total_bytes


BEGINNING = 12
"""Tokens of a held-out document that a sample goes on from."""


@torch.no_grad()
def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    valid: TokenFile,
    prompts: Sequence[str] | None,
    tokens: int,
    length: int,
    tick: Callable[[], None] = lambda: None,
) -> list[str]:
    """Each prompt (the beginnings of two held-out documents where None) with the model's greedy continuation of at most
    `tokens` tokens; none where `tokens` is 0."""
    if tokens == 0:
        return []
    separator = valid.metadata.separator_id
    if prompts is None:
        chosen = [valid.document(index)[:-1] for index in choose_documents(valid, 2)]
        rows = [[separator, *document[:BEGINNING].tolist()] for document in chosen]
    else:
        rows = [[separator, *encode_text(tokenizer, prompt)] for prompt in prompts]
    rows = [row[: max(1, length - tokens)] for row in rows]
    with evaluating(model):  # no early end: ranks that share a model in shards call it equally often
        most = min(tokens, length - 1)
        made = generate(model, rows, max_new_tokens=most, stop_ids=[], pad_id=separator, tick=tick).responses()
    whole = ([*row[1:], *_until(answer, separator)] for row, answer in zip(rows, made, strict=True))
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in whole]


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids
