"""Whether a reward model is as often right as it claims: the expected calibration error and the reliability figure.

Bradley and Terry's model claims that the answer it scores higher is the better one with probability σ(|Δ|), ½ to 1.
Its claims are put into bins of equal width, and the mean claim of each bin is set against the share that was right
(Guo et al. 2017, "On Calibration of Modern Neural Networks", equations 2 to 5). Shapes: N pairs, G rows (of a
list all pairs are of one), R resamples, B bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pipeline.evals import statistics
from pipeline.evals.statistics import Estimate, Floats

BINS = 10


@dataclass(frozen=True)
class Bin:
    """The pairs whose claim falls between `low` and `high`."""

    low: float
    high: float
    claimed: float
    """Mean of the claims; NaN in an empty bin, as `right`."""
    right: float
    n: int


def claims(probability_N: npt.ArrayLike, outcome_N: npt.ArrayLike) -> tuple[Floats, Floats]:
    """(how sure of its choice, ½ to 1, and how right the choice was) of pairs with the probability of the first.

    outcome_N: 1 where the first is the better, ½ for a tie. A model that does not choose (½) is half right.
    """
    p_N, outcome_N = np.asarray(probability_N, dtype=np.float64), np.asarray(outcome_N, dtype=np.float64)
    right_N = np.where(p_N > 0.5, outcome_N, np.where(p_N < 0.5, 1 - outcome_N, 0.5))
    return np.maximum(p_N, 1 - p_N), right_N


def bin_of(claimed_N: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Which of BINS equal bins from ½ to 1 a claim falls into; 1 itself into the last."""
    return np.clip(np.floor((np.asarray(claimed_N) - 0.5) * 2 * BINS), 0, BINS - 1).astype(np.int64)


def bins(claimed_N: Floats, right_N: Floats) -> list[Bin]:
    """All bins, in order."""
    bin_N = bin_of(claimed_N)
    found = []
    for number in range(BINS):
        here_N = bin_N == number
        n = int(here_N.sum())
        means = (float(claimed_N[here_N].mean()), float(right_N[here_N].mean())) if n else (np.nan, np.nan)
        found.append(Bin(0.5 + number / (2 * BINS), 0.5 + (number + 1) / (2 * BINS), *means, n))
    return found


def calibration_error(claimed_N: Floats, right_N: Floats, rows_N: npt.ArrayLike, seed: int) -> Estimate:
    """ECE = Σ_b (n_b / N) |share right in b − mean claim in b|. Chance alone makes it larger than 0, the more so the
    fewer pairs there are, and its resamples' interval lies high for the same reason.

    rows_N: which row a pair is of; rows are drawn whole. The sums of right − claim by bin are all it needs of a row.
    """
    _, row_N = np.unique(np.asarray(rows_N), return_inverse=True)
    gap_N, bin_N = right_N - claimed_N, bin_of(claimed_N)
    gaps_BG = [np.bincount(row_N, weights=np.where(bin_N == number, gap_N, 0.0)) for number in range(BINS)]
    pairs_G = np.bincount(row_N)

    def statistic(drawn_RG: Floats) -> Floats:
        index_RG = drawn_RG.astype(np.int64)
        parts = [np.abs(gap_G[index_RG].sum(-1)) for gap_G in gaps_BG]
        return np.asarray(np.sum(parts, axis=0) / pairs_G[index_RG].sum(-1))

    return replace(statistics.bootstrap(statistic, np.arange(len(pairs_G)), seed=seed), n=len(claimed_N))


# ---- the figure ----

SIDE, LEFT, TOP = 300, 52, 34
"""Pixels: the plot's side and what stands left of and above it."""


def figure(found: Sequence[Bin], title: str) -> str:
    """The reliability figure as SVG: share right over claim by bin, with 95 % bars; below how many pairs each holds.

    On the diagonal a model is as often right as it claims; below it claims too much.
    """
    most = max(each.n for each in found) or 1
    parts = [_frame(title), _line(_x(0.5), _y(0.5), _x(1.0), _y(1.0), "#999999", ' stroke-dasharray="4 4"')]
    for each in found:
        if not each.n:
            continue
        half = 1.96 * (each.right * (1 - each.right) / each.n) ** 0.5
        x, width = _x(each.claimed), (_x(each.high) - _x(each.low)) * 0.8
        height = 40 * each.n / most
        parts += [
            _line(x, _y(max(0.0, each.right - half)), x, _y(min(1.0, each.right + half)), "#1f77b4"),
            f'<circle cx="{x:.1f}" cy="{_y(each.right):.1f}" r="3.5" fill="#1f77b4">'
            f"<title>{each.n} pairs: claimed {each.claimed:.3f}, right {each.right:.3f}</title></circle>",
            f'<rect x="{_x(each.low) + width / 8:.1f}" y="{TOP + SIDE + 90 - height:.1f}" width="{width:.1f}" '
            f'height="{height:.1f}" fill="#c6dbef"/>',
            _text((_x(each.low) + _x(each.high)) / 2, TOP + SIDE + 102, str(each.n), 9),
        ]
    return "\n".join([*parts, "</svg>\n"])


def _x(claim: float) -> float:
    return LEFT + SIDE * (claim - 0.5) * 2


def _y(share: float) -> float:
    return TOP + SIDE * (1 - share)


def _frame(title: str) -> str:
    """The head of the file, the axes and their names."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + SIDE + 20}" height="{TOP + SIDE + 112}" '
        'font-family="sans-serif">\n<rect width="100%" height="100%" fill="white"/>\n'
        f'<rect x="{LEFT}" y="{TOP}" width="{SIDE}" height="{SIDE}" fill="none" stroke="#333333"/>'
    )
    down = "".join(_text(LEFT - 16, _y(share) + 4, f"{share:.1f}", 10) for share in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0))
    along = "".join(_text(_x(claim), TOP + SIDE + 14, f"{claim:.1f}", 10) for claim in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0))
    names = _text(LEFT + SIDE / 2, TOP + SIDE + 30, "claimed: σ(|Δ|)", 11) + _text(LEFT + SIDE / 2, 20, title, 12)
    turned = f'<g transform="rotate(-90 14 {TOP + SIDE / 2})">{_text(14, TOP + SIDE / 2, "share right", 11)}</g>'
    return "\n".join([head, down, along, names, turned])


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, more: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{more}/>'


def _text(x: float, y: float, text: str, size: int) -> str:
    safe = text.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="middle">{safe}</text>'
