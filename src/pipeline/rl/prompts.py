"""Which prompt each episode of a run answers: encoded once, refused where it can't be answered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from pipeline.errors import DataError

Row = dict[str, Any]


@dataclass(frozen=True)
class Prompts:
    """The prompts of a run."""

    rows: list[Row]
    ids: dict[int, list[int]]
    """Row -> the prompt's ids, for the rows the run comes to."""
    order: list[int]
    """The row of each episode."""
    left_out: int
    """Rows that were met and are too long."""

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.ids.values()))

    def once(self) -> Prompts:
        """Each prompt at its first place only."""
        return replace(self, order=list(dict.fromkeys(self.order)))


@dataclass(frozen=True)
class PromptReader:
    """How prompts are read: in which tokens, and how long they may be."""

    encode: Callable[[Row], list[int]]
    longest: int | None
    """Longer ones are left out."""
    room: int | None
    """What a response leaves of the context: longer ones are an error."""
    generator: Callable[..., torch.Generator]

    def take(self, rows: list[Row], count: int, purpose: str) -> Prompts:
        """The first `count` of one shuffle an epoch, which is a function of the seed, `purpose` and the epoch."""
        return order_prompts(
            rows,
            count,
            encode=self.encode,
            generator=lambda epoch: self.generator(purpose, epoch),
            longest=self.longest,
            room=self.room,
        )


def order_prompts(
    rows: list[Row],
    episodes: int,
    *,
    encode: Callable[[Row], list[int]],
    generator: Callable[[int], torch.Generator],
    longest: int | None,
    room: int | None,
) -> Prompts:
    """The first `episodes` rows of one shuffle an epoch (`generator` of its number): a pure function of seed and data.

    Prompts of more than `longest` tokens are left out. Raises DataError for a blank prompt, for one of more than
    `room` tokens (what a response leaves of the context), and where `longest` leaves nothing.
    """
    order: list[int] = []
    ids: dict[int, list[int]] = {}
    left_out: set[int] = set()
    epoch = 0
    while len(order) < episodes:
        shuffled = torch.randperm(len(rows), generator=generator(epoch)).tolist()
        for row in shuffled:
            if row not in ids and row not in left_out:
                prompt = encode(rows[row])
                if longest is not None and len(prompt) > longest:
                    left_out.add(row)
                else:
                    ids[row] = checked(rows[row], prompt, room)
            if row in ids and len(order) < episodes:
                order.append(row)
            if len(order) == episodes:
                break
        if not order:
            raise DataError(
                f"all {len(rows):,} prompts are longer than {longest} tokens",
                where="ppo.max_prompt_length",
                mend="raise it",
            )
        epoch += 1
    return Prompts(rows, ids, order, len(left_out))


def checked(row: Row, prompt: list[int], room: int | None) -> list[int]:
    """`prompt`, the ids of `row`; DataError if it is blank or longer than `room`."""
    said = row["prompt"][-1]["content"]
    if not prompt or not said.strip():
        raise DataError("an empty prompt", where="ppo.data", mend="take out the rows whose last message is blank")
    if room is not None and len(prompt) > room:
        leave_out = f"--set ppo.max_prompt_length={room} leaves such prompts out, or " if room > 0 else ""
        left = f"response_length leaves {max(0, room)} of the context"
        raise DataError(
            f"a prompt of {len(prompt)} tokens, where {left}: {said[:60]!r}",
            where="ppo.data",
            mend=f"{leave_out}lower ppo.response_length",
        )
    return prompt
