"""Scaling laws: the loss that a model of N parameters reaches on D tokens, the best N and D for given FLOPs, and a fit
to runs of one's own.

L(N, D) = E + A / N^α + B / D^β (Hoffmann et al. 2022, "Chinchilla"), with the constants of Besiroglu et al. 2024. A
fit keeps the exponents and finds E, A and B, which depend on the text, the tokenizer and the architecture: three
numbers can be had from a handful of small runs, five can't.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

ALPHA, BETA = 0.3478, 0.3658
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Law:
    """Loss as a function of parameters (without the input embedding) and tokens. Unit: that of `floor`."""

    floor: float = 1.8172
    of_parameters: float = 482.01
    of_tokens: float = 2085.43

    def loss(self, parameters: float, tokens: float) -> float:
        """E + A / N^α + B / D^β."""
        return float(self.floor + self.of_parameters / parameters**ALPHA + self.of_tokens / tokens**BETA)

    def best_split(self, flops: float) -> tuple[float, float]:
        """(N, D) of the lowest loss with 6 N D = flops; ValueError where the fit has no cost of size or of data."""
        if not (self.of_parameters > 0 and self.of_tokens > 0):
            raise ValueError("the law has no best split: one of its terms is zero")
        ratio = (ALPHA * self.of_parameters / (BETA * self.of_tokens)) ** (1 / (ALPHA + BETA))
        parameters = ratio * (flops / 6) ** (BETA / (ALPHA + BETA))
        return parameters, flops / 6 / parameters


CHINCHILLA = Law()
"""Nats a token of MassiveText-like English under a 32,000-token vocabulary; fitted from 44 M parameters up."""


@dataclass(frozen=True)
class Run:
    """A finished run: parameters, tokens seen, and the loss reached (any unit, the same for all)."""

    name: str
    parameters: float
    tokens: float
    loss: float


def fit(runs: Sequence[Run]) -> Law:
    """E, A and B, none below zero, by least squares of the relative errors. ValueError with fewer than 3 runs."""
    if len(runs) < 3:
        raise ValueError(f"{len(runs)} runs do not fix three numbers")
    loss = np.array([run.loss for run in runs])
    columns = np.array([[1.0, run.parameters**-ALPHA, run.tokens**-BETA] for run in runs])
    scale = columns.mean(axis=0)  # the powers differ by orders of magnitude
    floor, of_parameters, of_tokens = (_nonnegative(columns / scale / loss[:, None]) / scale).tolist()
    return Law(floor, of_parameters, of_tokens)


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
    """(loss, low, high) of a run of N parameters on D tokens.

    The interval is the fit's own prediction plus and minus twice the larger of two errors: how far the fits that leave
    one run out disagree (jackknife), and how far the runs lie from the fit.
    """
    law = fit(runs)
    guess = law.loss(parameters, tokens)
    residuals = [run.loss / law.loss(run.parameters, run.tokens) - 1 for run in runs]
    spread = math.sqrt(sum(r * r for r in residuals) / max(1, len(runs) - 3))
    jackknife = 0.0
    if len(runs) > 3:
        others = [fit([*runs[:i], *runs[i + 1 :]]).loss(parameters, tokens) for i in range(len(runs))]
        mean = sum(others) / len(others)
        jackknife = math.sqrt((len(runs) - 1) / len(runs) * sum((other - mean) ** 2 for other in others)) / guess
    width = 2 * max(spread, jackknife) * guess
    return guess, guess - width, guess + width
