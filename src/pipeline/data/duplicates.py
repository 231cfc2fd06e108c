"""Texts that are alike: near-duplicates by MinHash, and what two sets of texts share by long runs of words.

Texts are compared by their words, lower case and without punctuation. Near-duplicates (Broder 1997; Lee et al. 2022,
"Deduplicating Training Data Makes Language Models Better"): the Jaccard similarity of two sets of word 5-grams,
|A ∩ B| / |A ∪ B|, is at least 0.8. With h a random hash, P(min h(A) = min h(B)) is that similarity; 120 such minima, in
20 bands of 6, find the candidates (a pair of similarity s shares a band with probability 1 - (1 - s⁶)²⁰: 0.997 at 0.8),
whose similarity is then computed from the sets themselves. So nothing is called alike that is not, and few are missed.

Contamination (Brown et al. 2020, GPT-3, appendix C): an evaluation text is touched where it shares a run of 13 words
with a training text; runs that more than 10 training texts hold are phrases, and don't count.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

SHINGLE, ALIKE = 5, 0.8
BANDS, BAND = 20, 6
BUCKET = 1000
"""Texts that one value of a band is kept for: what more share is a template, and every text has 19 other bands."""
GRAM, PHRASE = 13, 10

IDEOGRAPHS = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # written without spaces: a word each
WORD = re.compile(f"[{IDEOGRAPHS}]|[^\\W{IDEOGRAPHS}]+")


@dataclass(frozen=True)
class Match:
    """An earlier text (or one of the other set) that a text is like."""

    place: int
    similarity: float


class Words:
    """Texts as hashes of their words, 64 bits each, the same on every machine."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def hashes(self, text: str) -> Hashes:
        """One hash a word, in order; of a text without words, one of the text as it stands."""
        words = WORD.findall(text.casefold()) or [text.strip()]
        return np.array([self.of(word) for word in words], dtype=np.uint64)

    def of(self, word: str) -> int:
        """The word's hash: 64 bits of blake2b."""
        found = self.known.get(word)
        if found is None:
            digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            found = self.known[word] = int.from_bytes(digest, "little")
        return found


def grams(words: Hashes, n: int) -> Hashes:
    """The distinct runs of `n` words as hashes, sorted; empty where there are fewer words. Equal runs, equal hashes:
    sum of word_j × 0x9e3779b97f4a7c15^(n - j) modulo 2⁶⁴, the words being random already."""
    count = len(words) - n + 1
    if count < 1:
        return np.zeros(0, dtype=np.uint64)
    found = np.zeros(count, dtype=np.uint64)
    for j in range(n):
        found = found * np.uint64(0x9E3779B97F4A7C15) + words[j : j + count]
    return np.unique(found)


def jaccard(a: Hashes, b: Hashes) -> float:
    """|A ∩ B| / |A ∪ B| of two sorted sets that are not both empty."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


def signatures(sets: Sequence[Hashes]) -> npt.NDArray[np.uint32]:
    """MinHash of each set, [texts, BANDS × BAND]: the minima of (a x + b) mod 2⁶⁴ >> 32, a odd (Dietzfelbinger et al.
    1997), with fixed a and b. No set is empty."""
    draw = np.random.default_rng(13)
    a, b = draw.integers(0, 2**64, size=(2, BANDS * BAND), dtype=np.uint64)
    a |= np.uint64(1)
    out = np.empty((len(sets), BANDS * BAND), dtype=np.uint32)
    for start in range(0, len(sets), 4096):  # blocks, so that all shingles are never copied at once
        block = sets[start : start + 4096]
        x = np.concatenate(block)
        begins = np.cumsum([0, *(len(each) for each in block[:-1])])
        for i in range(BANDS * BAND):
            hashed = ((x * a[i] + b[i]) >> np.uint64(32)).astype(np.uint32)
            out[start : start + len(block), i] = np.minimum.reduceat(hashed, begins)
    return out


class Index:
    """Texts that can be asked which of those added so far a text is like."""

    def __init__(self, texts: Sequence[str], parts: Sequence[Sequence[str]] = ()) -> None:
        words = Words()
        self.parts = [[shingles(words.hashes(part)) for part in each] for each in parts]
        self.sets = [shingles(words.hashes(text)) for text in texts]
        self.signatures = signatures(self.sets)
        self.buckets: list[dict[bytes, list[int]]] = [{} for _ in range(BANDS)]

    def bands(self, place: int) -> list[bytes]:
        """The bands of a text's signature."""
        raw = self.signatures[place].tobytes()
        return [raw[start : start + 4 * BAND] for start in range(0, len(raw), 4 * BAND)]

    def add(self, place: int) -> None:
        """Let this text be found."""
        for bucket, band in zip(self.buckets, self.bands(place), strict=True):
            members = bucket.setdefault(band, [])
            if len(members) < BUCKET:
                members.append(place)

    def like(self, place: int) -> Match | None:
        """The first text added that this one is like, itself left out."""
        candidates = {
            member
            for bucket, band in zip(self.buckets, self.bands(place), strict=True)
            for member in bucket.get(band, ())
        }
        ordered = np.array(sorted(candidates - {place}), dtype=np.int64)
        # the share of equal minima has a standard deviation of 0.037 at 0.8: four of them below, nothing is lost
        estimate = (self.signatures[ordered] == self.signatures[place]).mean(axis=1)
        for other in ordered[estimate >= ALIKE - 0.15].tolist():
            similarity = jaccard(self.sets[place], self.sets[other])
            if similarity >= ALIKE and self.parts_alike(place, other):
                return Match(other, similarity)
        return None

    def parts_alike(self, place: int, other: int) -> bool:
        """Whether the two texts are alike in each of their parts; those without parts are."""
        if not self.parts:
            return True
        own, others = self.parts[place], self.parts[other]
        return len(own) == len(others) and all(jaccard(*each) >= ALIKE for each in zip(own, others, strict=True))


def shingles(words: Hashes) -> Hashes:
    """The text's 5-grams, or all of it as one where it is shorter."""
    return grams(words, min(SHINGLE, len(words)))


def near_duplicates(texts: Sequence[str], parts: Sequence[Sequence[str]] = ()) -> dict[int, Match]:
    """Each text that is like an earlier one, and which; what is itself such a text counts for no other.

    `parts`, for every text those of it that have to be alike as well, one by one.
    """
    if not texts:
        return {}
    index = Index(texts, parts)
    found: dict[int, Match] = {}
    for place in range(len(texts)):
        match = index.like(place)
        if match is None:
            index.add(place)
        else:
            found[place] = match
    return found


def near_matches(texts: Sequence[str], corpus: Sequence[str]) -> dict[int, Match]:
    """Each of `texts` that is like one of `corpus`, and which."""
    if not texts or not corpus:
        return {}
    index = Index([*corpus, *texts])
    seen: set[bytes] = set()
    for place in range(len(corpus)):
        whole = index.sets[place].tobytes()
        if whole not in seen:
            seen.add(whole)
            index.add(place)
    matches = ((place, index.like(len(corpus) + place)) for place in range(len(texts)))
    return {place: match for place, match in matches if match is not None}


@dataclass(frozen=True)
class Touched:
    """What evaluation texts share with a corpus."""

    matches: dict[int, int]
    """Text -> the first of the corpus that holds one of its runs."""
    too_short: int
    """Texts with no run of 13 words, of which this says nothing."""


def shared_runs(texts: Sequence[Sequence[str]], corpus: Sequence[Sequence[str]]) -> Touched:
    """Which of `texts` share a run of 13 words with `corpus`; each text comes in parts, which runs don't cross.

    Copies of a text of the corpus count once among the 10 that make a phrase.
    """
    words = Words()

    def runs(parts: Sequence[str]) -> Hashes:
        return np.unique(np.concatenate([grams(words.hashes(part), GRAM) for part in ("", *parts)]))

    asked = [runs(parts) for parts in texts]
    known = np.unique(np.concatenate(asked)) if asked else np.zeros(0, dtype=np.uint64)
    too_short = sum(len(each) == 0 for each in asked)
    if not len(known):
        return Touched({}, too_short)
    holders = np.zeros(len(known), dtype=np.int64)
    first = np.full(len(known), -1, dtype=np.int64)
    seen: set[tuple[str, ...]] = set()
    for place, parts in enumerate(corpus):
        if (key := tuple(parts)) in seen:
            continue
        seen.add(key)
        own = runs(parts)
        at = np.minimum(np.searchsorted(known, own), len(known) - 1)
        at = at[known[at] == own]
        holders[at] += 1
        first[at[first[at] < 0]] = place
    counts = (holders > 0) & (holders <= PHRASE)
    matches: dict[int, int] = {}
    for place, own in enumerate(asked):
        at = np.searchsorted(known, own)
        at = at[counts[at]]
        if len(at):
            matches[place] = int(first[at].min())
    return Touched(matches, too_short)
