"""`llmpipe blame REF -p "…"`: which stage taught it this? The answer in the stages' colours, the figures, and the
training rows that are nearest.

Where there is no colour (NO_COLOR, a pipe) each run of tokens stands in brackets behind its stage's number.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from pipeline.artifacts import Store
from pipeline.cli.columns import legible
from pipeline.cli.conversation import best_device
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

COLOURS = ("cyan", "yellow", "magenta", "green", "blue", "red")
"""Of the stages, the oldest first; from the beginning again where there are more."""
NONE = "dim"


def blame_answer(
    store: Store,
    reference: str,
    *,
    prompt: str | None,
    system: str | None,
    answer: str | None,
    max_new_tokens: int,
    rows: int,
    keep: bool,
    as_json: bool,
) -> None:
    """Score the answer to `prompt` (what is piped in without one) under every ancestor, and print what came of it.
    `keep`: for the report of the model's run too."""
    if prompt is None:
        if sys.stdin.isatty():
            raise ConfigError("nothing was asked", mend=f'llmpipe blame {reference} -p "What does `json.loads` do?"')
        prompt = sys.stdin.read().rstrip("\n")
    artifact = store.resolve(reference)
    if keep and artifact.path.parent.parent != store.root:
        what = "it belongs to no run of these artifacts, whose report could show it"
        raise ConfigError(what, where=reference, mend="leave out --keep, or name it as run/stage")
    from transformers.utils import logging

    from pipeline.evals.blame import Question, blame

    logging.disable_progress_bar()
    question = Question(prompt, system, answer, max_new_tokens, rows)
    found = blame(artifact, store, question, device=best_device(), say=_say)
    if keep:
        from pipeline.report import blamed

        blamed.keep(artifact.path.parent, found)
    if as_json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        show(found)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def show(found: dict[str, Any]) -> None:
    """The result on stdout, in colours where they show."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    console = console if console.is_terminal else Console(highlight=False, markup=False, width=120)
    plain = console.no_color or console.color_system is None or not console.is_terminal
    console.print(f"{found['model']}, asked in {found['asked_in']}: every model reads the same tokens", style="bold")
    console.print(answer_in_colours(found, plain=plain), soft_wrap=True)
    console.print()
    console.print(totals(found))
    for each in found["left_out"]:
        console.print(f"left out: {each['reference']}: {each['why']}", soft_wrap=True)
    console.print()
    console.print(figures(found))
    for each in found["nearest"]:
        show_rows(console, found, each)
    console.print()
    console.print(found["caution"], style="italic", soft_wrap=True)


def answer_in_colours(found: dict[str, Any], *, plain: bool) -> Text:
    """The answer, each run of tokens in its stage's colour; `plain`: `2[Loads a JSON]1[ string]`, 0 is no stage's."""
    from rich.text import Text

    text = Text()
    tokens = found["tokens"]
    for place, token in enumerate(tokens):
        owner = token["owner"]
        begins = place == 0 or tokens[place - 1]["owner"] != owner
        ends = place + 1 == len(tokens) or tokens[place + 1]["owner"] != owner
        if plain and begins:
            text.append(f"{0 if owner is None else owner + 1}[")
        shown = legible(token["text"]) if token["text"] != "\n" else "⏎\n"
        text.append(shown, style="" if plain else colour(owner))
        text.append("]" if plain and ends else "")
    return text


def colour(owner: int | None) -> str:
    """A stage's colour."""
    return NONE if owner is None else COLOURS[owner % len(COLOURS)]


def totals(found: dict[str, Any]) -> Any:
    """A line a stage: its tokens, the answer's log-probability under it, and what it added to that."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name, justify in (("", "left"), ("stage", "left"), ("tokens", "right"), ("log p", "right"), ("gain", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    count = len(found["tokens"])
    table.add_row("", "uniform guess", "", f"{count * found['start_logprob']:.2f}", "", style="dim")
    for place, stage in enumerate(found["stages"]):
        cells = (str(stage["tokens"]), f"{stage['logprob']:z.2f}", f"{stage['gain']:+z.2f}")
        table.add_row(*map(Text, (str(place + 1), stage["reference"], *cells)), style=colour(place))
    lost = sum(token["owner"] is None for token in found["tokens"])
    if lost:
        table.add_row("0", "no stage raised", str(lost), "", "", style=NONE)
    return table


def figures(found: dict[str, Any]) -> Any:
    """A line a token: its log-probability under each model and, in brackets, what that stage added."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("token")
    for place in range(len(found["stages"])):
        table.add_column(f"{place + 1}: log p (gain)", justify="right")
    for token in found["tokens"]:
        owner = token["owner"]
        pairs = zip(token["logprobs"], token["gains"], strict=True)
        cells = (
            Text(f"{logprob:z.2f} ({gain:+z.2f})", style=colour(owner) if place == owner else "")
            for place, (logprob, gain) in enumerate(pairs)
        )
        name = Text(repr(token["text"])[1:-1].replace(" ", "·"), style=colour(owner))
        table.add_row(Text(str(0 if owner is None else owner + 1)), name, *cells)
    return table


def show_rows(console: Console, found: dict[str, Any], each: dict[str, Any]) -> None:
    """The nearest training rows of one stage, what they share with the answer set off."""
    from rich.text import Text

    place = [stage["reference"] for stage in found["stages"]].index(each["stage"])
    console.print()
    console.print(Text(f"{place + 1} {each['stage']}: nearest rows", style=f"bold {colour(place)}"))
    for note in each["notes"]:
        console.print(Text(f"  {note}"), soft_wrap=True)
    for row in each["rows"]:
        head = f"  {row['where']}, {row['side']}, shares “{row['shared']}” ({row['score']:.1f})"
        asked = f"{row['prompt']} → " if row["prompt"] else ""
        body = legible(f"    {asked}{row['text']}").replace("\n", " ")
        lines = (Text(legible(head).replace("\n", " ")), Text(body, style="dim"))
        console.print(*lines, sep="\n", soft_wrap=not console.is_terminal)
