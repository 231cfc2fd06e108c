"""The points of a frontier: what answers are worth by gold and by the proxies, and their KL. P prompts, N answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from speaker import BATCH, Speaker

from pipeline.artifacts import Artifact
from pipeline.evals import statistics
from pipeline.rl.best_of_n import estimated_kl, kl_bound, winning_chances
from pipeline.rl.scoring import Loading, Responses, function_scores, load_fitting, model_scores
from pipeline.rl.terms import mean_minus_std
from pipeline.usercode import load_member

Floats = npt.NDArray[np.float64]
Point = dict[str, Any]
ENSEMBLE = "ensemble"


@dataclass(frozen=True)
class Marks:
    """What answers are worth, [P, N] each."""

    gold: Floats
    scores: dict[str, Floats]
    """By proxy, and by all of them."""
    logprobs: Floats
    """Under the model that wrote them, whole answers, nats."""
    kl: Floats
    """log p - log p of the start."""
    lengths: Floats


@dataclass(frozen=True)
class Judges:
    """Gold, the proxies, and the proxies together."""

    gold: str
    std_weight: float
    proxies: dict[str, Any]

    @classmethod
    def load(
        cls, gold: str, std_weight: float, proxies: dict[str, Artifact], start: Speaker, inputs: dict[str, Any]
    ) -> Judges:
        """The reward models of `proxies`, by name, each refused where it does not fit the start's tokens."""
        runtime = start.runtime
        loading = Loading(inputs["init"], start.tokenizer, start.stop_id, start.pad_id, BATCH, runtime.bf16, runtime)
        return cls(gold, std_weight, {name: load_fitting(each, loading) for name, each in proxies.items()})

    @property
    def names(self) -> list[str]:
        """What answers can be chosen by."""
        return [*self.proxies, *([ENSEMBLE] if len(self.proxies) > 1 else [])]

    def mark(self, said: Responses, speaker: Speaker, start: Speaker, each: int) -> Marks:
        """The marks of a speaker's answers, `each` to a prompt, one prompt's after another's."""
        golds = function_scores(load_member(self.gold), self.gold, said.prompts, said.texts, said.rows)
        members = {
            name: model_scores(proxy, said.rollout, pad_id=start.pad_id, batch_size=BATCH).cpu()
            for name, proxy in self.proxies.items()
        }
        if len(members) > 1:
            members[ENSEMBLE] = mean_minus_std(torch.stack(list(members.values())), self.std_weight)
        logprobs = speaker.logprobs(said.rollout)
        kl = logprobs - start.logprobs(said.rollout) if speaker is not start else torch.zeros_like(logprobs)

        def table(values: torch.Tensor) -> Floats:
            return np.asarray(values.double().cpu().numpy().reshape(-1, each))

        scores = {name: table(values) for name, values in members.items()}
        return Marks(table(golds), scores, table(logprobs), table(kl), table(said.rollout.lengths_B))


def agreement(marks: Marks) -> dict[str, float]:
    """Mean correlation over all answers of the proxies with gold, and of each two of them with one another.

    What the proxies share beside gold is what an ensemble of them can't see.
    """
    proxies = [values.ravel() for name, values in marks.scores.items() if name != ENSEMBLE]
    table = np.corrcoef(np.stack([marks.gold.ravel(), *proxies]))
    found = {"proxies_with_gold": float(table[0, 1:].mean())}
    if len(proxies) > 1:
        found["proxies_with_one_another"] = float(table[1:, 1:][np.triu_indices(len(proxies), 1)].mean())
    return found


def start_point(marks: Marks, seed: int) -> Point:
    """The start itself: no KL."""
    return _point("start", 0, seed, gold=marks.gold.mean(1), kl=marks.kl.mean(1), length=marks.lengths.mean(1))


def best_of_n_points(marks: Marks, by: str, sizes: Sequence[int], seed: int) -> list[Point]:
    """Best of n by the score `by`, a point for each n, its KL estimated and, as `kl_bound`, by the formula.

    Winners of one half of the answers are held against the other half, and the other way round.
    """
    scores, half = marks.scores[by], marks.scores[by].shape[1] // 2
    assert max(sizes) <= half, "n is at most half of the answers"
    points = []
    for n in sizes:
        chances = np.stack([winning_chances(row, n) for row in scores])
        kl = [
            (estimated_kl(row[:half], own[:half], row[half:], n) + estimated_kl(row[half:], own[half:], row[:half], n))
            / 2
            for row, own in zip(scores, marks.logprobs, strict=True)
        ]
        figures = {"gold": marks.gold, "reward": scores, "length": marks.lengths}
        means = {name: (chances * values).sum(1) for name, values in figures.items()}
        points.append(_point(f"best of n by {by}", n, seed, kl=np.array(kl), **means) | {"kl_bound": kl_bound(n)})
    return points


def policy_point(name: str, marks: Marks, seed: int) -> Point:
    """A policy as it was written."""
    scores = {by: values.mean(1) for by, values in marks.scores.items()}
    return _point(name, "", seed, gold=marks.gold.mean(1), kl=marks.kl.mean(1), length=marks.lengths.mean(1), **scores)


def evaluation_points(name: str, metrics: Path) -> list[Point]:
    """The evaluations of a run in which gold was measured; none for a stage that made none."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [
        {
            "curve": name,
            "at": line["step"],
            "kl": line["eval_kl"],
            "gold": line["eval_gold"],
            "gold_low": line["eval_gold"] - 1.96 * line["eval_gold_se"],
            "gold_high": line["eval_gold"] + 1.96 * line["eval_gold_se"],
            "reward": line["eval_reward"],
            "length": line["eval_length"],
            "n": 0,
        }
        for line in lines
        if "eval_gold" in line
    ]


def _point(curve: str, at: int | str, seed: int, **figures: Floats) -> Point:
    """The mean over prompts of each figure [P], gold and KL with their intervals."""
    point: Point = {"curve": curve, "at": at, "n": len(figures["gold"])}
    for name, values in figures.items():
        found = statistics.mean(values, seed)
        point[name] = found.value
        if name in ("gold", "kl"):
            point |= {f"{name}_low": found.low, f"{name}_high": found.high}
    return point
