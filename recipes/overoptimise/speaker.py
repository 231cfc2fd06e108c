"""A model that is asked: what `label` and `frontier` share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.artifacts import Artifact
from pipeline.data.chat import encode_prompt, stop_token_id
from pipeline.data.tokenizers import load_tokenizer
from pipeline.model.build import load_causal_lm
from pipeline.model.generation import Sampling, draw_uniforms, generate
from pipeline.model.next_token import has_plain_head
from pipeline.rl.forwards import Cut, Reading, precision, sweep, token_logprobs
from pipeline.rl.prompts import PromptReader
from pipeline.rl.rollouts import Rollout, concatenate, rollout_of
from pipeline.rl.scoring import Responses
from pipeline.runtime import Runtime

BATCH = 256
"""Answers written side by side."""


@dataclass(frozen=True)
class Speaker:
    """A language model and how it is asked. Answers are sampled at temperature 1 from the whole distribution."""

    model: Any
    tokenizer: Any
    stop_id: int
    pad_id: int
    longest: int
    """Tokens of an answer at most."""
    runtime: Runtime

    @classmethod
    def load(cls, artifact: Artifact, longest: int, runtime: Runtime) -> Speaker:
        """The model of an artifact, on the runtime's device."""
        tokenizer = load_tokenizer(artifact.model)
        stop = stop_token_id(tokenizer)
        pad = stop if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        model = load_causal_lm(artifact.model).to(runtime.device).eval()
        return cls(model, tokenizer, stop, pad, longest, runtime)

    def prompts(self, rows: list[dict[str, Any]], count: int, longest: int | None) -> list[dict[str, Any]]:
        """`count` of the rows, shuffled; those whose prompt has more than `longest` tokens are left out."""
        reader = PromptReader(
            encode=lambda row: encode_prompt(self.tokenizer, row["prompt"]),
            longest=longest,
            room=None,
            generator=self.runtime.generator,
        )
        taken = reader.take(rows, count, "prompts")
        return [taken.rows[row] for row in taken.order]

    def say(self, rows: Sequence[dict[str, Any]], generator: torch.Generator) -> Responses:
        """An answer to the prompt of each row, in their order; its own log-probs are in the rollout's `sampled_BT`."""
        uniforms_BT = draw_uniforms(len(rows), self.longest, generator)
        parts: list[Rollout] = []
        with self.runtime.progress("answer", len(rows), "answers") as bar:
            for start in range(0, len(rows), BATCH):
                here = slice(start, start + BATCH)
                prompts = [encode_prompt(self.tokenizer, row["prompt"]) for row in rows[here]]
                with precision(self.runtime.device, self.runtime.bf16):
                    written = generate(
                        self.model,
                        prompts,
                        max_new_tokens=self.longest,
                        stop_ids=[self.stop_id],
                        pad_id=self.pad_id,
                        sampling=Sampling(temperature=1.0),
                        uniforms_BT=uniforms_BT[here],
                        batch_size=BATCH,
                    )
                part = rollout_of(prompts, written, self.pad_id, self.model.device, stop_id=self.stop_id)
                parts.append(part)
                bar.advance(len(prompts))
                self.runtime.check_stop()
        return Responses(concatenate(parts, self.pad_id), list(rows), self.tokenizer)

    def logprobs(self, rollout: Rollout) -> Tensor:
        """log p of each whole answer, in nats, by a forward over it. Float64 [B]."""
        reading = Reading(1.0, has_plain_head(self.model))
        with precision(self.runtime.device, self.runtime.bf16):
            (logprobs_BT,) = sweep(rollout, Cut(BATCH), 1, lambda part: (token_logprobs(self.model, part, reading),))
        return logprobs_BT.double().sum(dim=1).cpu()
