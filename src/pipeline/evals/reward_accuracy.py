"""Accuracy of a reward model on held-out preferences: how often the chosen answer scores higher.

By kind of negative, since a mean over easy kinds hides a hard one, and beside what lengths alone would reach.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from pipeline.data.chat import encode_messages
from pipeline.evals.pairs import Row, Scorer, accuracies, describe
from pipeline.evals.statistics import Estimate
from pipeline.model.reward import RewardModel

Item = dict[str, Any]


def score(
    reward: RewardModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Row],
    *,
    max_length: int,
    token_budget: int,
    tick: Callable[[], None],
) -> list[Item]:
    """One item a row: the rewards of both answers. Rows too long are left out."""
    items, texts = [], []
    for number, row in enumerate(rows):
        pair = [encode_messages(tokenizer, [*row["prompt"], *row[side]]).input_ids for side in ("chosen", "rejected")]
        if max(map(len, pair)) <= max_length:
            items.append(describe(number, row))
            texts += pair
    values = rewards(reward, texts, token_budget=token_budget, tick=tick)
    for item, chosen, rejected in zip(items, values[::2], values[1::2], strict=True):
        item |= {"chosen": chosen, "rejected": rejected}
    return items


def figures(items: Sequence[Item], length_only: Scorer, seed: int) -> dict[str, Estimate]:
    """accuracy and length_only, over all rows and by kind of negative."""
    return accuracies([item["chosen"] - item["rejected"] for item in items], items, length_only, seed)


@torch.inference_mode()
def rewards(
    reward: RewardModel, rows: Sequence[Sequence[int]], *, token_budget: int, tick: Callable[[], None]
) -> list[float]:
    """Normalised reward of each row of tokens, in the order given; batched by length."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    values = [0.0] * len(rows)
    start = 0
    while start < len(order):
        width = len(rows[order[start]])
        batch = order[start : start + max(1, token_budget // width)]
        ids_BT = torch.zeros(len(batch), width, dtype=torch.long)
        for place, index in enumerate(batch):
            ids_BT[place, : len(rows[index])] = torch.tensor(rows[index])
        lengths_B = torch.tensor([len(rows[index]) for index in batch])
        for index, value in zip(batch, reward.score(ids_BT, lengths_B).tolist(), strict=True):
            values[index] = round(value, 5)
        start += len(batch)
        tick()
    return values
