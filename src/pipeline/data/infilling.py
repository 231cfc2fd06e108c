"""Fill in the middle: documents cut in three and told in another order, so that a model learns to write what belongs
between two texts (Bavarian et al. 2022).

A document of a sample (what of it stands there), with probability `rate`, is cut at two of its characters, drawn
evenly, and becomes one of

    PSM   <prefix> before <suffix> after <middle> between
    SPM   <prefix> <suffix> after <middle> before between          (in the paper's second form)

each part encoded by itself, as a user's text would be. Which and where is a pure function of (seed, position, place in
the sample). The three tokens lengthen a sample, whose end is cut off.

Letters of shapes: B samples, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from pipeline.data.encoding import choose
from pipeline.data.mixture import Mixture, Samples
from pipeline.data.packing import Batch, Positions, hash_of, places_after
from pipeline.data.tokenizers import load_tokenizer, plain_text
from pipeline.errors import ConfigError

NAMES = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
)
"""What families call the three tokens; the first are ours and Qwen's, the second StarCoder's."""

SHORTEST = 4
"""Tokens of a document's part below which it is left as it is."""


@dataclass(frozen=True)
class Marks:
    """The ids of the three tokens."""

    prefix: int
    suffix: int
    middle: int


def marks_of(tokenizer: PreTrainedTokenizerFast) -> Marks:
    """The tokenizer's three tokens. ConfigError where it lacks them, or cannot give a text back as it was."""
    vocab = tokenizer.get_vocab()
    names = next((each for each in NAMES if all(name in vocab for name in each)), None)
    if names is None:
        raise ConfigError(
            "the tokenizer has no tokens for filling in",
            where="pretrain.fim_rate",
            mend=f"tokenize with added_tokens: [{', '.join(NAMES[0])}]",
        )
    if plain_text(tokenizer).prefix != "never":
        raise ConfigError(
            "the tokenizer writes a space before a text, so that parts of a document would not join",
            where="pretrain.fim_rate",
            mend="a byte-level tokenizer, such as one that tokenize trains",
        )
    return Marks(*(vocab[name] for name in names))


def infill(
    order: Samples | Mixture, rate: float, spm_share: float, folder: Path, separator: int, seed: int, apart: bool
) -> Infilled:
    """`order` with a share `rate` of its documents told anew; `folder` has the tokenizer. Raises as `marks_of`."""
    tokenizer = load_tokenizer(folder)
    encoder, _ = choose(folder, [])
    return Infilled(
        order,
        rate=rate,
        spm_share=spm_share,
        marks=marks_of(tokenizer),
        separator=separator,
        decode=tokenizer.decode,
        encode=lambda text: encoder.encode([text])[0].tolist(),
        seed=seed,
        apart=apart,
    )


class Infilled:
    """The samples of a run, some of their documents told in another order. `order` is of windows (packing: chunk)."""

    def __init__(
        self,
        order: Samples | Mixture,
        *,
        rate: float,
        spm_share: float,
        marks: Marks,
        separator: int,
        decode: Callable[[list[int]], str],
        encode: Callable[[str], list[int]],
        seed: int,
        apart: bool,
    ) -> None:
        self.order, self.rate, self.spm_share, self.marks = order, rate, spm_share, marks
        self.separator, self.decode, self.encode, self.seed, self.apart = separator, decode, encode, seed, apart

    def take(self, positions: Positions) -> Batch:
        """The samples at these positions of the run; what is shorter than it was ends in separators, no targets."""
        given_BT = self.order.take(positions).rows_BT
        size = given_BT.shape[1]
        rows_BT = np.full_like(given_BT, self.separator)
        is_target_BT = np.zeros((len(given_BT), size - 1), dtype=bool)
        for row, (position, ids) in enumerate(zip(positions, given_BT.tolist(), strict=True)):
            made = self.sample(ids, int(position))[:size]
            rows_BT[row, : len(made)] = made
            is_target_BT[row, : len(made) - 1] = True
        return Batch(rows_BT, is_target_BT, places_after(rows_BT[:, :-1] == self.separator) if self.apart else None)

    def targets(self, positions: Positions) -> int:
        """Tokens that are predicted in the samples at these positions, were none the shorter for it."""
        return self.order.targets(positions)

    def documents(self, positions: Positions) -> list[int]:
        """The documents that the samples at these positions reach into, rising."""
        return self.order.documents(positions)

    def sample(self, ids: list[int], position: int) -> list[int]:
        """One sample, each of its documents told anew or not."""
        made: list[int] = []
        start = 0
        for place in [*(i for i, token in enumerate(ids) if token == self.separator), len(ids)]:
            part = ids[start:place]
            draws = [hash_of(self.seed, position, start, turn) / 2**64 for turn in range(4)]
            made += self.told_anew(part, draws[1:]) if len(part) >= SHORTEST and draws[0] < self.rate else part
            made += ids[place : place + 1]
            start = place + 1
        return made

    def told_anew(self, ids: list[int], draws: Sequence[float]) -> list[int]:
        """A document (or a part of one) in the new order. Left as it is where a window has cut a character in two."""
        text = self.decode(ids)
        if "\ufffd" in text:
            return ids
        first, last = sorted(int(draw * (len(text) + 1)) for draw in draws[:2])
        before, between, after = (self.encode(part) for part in (text[:first], text[first:last], text[last:]))
        marks = self.marks
        if draws[2] < self.spm_share:
            return [marks.prefix, marks.suffix, *after, marks.middle, *before, *between]
        return [marks.prefix, *before, marks.suffix, *after, marks.middle, *between]


Order = Samples | Mixture | Infilled
"""What stands at each position of a run."""
