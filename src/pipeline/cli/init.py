"""`llmpipe init`: look at the data and the hardware, and write a recipe that fits both.

Stages stand in it for what there is data for. Sizes come from `sizes.py`; what a stage costs is what `llmpipe plan`
says of it with a hundred steps, and its steps are then those that its share of the hours pays for.
"""

from __future__ import annotations

import json
import math
import shlex
import sys

from pipeline.artifacts import Store
from pipeline.cli import sizes
from pipeline.cli.init_recipe import DEFAULT_OUT, Asked, Found, Stages, left_over, render
from pipeline.cli.init_sizing import size
from pipeline.cli.outputs import check_out, make_parent
from pipeline.cli.session import open_session
from pipeline.errors import ConfigError, DataError, MissingInputError
from pipeline.hashes import template_hash


def init(asked: Asked, *, force: bool, as_json: bool) -> None:
    """Write the recipe and print its plan. Raises ConfigError where it is there already, and for nothing to learn from;
    DataError with file and line for data that cannot be read."""
    _check(asked, force)
    found = look(asked)
    for line in describe(asked, found):
        print(line, file=sys.stderr)
    stages = _stages(asked, found)
    probe = size(stages, asked, found)
    text = render(stages, asked.run, _head(asked, found), asked.out)
    make_parent(asked.out)
    asked.out.write_text(text, encoding="utf-8")
    session = open_session(str(asked.out), artifacts=asked.artifacts)
    if as_json:
        fields = {"recipe": str(asked.out), "run": asked.run, "stages": stages.values}
        print(json.dumps({**fields, "looked_at": describe(asked, found)}, indent=1))
        return
    from pipeline.cli.plan import show_plan

    told = found.bytes_a_token
    show_plan(session, budget=None, price=2.5, on=None, fit=[], as_json=False, probe=probe, bytes_a_token=told)
    print(f"wrote {asked.out}\nnext: llmpipe run {shlex.quote(str(asked.out))}")


def _check(asked: Asked, force: bool) -> None:
    example = "llmpipe init --data ./texts --chats ./chats.jsonl --preferences ./preferences.jsonl --hours 2"
    if asked.data is None and asked.base is None:
        raise ConfigError("nothing to start from: neither --data nor --base", mend=example)
    if asked.data is None and asked.chats is None and asked.preferences is None:
        raise ConfigError("nothing to teach the base: no --data, --chats or --preferences", mend=example)
    if not (asked.hours > 0 and math.isfinite(asked.hours)):
        raise ConfigError(f"--hours {asked.hours:g}: a number above 0", mend="--hours 0.5 is half an hour")
    for flag, path in (("--data", asked.data), ("--chats", asked.chats), ("--preferences", asked.preferences)):
        if path is not None and not path.exists():
            raise MissingInputError("nothing there", where=f"{flag} {path}", mend=f"{flag} with {_wanted(flag)}")
    check_out(asked.out, name=DEFAULT_OUT)
    if asked.out.exists() and not force:
        raise ConfigError("there is a recipe already", where=str(asked.out), mend="--force, or --out with a new name")


def _wanted(flag: str) -> str:
    return "a folder or a file of text" if flag == "--data" else "a file of rows (docs/data.md has their formats)"


def look(asked: Asked) -> Found:
    """Read the data and the base's config. Raises as `init` does."""
    from pipeline.data.looking import SAMPLE_BYTES, look_at_rows, look_at_text, try_tokenizer
    from pipeline.data.tokenizers import SMALLEST_VOCAB, encode_text, load_tokenizer
    from pipeline.plan.lengths import BYTES_A_TOKEN

    chats = look_at_rows(str(asked.chats), "messages") if asked.chats else None
    preferences = look_at_rows(str(asked.preferences), "preference") if asked.preferences else None
    rows = [path for path in (asked.chats, asked.preferences) if path is not None]
    sources = list(left_over(asked.data, rows)) if asked.data else []
    if asked.data and not sources:
        raise ConfigError("nothing in it but the rows", where=f"--data {asked.data}", mend="a folder with text")
    text = look_at_text(sources) if sources else None
    base = Store(asked.artifacts).resolve(asked.base) if asked.base else None
    if base is not None and base.kind != "causal-lm":
        raise ConfigError(f"a {base.kind}, and a language model is needed", where=f"--base {asked.base}")
    vocab = sizes.vocabulary(text.bytes) if text else 0
    if base is not None:
        tokenizer = load_tokenizer(base.model)
        sample = [part[:5000] for part in text.sample[:100]] if text else []
        tokens = sum(len(encode_text(tokenizer, part)) for part in sample)
        each = sum(len(part.encode()) for part in sample) / tokens if tokens else BYTES_A_TOKEN
        return Found(sources, text, chats, preferences, base, each, len(tokenizer))
    assert text is not None
    each, made = try_tokenizer(text.sample, vocab)
    if text.bytes < SAMPLE_BYTES:  # else the sample says nothing of how many the whole text makes
        short = max(SMALLEST_VOCAB, int(0.95 * made))  # a part of the text is held out
        vocab = vocab if made >= vocab else short
    return Found(sources, text, chats, preferences, None, each, vocab)


def describe(asked: Asked, found: Found) -> list[str]:
    """What was looked at, a line each."""
    from pipeline.plan.lengths import si

    lines = []
    if found.text is not None:
        text = found.text
        size = f"{si(text.bytes)}B" if text.bytes >= 1000 else f"{text.bytes:.0f} bytes"
        about = "about " if text.is_guessed else ""
        files = ", ".join(f"{count:,} {suffix or 'nameless'}" for suffix, count in text.kinds.items())
        scripts = ", ".join(f"{name} {share:.0%}" for name, share in text.scripts.items() if share >= 0.005)
        documents = "document" if text.documents == 1 else "documents"
        read = f"{text.documents:,} {'read of more' if text.is_guessed else documents}"
        lines.append(f"text: {about}{size} in {files} ({read}); letters: {scripts or 'none'}")
        lines.append(
            f"about {found.bytes_a_token:.2f} bytes a token of {found.vocab:,}: "
            f"{si(text.bytes / found.bytes_a_token)} tokens"
        )
    for flag, rows in (("chats", found.chats), ("preferences", found.preferences)):
        if rows is not None:
            lengths = sizes.quantile([a + b for a, b in zip(rows.prompts, rows.answers, strict=True)], 0.5)
            lines.append(f"{flag}: {rows.count:,} {rows.format} rows, half of them up to {lengths:,} bytes")
    if found.base is not None:
        lines.append(f"base: {asked.base}")
    return lines


def _head(asked: Asked, found: Found) -> list[str]:
    return [
        f"Written by llmpipe init for about {asked.hours:g} h of work on the machine it was written on.",
        "Change what you like: `llmpipe plan` says what it then takes, `llmpipe config show` has every field.",
        "",
        *describe(asked, found),
    ]


def _stages(asked: Asked, found: Found) -> Stages:
    """The stages that there is data for, but for their sizes."""
    stages = Stages()
    start = asked.base if found.text is None and asked.base is not None else "pretrain"
    if found.text is not None:
        stages.set("tokenize", "data", found.sources)
        if found.text.text_field != "text":
            entries = [{"source": source, "text_field": found.text.text_field} for source in found.sources]
            stages.set("tokenize", "data", entries)
        stages.values["pretrain"] = {}
        if asked.base is not None:
            stages.set("tokenize", "tokenizer", asked.base, "the base's own tokens")
            stages.set("pretrain", "init", asked.base, "goes on from the base; its rate is a tenth of a new model's")
    held = sizes.held_out_share([rows.shares for rows in (found.chats, found.preferences) if rows])
    trained = _trained_on_rows(asked, found, stages, start)
    for name in trained:
        stages.set(name, "held_out", held, "of the rows, by their prompts: the same ones in every stage")
    _check_held_out(asked, found, held)
    _add_eval(asked, found, stages, trained, start, held)
    return stages


def _trained_on_rows(asked: Asked, found: Found, stages: Stages, start: str) -> list[str]:
    """Add sft, reward, dpo and ppo as far as there are rows for them; their names."""
    names = []
    if found.chats is not None:
        stages.set("sft", "init", start)
        stages.set("sft", "data", [str(asked.chats)])
        if found.text is None and found.base is not None and not template_hash(found.base.model):
            stages.set("sft", "chat_template", "chatml", "the base has none of its own")
        names.append("sft")
        start = "sft"
    if found.preferences is None:
        return names
    data = [str(asked.preferences)]
    is_unpaired = found.preferences.format == "unpaired"
    if found.chats is not None and not is_unpaired:  # its zero is the mean over demonstrations
        stages.set("reward", "init", start)
        stages.set("reward", "data", data)
        names.append("reward")
    stages.set("dpo", "init", start)
    stages.set("dpo", "data", data)
    if is_unpaired:
        stages.set("dpo", "objective", "kto", "the rows are lone answers with a label")
    elif start == "pretrain":
        stages.set("dpo", "objective", "orpo", "teaches and prefers at once: there are no chats for an sft")
    names.append("dpo")
    if "reward" in names:
        stages.set("ppo", "init", start)
        stages.set("ppo", "reward", "reward")
        names.append("ppo")
    return names


def _check_held_out(asked: Asked, found: Found, held: float) -> None:
    for path, rows in ((asked.chats, found.chats), (asked.preferences, found.preferences)):
        if rows is not None and not 0 < rows.held(held) < rows.count:
            what = f"{rows.count} rows are too few to hold some out by their prompts"
            raise DataError(what, where=str(path), mend="some dozen rows with different prompts")


def _add_eval(asked: Asked, found: Found, stages: Stages, trained: list[str], start: str, held: float) -> None:
    models = [name for name in ("pretrain", "sft", "dpo", "ppo") if name in stages.values]
    outside = [] if "pretrain" in models else [start]
    stages.set("eval", "models", [*outside, *models])
    if found.text is None:
        stages.set("eval", "tokens", None)
    if "reward" not in trained:
        stages.set("eval", "reward", None)
    if "sft" not in trained:
        stages.set("eval", "baseline", outside[0] if outside and trained else None)
    is_unpaired = found.preferences is not None and found.preferences.format == "unpaired"
    is_pairs = found.preferences is not None and not is_unpaired
    if found.chats is None and is_unpaired:  # else there may be nothing that eval could measure
        stages.set("eval", "data", [str(asked.preferences)], "the prompts, and the desirable answers to them")
    else:
        stages.set("eval", "data", [str(asked.chats)] if found.chats else None)
    stages.set("eval", "preferences", [str(asked.preferences)] if is_pairs else None)
    if trained:
        stages.set("eval", "held_out", held)
