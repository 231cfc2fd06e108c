"""The graph of a run, laid out: a layer for each distance from the start, edges that a longer way implies left out.

Of stages that differ in their settings alone (`dpo@beta=0.1@seed=0`, …) more than three become one box, and fewer too
where more than six boxes would stand beside each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.report.records import StageRecord

BOX = (112, 48)
"""Pixels of a stage's box."""
GAP = (26, 16)
"""Between boxes: from layer to layer, and within one."""
FOLDED_FROM = 4
CROWDED = 6
"""Boxes of a layer, beyond which any that are alike become one: on a phone no more can be read."""


@dataclass
class Box:
    """A stage, several alike, or a place that an edge passes through (`stages` is empty then)."""

    key: str
    stages: tuple[str, ...]
    parents: tuple[str, ...]
    layer: int = 0
    place: float = 0.0
    """Across its layer, in boxes."""


@dataclass(frozen=True)
class Drawn:
    """Boxes with their corner, edges as paths of SVG, the size of the whole in pixels."""

    width: int
    height: int
    boxes: tuple[tuple[Box, float, float], ...] = field(default_factory=tuple)
    edges: tuple[str, ...] = field(default_factory=tuple)


def boxes_of(stages: Sequence[StageRecord]) -> list[Box]:
    """A box for each stage, or for each group of like ones, parents before children, with their layers."""
    boxes = _boxes(stages, FOLDED_FROM)
    widest = max(Counter(box.layer for box in boxes).values())
    return boxes if widest <= CROWDED else _boxes(stages, 2)


def _boxes(stages: Sequence[StageRecord], folded_from: int) -> list[Box]:
    names = {each.name for each in stages}
    above = {each.name: tuple(parent for parent in each.parents if parent in names) for each in stages}
    groups: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for each in stages:
        groups.setdefault((each.base, each.type, tuple(sorted(above[each.name]))), []).append(each.name)
    key_of: dict[str, str] = {}
    for members in groups.values():
        key_of |= {name: members[0] if len(members) >= folded_from else name for name in members}
    found: dict[str, Box] = {}
    for each in stages:
        key = key_of[each.name]
        parents = {key_of[parent]: None for parent in above[each.name] if key_of[parent] != key}
        known = found.setdefault(key, Box(key, (), ()))
        known.stages = (*known.stages, each.name)
        known.parents = tuple(dict.fromkeys([*known.parents, *parents]))
    boxes = list(found.values())
    _layers(boxes)
    return boxes


def lay_out(stages: Sequence[StageRecord], *, is_upright: bool) -> Drawn:
    """The drawing; `is_upright`: the layers one below the other, for a narrow page."""
    boxes = boxes_of(stages)
    _reduce(boxes)
    layers = _with_passages(boxes)
    _arrange(layers)
    return _drawn(layers, is_upright)


def _layers(boxes: Sequence[Box]) -> None:
    by_key = {box.key: box for box in boxes}
    for _ in boxes:  # a box of several may stand before a parent: until nothing moves
        before = [box.layer for box in boxes]
        for box in boxes:
            box.layer = 1 + max((by_key[parent].layer for parent in box.parents), default=-1)
        if before == [box.layer for box in boxes]:
            return


def _reduce(boxes: Sequence[Box]) -> None:
    """Drop the edge to a parent that another parent comes from."""
    by_key = {box.key: box for box in boxes}
    above: dict[str, set[str]] = {}
    for box in sorted(boxes, key=lambda box: box.layer):
        above[box.key] = {*box.parents}.union(*(above[parent] for parent in box.parents if parent in above))
    for box in boxes:
        implied = set().union(*(above[parent] for parent in box.parents))
        box.parents = tuple(parent for parent in box.parents if parent not in implied or parent not in by_key)


def _with_passages(boxes: Sequence[Box]) -> list[list[Box]]:
    """The layers, with a place in each layer that an edge passes."""
    layers: list[list[Box]] = [[] for _ in range(1 + max(box.layer for box in boxes))]
    by_key = {box.key: box for box in boxes}
    for box in sorted(boxes, key=lambda box: box.layer):
        layers[box.layer].append(box)
    for box in boxes:
        parents = []
        for parent in box.parents:
            last = parent
            for layer in range(by_key[parent].layer + 1, box.layer):
                key = f"{parent}\0{layer}"  # one way for all that pass here from this parent
                passage = next((each for each in layers[layer] if each.key == key), None)
                if passage is None:
                    passage = Box(key, (), (last,), layer)
                    layers[layer].append(passage)
                last = key
            parents.append(last)
        box.parents = tuple(parents)
    return layers


SWEEPS = 4


def _arrange(layers: Sequence[list[Box]]) -> None:
    """Order each layer by where its parents stand, then by its children, and so on (barycentres: Sugiyama 1981)."""
    children: dict[str, list[str]] = {}
    for layer in layers:
        for box in layer:
            for parent in box.parents:
                children.setdefault(parent, []).append(box.key)
    place = {box.key: 0.0 for layer in layers for box in layer}
    for sweep in range(2 * SWEEPS + 1):
        is_down = sweep % 2 == 0
        for layer in layers if is_down else layers[::-1]:
            _order(
                layer, {box.key: box.parents if is_down else tuple(children.get(box.key, ())) for box in layer}, place
            )


def _order(layer: list[Box], beside: Mapping[str, Sequence[str]], place: dict[str, float]) -> None:
    """Sort the layer by the mean place of what each box hangs on, and centre it."""
    middle = {
        key: sum(place[other] for other in others) / len(others) if others else place[key]
        for key, others in beside.items()
    }
    layer.sort(key=lambda box: middle[box.key])
    for number, box in enumerate(layer):
        box.place = place[box.key] = number - (len(layer) - 1) / 2


def _drawn(layers: Sequence[Sequence[Box]], is_upright: bool) -> Drawn:
    along, across = (BOX[1] + GAP[0], BOX[0] + GAP[1]) if is_upright else (BOX[0] + GAP[0], BOX[1] + GAP[1])
    most = max(len(layer) for layer in layers)
    corner: dict[str, tuple[float, float]] = {}
    for layer in layers:
        for box in layer:
            first, second = box.layer * along, (box.place + (most - 1) / 2) * across
            corner[box.key] = (second, first) if is_upright else (first, second)
    edges = [
        _edge(corner[parent], corner[box.key], is_upright)
        for layer in layers
        for box in layer
        for parent in box.parents
    ]
    edges += [_through(corner[box.key], is_upright) for layer in layers for box in layer if not box.stages]
    sizes = (most * across - GAP[1], len(layers) * along - GAP[0])
    width, height = sizes if is_upright else sizes[::-1]
    shown = tuple((box, *corner[box.key]) for layer in layers for box in layer if box.stages)
    return Drawn(width, height, shown, tuple(edges))


def _edge(start: tuple[float, float], end: tuple[float, float], is_upright: bool) -> str:
    """From the far side of one box to the near side of the next."""
    if is_upright:
        x1, y1, x2, y2 = start[0] + BOX[0] / 2, start[1] + BOX[1], end[0] + BOX[0] / 2, end[1]
        half = (y1 + y2) / 2
        return f"M{x1:g} {y1:g}C{x1:g} {half:g} {x2:g} {half:g} {x2:g} {y2:g}"
    x1, y1, x2, y2 = start[0] + BOX[0], start[1] + BOX[1] / 2, end[0], end[1] + BOX[1] / 2
    half = (x1 + x2) / 2
    return f"M{x1:g} {y1:g}C{half:g} {y1:g} {half:g} {y2:g} {x2:g} {y2:g}"


def _through(at: tuple[float, float], is_upright: bool) -> str:
    if is_upright:
        return f"M{at[0] + BOX[0] / 2:g} {at[1]:g}v{BOX[1]}"
    return f"M{at[0]:g} {at[1] + BOX[1] / 2:g}h{BOX[0]}"


def shares(values: Mapping[str, float]) -> dict[str, float]:
    """Each value as a share of the largest, 0 to 1; 0 where all are."""
    most = max(values.values(), default=0.0)
    return {name: value / most if most else 0.0 for name, value in values.items()}
