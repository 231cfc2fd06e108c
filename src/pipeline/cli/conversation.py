"""A model that is talked to: what was said so far, the answer piece by piece, and how long that took."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.artifacts import Artifact
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from pipeline.model.generation import Sampling
    from pipeline.model.heard import Heard


def say(text: str, end: str = "\n") -> None:
    """On stderr."""
    print(text, file=sys.stderr, end=end, flush=True)


@dataclass(frozen=True)
class Said:
    """An answer and its figures."""

    text: str
    tokens: int
    """Without the stop token."""
    is_ended: bool
    """Whether the model stopped by itself."""
    first_seconds: float | None
    """From the question to the first token; None where none came."""
    seconds: float


@dataclass
class Conversation:
    """A model and what has been said so far, the system message left out."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    is_chat: bool
    stop_ids: list[int]
    context: int
    system: str | None
    sampling: Sampling
    max_new_tokens: int
    seed: int
    heard: Heard
    """What the model has read of it."""
    load_seconds: float = 0.0
    """Imports of a fresh process included."""
    encode_seconds: float = 0.0
    """Of the last question."""
    messages: list[dict[str, str]] = field(default_factory=list)
    turn: int = 0
    said: Said | None = None
    """The last answer."""

    def reply(self, text: str, ids: list[int]) -> Generator[str]:
        """The answer to `text`, whose tokens `encode` gave, in pieces. What was written is remembered, however it
        ended: close the iterator where you leave it early."""
        start, first = time.perf_counter() - self.encode_seconds, None
        tokens: list[int] = []
        written: list[str] = []
        is_ended = False

        def counted() -> Iterator[int]:
            nonlocal first
            for token in self.stream(ids):
                first = first or time.perf_counter() - start
                tokens.append(token)
                yield token

        try:
            for piece in pieces(self.tokenizer, counted()):
                written.append(piece)
                yield piece
            is_ended = len(tokens) < self.room(ids)
        finally:
            self.turn += 1
            answer = "".join(written)
            self.said = Said(answer, len(tokens), is_ended, first, time.perf_counter() - start)
            if self.is_chat:
                self.messages.append({"role": "user", "content": text})
                self.messages.append({"role": "assistant", "content": answer})

    def forget(self) -> None:
        """Begin anew: the next answer is what it would be in a fresh process, to the last bit."""
        from pipeline.model.heard import Heard

        self.messages, self.heard = [], Heard()

    def room(self, ids: list[int]) -> int:
        """Tokens that an answer may have."""
        return min(self.max_new_tokens, self.context - len(ids))

    def encode(self, text: str) -> list[int]:
        """The prompt as tokens; the oldest turns are forgotten where they leave less than half the context."""
        from pipeline.data.chat import encode_prompt
        from pipeline.data.tokenizers import encode_text

        start = time.perf_counter()
        if not self.is_chat:
            bos = self.tokenizer.bos_token_id
            ids = [*([] if bos is None else [bos]), *encode_text(self.tokenizer, text)]
        else:
            head = [{"role": "system", "content": self.system}] if self.system else []
            question = {"role": "user", "content": text}
            kept = self.messages
            ids = encode_prompt(self.tokenizer, [*head, *kept, question])
            while len(ids) > self.context // 2 and kept:
                kept = kept[2:]
                ids = encode_prompt(self.tokenizer, [*head, *kept, question])
            if len(ids) < self.context:
                self.messages = kept
        if len(ids) >= self.context:
            what = f"the text has {len(ids):,} tokens, and the model reads {self.context:,}"
            raise ConfigError(what, where=self.name, mend="a shorter text")
        self.encode_seconds = time.perf_counter() - start
        return ids

    def stream(self, ids: list[int]) -> Iterator[int]:
        """The tokens of the answer, one by one, without the stop token."""
        import torch

        from pipeline.model.generation import draw_uniforms, stream
        from pipeline.runtime import derive_seed

        steps = self.room(ids)
        uniforms = None
        if self.sampling.temperature > 0:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "chat", self.turn))
            uniforms = draw_uniforms(1, steps, generator)[0].to(self.model.device)
        return stream(
            self.model,
            ids,
            max_new_tokens=steps,
            stop_ids=self.stop_ids,
            sampling=self.sampling,
            uniforms_T=uniforms,
            heard=self.heard,
        )


def pieces(tokenizer: PreTrainedTokenizerFast, ids: Iterator[int]) -> Iterator[str]:
    """Text as it becomes whole: a character whose bytes are spread over tokens waits for its last one.

    Bytes that never become a character are written as U+FFFD once that is certain.
    """
    from tokenizers.decoders import DecodeStream

    decoder = DecodeStream(skip_special_tokens=False)
    seen: list[int] = []
    shown = 0
    for token in ids:
        seen.append(token)
        piece = decoder.step(tokenizer.backend_tokenizer, token)
        if piece:
            shown += len(piece)
            yield piece
    rest = tokenizer.backend_tokenizer.decode(seen, skip_special_tokens=False)[shown:]
    if rest:
        yield rest


def best_device() -> torch.device:
    """CUDA, else MPS, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def load(
    artifact: Artifact | Path, name: str, system: str | None, temperature: float, max_new_tokens: int, seed: int
) -> Conversation:
    """The model on the best device that is there, ready to answer; of a Path, that of an unfinished stage's newest
    checkpoint. ConfigError for what is no language model."""
    if isinstance(artifact, Artifact) and artifact.kind != "causal-lm":
        raise ConfigError(
            f"{artifact.kind} is no kind that can talk", where=artifact.reference, mend="llmpipe status lists models"
        )
    start = time.perf_counter()
    import torch
    from transformers.utils import logging

    from pipeline.data.chat import stop_token_id
    from pipeline.data.tokenizers import load_tokenizer
    from pipeline.evals.subject import is_chat
    from pipeline.model.build import load_causal_lm, reach_of
    from pipeline.model.generation import Sampling
    from pipeline.model.heard import Heard
    from pipeline.model.unfinished import load_unfinished
    from pipeline.runtime import bf16_pays

    logging.disable_progress_bar()
    device = best_device()
    dtype = torch.bfloat16 if bf16_pays(device) else torch.float32
    if isinstance(artifact, Artifact):
        folder, model = artifact.model, load_causal_lm(artifact.model, dtype=dtype)
    else:
        model, folder, step = load_unfinished(artifact, dtype)
        say(f"the stage has not finished: this is its model at step {step:,}")
    tokenizer = load_tokenizer(folder)
    chat = is_chat(folder, tokenizer)
    eos = model.generation_config.eos_token_id
    stops = {*(eos if isinstance(eos, list) else [eos] if eos is not None else [])}
    if chat:
        stops.add(stop_token_id(tokenizer))
    context = reach_of(model.config) or tokenizer.model_max_length
    return Conversation(
        name,
        model.to(device).eval(),
        tokenizer,
        chat,
        sorted(stops),
        context,
        system,
        Sampling(temperature=temperature),
        max_new_tokens,
        seed,
        Heard(),
        load_seconds=time.perf_counter() - start,
    )
