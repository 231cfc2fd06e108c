"""`llmpipe chat`: talk to a model. Answers stream on stdout, everything else goes to stderr.

With a prompt, or text on stdin, it answers once and ends; on a terminal it goes on until `/exit` or the end of input.
A base model has not learnt to answer: it is told so, and continues the text.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.artifacts import Artifact
from pipeline.errors import ConfigError, PipelineError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from pipeline.model.generation import Sampling


def chat(
    artifact: Artifact | Path,
    *,
    reference: str,
    prompt: str | None,
    system: str | None,
    temperature: float,
    max_new_tokens: int,
    seed: int,
) -> None:
    """Answer `prompt`, else what is piped in, else whoever sits at the terminal.

    temperature 0 is greedy. Raises ConfigError for what is no language model and for an empty prompt.
    """
    if temperature < 0 or max_new_tokens < 1:
        raise ConfigError("temperature is at least 0, and max_new_tokens at least 1")
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read()
    if prompt is not None and not prompt.strip():
        raise ConfigError(
            "nothing to answer: the prompt is empty", mend='llmpipe chat REF -p "What does `json.loads` do?"'
        )
    conversation = load(artifact, system, temperature, max_new_tokens, seed)
    if not conversation.is_chat:
        say(f"{reference} is a base model: it was not taught to answer, so it continues the text")
        if system is not None:
            raise ConfigError("a base model takes no system message", where=reference, mend="drop --system")
    if prompt is not None:
        conversation.reply(prompt.rstrip("\n"), write)
        write("\n")
    else:
        converse(conversation, reference)


def write(text: str) -> None:
    """On stdout, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def say(text: str, end: str = "\n") -> None:
    """On stderr."""
    print(text, file=sys.stderr, end=end, flush=True)


def converse(conversation: Conversation, reference: str) -> None:
    """Turn by turn, until `/exit` or the end of input. Ctrl-C ends an answer, or the conversation between answers."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing for input()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it ends an answer, or the conversation at the prompt
    say(f"{reference}   /reset forgets what was said, /exit ends")
    while True:
        say("> ", end="")
        try:
            text = input()
        except (EOFError, KeyboardInterrupt):
            say("")
            return
        if text.strip() == "/exit":
            return
        if text.strip() == "/reset":
            conversation.messages.clear()
            say("forgotten")
        elif text.strip():
            try:
                conversation.reply(text, write)
            except KeyboardInterrupt:
                say(" …", end="")
            except PipelineError as error:
                say(str(error), end="")
            write("\n")


@dataclass
class Conversation:
    """A model and what has been said so far, the system message left out."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    is_chat: bool
    stop_ids: list[int]
    context: int
    system: str | None
    sampling: Sampling
    max_new_tokens: int
    seed: int
    messages: list[dict[str, str]] = field(default_factory=list)
    turn: int = 0

    def reply(self, text: str, write: Callable[[str], None]) -> None:
        """Stream the answer to `text` through `write`; what was written is remembered, however it ended."""
        ids = self.encode(text)
        written: list[str] = []
        try:
            for piece in pieces(self.tokenizer, self.stream(ids)):
                written.append(piece)
                write(piece)
        finally:
            self.turn += 1
            if self.is_chat:
                self.messages.append({"role": "user", "content": text})
                self.messages.append({"role": "assistant", "content": "".join(written)})

    def encode(self, text: str) -> list[int]:
        """The prompt as tokens; the oldest turns are forgotten where they leave less than half the context."""
        from pipeline.data.chat import encode_prompt
        from pipeline.data.tokenizers import encode_text

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
            raise ConfigError(what, mend="a shorter text")
        return ids

    def stream(self, ids: list[int]) -> Iterator[int]:
        """The tokens of the answer, one by one, without the stop token."""
        import torch

        from pipeline.model.generation import draw_uniforms, stream
        from pipeline.runtime import derive_seed

        steps = min(self.max_new_tokens, self.context - len(ids))
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
    artifact: Artifact | Path, system: str | None, temperature: float, max_new_tokens: int, seed: int
) -> Conversation:
    """The model on the best device that is there, ready to answer; of a Path, that of an unfinished stage's newest
    checkpoint. ConfigError for what is no language model."""
    if isinstance(artifact, Artifact) and artifact.kind != "causal-lm":
        raise ConfigError(
            f"{artifact.kind} is no kind that can talk", where=artifact.reference, mend="llmpipe status lists models"
        )
    import torch
    from transformers.utils import logging

    from pipeline.data.chat import stop_token_id
    from pipeline.data.tokenizers import load_tokenizer
    from pipeline.evals.subject import is_chat
    from pipeline.model.build import load_causal_lm, reach_of
    from pipeline.model.generation import Sampling
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
        model.to(device).eval(),
        tokenizer,
        chat,
        sorted(stops),
        context,
        system,
        Sampling(temperature=temperature),
        max_new_tokens,
        seed,
    )
