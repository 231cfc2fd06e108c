"""Functions that score responses: the user's own, and those by name that compare with the data's answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import DataError, TrainingError
from pipeline.reward_config import RewardTerm
from pipeline.rl import verifiable

Row = dict[str, Any]
RewardFunction = Callable[[list[str], list[str], list[Row]], Sequence[float]]
CONTRACT = "f(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float], one finite number a response"


def function_scores(
    function: RewardFunction, where: str, prompts: list[str], responses: list[str], rows: list[Row]
) -> Tensor:
    """The scores of `function`, float32 [B]; `where` (`/folder/rewards.py:exact`) names it in errors.

    Raises TrainingError where it raises, or gives another number of scores, or one that is not finite.
    """
    mend = f"its contract: {CONTRACT}"
    try:
        scores = [float(score) for score in function(prompts, responses, rows)]
    except Exception as error:
        what = f"the reward function raised {type(error).__name__}: {error}"
        raise TrainingError(what, where=where, mend=mend) from error
    if len(scores) != len(responses):
        what = f"the reward function gave {len(scores)} scores for {len(responses)} responses"
        raise TrainingError(what, where=where, mend=mend)
    for score, response in zip(scores, responses, strict=True):
        if not math.isfinite(score):
            what = f"the reward function gave {score} for the response {response[:80]!r}"
            raise TrainingError(what, where=where, mend=mend)
    return torch.tensor(scores, dtype=torch.float32)


def verifier_of(term: RewardTerm) -> verifiable.Verifier:
    """What compares a response with the data's answer, for a term with a function by name."""
    if term.function == "rouge_l":
        return verifiable.rouge_l
    if term.function == "exact":
        return partial(verifiable.exact, ignore_case=term.ignore_case)
    if term.function == "regex":
        assert term.pattern is not None
        return verifiable.pattern(term.pattern, ignore_case=term.ignore_case)
    if term.function == "json_schema":
        assert term.schema_file is not None
        return verifiable.json_schema(term.schema_file)
    return verifiable.number


def check_references(reward: str | tuple[RewardTerm, ...], rows: Sequence[Row]) -> None:
    """DataError for a row whose answer a term's function can't compare with: none there, or no number in it."""
    for term in () if isinstance(reward, str) else reward:
        _check_references(term, rows)


def _check_references(term: RewardTerm, rows: Sequence[Row]) -> None:
    has_group = term.function == "regex" and "(?P<answer>" in (term.pattern or "")
    for row in rows if term.function in ("exact", "number", "rouge_l") or has_group else ():
        reference, said = row["reference"], row["prompt"][-1]["content"]
        if not reference.strip():
            lacks = "no answer"
        elif term.function == "number" and verifiable.answer_number(reference) is None:
            lacks = "no number in its answer"
        else:
            continue
        raise DataError(
            f"`{term.figure}` compares with the data's answer, and a row has {lacks}: {said[:60]!r}",
            where="ppo.data",
            mend="rows with an answer, or another reward",
        )
