"""What writes short texts for a stage: a model of this process, or one behind an OpenAI-compatible address."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pipeline.artifacts import Artifact
from pipeline.data.chat import stop_token_id
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import MismatchError
from pipeline.model.build import check_vocabulary, count_parameters, load_causal_lm, reach_of
from pipeline.model.generation import draw_uniforms
from pipeline.rl.asking import Asking
from pipeline.rl.judge import judge_ids
from pipeline.rl.judge_api import AT_ONCE, RemoteModel
from pipeline.rl.rollouts import last_turns

Step = Literal["critique", "revision"]
Key = tuple[int, ...]
"""What names the random numbers of a request, beside its step."""


@dataclass(frozen=True)
class Reply:
    """What a model wrote, and whether it came to its end; without text where the request did not fit."""

    text: str | None
    is_ended: bool = True
    tokens: int = 0
    """Read and written."""


def load_writer(artifact: Artifact, asking: Asking, longest: Mapping[Step, int]) -> Writer:
    """The language model of `artifact` as a writer; of any tokenizer, with a chat template or none."""
    tokenizer = load_tokenizer(artifact.model)
    model = load_causal_lm(artifact.model).to(asking.place.device).eval().requires_grad_(False)
    check_vocabulary(model, len(tokenizer), "sample.judge")
    stop_id = stop_token_id(tokenizer) if tokenizer.chat_template else tokenizer.eos_token_id
    if not isinstance(stop_id, int):
        mend = "an instruction-tuned model"
        raise MismatchError("the judge's tokenizer has no token that ends a text", where=artifact.reference, mend=mend)
    pad_id = stop_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return writer_of(model, tokenizer, replace(asking, stop_id=stop_id, pad_id=pad_id), longest)


def writer_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, asking: Asking, longest: Mapping[Step, int]
) -> Writer:
    """The model as what criticises and revises, asked as `asking` says but for stop strings."""
    hows = {
        step: replace(asking, longest=length, stop_strings=(), decode=None, environment=None)
        for step, length in longest.items()
    }
    return Writer(model, tokenizer, hows)


@dataclass(frozen=True)
class Writer:
    """A model of this process."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    hows: Mapping[Step, Asking]

    @property
    def parameters(self) -> int:
        """Those that a token goes through."""
        return count_parameters(self.model)[1]

    def write(self, step: Step, texts: Sequence[str], keys: Sequence[Key]) -> list[Reply]:
        """The reply to each request; `keys` name the random numbers of each."""
        how, reach = self.hows[step], reach_of(self.model.config)
        rows = [judge_ids(self.tokenizer, text) for text in texts]
        fits = [place for place, row in enumerate(rows) if reach is None or len(row) + how.longest <= reach]
        found = [Reply(None)] * len(texts)
        if not fits:
            return found
        uniforms_BT = None
        if how.temperature > 0:
            draws = [draw_uniforms(1, how.longest, how.place.generator(step, *keys[place])) for place in fits]
            uniforms_BT = torch.cat(draws)
        rollout, _ = how.answers(self.model, [rows[place] for place in fits], uniforms_BT, [{} for _ in fits])
        written = self.tokenizer.batch_decode(last_turns(rollout))
        ended, lengths = rollout.is_ended_B.tolist(), rollout.lengths_B.tolist()
        for place, text, is_ended, length in zip(fits, written, ended, lengths, strict=True):
            found[place] = Reply(text, is_ended, len(rows[place]) + length)
        return found


@dataclass(frozen=True)
class RemoteWriter:
    """A model behind an address. It has random numbers of its own: what it said is kept, and not asked for again."""

    models: Mapping[Step, RemoteModel]
    parameters: int = 0

    def write(self, step: Step, texts: Sequence[str], keys: Sequence[Key]) -> list[Reply]:
        """The reply to each request; `keys` mean nothing to it. TrainingError where the address does not answer."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return [Reply(*said) for said in pool.map(self.models[step].reply, texts)]
