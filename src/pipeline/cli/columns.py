"""Answers side by side on a terminal, a column each, as they are written."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

REDRAWN = 0.05
"""Seconds between two frames."""
GAP = 3
"""Characters between two columns."""
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def side_by_side(names: Sequence[str], replies: Sequence[Generator[str]]) -> None:
    """Stream the replies by turns, a piece each; the whole of them stands there at the end, however that comes.

    While they are written, the last lines that fit the terminal are shown.
    """
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    texts = [""] * len(names)
    going = dict(enumerate(replies))
    drawn = 0.0
    with contextlib.ExitStack() as stack:
        live = stack.enter_context(Live(console=console, auto_refresh=False))
        for reply in replies:
            stack.callback(reply.close)
        try:
            while going:
                for place, reply in list(going.items()):
                    piece = next(reply, None)
                    if piece is None:
                        del going[place]
                    else:
                        texts[place] += piece
                if time.monotonic() - drawn > REDRAWN:
                    live.update(columns(names, texts, console, most=console.height - 2), refresh=True)
                    drawn = time.monotonic()
        finally:
            live.update(columns(names, texts, console), refresh=True)


def legible(text: str) -> str:
    """Without what would move the cursor: in columns that would tear the other answer."""
    return CONTROL.sub("", text).expandtabs(4)


def columns(names: Sequence[str], texts: Sequence[str], console: Console, most: int | None = None) -> Table:
    """The texts in columns of equal width under their names; of each the last `most` lines."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, GAP, 0, 0), pad_edge=False)
    width = max(1, (console.width - GAP * (len(names) - 1)) // len(names))
    for _ in names:
        table.add_column(width=width, overflow="fold")
    table.add_row(*(Text(name, style="bold underline", overflow="fold") for name in names))
    lines = [Text(legible(text), overflow="fold").wrap(console, width) for text in texts]
    table.add_row(*(Text("\n").join(each[-most:] if most else each) for each in lines))
    return table
