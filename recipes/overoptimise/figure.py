"""Draw the frontier: gold over sqrt(KL), and what the proxies say over the same.

    python figure.py artifacts/overoptimise/frontier/frontier.jsonl frontier.svg

Lines are the way of a run of ppo by its evaluations, and n of best-of-n; diamonds are models as they were written.
Bars are 95 % intervals.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

Point = dict[str, Any]
FAMILIES = {
    "best of n by reward": ("best of n, one proxy", "tab:green"),
    "best of n by ensemble": ("best of n, ensemble", "tab:olive"),
    "ppo": ("ppo, one proxy", "tab:red"),
    "ppo-ensemble": ("ppo, ensemble", "tab:blue"),
    "ppo-all": ("ppo, one proxy of all labels", "tab:orange"),
    "dpo": ("dpo", "tab:purple"),
}


def family(curve: str) -> tuple[str, str]:
    """(name in the legend, colour) of a curve: the longest beginning that is known."""
    known = max((name for name in FAMILIES if re.match(rf"{re.escape(name)}(-|$)", curve)), key=len)
    return FAMILIES[known]


def root(kl: float) -> float:
    """sqrt(KL); 0 for an estimate below 0."""
    return math.sqrt(max(kl, 0.0))


def main(source: Path, target: Path) -> None:
    """Read points, write the figure in the format of the target's name."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "llmpipe", "svg.fonttype": "none"}  # the same bytes from the same points
    import matplotlib.pyplot as plt

    points = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    start = next(point for point in points if point["curve"] == "start")
    figure, (gold, proxy) = plt.subplots(1, 2, figsize=(10, 4), sharex=True, layout="constrained")
    seen: set[str] = set()
    for curve in dict.fromkeys(point["curve"] for point in points):
        if curve == "start":
            continue
        label, colour = family(curve)
        own = [point for point in points if point["curve"] == curve]
        way = [point for point in own if point["at"] != ""]  # a run's, else there is the model that was written
        own = ([start] if curve.startswith("ppo") else []) + way if way else own
        draw(gold, own, colour, label if label not in seen else None)
        with_reward = [point for point in own if "reward" in point]
        proxy.plot([root(p["kl"]) for p in with_reward], [p["reward"] for p in with_reward], color=colour, lw=1)
        seen.add(label)
    gold.axhline(start["gold"], color="grey", lw=0.8, ls=":")
    gold.set(xlabel="√KL from the start, √nats", ylabel="gold reward", ylim=(0, None))
    proxy.set(xlabel="√KL from the start, √nats", ylabel="what the proxy (or the ensemble) says")
    gold.legend(fontsize=7)
    figure.savefig(target, dpi=110, metadata={"Date": None} if target.suffix == ".svg" else None)


def draw(axes: Any, own: list[Point], colour: str, label: str | None) -> None:
    """One curve, each point with its interval; a model by itself is a diamond."""
    x, y = [root(point["kl"]) for point in own], [point["gold"] for point in own]
    bars = [[p["gold"] - p["gold_low"] for p in own], [p["gold_high"] - p["gold"] for p in own]]
    style = {"marker": "D", "ms": 5} if len(own) == 1 else {"marker": ".", "ms": 4, "lw": 1.2}
    axes.errorbar(x, y, yerr=bars, color=colour, elinewidth=0.6, label=label, **style)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python figure.py frontier.jsonl figure.svg")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
