"""A hand-made tokenizer of sixteen tokens whose template has tools, and policies that say what they are told to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pipeline.model.generation import Generation
from pipeline.rl.turns import Environment, Reply

SPECIALS = ("<pad>", "<e>", "<u>", "<a>", "<t>", "<.>")
WORDS = ("p", "q", "r", "0", "1", "2", "x", "<unk>")
PAD, E, U, A, T, DOT, P, Q, R, ZERO, ONE, TWO, X, UNK = range(14)
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'user' %}<u>{{ m.content }}{% elif m.role == 'assistant' %}<a>{{ m.content }}<e>"
    "{% elif m.role == 'tool' %}<t>{{ m.content }}<.>{% else %}{{ raise_exception('no such role') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def word_tokenizer(template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    """Words are tokens; `<u>`, `<a>`, `<t>` open the turns of user, assistant and tool."""
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate((*SPECIALS, *WORDS))}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<e>", unk_token="<unk>",
        extra_special_tokens=list(SPECIALS[2:]),
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer


def environment_of(reply: Reply, *, max_turns: int = 3, context: int | None = None, **options: Any) -> Environment:
    return Environment(reply, "/tools.py:reply", word_tokenizer(**options), max_turns, context)


class Script:
    """A policy that says given turns, cut at the steps it may take; it keeps what it was asked."""

    def __init__(self, *turns: Sequence[Sequence[int]]) -> None:
        self.turns, self.asked = list(turns), list[tuple[list[list[int]], Tensor | None, int]]()

    def __call__(
        self, prompts: Sequence[Sequence[int]], uniforms_BT: Tensor | None, steps: int, samples: int
    ) -> Generation:
        said = [list(each)[:steps] for each in self.turns[len(self.asked)]]
        assert len(said) == len(prompts)
        self.asked.append(([list(prompt) for prompt in prompts], uniforms_BT, steps))
        ids_BT, logprobs_BT = torch.full((len(said), steps), PAD), torch.zeros(len(said), steps)
        for row, ids in enumerate(said):
            ids_BT[row, : len(ids)] = torch.tensor(ids)
            logprobs_BT[row, : len(ids)] = -torch.tensor(ids) / 10  # told apart by their token
        lengths_B = torch.tensor([len(ids) for ids in said])
        return Generation(ids_BT, lengths_B, torch.tensor([ids[-1] == E for ids in said]), logprobs_BT, logprobs_BT)
