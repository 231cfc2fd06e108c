"""Two answers side by side: what stands where, by turns, however it ends."""

from __future__ import annotations

import io
from collections.abc import Generator

import pytest
from rich.console import Console

from pipeline.cli.columns import columns, side_by_side


def drawn(texts: list[str], *, width: int, most: int | None = None) -> list[str]:
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None)
    console.print(columns(["one", "two"], texts, console, most=most))
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_columns_by_hand() -> None:
    """23 characters: two columns of 10 and 3 between them. Long words are cut, lines of each text stay its own."""
    assert drawn(["aa bb\ncc", "a long text here"], width=23) == [
        "one          two",
        "aa bb        a long",
        "cc           text here",
    ]
    assert drawn(["abcdefghijklm", ""], width=23) == ["one          two", "abcdefghij", "klm"]


def test_the_last_lines_are_shown_while_it_is_written() -> None:
    assert drawn(["1\n2\n3\n4", "x"], width=23, most=2) == ["one          two", "3            x", "4"]


def test_markup_is_letters() -> None:
    assert drawn(["[bold]a", "[/x]"], width=40)[1].split() == ["[bold]a", "[/x]"]


def test_nothing_moves_the_cursor() -> None:
    assert drawn(["a\x1b[2Jb\rc\td", "e"], width=43)[1] == "a[2Jbc  d" + " " * 14 + "e"


def test_by_turns_and_whole_at_the_end(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    order: list[str] = []

    def reply(name: str, count: int) -> Generator[str]:
        for number in range(count):
            order.append(name)
            yield f"{name}{number} "

    side_by_side(["left", "right"], [reply("a", 3), reply("b", 1)])
    assert order == ["a", "b", "a", "a"]
    out = capsys.readouterr().out
    assert out.splitlines()[-1].split() == ["a0", "a1", "a2", "b0"]


def test_an_interrupt_closes_both_and_leaves_what_was_written(capsys: pytest.CaptureFixture[str]) -> None:
    closed: list[str] = []

    def reply(name: str, is_interrupted: bool) -> Generator[str]:
        try:
            yield name
            if is_interrupted:
                raise KeyboardInterrupt
            yield "never"
        finally:
            closed.append(name)

    with pytest.raises(KeyboardInterrupt):
        side_by_side(["left", "right"], [reply("begun", False), reply("cut", True)])
    assert sorted(closed) == ["begun", "cut"]
    assert capsys.readouterr().out.splitlines()[-1].split()[0] == "begunnever"
