"""Scaling laws: the loss that a model of N parameters reaches on D tokens, the best N and D for given FLOPs, the batch
for D tokens, and a fit to runs of one's own.

L(N, D) = E + A / N^α + B / D^β (Hoffmann et al. 2022, "Chinchilla"), with the constants of Besiroglu et al. 2024. A
fit keeps the exponents and finds E, A and B, which depend on the text, the tokenizer and the architecture: three
numbers can be had from a handful of small runs, five can't. So the exponents may be somewhat wrong, and how far that
would carry is a part of a prediction's interval.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

ALPHA, BETA = 0.3478, 0.3658
DOUBT = 0.8
"""What the exponents are multiplied and divided by, each for itself, to see what hangs on them (Hoffmann et al. found
0.34 and 0.28 in the data that Besiroglu et al. fitted 0.35 and 0.37 to)."""
NOISE = 0.003
"""What two runs of other seeds differ by at least, of the loss: a fit that meets its few runs better than that is
lucky."""
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Law:
    """Loss as a function of parameters (without the input embedding) and tokens. Unit: that of `floor`."""

    floor: float = 1.8172
    of_parameters: float = 482.01
    of_tokens: float = 2085.43
    alpha: float = ALPHA
    beta: float = BETA

    def loss(self, parameters: float, tokens: float) -> float:
        """E + A / N^α + B / D^β."""
        return float(self.floor + self.of_parameters / parameters**self.alpha + self.of_tokens / tokens**self.beta)

    def best_split(self, flops: float) -> tuple[float, float]:
        """(N, D) of the lowest loss with 6 N D = flops; ValueError where the fit has no cost of size or of data."""
        if not (self.of_parameters > 0 and self.of_tokens > 0):
            raise ValueError("the law has no best split: one of its terms is zero")
        both = self.alpha + self.beta
        ratio = (self.alpha * self.of_parameters / (self.beta * self.of_tokens)) ** (1 / both)
        parameters = ratio * (flops / 6) ** (self.beta / both)
        return parameters, flops / 6 / parameters


def batch_tokens(tokens: float) -> float:
    """Tokens of an optimiser step that train best where a run sees so many: 0.58 · D^0.571, whatever the model's size
    (the step law, Li et al. 2025: measured there from 60 M to 1 B parameters and 2 B to 100 B tokens)."""
    return float(0.58 * tokens**0.571)


LARGE = 4
"""Times the law's batch from which on a batch is called large."""


def large_batch(batch: float, tokens: float) -> str:
    """A line on a batch (tokens a step) that is LARGE for a run of so many tokens; "" where it is not."""
    law = batch_tokens(tokens)
    if batch < LARGE * law:
        return ""
    return (
        f"{batch:,.0f} tokens a step are many for a run of {tokens:,.0f}: the step law takes {law:,.0f}, and more steps"
    )


CHINCHILLA = Law()
"""Nats a token of MassiveText-like English under a 32,000-token vocabulary; fitted from 44 M parameters up."""


@dataclass(frozen=True)
class Run:
    """A finished run: parameters, tokens seen, and the loss reached (any unit, the same for all)."""

    name: str
    parameters: float
    tokens: float
    loss: float


def fit(runs: Sequence[Run], alpha: float = ALPHA, beta: float = BETA) -> Law:
    """E, A and B, none below zero, by least squares of the relative errors. ValueError with fewer than 3 different
    runs, and where all have one size or one number of tokens."""
    sizes, amounts = {run.parameters for run in runs}, {run.tokens for run in runs}
    if len({(run.parameters, run.tokens) for run in runs}) < 3:
        raise ValueError(f"{len(runs)} runs, of which fewer than three differ, do not fix three numbers")
    if len(sizes) < 2 or len(amounts) < 2:
        alike = "parameters" if len(sizes) < 2 else "tokens"
        raise ValueError(f"all runs have as many {alike}: what those are worth is not in them")
    loss = np.array([run.loss for run in runs])
    columns = np.array([[1.0, run.parameters**-alpha, run.tokens**-beta] for run in runs])
    scale = columns.mean(axis=0)  # the powers differ by orders of magnitude
    floor, of_parameters, of_tokens = (_nonnegative(columns / scale / loss[:, None]) / scale).tolist()
    return Law(floor, of_parameters, of_tokens, alpha, beta)


def _nonnegative(columns: Floats) -> Floats:
    """The coefficients ≥ 0 that bring the columns nearest to one: the best allowed of the plain fits over some."""
    best, error = np.zeros(columns.shape[1]), math.inf
    for count in range(1, columns.shape[1] + 1):
        for kept in itertools.combinations(range(columns.shape[1]), count):
            found = np.linalg.lstsq(columns[:, kept], np.ones(len(columns)), rcond=None)[0]
            here = float(((columns[:, kept] @ found - 1) ** 2).sum())
            if (found >= 0).all() and here < error:
                best, error = np.zeros(columns.shape[1]), here
                best[list(kept)] = found
    return best


def predict(runs: Sequence[Run], parameters: float, tokens: float) -> tuple[float, float, float]:
    """(loss, low, high) of a run of N parameters on D tokens; low and high are NaN with three runs, which any three
    numbers fit.

    The interval is the fit's own prediction plus and minus two errors together (the root of the sum of their squares):
    twice the largest of how far the fits that leave one run out disagree (jackknife), how far the runs lie from the
    fit, and `NOISE`; and the most that fits with exponents off by `DOUBT` say otherwise.
    """
    law = fit(runs)
    guess = law.loss(parameters, tokens)
    if len(runs) == 3:
        return guess, math.nan, math.nan
    residuals = [run.loss / law.loss(run.parameters, run.tokens) - 1 for run in runs]
    spread = math.sqrt(sum(r * r for r in residuals) / (len(runs) - 3)) * guess
    others = [law.loss(parameters, tokens) for law in _without_one(runs)]
    mean = sum(others) / len(others)
    jackknife = math.sqrt((len(others) - 1) / len(others) * sum((other - mean) ** 2 for other in others))
    changed = itertools.product((ALPHA * DOUBT, ALPHA / DOUBT), (BETA * DOUBT, BETA / DOUBT))
    doubt = max(abs(fit(runs, *exponents).loss(parameters, tokens) - guess) for exponents in changed)
    width = math.hypot(2 * max(spread, jackknife, NOISE * guess), doubt)
    return guess, guess - width, guess + width


def _without_one(runs: Sequence[Run]) -> list[Law]:
    """The fits to all runs but one, those left out without which nothing can be fitted."""
    found = []
    for left in range(len(runs)):
        with contextlib.suppress(ValueError):
            found.append(fit([*runs[:left], *runs[left + 1 :]]))
    return found or [fit(runs)]
