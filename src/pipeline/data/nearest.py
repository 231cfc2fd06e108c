"""Which documents share most with a short text: exact runs of tokens, found in one pass over a memory-mapped file.

A run of n tokens (3; 2 where no document holds one of 3) is a gram. A document's score is the sum, over the text's
distinct grams that it holds, of ln(1 + D / df): D documents, df of them with that gram (the idf of Spärck Jones 1972,
kept above 0), so that rare wording counts and "of the" hardly does. Equal scores go by the longest run, then by place.

Letters: N tokens, D documents, T tokens of the text, M places where the corpus and the text agree on a gram.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

GRAMS = (3, 2)
BLOCK = 1 << 22
"""Tokens of the corpus that are looked at together."""


@dataclass(frozen=True)
class Near:
    """A document that shares runs of tokens with the text."""

    document: int
    score: float
    begin: int
    """Where in the document its longest common run begins, in tokens."""
    at: int
    """Where in the text that is."""
    length: int
    """Tokens of it."""


def nearest(
    tokens_N: Array,
    ends_D: Array,
    text: Sequence[int],
    is_sought: Sequence[bool],
    vocabulary: int,
    count: int = 3,
    is_read_D: Array | None = None,
) -> list[Near]:
    """The `count` documents with the highest scores, the best first; fewer where fewer share a gram.

    tokens: [N] integers below `vocabulary`, such as a memory map; ends: [D], where each document ends. Only grams of
    the text that touch a token of `is_sought` (as long as the text) score. With `is_read`, bool [D], the documents
    where it is False don't count at all.
    """
    assert len(text) == len(is_sought)
    for n in sorted({min(n, len(text)) for n in GRAMS} - {0}, reverse=True):
        is_scored = np.array([any(is_sought[j : j + n]) for j in range(len(text) - n + 1)])
        if not is_scored.any():
            return []
        places_M, at_M = agreements(tokens_N, text, n, vocabulary)
        documents_M = np.searchsorted(ends_D, places_M, side="right")
        is_kept_M = places_M + n <= np.asarray(ends_D[documents_M]).astype(np.int64)
        if is_read_D is not None:
            is_kept_M &= is_read_D[documents_M]
        found = (documents_M[is_kept_M], places_M[is_kept_M], at_M[is_kept_M])
        total = len(ends_D) if is_read_D is None else int(is_read_D.sum())
        best = ranked(found, total, is_scored, first_of(text, n), n, count)
        if best:
            return [located(document, score, found, ends_D, n) for document, score in best]
    return []


def first_of(text: Sequence[int], n: int) -> Array:
    """For each gram of the text, where the first equal one begins: [T - n + 1]."""
    seen: dict[tuple[int, ...], int] = {}
    return np.array([seen.setdefault(tuple(text[j : j + n]), j) for j in range(len(text) - n + 1)])


def agreements(tokens_N: Array, text: Sequence[int], n: int, vocabulary: int) -> tuple[Array, Array]:
    """Every pair of a place in the corpus and one in the text at which the same n tokens begin: (places, at), [M]."""
    letters = sorted(set(text))
    assert letters[-1] < vocabulary
    rank = np.full(vocabulary, -1, dtype=np.int64)
    rank[letters] = np.arange(len(letters))
    powers = len(letters) ** np.arange(n, dtype=np.int64)
    grams = np.lib.stride_tricks.sliding_window_view(rank[list(text)], n) @ powers
    order = np.argsort(grams, kind="stable")
    in_order = grams[order]
    places, at = [], []
    for start in range(0, len(tokens_N) - n + 1, BLOCK):
        ranks = rank[tokens_N[start : start + BLOCK + n - 1]]
        width = len(ranks) - n + 1
        is_known = ranks[:width] >= 0
        for k in range(1, n):
            is_known &= ranks[k : width + k] >= 0
        here = np.flatnonzero(is_known)
        keys = sum(ranks[here + k] * powers[k] for k in range(n))
        low, high = (np.searchsorted(in_order, keys, side=side) for side in ("left", "right"))
        times = high - low
        within = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
        places.append(np.repeat(here, times) + start)
        at.append(order[np.repeat(low, times) + within])
    return np.concatenate(places or [np.zeros(0, int)]), np.concatenate(at or [np.zeros(0, int)])


def ranked(
    found: tuple[Array, Array, Array], total: int, is_scored: Array, first: Array, n: int, count: int
) -> list[tuple[int, float]]:
    """(document, score) of the best."""
    documents_M, places_M, at_M = found
    scored_M = is_scored[at_M]
    pairs = np.unique(np.stack([documents_M[scored_M], first[at_M[scored_M]]]), axis=1)
    holders = np.bincount(pairs[1], minlength=len(first))
    names, where = np.unique(pairs[0], return_inverse=True)
    scores = np.bincount(where, weights=np.log1p(total / holders[pairs[1]]), minlength=len(names))
    if not len(names):
        return []
    longest = run_lengths(documents_M, places_M, at_M)
    best_run = np.zeros(len(names), dtype=np.int64)
    known = np.isin(documents_M, names)
    np.maximum.at(best_run, np.searchsorted(names, documents_M[known]), longest[known])
    order = np.lexsort((names, -best_run, -scores.round(9)))[:count]
    return [(int(names[place]), float(scores[place])) for place in order]


def run_lengths(documents_M: Array, places_M: Array, at_M: Array) -> Array:
    """For each agreement, how many follow one another along its diagonal, itself included and it the first: [M]."""
    order = np.lexsort((places_M, places_M - at_M, documents_M))
    goes_on = (
        (np.diff(places_M[order]) == 1) & (np.diff(at_M[order]) == 1) & (np.diff(documents_M[order]) == 0)
        if len(order)
        else np.zeros(0, dtype=bool)
    )
    last = np.append(np.flatnonzero(~goes_on), len(order) - 1)
    ends = last[np.searchsorted(last, np.arange(len(order)))]
    lengths = np.empty(len(order), dtype=np.int64)
    lengths[order] = ends - np.arange(len(order)) + 1
    return lengths


def located(document: int, score: float, found: tuple[Array, Array, Array], ends_D: Array, n: int) -> Near:
    """The document with its longest common run, the first of several."""
    documents_M, places_M, at_M = found
    own = np.flatnonzero(documents_M == document)
    lengths = run_lengths(documents_M[own], places_M[own], at_M[own])
    place = own[int(np.lexsort((places_M[own], -lengths))[0])]
    begin = int(ends_D[document - 1]) if document else 0
    length = int(lengths.max()) + n - 1
    return Near(document, score, int(places_M[place]) - begin, int(at_M[place]), length)
