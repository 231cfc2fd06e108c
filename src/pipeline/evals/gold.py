"""What a gold function says of held-out answers, to set a reward model's scores against."""

from __future__ import annotations

from pipeline.data.tools import text_of
from pipeline.evals.reward_accuracy import HeldOut
from pipeline.rl import verifiable
from pipeline.rl.functions import function_scores
from pipeline.usercode import load_member


def gold_scores(gold: str | None, held: HeldOut) -> list[float] | None:
    """One number an answer, list after list; None without a gold. `gold` is rouge_l, exact or number, which compare
    with the row's `reference`, or names a function of the user's (`/folder/rewards.py:name`; its contract is ppo's)."""
    if gold is None:
        return None
    each = [(row, text_of(answer, "a gold function", "reward.gold")) for row in held.rows for answer in row["answers"]]
    verify: verifiable.Verifier
    if gold == "rouge_l":
        verify = verifiable.rouge_l
    elif gold == "exact":
        verify = verifiable.exact
    elif gold == "number":
        verify = verifiable.number
    else:
        rows, texts = [row for row, _ in each], [text for _, text in each]
        prompts = [row["prompt"][-1]["content"] for row in rows]
        scores: list[float] = function_scores(load_member(gold), gold, prompts, texts, rows).tolist()
        return scores
    return [verify(text, row["reference"]) for row, text in each]
