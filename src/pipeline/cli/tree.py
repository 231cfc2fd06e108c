"""A recipe's graph as lines of a tree: each stage under the one it mainly comes from, its other inputs beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.graph import Node


@dataclass(frozen=True)
class Line:
    """One stage: what is drawn before its name, and the stages it takes beside the one above it."""

    drawn: str
    stage: str
    others: tuple[str, ...]


def trunk_of(node: Node, nodes: Mapping[str, Node]) -> str | None:
    """The stage of the recipe that this one starts from: its `init`, else the only one it takes; None for neither."""
    init = [ref for ref in node.inputs.get("init", ()) if ref in nodes]
    parents = node.parents(nodes)
    return init[0] if init else parents[0] if len(parents) == 1 else None


def tree(nodes: Mapping[str, Node]) -> list[Line]:
    """The lines, in running order as far as the tree allows."""
    trunks = {name: trunk_of(node, nodes) for name, node in nodes.items()}
    others = {
        name: tuple(parent for parent in node.parents(nodes) if parent != trunks[name]) for name, node in nodes.items()
    }
    return [
        Line(drawn, name, others[name])
        for top in (name for name, trunk in trunks.items() if trunk is None)
        for drawn, name in _below(top, trunks, "", "")
    ]


def _below(name: str, trunks: Mapping[str, str | None], first: str, rest: str) -> Iterator[tuple[str, str]]:
    """(drawn, name) of a stage and of all that stand on it; `first` is drawn before it, `rest` before what follows."""
    yield first, name
    children: Sequence[str] = [child for child, trunk in trunks.items() if trunk == name]
    for child in children:
        is_last = child == children[-1]
        yield from _below(child, trunks, rest + ("└─ " if is_last else "├─ "), rest + ("   " if is_last else "│  "))
