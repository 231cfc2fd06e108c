"""A model under evaluation: loaded once, asked by every task."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pipeline.data.chat import encode_messages, encode_prompt, stop_token_id
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import MismatchError
from pipeline.evals import likelihood
from pipeline.evals.likelihood import Beginning, Request
from pipeline.evals.statistics import Floats
from pipeline.model.build import load_causal_lm, reach_of

Message = dict[str, str]


@dataclass(frozen=True)
class Subject:
    """A loaded model, and how it is run."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    is_chat: bool
    max_length: int
    """Tokens it is given at most, prompt and completion together."""
    token_budget: int
    """Tokens of a batch, padding included; no figure depends on it beyond float order."""
    tick: Callable[[], None]
    """Called after every batch: the place to stop at."""
    beginning: Beginning = field(default_factory=Beginning)
    """What prompts have begun with, read."""

    @property
    def start_token(self) -> int:
        """What stands before a text: bos, or eos for a tokenizer without one."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        start = eos if bos is None else bos
        assert isinstance(start, int), "a tokenizer with neither bos nor eos"
        return start

    def log_likelihoods(self, requests: Sequence[Request]) -> Floats:
        """Sum of log p(completion | prompt) in nats for each request. Float64."""
        return likelihood.log_likelihoods(
            self.model, requests, token_budget=self.token_budget, tick=self.tick, beginning=self.beginning
        )


def load_subject(
    name: str,
    folder: Path,
    device: torch.device,
    *,
    max_length: int,
    token_budget: int,
    bf16: bool,
    tick: Callable[[], None],
) -> Subject:
    """The causal language model of a Hugging Face folder, in bfloat16 or float32 and without dropout.

    `max_length` is lowered to what the model's positions reach.
    """
    tokenizer = load_tokenizer(folder)
    model = load_causal_lm(folder, dtype=torch.bfloat16 if bf16 else torch.float32).to(device).eval()
    reach = reach_of(model.config) or max_length
    chat = is_chat(folder, tokenizer)
    return Subject(name, model, tokenizer, chat, min(max_length, reach), token_budget, tick)


def is_chat(folder: Path, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the model was taught to end its turns: its generation ends at the chat template's stop token.

    False for a model without a chat template, or with one that has no stop token.
    """
    file = folder / "generation_config.json"
    if not tokenizer.chat_template or not file.exists():
        return False
    eos = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    try:
        return stop_token_id(tokenizer) in (eos if isinstance(eos, list) else [eos])
    except MismatchError:
        return False


def chat_request(tokenizer: PreTrainedTokenizerFast, prompt: list[Message], answer: list[Message]) -> Request:
    """The answer, which is one assistant's message, its stop token included, after the prompt as the chat template
    writes it."""
    before = encode_prompt(tokenizer, prompt)
    row = encode_messages(tokenizer, [*prompt, *answer]).input_ids
    assert row[: len(before)] == before, "the row does not begin with its own prompt"
    return Request(tuple(before), tuple(row[len(before) :]))
