"""frontier: what policies and best-of-n get of a gold reward, for the KL they take from their start.

Gao et al. 2023 draw gold reward over sqrt(KL): as a proxy is optimised harder, gold rises, bends and falls. Three kinds
of points, all on held-out prompts, intervals by a bootstrap over prompts:

- best of n by each proxy and by all of them, from one set of the start's answers (pipeline/rl/best_of_n.py);
- every policy, from answers of its own;
- ppo's way there, from the evaluations in its metrics.jsonl (measured on its own held-out prompts, plus and minus 1.96
  standard errors).

frontier.jsonl holds a point a line; `figure.py` draws it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.recipe import Data, Ref, StageConfig, field


class FrontierConfig(StageConfig):
    """What frontier can be told."""

    init: Ref = field("sft", "where all start: what KL is measured to, and whose answers best-of-n chooses from")
    policies: tuple[Ref, ...] = field(..., "the models to measure; of a ppo run its evaluations too")
    proxies: tuple[Ref, ...] = field(..., "reward models; together they are the ensemble")
    gold: str = field(..., "what is really wanted: a function of answers, ./gold.py:gold")
    data: Data | None = field(None, "rows with held-out prompts; those sft was trained on unless set")
    held_out: float = field(0.05, "share of the rows of files that is held out, as in sft", gt=0)
    prompts: int = field(64, "held-out prompts", unit="prompts", gt=1)
    samples: int = field(128, "answers of the start to each, half for best-of-n's KL", unit="answers", gt=1)
    answers: int = field(8, "answers of a policy to each", unit="answers", gt=0)
    best_of: tuple[int, ...] = field((1, 2, 4, 8, 16, 32, 64), "the n of best-of-n; at most half of `samples`")
    std_weight: float = field(1.0, "the ensemble's score: mean - this × deviation", ge=0)
    max_prompt_length: int | None = field(None, "leave out longer prompts, chat template included", unit="tokens", gt=0)
    response_length: int = field(48, "tokens of an answer at most", unit="tokens", gt=0)


INPUTS = {"init": "causal-lm", "policies": "causal-lm", "proxies": "reward-model"}
KIND = "evaluation"
DEFAULTS = {"data": "demonstrations"}
RESULT_VERSION = 1
SHOWN = 4  # samples of each policy that are written


def run(config: FrontierConfig, inputs: dict[str, Any], out: Path, runtime: Any) -> dict[str, float]:
    """Measure everything; returns peak and end of every curve, and how far the proxies agree."""
    from measures import Judges, agreement, best_of_n_points, evaluation_points, policy_point, start_point
    from speaker import Speaker

    from pipeline.data.formats import read_rows
    from pipeline.evals.results import Result, write_jsonl

    # 1. the start's answers to every prompt, and what each is worth
    rows = read_rows(config.data, "prompt", split="held_out", held_out=config.held_out, say=runtime.say)
    start = Speaker.load(inputs["init"], config.response_length, runtime)
    prompts = start.prompts(rows, config.prompts, config.max_prompt_length)
    judges = Judges.load(config.gold, config.std_weight, dict(zip(config.proxies, inputs["proxies"])), start, inputs)
    said = start.say([row for row in prompts for _ in range(config.samples)], runtime.generator("start"))
    first = judges.mark(said, start, start, config.samples)

    # 2. best of n, for each proxy and for all
    points = [start_point(first, config.seed)]
    for name in judges.names:
        points += best_of_n_points(first, name, config.best_of, config.seed)

    # 3. the policies, and how they came there
    shown = list(_samples(config.init, prompts, said.texts, first.gold.ravel(), config.samples))
    for name, artifact in zip(config.policies, inputs["policies"], strict=True):
        points += evaluation_points(name, artifact.path / "metrics.jsonl")
        policy = Speaker.load(artifact, config.response_length, runtime)
        said = policy.say([row for row in prompts for _ in range(config.answers)], runtime.generator("policy"))
        marks = judges.mark(said, policy, start, config.answers)
        points.append(policy_point(name, marks, config.seed))
        shown += _samples(name, prompts, said.texts, marks.gold.ravel(), config.answers)

    # 4. points as they are, and as every evaluation writes its figures
    with (out / "frontier.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(point) + "\n" for point in points)
    prints = {name: each.fingerprint for name, each in zip(config.policies, inputs["policies"])}
    results = [
        Result(f"{point['curve']} {point['at']}".strip(), prints.get(point["curve"], ""), "frontier", metric,
               point[metric], point.get(f"{metric}_low", math.nan), point.get(f"{metric}_high", math.nan), point["n"])
        for point in points for metric in ("gold", "kl", "reward") if metric in point
    ]  # fmt: skip
    write_jsonl(out / "results.jsonl", [vars(each) for each in results])
    write_jsonl(out / "samples.jsonl", shown)
    figures = agreement(first) | _summary(points)
    runtime.metrics.log(len(points), None, **figures)
    return figures


def _samples(
    name: str, prompts: list[dict[str, Any]], texts: list[str], golds: Any, each: int
) -> Iterator[dict[str, Any]]:
    for place in range(min(SHOWN, len(prompts))):
        question = prompts[place]["prompt"][-1]["content"]
        yield {"model": name, "prompt": question, "answer": texts[place * each], "gold": float(golds[place * each])}


def _summary(points: list[dict[str, Any]]) -> dict[str, float]:
    """Of every curve of more than one point, its highest gold and where, and its end."""
    figures: dict[str, float] = {}
    for curve in dict.fromkeys(point["curve"] for point in points):
        own = [point for point in points if point["curve"] == curve]
        best = max(own, key=lambda point: point["gold"])
        for what, point in (("peak", best), ("end", own[-1])):
            figures |= {f"{curve}.{what}_gold": point["gold"], f"{curve}.{what}_kl": point["kl"]}
    return figures
