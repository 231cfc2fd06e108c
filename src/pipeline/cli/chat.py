"""`llmpipe chat REF [REF]`: talk to a model, or to two side by side. Answers stream on stdout, everything else goes to
stderr.

With a prompt, or text on stdin, it answers once and ends; on a terminal it goes on until `/quit` or the end of input.
Two models answer in columns on a terminal, elsewhere one after the other behind their names. A base model has not
learnt to answer: it is told so, and continues the text.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.artifacts import Artifact
from pipeline.cli.columns import legible
from pipeline.cli.conversation import Conversation, load, say
from pipeline.errors import ConfigError, PipelineError
from pipeline.reading import meant

COMMANDS = {
    "/help": "these lines",
    "/reset": "forget what was said",
    "/system": "/system TEXT: the system message from here on; alone, none",
    "/temperature": "/temperature 0.7; 0 is greedy",
    "/quit": "end (/exit and the end of input too)",
}
COMMAND = re.compile(r"/[a-z]+")
LEAST_TEMPERATURE = 1e-3
TEMPERATURES = f"0 is greedy; else a number from {LEAST_TEMPERATURE} on"


def chat(
    models: Sequence[tuple[str, Artifact | Path]],
    *,
    prompt: str | None,
    system: str | None,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    as_json: bool,
) -> None:
    """Answer `prompt`, else what is piped in, else whoever sits at the terminal. `models`: (reference, what it is).

    temperature 0 is greedy. Raises ConfigError for what is no language model and for an empty prompt.
    """
    if not is_temperature(temperature):
        raise ConfigError(f"no temperature: {temperature:g}", where="--temperature", mend=TEMPERATURES)
    if len(models) > 2:
        raise ConfigError("one model to talk to, or two side by side", mend="llmpipe eval compares more of them")
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read()
    if prompt is None and as_json:
        raise ConfigError("--json is for one answer, not for a conversation", mend="-p, or a prompt on stdin")
    if prompt is not None and not prompt.strip():
        raise ConfigError(
            "nothing to answer: the prompt is empty", mend='llmpipe chat REF -p "What does `json.loads` do?"'
        )
    with tempfile.TemporaryDirectory() as made:  # for adapters, merged: loaded they need no folder
        ready = [(name, plain(found, Path(made) / str(place))) for place, (name, found) in enumerate(models)]
        conversations = [load(found, name, system, temperature, max_new_tokens, seed) for name, found in ready]
    for each in conversations:
        if not each.is_chat:
            say(f"{each.name} is a base model: it was not taught to answer, so it continues the text")
            if system is not None:
                raise ConfigError("a base model takes no system message", where=each.name, mend="drop --system")
    if prompt is None:
        converse(conversations)
    elif as_json:
        print(json.dumps(answered(conversations, prompt.rstrip("\n")), indent=1, ensure_ascii=False))
    else:
        answer(conversations, prompt.rstrip("\n"))


def plain(found: Artifact | Path, folder: Path) -> Artifact | Path:
    """The model; of an adapter, what it and its base are merged into `folder`."""
    if isinstance(found, Path) or found.adapter is None:
        return found
    from pipeline.model.merging import merge

    return merge(found, folder)


def is_temperature(value: float) -> bool:
    """0, or a number that logits can be divided by."""
    return value == 0 or LEAST_TEMPERATURE <= value < float("inf")


def write(text: str) -> None:
    """On stdout, at once; on a terminal without what would drive it."""
    sys.stdout.write(legible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def answer(conversations: Sequence[Conversation], text: str) -> None:
    """Stream the answers to `text`. Raises ConfigError, before anything is written, where it is too long for one."""
    encoded = [each.encode(text) for each in conversations]
    is_wide = len(conversations) > 1 and sys.stdout.isatty()
    replies = [each.reply(text, ids) for each, ids in zip(conversations, encoded, strict=True)]
    if is_wide:
        from pipeline.cli.columns import side_by_side

        side_by_side([each.name for each in conversations], replies)
        return
    for each, reply in zip(conversations, replies, strict=True):
        if len(conversations) > 1:
            write(("" if each is conversations[0] else "\n") + f"{each.name}:\n")
        with contextlib.closing(reply):
            for piece in reply:
                write(piece)
        write("\n")


def answered(conversations: Sequence[Conversation], text: str) -> dict[str, object]:
    """The answers to `text` with their figures, one model after the other."""
    encoded = [each.encode(text) for each in conversations]
    found = []
    for each, ids in zip(conversations, encoded, strict=True):
        for _ in each.reply(text, ids):
            pass
        assert each.said is not None
        figures = {
            "model": each.name,
            "answer": each.said.text,
            "tokens": each.said.tokens,
            "ended": each.said.is_ended,
            "load_seconds": round(each.load_seconds, 3),
            "first_token_seconds": None if each.said.first_seconds is None else round(each.said.first_seconds, 3),
            "seconds": round(each.said.seconds, 3),
        }
        found.append(figures)
    first = conversations[0]
    asked = {"prompt": text, "system": first.system, "temperature": first.sampling.temperature, "seed": first.seed}
    return {**asked, "answers": found}


def converse(conversations: Sequence[Conversation]) -> None:
    """Turn by turn, until `/quit` or the end of input. Ctrl-C ends an answer, or the conversation between answers."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing for input()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it ends an answer, or the conversation at the prompt
    for each in conversations:
        say(f"{each.name}   loaded in {each.load_seconds:.1f} s")
    say("/help lists the commands, /quit ends")
    while True:
        say("> ", end="")
        try:
            text = input()
        except (EOFError, KeyboardInterrupt):
            say("")
            return
        word, _, rest = text.strip().partition(" ")
        if word in ("/quit", "/exit"):
            return
        if COMMAND.fullmatch(word) and not text.startswith(" "):
            command(conversations, word, rest.strip())
        elif text.strip():
            try:
                answer(conversations, text)
            except KeyboardInterrupt:
                say(" …", end="")
                write("\n")
            except PipelineError as error:
                say(str(error))


def command(conversations: Sequence[Conversation], word: str, rest: str) -> None:
    """Do what a line that begins with `/` says, and say what came of it."""
    if word == "/help":
        for name, does in COMMANDS.items():
            say(f"{name:<14}{does}")
        say("a line that begins with a space is never a command")
    elif word == "/reset":
        for each in conversations:
            each.forget()
        say("forgotten")
    elif word == "/system":
        bases = [each.name for each in conversations if not each.is_chat]
        if bases:
            say(f"{', '.join(bases)}: a base model takes no system message")
            return
        for each in conversations:
            each.system = rest or None
        say("system message set; /reset to begin anew with it" if rest else "no system message")
    elif word == "/temperature":
        set_temperature(conversations, rest)
    else:
        say(f"no command {word}{meant(word, COMMANDS)}; /help lists them, and a space before it sends it as text")


def set_temperature(conversations: Sequence[Conversation], given: str) -> None:
    """The temperature of the answers to come; what is none changes nothing."""
    try:
        value = float(given)
    except ValueError:
        value = -1.0
    if not is_temperature(value):
        say(f"temperature {conversations[0].sampling.temperature:g}; {TEMPERATURES}")
        return
    for each in conversations:
        each.sampling = replace(each.sampling, temperature=value)
    say(f"temperature {value:g}")
