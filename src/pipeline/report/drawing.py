"""A panel as SVG, drawn by matplotlib. Colours are the page's own variables, so that one figure serves light and dark;
text stays text, in the page's font. What the pointer shows is beside it as data.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.report.curves import Curve, Panel
from pipeline.report.reliability import Reliability

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (360, 214)
"""Points of a figure, as wide as a phone: the page shows it about as large as it is."""
COLOURS = 8
SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "llmpipe", "font.size": 10.0}
INK, GRID = "#020202", "#030303"
"""Stand-ins that `_own_colours` turns into variables of the page."""


def _stand_in(number: int) -> str:
    return f"#0101{number % COLOURS + 1:02d}"


@dataclass(frozen=True)
class Figured:
    """A drawn panel: inline SVG, and for the pointer its axes' place in it, their ranges and the points."""

    panel: Panel
    svg: str
    data: dict[str, Any]
    colours: tuple[int, ...]
    """Of each curve, from 1."""


def draw(panel: Panel, number: int) -> Figured:
    """The panel; `number` keeps the ids of figures on one page apart. The same panel gives the same bytes."""
    import matplotlib

    with matplotlib.rc_context(SETTINGS):
        return _draw(panel, number)


def _draw(panel: Panel, number: int) -> Figured:
    figure, axes = _axes(panel)
    if panel.kind == "stack":
        axes.stackplot(
            panel.curves[0].x,
            [curve.y for curve in panel.curves],
            colors=[_stand_in(i) for i in range(len(panel.curves))],
            alpha=0.85,
            linewidth=0,
        )
        axes.margins(0)
    for curve in panel.curves if panel.kind != "stack" else ():
        _plot(axes, curve, panel.kind == "points")
    data = _data(panel, figure, axes)
    return Figured(panel, _svg(figure, number), data, tuple(curve.colour % COLOURS + 1 for curve in panel.curves))


STROKES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1.2, 1.6)), (0, (5, 2, 1.2, 2)))
"""As matplotlib writes them; the legend's are in the page's style, by the same numbers."""
MARKERS = "osD^"


def _plot(axes: Axes, curve: Curve, is_points: bool) -> None:
    colour, stroke = _stand_in(curve.colour), curve.stroke % len(STROKES)
    if is_points:
        dots = axes.plot(
            curve.x, curve.y, color=colour, marker=MARKERS[stroke], markersize=4.5, linewidth=0, alpha=0.75
        )
    else:
        marker = "o" if len(curve.x) <= 16 else ""
        dots = axes.plot(curve.x, curve.y, color=colour, linestyle=STROKES[stroke], linewidth=1.5, marker=marker)
        dots[0].set_markersize(3.2)
    dots[0].set_markeredgewidth(0)


def _axes(panel: Panel) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(SIZE[0] / 72, SIZE[1] / 72), layout="constrained")
    axes = figure.subplots()
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    axes.set_axisbelow(True)
    axes.grid(color=GRID, linewidth=0.7)
    axes.tick_params(colors=INK, length=0, labelsize=10)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(INK)
        spine.set_linewidth(0.8)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=panel.x_label in ("step", "round")))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(panel.x_label, color=INK)
    axes.set_ylabel(panel.y_label, color=INK)
    return figure, axes


def draw_reliability(found: Reliability, number: int) -> Figured:
    """Share right over claim by bin with 95 % bars; the area of a point goes with its pairs."""
    import matplotlib

    claimed, right, pairs, halves = (tuple(each[i] for each in found.bins) for i in range(4))
    curve = Curve("pairs of a bin", claimed, right)
    note = f"{found.pairs:,} held-out pairs, calibration error {found.error:.3f}; a larger point has more pairs"
    panel = Panel(f"Reliability of {found.model}", "claimed: σ(|Δ|)", "share right", "points", (curve,), note)
    with matplotlib.rc_context(SETTINGS):
        figure, axes = _axes(panel)
        axes.plot((0.5, 1), (0.5, 1), color=INK, linewidth=0.9, linestyle=(0, (4, 4)))
        low, high = ([max(0.0, a - h) for a, h in zip(right, halves)], [min(1.0, a + h) for a, h in zip(right, halves)])
        axes.vlines(claimed, low, high, color=_stand_in(0), linewidth=1.4)
        most = max(pairs)
        axes.scatter(claimed, right, s=[14 + 60 * n / most for n in pairs], color=_stand_in(0), linewidth=0, zorder=3)
        axes.set_xlim(0.48, 1.02)
        axes.set_ylim(top=1.03)
        data = _data(panel, figure, axes)
        data["curves"][0]["more"] = [f"{n:,} pairs" for n in pairs]
        return Figured(panel, _svg(figure, number), data, (1,))


def _data(panel: Panel, figure: Figure, axes: Axes) -> dict[str, Any]:
    """The axes' rectangle in the figure's points, from its top left, their ranges, and every curve's points."""
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)
    figure.set_layout_engine("none")  # once is enough, and half of the time
    box = axes.get_position()
    width, height = SIZE
    return {
        "box": [round(v, 1) for v in (box.x0 * width, (1 - box.y1) * height, box.width * width, box.height * height)],
        "x": [float(v) for v in axes.get_xlim()],
        "y": [float(v) for v in axes.get_ylim()],
        "title": panel.title,
        "kind": panel.kind,
        "xlabel": panel.x_label,
        "curves": [
            {"label": curve.label, "x": [_short(v) for v in curve.x], "y": [_short(v) for v in curve.y]}
            for curve in panel.curves
        ],
    }


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _svg(figure: Figure, number: int) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"<style type=\"text/css\">.*?</style>", "", text, flags=re.S)
    text = re.sub(
        r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg class="plot" viewBox="\1" aria-hidden="true">', text, count=1
    )
    text = re.sub(r' id="', f' id="f{number}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#f{number}-", text).replace("xlink:href", "href")
    text = re.sub(r" font-family: [^;\"]*;?", "", text).replace("font-size: 10px;", "")
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
    text = re.sub(r'="[^"]*\.\d[^"]*"', lambda found: LONG.sub(_rounded, found[0]), text)
    text = re.sub(r"\n\s*", " ", text)
    return _own_colours(text)


LONG = re.compile(r"\d+\.\d{2,}")


def _rounded(found: re.Match[str]) -> str:
    return f"{float(found[0]):.1f}".removesuffix(".0")


def _own_colours(text: str) -> str:
    text = re.sub(r"#0101(\d\d)", lambda found: f"var(--c{int(found[1])})", text)
    return text.replace(INK, "var(--soft)").replace(GRID, "var(--line)")


def draw_all(panels: Sequence[Panel], first: int) -> list[Figured]:
    """The panels, numbered from `first`."""
    return [draw(panel, first + i) for i, panel in enumerate(panels)]
