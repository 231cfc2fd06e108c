"""The rules by which `llmpipe init` sizes a recipe: numbers in, numbers out.

The split of a budget is the Chinchilla law's; where the text is short of it, four epochs are nearly as good as new
text (Muennighoff et al. 2023). Below the sizes that the law was fitted to, the demo's own model is the least that pays,
as long as it gets some hundred steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

EPOCHS = 4
SHARES = {"pretrain": 10, "sft": 4, "reward": 2, "dpo": 2, "ppo": 4}
"""Parts of the time that the stages get, of those that there are."""
TRAINING = 0.85
"""Share of the hours for them; the rest is for tokenizing, evaluating and starting."""
EVALUATION = 0.1
LEAST_DEPTH, LEAST_STEPS = 3, 300
DEEPEST = 48
LEAST_TOKENS, MOST_TOKENS = 1024, 524_288
"""Of an optimiser step: small batches and many steps, 1,500 of them where the text allows."""
FEW_STEPS = 30


@dataclass(frozen=True)
class Pretraining:
    """depth; tokens of a sample; samples a step; steps; whether the text, not the time, sets the end."""

    depth: int
    context: int
    batch: int
    steps: int
    is_short_of_text: bool


def vocabulary(text_bytes: float) -> int:
    """Tokens of a vocabulary for so much text: every merge should be met often enough to be learnt."""
    for most, size in ((1e6, 1024), (1e7, 4096), (1e8, 8192), (1e9, 16_384)):
        if text_bytes < most:
            return size
    return 32_768


def seconds_of(stages: Sequence[str], hours: float) -> dict[str, float]:
    """Seconds that each training stage gets of `hours`."""
    there = {name: SHARES[name] for name in stages if name in SHARES}
    whole = sum(there.values())
    return {name: hours * 3600 * TRAINING * part / whole for name, part in there.items()}


def pretraining(
    flops: float,
    text_tokens: float,
    rows: Sequence[Sequence[int]],
    best_split: Callable[[float], tuple[float, float]],
    cost: Callable[[int, int], tuple[float, float]],
    processes: int = 1,
) -> Pretraining:
    """The model and the steps for a budget of FLOPs and a text of `text_tokens`, in a batch that `processes` share.

    best_split: FLOPs -> (parameters, tokens) of the lowest loss. cost: (depth, context) -> (parameters that count,
    FLOPs a token to train) of the model that would be built. rows: tokens of the later stages' rows, by kind.
    """
    most = EPOCHS * text_tokens
    wanted, tokens = best_split(flops)
    if tokens > most:  # the best model for the text there is
        wanted *= most / tokens
    depth = _nearest_depth(wanted, lambda depth: cost(depth, 256)[0])
    least = cost(LEAST_DEPTH, 256)[1]
    if depth < LEAST_DEPTH and min(flops / least, most) >= LEAST_STEPS * 2048:
        depth = LEAST_DEPTH
    context = context_for(rows, context_of(cost(depth, 256)[0]))
    there = flops / cost(depth, context)[1]
    seen = min(there, most)
    batch = shared(power_of_two(min(max(seen / 1500, LEAST_TOKENS), MOST_TOKENS) / context), processes)
    return Pretraining(depth, context, batch, max(10, round(seen / batch / context)), there > most)


def _nearest_depth(wanted: float, parameters: Callable[[int], float]) -> int:
    """The depth whose parameters are nearest to `wanted`, by their ratio."""
    depth = 1
    while depth < DEEPEST and parameters(depth + 1) * parameters(depth) <= wanted * wanted:
        depth += 1
    return depth


def context_of(parameters: float) -> int:
    """Tokens of a sample that suit a model of this size."""
    for most, length in ((1e6, 128), (1e7, 256), (1e8, 512), (1e9, 1024)):
        if parameters < most:
            return length
    return 2048


def context_for(rows: Sequence[Sequence[int]], own: int) -> int:
    """Tokens that hold nineteen of twenty rows, up to four times the model's `own`; but half the rows of each kind."""
    most = [power_of_two(quantile(kind, 0.95), up=True) for kind in rows]
    half = [power_of_two(quantile(kind, 0.5), up=True) for kind in rows]
    return max(own, *half, min(4 * own, max(most))) if rows else own


def power_of_two(value: float, up: bool = False) -> int:
    """The largest power of two that is no larger, with `up` the smallest that is no smaller; at least 1."""
    exponent = math.log2(max(1.0, value))
    return int(2 ** (math.ceil(exponent) if up else math.floor(exponent)))


def shared(batch: int, processes: int) -> int:
    """The batch nearest to `batch` (by their ratio) of which every process has the same power of two of rows: it can be
    halved, and accumulated, down to a row a process."""
    return processes * int(2 ** max(0, round(math.log2(batch / processes))))


def rows_a_step(rows: int, most: int, processes: int = 1) -> int:
    """Rows of an optimiser step: a power of two up to `most`, of few rows so many that an epoch has eight steps; then
    what is nearest to it that `processes` share."""
    return shared(max(2, min(most, power_of_two(rows / 8))), processes)


def fewer_a_step(seen: float, batch: int, least: int) -> int:
    """The batch, halved as long as it is no less than `least`, until `seen` rows make some steps of it."""
    while batch // 2 >= least and seen / batch < FEW_STEPS:
        batch //= 2
    return batch


def learning_rate(parameters: float, is_adapter: bool) -> float:
    """Peak rate of sft: 1e-3 for a model of some million parameters, 2e-5 for one of some billion; adapters 2e-4."""
    if is_adapter:
        return 2e-4
    return float(f"{min(1e-3, max(1e-5, 2e-5 * math.sqrt(3e9 / parameters))):.0e}")


def held_out_share(shares: Sequence[Sequence[float]], wanted: int = 20) -> float:
    """The least usual share that holds out `wanted` rows of each kind, else the largest of them."""
    for share in (0.05, 0.1, 0.2):
        if all(sum(each < share for each in rows) >= wanted for rows in shares):
            return share
    return 0.2


def quantile(values: Sequence[int], share: float) -> int:
    """The value that `share` of the values do not exceed."""
    return sorted(values)[min(len(values) - 1, math.ceil(share * len(values)) - 1)]
