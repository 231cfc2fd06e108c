"""Held-out bits per byte of a model in training.

Each document stands alone: its tokens in windows of T, the first behind the separator, the others behind the token
before them, and the end of a document is not scored. So defined, `llmpipe eval` gives the same figure.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.data.shards import TokenFile
from pipeline.model.losses import IGNORED
from pipeline.model.next_token import NextToken

TOKENS_A_BATCH = 8192


def choose_documents(valid: TokenFile, count: int) -> list[int]:
    """The documents that are scored: a fixed draw, the same for every model of the same shards."""
    order = np.random.default_rng(0).permutation(valid.metadata.documents)
    return [int(index) for index in order[:count]]


def windows(document: Any, separator: int, length: int) -> list[np.ndarray[Any, Any]]:
    """The document (its own separator left off) as windows of at most `length` targets, each with the token before."""
    stream = np.concatenate([[separator], document[:-1]]).astype(np.int64)
    return [stream[start : start + length + 1] for start in range(0, len(stream) - 1, length)]


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
def bits_per_byte(losses: NextToken, valid: TokenFile, length: int, documents: int) -> float:
    """Bits a UTF-8 byte over `documents` held-out documents: Σ nats / (ln 2 · Σ bytes)."""
    chosen = choose_documents(valid, documents)
    rows = [row for index in chosen for row in windows(valid.document(index), valid.metadata.separator_id, length)]
    rows.sort(key=len)
    nats, start = 0.0, 0
    while start < len(rows):
        end = start + max(1, TOKENS_A_BATCH // len(rows[min(start + 16, len(rows) - 1)]))
        inputs, targets = (part.to(losses.model.device) for part in padded(rows[start:end]))
        nats += float(losses.nats(inputs, targets).double().sum())
        start = end
    total_bytes = sum(int(valid.document_bytes[index]) for index in chosen)
    return nats / math.log(2) / total_bytes
