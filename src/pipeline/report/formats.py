"""Numbers as people read them."""

from __future__ import annotations

import itertools
import math


def si(value: float | None, unit: str = "") -> str:
    """`1.24 B`, `942 k`: three digits and the power's letter; a dash for None."""
    if value is None:
        return "–"
    for letter, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G" if unit else "B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {letter}{unit}"
    return f"{value:.3g} {unit}".strip()


def flops(value: float | None) -> str:
    """`16.2 T`: as `si`, with G for a thousand million."""
    return si(value, "F").removesuffix("F").strip()


def duration(seconds: float) -> str:
    """`42 s`, `4 min 51 s`, `3 h 20 min`, `2 d 4 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.0f} s" if seconds >= 1 or not seconds else f"{seconds:.2g} s"
    parts = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    for (size, name), (less, below) in itertools.pairwise(parts):
        if whole >= size:
            rest = whole % size // less
            return f"{whole // size} {name}" + (f" {rest} {below}" if rest else "")
    raise AssertionError(seconds)


def money(euros: float) -> str:
    """`€1.15`; of cents so many digits that two of them say something."""
    if euros >= 0.995 or not euros:
        return f"€{euros:,.2f}"
    digits = max(2, 1 - math.floor(math.log10(euros)))
    return f"€{euros:.{digits}f}"


def short(value: float) -> str:
    """Three significant digits."""
    return number(float(f"{value:.3g}"))


def number(value: float) -> str:
    """Five significant digits, no exponent where it can be read without."""
    if not math.isfinite(value):
        return "–"
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value)}"
    return f"{value:.5g}"
