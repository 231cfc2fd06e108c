"""A reward model on held-out preferences: how often the better answer scores higher, and how far its numbers mean it.

Accuracy by kind of negative, since a mean over easy kinds hides a hard one, by margin, and beside what lengths alone
would reach; calibration; correlation with length; agreement with a gold score where there is one. Every answer is
scored once, in a list of three as in a pair. Letters: A answers, M members of an ensemble, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from pipeline.data.chat import encode_messages
from pipeline.data.messages import words
from pipeline.data.preferences import TIE
from pipeline.data.ranked import as_ranked
from pipeline.evals import calibration, correlation, statistics
from pipeline.evals.pairs import Row, Scorer, accuracies, share
from pipeline.evals.statistics import Estimate, Floats
from pipeline.model.reward import Ensemble, RewardModel

Item = dict[str, Any]
QUARTERS = 4


@dataclass(frozen=True)
class HeldOut:
    """Lists of answers that fit the length: their places in the data, the rows (canonical ranked ones), and the tokens
    of all answers, list after list."""

    numbers: list[int]
    rows: list[Row]
    texts: list[list[int]]

    @property
    def pairs(self) -> int:
        """How many pairs they are."""
        return sum(len(row["answers"]) * (len(row["answers"]) - 1) // 2 for row in self.rows)


def encode(tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row], max_length: int) -> HeldOut:
    """Rows of the layout "ranked" or "preference" as tokens, to the stop token. One with an answer too long is left
    out."""
    held = HeldOut([], [], [])
    for number, row in enumerate(rows):
        row = row if "answers" in row else as_ranked(row, row)
        texts = [encode_messages(tokenizer, [*row["prompt"], *answer]).input_ids for answer in row["answers"]]
        if max(map(len, texts)) <= max_length:
            held.numbers.append(number)
            held.rows.append(row)
            held.texts.extend(texts)
    return held


def score(
    reward: RewardModel | Ensemble,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Row],
    *,
    max_length: int,
    token_budget: int,
    tick: Callable[[], None],
) -> list[Item]:
    """One item a pair; see `items`."""
    held = encode(tokenizer, rows, max_length)
    members = reward.members if isinstance(reward, Ensemble) else (reward,)
    values = [rewards(member, held.texts, token_budget=token_budget, tick=tick) for member in members]
    return items(held, np.array(values).reshape(len(members), -1), [member.std for member in members])


def items(
    held: HeldOut, values_MA: Floats, std_M: Sequence[float], gold_A: Sequence[float] | None = None
) -> list[Item]:
    """One item a pair, ties too, the better answer called chosen.

    values_MA: the members' normalised scores of all answers. `chosen` and `rejected` are their means; `probability` is
    the members' mean σ(Δ) of the raw scores, which the loss is of; `places` says which answers of the list they are.
    """
    found: list[Item] = []
    start = 0
    for number, row in zip(held.numbers, held.rows, strict=True):
        chars = [len(words(answer[0])) for answer in row["answers"]]
        for i, j in combinations(range(len(chars)), 2):
            delta_M = (values_MA[:, start + i] - values_MA[:, start + j]) * np.asarray(std_M)
            chosen, rejected = (float(values_MA[:, start + place].mean()) for place in (i, j))
            item: Item = {
                "item": number,
                "kind": row["kind"],
                "chosen_chars": chars[i],
                "rejected_chars": chars[j],
                "chosen": round(chosen, 5),
                "rejected": round(rejected, 5),
                "probability": round(float(np.exp(-np.logaddexp(0.0, -delta_M)).mean()), 6),
                "preference": row["preference"] if row["ranks"][i] < row["ranks"][j] else TIE,
                "margin": row["margin"],
                "places": [i, j],
            }
            if len(std_M) > 1:
                item["members"] = [round(float(delta), 5) for delta in delta_M]
            if gold_A is not None:
                item["gold"] = [gold_A[start + i], gold_A[start + j]]
            found.append(item)
        start += len(chars)
    return found


def figures(items: Sequence[Item], length_only: Scorer, seed: int) -> dict[str, Estimate]:
    """All figures of the items; ties count for calibration alone. docs/reward.md says what each of them means."""
    strict = [item for item in items if item["preference"] > TIE]
    deltas_P = _column(strict, "chosen") - _column(strict, "rejected")
    right_P = statistics.wins(deltas_P, np.zeros(len(strict)))
    rows_P = _column(strict, "item")
    found = accuracies(deltas_P, strict, length_only, seed, rows_P)
    claimed_N, right_N = calibration.claims(_column(items, "probability"), _column(items, "preference"))
    p_N, mu_N = _column(items, "probability").clip(1e-7, 1 - 1e-7), _column(items, "preference")
    found["ece"] = calibration.calibration_error(claimed_N, right_N, _column(items, "item"), seed)
    found["nll"] = share(-mu_N * np.log(p_N) - (1 - mu_N) * np.log(1 - p_N), _column(items, "item"), seed)
    found |= _by_length(items, seed)
    found |= _by_margin(np.abs(deltas_P), right_P, rows_P, seed)
    margins_P = _column(strict, "margin")
    if 1 < len(set(margins_P)) <= calibration.BINS:
        for margin in sorted(set(margins_P)):
            here_P = margins_P == margin
            found[f"accuracy_by_label_margin/{margin:g}"] = share(right_P[here_P], rows_P[here_P], seed)
    return found | _of_members(strict, seed) | _of_gold(items, strict, seed)


def _column(items: Sequence[Item], name: str) -> Floats:
    return np.array([item[name] for item in items], dtype=np.float64)


def _by_margin(sizes_P: Floats, right_P: Floats, rows_P: Floats, seed: int) -> dict[str, Estimate]:
    """Accuracy in the quarters of the pairs by |Δ|, the least sure first; nothing of fewer pairs than quarters."""
    if len(sizes_P) < QUARTERS:
        return {}
    parts = np.array_split(np.argsort(sizes_P, kind="stable"), QUARTERS)
    return {
        f"accuracy_by_margin/{number}": share(right_P[part], rows_P[part], seed)
        for number, part in enumerate(parts, start=1)
    }


def _by_length(items: Sequence[Item], seed: int) -> dict[str, Estimate]:
    """Correlation of the scores with the answers' characters, each answer once."""
    answers = {}
    for item in items:
        for place, side in zip(item["places"], ("chosen", "rejected"), strict=True):
            answers[item["item"], place] = (item[f"{side}_chars"], item[side])
    chars, scores = (np.array([answer[k] for answer in answers.values()]) for k in (0, 1))
    rows = [row for row, _ in answers]
    return {
        "length_spearman": correlation.spearman(chars, scores, rows, seed),
        "length_pearson": correlation.pearson(chars, scores, rows, seed),
    }


def _of_members(strict: Sequence[Item], seed: int) -> dict[str, Estimate]:
    """Of an ensemble: each member's accuracy, and the share of pairs that they don't agree on."""
    if not strict or "members" not in strict[0]:
        return {}
    deltas_PM = np.array([item["members"] for item in strict])
    rows_P = _column(strict, "item")
    found = {"members_disagree": share(1.0 * (np.ptp(np.sign(deltas_PM), axis=1) > 0), rows_P, seed)}
    for member, deltas_P in enumerate(deltas_PM.T):
        found[f"member_accuracy/{member}"] = share(statistics.wins(deltas_P, 0 * deltas_P), rows_P, seed)
    return found


def _of_gold(items: Sequence[Item], strict: Sequence[Item], seed: int) -> dict[str, Estimate]:
    """Over the pairs that gold tells apart: how often the reward, and how often the label, says what it says."""
    if not items or "gold" not in items[0]:
        return {}
    found = {}
    for name, pairs in (("gold_agreement", items), ("gold_agreement_of_labels", strict)):
        told = [item for item in pairs if item["gold"][0] != item["gold"][1]]
        gold_P = np.sign([item["gold"][0] - item["gold"][1] for item in told])
        said_P = _column(told, "chosen") - _column(told, "rejected") if name == "gold_agreement" else np.ones(len(told))
        found[name] = share(statistics.wins(said_P * gold_P, np.zeros(len(told))), _column(told, "item"), seed)
    return found


@torch.inference_mode()
def rewards(
    reward: RewardModel | Ensemble, rows: Sequence[Sequence[int]], *, token_budget: int, tick: Callable[[], None]
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
