"""Answers of a model to held-out prompts: what they are worth to the reward model, and what by the gold rule.

    reward         mean normalised reward of the answers (the reward model's own units); an answer that was cut off is
                   read as though it had stopped there
    reward_sd      mean of reward - the baseline's reward to the same prompt, in standard deviations of the baseline's
    kl             E_policy [ log p(answer) - log baseline(answer) ] in nats an answer, estimated by the samples
                   themselves (Schulman 2020, "Approximating KL divergence", k1); only where they are sampled at
                   temperature 1, since greedy answers are no sample of the policy
    length, ended  tokens of an answer, its stop token included; share of answers that came to it
    gold           ROUGE-L F1 to the reference answer, zero without a stop token: no model was trained on it
    gold_win_rate  how often gold is above the baseline's to the same prompt; a tie counts half

The same prompts and the same random numbers for every model, so that comparisons are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pipeline.data.chat import encode_prompt, stop_token_id
from pipeline.data.pydocs import gold
from pipeline.evals import statistics
from pipeline.evals.likelihood import Request
from pipeline.evals.statistics import Estimate, PerItem
from pipeline.evals.subject import Subject
from pipeline.model.generation import GREEDY, Generation, Sampling, generate

Item = dict[str, Any]
Row = dict[str, Any]
Scorer = Callable[[Sequence[Sequence[int]]], list[float]]


def score(
    subject: Subject,
    rows: Sequence[Row],
    *,
    max_new_tokens: int,
    uniforms_NT: torch.Tensor | None,
    baseline: Subject | None,
    rewards: Scorer | None,
) -> list[Item]:
    """One item a prompt that leaves room for an answer. Greedy without `uniforms_NT`
    ([rows, max_new_tokens], see `draw_uniforms`), else sampled as the model is.

    baseline: what KL is measured from. rewards: prompt and answer as tokens -> normalised reward. Both read the
    subject's own tokens.
    """
    encoded = [tuple(encode_prompt(subject.tokenizer, row["prompt"])) for row in rows]
    kept = [number for number, prompt in enumerate(encoded) if len(prompt) + max_new_tokens <= subject.max_length]
    prompts = [encoded[number] for number in kept]
    if not prompts:
        return []
    uniforms = None if uniforms_NT is None else uniforms_NT[kept]
    written = _generate(subject, prompts, max_new_tokens, uniforms)
    answers = written.responses()
    ended = written.is_ended_B.tolist()
    items = []
    for number, answer, is_ended in zip(kept, answers, ended, strict=True):
        row = rows[number]
        text = str(subject.tokenizer.decode(answer[:-1] if is_ended else answer))
        item: Item = {"item": number, "prompt": row["prompt"], "reference": row["reference"], "answer": text}
        item |= {"length": len(answer), "ended": is_ended, "gold": gold(text, row["reference"], is_ended)}
        items.append(item)
    if rewards is not None:
        _add(items, "reward", rewards([[*p, *a] for p, a in zip(prompts, answers, strict=True)]))
    if baseline is not None and uniforms is not None:
        requests = [Request(p, tuple(a)) for p, a in zip(prompts, answers, strict=True)]
        _add(items, "logprob", written.logprobs_BT.double().sum(1).tolist())
        _add(items, "baseline_logprob", baseline.log_likelihoods(requests).tolist())
    return items


def _generate(
    subject: Subject, prompts: Sequence[Sequence[int]], max_new_tokens: int, uniforms: torch.Tensor | None
) -> Generation:
    """As many answers at a time as the token budget has room for."""
    stop = stop_token_id(subject.tokenizer)
    longest = max(map(len, prompts)) + max_new_tokens
    return generate(
        subject.model,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_ids=[stop],
        pad_id=stop if subject.tokenizer.pad_token_id is None else subject.tokenizer.pad_token_id,
        sampling=GREEDY if uniforms is None else Sampling(temperature=1.0),
        uniforms_BT=uniforms,
        batch_size=max(1, 4 * subject.token_budget // longest),
    )


def _add(items: Sequence[Item], key: str, values: Sequence[float]) -> None:
    for item, value in zip(items, values, strict=True):
        item[key] = round(value, 5)


def figures(items: Sequence[Item], baseline: Sequence[Item] | None, seed: int) -> dict[str, Estimate]:
    """Means over prompts, and the comparisons over the prompts that both models answered; `baseline` is None for the
    baseline itself."""
    found = {name: statistics.mean([item[name] for item in items], seed) for name in ("length", "ended", "gold")}
    if items and "reward" in items[0]:
        found["reward"] = statistics.mean([item["reward"] for item in items], seed)
    if baseline is None:
        return found
    if items and "baseline_logprob" in items[0]:
        found["kl"] = statistics.mean([item["logprob"] - item["baseline_logprob"] for item in items], seed)
    theirs = {item["item"]: item for item in baseline}
    ours = [item for item in items if item["item"] in theirs]
    pairs = [(item, theirs[item["item"]]) for item in ours]
    golds = np.array([[a["gold"], b["gold"]] for a, b in pairs]).reshape(-1, 2)
    found["gold_win_rate"] = statistics.mean(statistics.wins(golds[:, 0], golds[:, 1]), seed)
    found["gold_difference"] = statistics.paired_difference(golds[:, 0], golds[:, 1], seed)
    if "reward" in found:
        both = np.array([[a["reward"], b["reward"]] for a, b in pairs]).reshape(-1, 2)
        found["reward_sd"] = statistics.standardised_difference(both[:, 0], both[:, 1], seed)
    return found


def per_item(items: Sequence[Item]) -> PerItem:
    """What each answer is worth, its length and end, and the samples' log-ratio to the baseline."""
    found: dict[str, dict[int, tuple[float, float]]] = {}
    for name in ("length", "ended", "gold", "reward"):
        if items and name in items[0]:
            found[name] = {item["item"]: (float(item[name]), 1.0) for item in items}
    if items and "baseline_logprob" in items[0]:
        found["kl"] = {item["item"]: (item["logprob"] - item["baseline_logprob"], 1.0) for item in items}
    return found
