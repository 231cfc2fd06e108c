"""Answers of several turns: the policy speaks, an environment of the user's replies, the policy goes on.

A row is one line of tokens. What the policy has drawn stays as it was drawn, never tokenised again; after its stop
token stand the template's own tokens of the reply and of the next generation prompt, which the policy did not write and
is not trained on. Lengths are of all that stands after the prompt, so that a row never outgrows the context.

    prompt | the policy's turn, its stop token | a newline, <|im_start|>tool, the reply, ... | the policy's next turn
             True                                False                                         True
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pipeline.data.chat import encode_messages
from pipeline.errors import DataError, MismatchError, TrainingError
from pipeline.model.generation import Generation
from pipeline.usercode import load_member

Row = dict[str, Any]
Message = dict[str, str]
Write = Callable[[Sequence[Sequence[int]], Tensor | None, int, int], Generation]
"""(prompts as ids, uniforms [prompts, steps] or None for the likeliest, steps, samples) -> what is written, `steps`
tokens at most. Each prompt stands there `samples` times in a row."""
Reply = Callable[[list[list[Message]], list[Row]], Sequence[Any]]

CONTRACT = (
    "reply(conversations: list[list[message]], rows: list[dict]) -> for each conversation the next message, "
    '{"role": "user" or "tool", "content": text}, or None where it is over'
)
SOMETHING = "x"  # in the place of the policy's words where only what the template writes after them is wanted


@dataclass(frozen=True)
class Environment:
    """What replies to the policy."""

    reply: Reply
    where: str
    """Its name in errors: `/folder/tools.py:reply`."""
    tokenizer: PreTrainedTokenizerFast
    max_turns: int
    """Turns of the policy at most."""
    context: int | None
    """Tokens that the policy can read."""

    def replies(self, conversations: list[list[Message]], rows: list[Row]) -> list[Message | None]:
        """Its replies to conversations whose last message is the policy's; TrainingError for what is none."""
        try:
            found = list(self.reply(copy.deepcopy(conversations), rows))
        except Exception as error:
            raise self._wrong(f"raised {type(error).__name__}: {error}") from error
        if len(found) != len(conversations):
            raise self._wrong(f"gave {len(found)} replies for {len(conversations)} conversations")
        for reply in found:
            if reply is not None and not _is_message(reply):
                raise self._wrong(f"gave {str(reply)[:80]!r} for a message")
        return found

    def ids_after(self, messages: list[Message], reply: Message) -> list[int]:
        """What stands between the stop token of the last of `messages`, the policy's, and its next turn.

        The template's rendering is that of the longer conversation, from there on. TrainingError where it has no such
        roles.
        """
        said = [message | {"content": SOMETHING} if message["role"] == "assistant" else message for message in messages]
        try:
            encoded = encode_messages(self.tokenizer, [*said, reply], add_generation_prompt=True)
        except (DataError, MismatchError) as error:
            raise self._wrong(f"gave a message of role {reply['role']} that does not go: {error.what}") from error
        trained = [place for place, is_trained in enumerate(encoded.is_trained) if is_trained]
        return encoded.input_ids[trained[-1] + 1 :]

    def _wrong(self, what: str) -> TrainingError:
        return TrainingError(f"the environment {what}", where=self.where, mend=f"its contract: {CONTRACT}")


def load_environment(
    reference: str | None, tokenizer: PreTrainedTokenizerFast, max_turns: int, context: int | None
) -> Environment | None:
    """The function of the user's that `reference` names (`/folder/tools.py:reply`); None without one."""
    if reference is None:
        return None
    return Environment(load_member(reference), reference, tokenizer, max_turns, context)


def _is_message(reply: Any) -> bool:
    return (
        isinstance(reply, dict)
        and reply.keys() == {"role", "content"}
        and reply["role"] in ("user", "tool")
        and isinstance(reply["content"], str)
    )


@dataclass
class Talk:
    """One conversation under way: its prompt, and what stands after it."""

    prompt: list[int]
    messages: list[Message]
    """All of it as text; the last one is the policy's, once it has spoken."""
    ids: list[int] = field(default_factory=list)
    is_policys: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    is_ended: bool = False

    def speak(self, ids: list[int], logprobs: list[float], is_ended: bool, text: str) -> None:
        """A turn of the policy."""
        self.ids += ids
        self.is_policys += [True] * len(ids)
        self.logprobs += logprobs
        self.is_ended = is_ended
        self.messages = [*self.messages, {"role": "assistant", "content": text}]

    def hear(self, reply: Message, ids: list[int], room: int) -> bool:
        """The environment's reply; whether the policy may go on. Where no token is left for it to say, the row is cut
        off within the reply, which is then no part of the conversation."""
        fits = len(ids) < room
        ids = ids[:room]
        self.ids += ids
        self.is_policys += [False] * len(ids)
        self.logprobs += [0.0] * len(ids)
        self.is_ended = False
        if fits:
            self.messages = [*self.messages, reply]
        return fits


def converse(
    write: Write,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[Row],
    uniforms_BT: Tensor | None,
    environment: Environment,
    *,
    longest: int,
    pad_id: int,
    samples: int = 1,
) -> tuple[Generation, Tensor, list[Row]]:
    """(what stands after each prompt, True [B, T] for the tokens that the policy wrote, the rows with "messages").

    At most `longest` tokens after a prompt, replies included. A row is over where the environment says so, or after
    `max_turns` turns; it is cut off where it runs out of room, in a turn or in a reply. The random number of a token is
    that of its place after the prompt, so what a row says does not depend on the others. Each prompt stands there
    `samples` times in a row; only the first turns have that in common.
    """
    talks = [Talk(list(prompt), list(row["prompt"])) for prompt, row in zip(prompts, rows, strict=True)]
    going = list(range(len(talks)))
    for turn in range(environment.max_turns):
        _speak(write, talks, going, uniforms_BT, environment, longest, 1 if turn else samples)
        asked = [number for number in going if talks[number].is_ended and len(talks[number].ids) < longest]
        if turn + 1 == environment.max_turns or not asked:
            break
        replies = environment.replies([talks[number].messages for number in asked], [rows[number] for number in asked])
        going = []
        for number, reply in zip(asked, replies, strict=True):
            talk = talks[number]
            if reply is not None and talk.hear(
                reply, environment.ids_after(talk.messages, reply), longest - len(talk.ids)
            ):
                going.append(number)
    said = [dict(row) | {"messages": talk.messages} for row, talk in zip(rows, talks, strict=True)]
    return *_together(talks, pad_id), said


def _speak(
    write: Write,
    talks: list[Talk],
    going: list[int],
    uniforms_BT: Tensor | None,
    environment: Environment,
    longest: int,
    samples: int,
) -> None:
    """The next turn of the conversations `going`. Some are nearer to their end than others: they are written to the end
    of the longest of their call, and cut at their own."""
    while going:
        steps = max(longest - len(talks[number].ids) for number in going)
        here = [number for number in going if _fits(talks[number], steps, environment.context)]
        going = [number for number in going if number not in set(here)]
        uniforms = None if uniforms_BT is None else _shifted(uniforms_BT, [(n, len(talks[n].ids)) for n in here], steps)
        written = write([talks[number].prompt + talks[number].ids for number in here], uniforms, steps, samples)
        for i, number in enumerate(here):
            talk = talks[number]
            room, length = longest - len(talk.ids), int(written.lengths_B[i])
            used, is_ended = min(room, length), bool(written.is_ended_B[i]) and length <= room
            ids = written.ids_BT[i, :used].tolist()
            text = environment.tokenizer.decode(ids[:-1] if is_ended else ids)
            talk.speak(ids, written.logprobs_BT[i, :used].tolist(), is_ended, text)


def _fits(talk: Talk, steps: int, context: int | None) -> bool:
    """Whether so many steps of writing stay within the context; always so for the conversation with most room."""
    return context is None or len(talk.prompt) + len(talk.ids) + steps <= context


def _shifted(uniforms_BT: Tensor, places: list[tuple[int, int]], steps: int) -> Tensor:
    """For each (row, place) the row's numbers from that place on; zeros after its last."""
    found = torch.zeros(len(places), steps, dtype=uniforms_BT.dtype)
    for i, (row, place) in enumerate(places):
        own = uniforms_BT[row, place : place + steps]
        found[i, : len(own)] = own
    return found


def _together(talks: list[Talk], pad_id: int) -> tuple[Generation, Tensor]:
    shape = (len(talks), max((len(talk.ids) for talk in talks), default=1))
    ids_BT, is_policys_BT = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.bool)
    logprobs_BT = torch.zeros(shape)
    for row, talk in enumerate(talks):
        used = len(talk.ids)
        ids_BT[row, :used] = torch.tensor(talk.ids)
        is_policys_BT[row, :used] = torch.tensor(talk.is_policys)
        logprobs_BT[row, :used] = torch.tensor(talk.logprobs)
    lengths_B = torch.tensor([len(talk.ids) for talk in talks])
    is_ended_B = torch.tensor([talk.is_ended for talk in talks])
    return Generation(ids_BT, lengths_B, is_ended_B, logprobs_BT, logprobs_BT), is_policys_BT
