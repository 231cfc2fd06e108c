"""A policy on held-out preferences beside the model it was trained from: what it prefers, how far it went, how long it
has become.

    accuracy        share of pairs whose chosen answer has the greater log-ratio, log p(y | x) - log start(y | x); by
                    kind of negative, and beside what lengths alone reach (`preference_accuracy`)
    margin          beta × mean difference of the log-ratios
    separation      unpaired answers: how often a desirable one has a greater log-ratio than an undesirable one, over
                    all pairs of them
    reward_length_correlation       Pearson's, of an answer's log-ratio and its tokens
    kl_per_token    KL(policy ‖ start) of the next token in nats, over the whole vocabulary, mean over the places of
                    held-out good answers
    greedy_length, greedy_length_start, greedy_ended        mean tokens of greedy answers to held-out prompts, now and
                    of the start; share that came to the stop token
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from pipeline.data.chat import encode_prompt, stop_token_id
from pipeline.evals import preference_accuracy, statistics
from pipeline.evals.likelihood import Request
from pipeline.evals.pairs import Row, Scorer
from pipeline.evals.statistics import Floats
from pipeline.evals.subject import Subject, chat_request
from pipeline.model.generation import generate

KL_ROWS = 128
"""Held-out answers along which the KL is taken, at most: two forwards each, one row at a time."""
SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class HeldOut:
    """What a policy is measured on."""

    pairs: Sequence[Row]
    lone: Sequence[Row]
    """Canonical unpaired rows; empty where the data are pairs."""
    drift_prompts: int
    """Prompts answered greedily, at most."""
    max_new_tokens: int
    length_only: Scorer
    beta: float
    seed: int


@dataclass(frozen=True)
class Said:
    """What a model says of the rows."""

    pairs: list[dict[str, Any]]
    """`preference_accuracy.score`'s items."""
    lone: list[float]
    """Log-likelihoods of the lone answers that fit the length."""
    lengths: list[int]
    """Tokens of its greedy answers."""
    ended: list[bool]


def listen(subject: Subject, held_out: HeldOut) -> Said:
    """The likelihoods a model gives and the answers it writes."""
    lone = [request for request, _ in _lone_requests(subject, held_out)]
    prompts = _prompts(subject, held_out)
    lengths, ended = [], []
    if prompts:
        stop = stop_token_id(subject.tokenizer)
        longest = max(map(len, prompts)) + held_out.max_new_tokens
        written = generate(
            subject.model,
            prompts,
            max_new_tokens=held_out.max_new_tokens,
            stop_ids=[stop],
            pad_id=stop if subject.tokenizer.pad_token_id is None else subject.tokenizer.pad_token_id,
            batch_size=max(1, 4 * subject.token_budget // longest),
            tick=subject.tick,
        )
        lengths, ended = written.lengths_B.tolist(), written.is_ended_B.tolist()
    pairs = preference_accuracy.score(subject, held_out.pairs)
    return Said(pairs, subject.log_likelihoods(lone).tolist() if lone else [], lengths, ended)


def figures(subject: Subject, start: PreTrainedModel, held_out: HeldOut, before: Said) -> dict[str, float]:
    """All figures of `subject` beside its start, of which `before` is what it said; only those there are rows for."""
    now = listen(subject, held_out)
    found: dict[str, float] = {}
    ratios, tokens = _log_ratios(subject, held_out, now, before)
    if now.pairs:
        accuracies = preference_accuracy.figures(now.pairs, before.pairs, held_out.length_only, held_out.seed)
        found |= {name: each.value for name, each in accuracies.items()}
        pair_ratios = ratios[: 2 * len(now.pairs)].reshape(-1, 2)
        found["margin"] = held_out.beta * float((pair_ratios[:, 0] - pair_ratios[:, 1]).mean())
    if now.lone:
        labels = np.array([label for _, label in _lone_requests(subject, held_out)])
        lone = ratios[2 * len(now.pairs) :]
        if labels.any() and not labels.all():
            good, bad = lone[labels], lone[~labels]
            found["separation"] = float(statistics.wins(*np.broadcast_arrays(good[:, None], bad[None, :])).mean())
    if len(ratios) > 1 and ratios.std() > 0 and tokens.std() > 0:
        found["reward_length_correlation"] = float(np.corrcoef(ratios, tokens)[0, 1])
    answers = _good_answers(subject, held_out, now)
    if answers:
        found["kl_per_token"] = mean_kl(subject.model, start, answers, subject)
    if now.lengths:
        found["greedy_length"] = float(np.mean(now.lengths))
        found["greedy_length_start"] = float(np.mean(before.lengths))
        found["greedy_ended"] = float(np.mean(now.ended))
    return found


def mean_kl(policy: PreTrainedModel, start: PreTrainedModel, answers: Sequence[Request], subject: Subject) -> float:
    """KL(policy ‖ start) of the next token in nats, over the whole vocabulary, mean over the answers' places."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for answer in answers:
            ids_1T = torch.tensor([[*answer.prompt, *answer.completion]], device=policy.device)
            places = slice(len(answer.prompt) - 1, ids_1T.shape[1] - 1)
            log_p_SV, log_q_SV = (
                model(input_ids=ids_1T, use_cache=False).logits[0, places].float().log_softmax(dim=-1)
                for model in (policy, start)
            )
            total += float((log_p_SV.exp() * (log_p_SV - log_q_SV)).sum())
            count += len(answer.completion)
            subject.tick()
    return total / count


def _log_ratios(subject: Subject, held_out: HeldOut, now: Said, before: Said) -> tuple[Floats, Floats]:
    """(log-ratio, tokens) of every answer: both sides of each pair, then the lone ones."""
    ratios = [item[side] - was[side] for item, was in zip(now.pairs, before.pairs, strict=True) for side in SIDES] + [
        value - was for value, was in zip(now.lone, before.lone, strict=True)
    ]
    rows = [held_out.pairs[item["item"]] for item in now.pairs]
    requests = [chat_request(subject.tokenizer, row["prompt"], row[side]) for row in rows for side in SIDES]
    tokens = [len(request.completion) for request in requests]
    tokens += [len(request.completion) for request, _ in _lone_requests(subject, held_out)]
    return np.array(ratios), np.array(tokens, dtype=np.float64)


def _lone_requests(subject: Subject, held_out: HeldOut) -> list[tuple[Request, bool]]:
    """The lone answers that fit the length, and whether each is desirable."""
    found = [
        (chat_request(subject.tokenizer, row["prompt"], row["completion"]), bool(row["label"])) for row in held_out.lone
    ]
    return [each for each in found if len(each[0].prompt) + len(each[0].completion) <= subject.max_length]


def _prompts(subject: Subject, held_out: HeldOut) -> list[tuple[int, ...]]:
    """The first different prompts that leave room for an answer."""
    found = dict.fromkeys(
        tuple(encode_prompt(subject.tokenizer, row["prompt"])) for row in [*held_out.pairs, *held_out.lone]
    )
    room = subject.max_length - held_out.max_new_tokens
    return [prompt for prompt in found if len(prompt) <= room][: held_out.drift_prompts]


def _good_answers(subject: Subject, held_out: HeldOut, now: Said) -> list[Request]:
    """What the KL is taken along."""
    if now.pairs:
        kept = [held_out.pairs[item["item"]] for item in now.pairs[:KL_ROWS]]
        return [chat_request(subject.tokenizer, row["prompt"], row["chosen"]) for row in kept]
    return [request for request, is_good in _lone_requests(subject, held_out) if is_good][:KL_ROWS]
