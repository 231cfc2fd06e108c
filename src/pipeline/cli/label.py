"""`llmpipe label REF [REF]`: a person says which of two answers is better, blind, and the labels become an artifact.

A reference is a language model, which first answers some prompts (a sample stage), or an artifact of rows that holds
answers already. Which pair is shown and which side is left is drawn by the seed. Every label is on disk before the next
pair is shown, so that the same command goes on wherever it was left; at the end a label stage makes rows of them.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.artifacts import Store
from pipeline.cli.run import run_graph
from pipeline.cli.sample import Stages, refuse_another_model, run_of, sample_fields, short
from pipeline.cli.session import open_stages
from pipeline.data.answers import Answers, pairs_of, read_answers
from pipeline.data.labels import CHANCES, Label, append_label, key_of, mend_end, read_labels
from pipeline.data.messages import Message
from pipeline.errors import ConfigError
from pipeline.launch import Launch
from pipeline.recipe import NAME, DataEntry
from pipeline.roles import ROWS, rows_of

LEFT, RIGHT = "\x1b[D", "\x1b[C"  # arrows, as terminals send them
KEYS: dict[str, Label] = {
    **dict.fromkeys(("1", "l", LEFT), "left"),
    **dict.fromkeys(("2", "r", RIGHT), "right"),
    **dict.fromkeys(("=", "t"), "tie"),
    "s": "skip",
}
BACK, QUIT = "b", "q"
HELP = "1 or ←: left   2 or →: right   =: tie   s: skip   b: back   q: end, to go on later"


@dataclass(frozen=True)
class Asked:
    """A pair as it is shown."""

    prompt: list[Message]
    left: str
    right: str


def label_references(
    references: Sequence[str],
    store: Store,
    *,
    data: Sequence[str],
    fields: Mapping[str, Any],
    pairs: Literal["one", "all"],
    seed: int,
    labels: Path | None,
    run: str | None,
    name: str | None,
    overrides: Sequence[str] = (),
    launch: Launch,
    as_json: bool,
) -> None:
    """Show the pairs that are not labelled yet, one after another; then make rows of all labels.

    `fields` are the sample stage's for models, as `overrides` and `LLMPIPE_SET` are. ConfigError where there
    is nothing to compare, or nothing that takes the overrides.
    """
    run, name = run or run_of(references[0]), name or label_name(references)
    for option, given in (("--as", name), ("--run", run)):
        if not NAME.fullmatch(given):
            what = f"{given!r} is no name: letters, digits, '.', '_' and '-', at most 64, a letter or digit first"
            raise ConfigError(what, where=option, mend=f"{option} and such a name")
    stages = _sampling(references, store, data, dict(fields), seed)
    sources = [each if each in stages else str(_rows_in(store, ref)) for ref, each in _named(references, stages)]
    sampled = dict.fromkeys(stages, overrides)
    if overrides and not sampled:
        mend = "leave it out; the fields of label are set in a recipe"
        raise ConfigError("it is of the answers, and these are there already", where=f"--set {overrides[0]}", mend=mend)
    if stages:
        session = open_stages(stages, run=run, store=store, named=f"{run}/{name}", overrides=sampled, launch=launch)
        refuse_another_model(session)
        run_graph(session, until=None, keep=[], force=False, dry_run=False, as_json=False, closes=False)
    files = [str(rows_of(store, run, each)) if each in stages else each for each in sources]
    groups = read_answers([DataEntry(source=file) for file in files])
    path = labels or store.folder(run, name).with_name(f"{name}.labels.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    mend_end(path)
    said = converse(_asked(groups, pairs, seed), path)
    if not any(label in CHANCES for label in said.values()):
        say("nothing is labelled yet: no artifact")
        return
    stages[name] = {"stage": "label", "data": sources, "labels": str(path), "pairs": pairs, "seed": seed, "init": None}
    session = open_stages(
        stages, run=run, store=store, named=f"{run}/{name}", overrides=sampled, launch=Launch(1, quiet=launch.quiet)
    )
    run_graph(session, until=None, keep=[], force=False, dry_run=False, as_json=as_json)


def label_name(references: Sequence[str]) -> str:
    """The artifact's name unless one is given: what is compared, each part cut where it would be too long."""
    whole = f"{'-'.join(map(short, references))}-label"
    return whole if len(whole) <= 64 else f"{'-'.join(short(each, 28) for each in references)}-label"


def _sampling(
    references: Sequence[str], store: Store, data: Sequence[str], fields: dict[str, Any], seed: int
) -> Stages:
    """A sample stage for every reference that is a model: one answer to each prompt, of a model alone two. All answer
    the same prompts, those of the first unless `data` names others."""
    stages: Stages = {}
    for place, reference in enumerate(references):
        if store.resolve(reference).kind != "rows":
            count = 2 if len(references) == 1 else 1
            own = sample_fields(reference, store, data) | {"num_generations": count, "seed": seed}
            stages[f"{short(reference)}-{place + 1}-answers"] = own | fields
            data = own["data"]
    return stages


def _named(references: Sequence[str], stages: Stages) -> list[tuple[str, str]]:
    """Each reference with the name that its sample stage would have."""
    return [(reference, f"{short(reference)}-{place + 1}-answers") for place, reference in enumerate(references)]


def _rows_in(store: Store, reference: str) -> Path:
    return store.resolve(reference).path / ROWS


def _asked(groups: Sequence[Answers], pairs: Literal["one", "all"], seed: int) -> list[Asked]:
    return [
        Asked(group.prompt, group.texts[a], group.texts[b])
        for number, group in enumerate(groups)
        for a, b in pairs_of(group, number, pairs, seed)
    ]


def converse(asked: Sequence[Asked], path: Path) -> dict[Any, Label]:
    """Show what is not in the file yet until all is labelled, `q`, Ctrl-C or the end of input. Returns all labels."""
    said = read_labels(path) if path.exists() else {}
    keys = [key_of(each.prompt, each.left, each.right) for each in asked]
    strange = said.keys() - set(keys)
    if strange:  # the stage that makes rows of them would refuse them, once all is labelled
        raise ConfigError(
            f"{len(strange)} of its {len(said)} labels are of other pairs than these",
            where=str(path),
            mend="--labels another.jsonl, or the --seed, --data and --pairs that they were made with",
        )
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        place = _next(keys, said, 0)
        while place < len(asked):
            show(asked[place], sum(key in said for key in keys) + 1, len(asked))
            key = read_key()
            if key == QUIT:
                break
            if key == BACK:
                place = max(0, place - 1)
                continue
            label = KEYS.get(key)
            if label is None:
                say(f"{key!r} is no key.   {HELP}")
                continue
            append_label(path, asked[place].prompt, asked[place].left, asked[place].right, label)
            said[keys[place]] = label
            place = _next(keys, said, place + 1)
    except KeyboardInterrupt:
        say("")
    finally:
        signal.signal(signal.SIGINT, before)
    done = sum(key in said for key in keys)
    say(f"{done} of {len(asked)} labelled; they are in {path}" + ("" if done == len(asked) else ", to go on later"))
    return {key: said[key] for key in keys if key in said}


def _next(keys: Sequence[Any], said: Mapping[Any, Label], start: int) -> int:
    """The first place from `start` on, then from the beginning, that is not labelled; the end where all are."""
    order = [*range(start, len(keys)), *range(start)]
    return next((place for place in order if keys[place] not in said), len(keys))


def say(text: str) -> None:
    """On stderr."""
    print(text, file=sys.stderr, flush=True)


def show(asked: Asked, number: int, count: int) -> None:
    """The prompt and two answers side by side, on stderr; nothing of a text is taken for a control of the terminal."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    console = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 120)
    lines = [f"{message['role']}: {message['content']}" for message in asked.prompt]
    table = Table.grid(expand=True)
    for _ in range(2):
        table.add_column(ratio=1)
    table.add_row(*(Panel(Text(plain(text)), title=side) for side, text in (("1", asked.left), ("2", asked.right))))
    console.rule(f"{number} of {count}")
    console.print(Text(plain("\n".join(lines)), style="bold"))
    console.print(table)
    console.print(Text(HELP, style="dim"))


def plain(text: str) -> str:
    """`text` with what would steer a terminal as a dot."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "·" for letter in text)


def read_key() -> str:
    """A key without Enter on a terminal, else the first letter of a line; `q` at the end of input."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return (line.strip()[:1] or " ") if line else QUIT
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor, termios.TCSANOW)  # what was typed ahead stays
        pressed = os.read(descriptor, 1)
        if pressed == b"\x1b" and select.select([descriptor], [], [], 0.05)[0]:
            pressed += os.read(descriptor, 2)
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
    return QUIT if pressed in (b"", b"\x04") else pressed.decode(errors="replace")
