"""`llmpipe doctor`: what is here, what will be slow, what is missing, and the command that mends it."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pipeline
from pipeline.cli import probes
from pipeline.cli.probes import Check
from pipeline.errors import MachineError

MARKS = {"ok": ("ok", "green"), "slow": ("slow", "yellow"), "missing": ("–", "dim"), "broken": ("BROKEN", "bold red")}


def examine(artifacts: Path) -> Iterator[Check]:
    """Every check, as it is done. Where torch is broken, what needs it is left out."""
    yield Check("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    constraints = Path(pipeline.__file__).parents[2] / "constraints.txt"
    broken = False
    for check in probes.software(constraints):
        broken = broken or check.state == "broken"
        yield check
    yield from probes.places(artifacts)
    yield probes.memory()
    if not broken:
        yield from _with_torch()
    yield from probes.extras()


def _with_torch() -> Iterator[Check]:
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield from probes.processor()
    yield from probes.gpus()
    yield probes.products(device)
    yield from probes.kernels(device)


def doctor(artifacts: Path, *, as_json: bool) -> None:
    """Print the checks. MachineError (exit 1) where something that is required is broken."""
    began = time.monotonic()
    found = list(examine(artifacts))
    seconds = time.monotonic() - began
    if as_json:
        print(json.dumps({"checks": [asdict(check) for check in found], "seconds": round(seconds, 1)}, indent=1))
    else:
        _print(found, seconds)
    broken = [check for check in found if check.state == "broken"]
    if broken:
        what = "; ".join(f"{check.name}: {check.found}" for check in broken)
        raise MachineError(f"what llmpipe needs is broken: {what}", mend=broken[0].mend)


def _print(found: list[Check], seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in found:
        word, style = MARKS[check.state]
        cell = Text(check.found)
        if check.mend:
            cell.append(f"\n→ {check.mend}", style="cyan")
        table.add_row(Text(word, style), check.name, cell)
    console.print(table)
    counts = {state: sum(check.state == state for check in found) for state in MARKS}
    words = f"{counts['ok']} well, {counts['slow']} slow, {counts['missing']} not here, which nothing requires"
    console.print(f"\n{words}, {counts['broken']} broken; {seconds:.0f} s")
