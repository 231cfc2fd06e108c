"""Pairs and lists of answers as tokens: what a reward model is trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerFast

from pipeline.data.chat import encode_messages
from pipeline.data.files import Row
from pipeline.errors import DataError

if TYPE_CHECKING:
    from pipeline.runtime import Runtime


def encode_answers(
    lists: list[Row], tokenizer: PreTrainedTokenizerFast, length: int, margin_weight: float, runtime: Runtime
) -> list[Row]:
    """All answers of each row as ids, from the prompt to the stop token, its margin times `margin_weight`. A row
    with an answer too long is left out; one with a margin that counts and a doubt is refused (DataError).

    Where all are pairs and none a tie, they are rows for TRL's own trainer, else for ours.
    """
    rows: list[Row] = []
    with runtime.progress("encode", len(lists), "rows") as bar:
        for row in lists:
            texts = [encode_messages(tokenizer, [*row["prompt"], *answer]).input_ids for answer in row["answers"]]
            if len(set(map(tuple, texts))) < len(texts):
                sides = "chosen and rejected" if len(texts) == 2 else "two answers of a list"
                raise DataError(
                    f"{sides} are the same tokens: {row['answers'][0][0]['content'][:60]!r}",
                    where="reward.data",
                    mend="take the row out",
                )
            margin = margin_weight * row["margin"] if margin_weight else 0.0  # of any margin, infinite ones too
            if margin and row["preference"] < 1:
                raise DataError(
                    f"a margin of {row['margin']:g} is sure that chosen is better, preference {row['preference']:g} is "
                    f"not: {row['answers'][0][0]['content'][:60]!r}",
                    where="reward.data",
                    mend="take one of the two out of the row, or `margin_weight: 0`",
                )
            if max(map(len, texts)) <= length:
                rows.append({"ids": texts, "ranks": row["ranks"], "preference": row["preference"], "margin": margin})
            bar.advance()
            runtime.check_stop()
    what = "pairs" if all(len(row["answers"]) == 2 for row in lists) else "rows"
    if len(rows) < len(lists):
        runtime.say(f"{len(lists) - len(rows):,} {what} with a side longer than {length:,} tokens are left out")
    if not rows:
        raise DataError(f"every row is longer than {length:,} tokens", where="reward.data", mend="a larger max_length")
    if any(len(row["ids"]) > 2 or row["preference"] < 1 for row in rows):
        return rows
    pairs = [{"chosen_ids": row["ids"][0], "rejected_ids": row["ids"][1]} for row in rows]
    if any(row["margin"] for row in rows):
        return [pair | {"margin": row["margin"]} for pair, row in zip(pairs, rows, strict=True)]
    return pairs


def answers_of(row: Row) -> list[list[int]]:
    """The ids of a training row's answers, as either trainer takes them."""
    ids: list[list[int]] = row["ids"] if "ids" in row else [row["chosen_ids"], row["rejected_ids"]]
    return ids
