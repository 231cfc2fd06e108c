"""What `llmpipe plan` says of the memory of a recipe's stages, beside the largest resident set of their processes.

    python benchmarks/plan_memory.py RECIPE [STAGE.FIELD=VALUE …]

Linux, a CPU. Runs the recipe in an empty store, stage by stage, and reads /proc a hundred times a second. A run of some
tens of steps is the least: what lies unused between blocks grows over the first of them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pipeline.cli.session import open_session
from pipeline.hardware import measure_device
from pipeline.lineage import survey
from pipeline.plan.planner import Planner

MIB = 2**20


def resident(pid: int) -> float:
    """The largest resident set that a process, or one below it, has had so far, MiB; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
        children = [file.read_text(encoding="utf-8") for file in Path(f"/proc/{pid}/task").glob("*/children")]
    except (OSError, ValueError):
        return 0.0
    own = next((float(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)
    return max([own, *(resident(int(child)) for words in children for child in words.split())])


def run(recipe: str, store: Path, stage: str, settings: list[str]) -> float:
    """Runs the recipe until `stage`; the peak, MiB."""
    words = [f"--set={each}" for each in settings]
    command = [sys.executable, "-m", "pipeline", "run", recipe, "--quiet", "--until", stage, "--artifacts", str(store)]
    process, peak = subprocess.Popen([*command, *words], stdout=subprocess.DEVNULL), 0.0
    while process.poll() is None:
        peak = max(peak, resident(process.pid))
        time.sleep(0.01)
    assert process.returncode == 0, f"{stage} failed"
    return peak


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("recipe")
    words.add_argument("settings", nargs="*")
    given = words.parse_args()
    print(f"{'stage':<12}{'planned, MiB':>14}{'peak, MiB':>12}{'ratio':>8}   parts, MiB", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder)
        device = measure_device(0.1)
        for name in open_session(given.recipe, artifacts=store, overrides=given.settings).recipe.nodes:
            session = open_session(given.recipe, artifacts=store, overrides=given.settings)
            found = Planner(session.recipe, session.store, device, 1).estimate(
                survey(session.recipe, session.store)[name]
            )
            peak = run(given.recipe, store, name, given.settings)
            if found.memory:
                parts = ", ".join(f"{part} {size / MIB:.0f}" for part, size in found.memory.items() if size)
                planned = found.peak / MIB
                print(f"{name:<12}{planned:>14.0f}{peak:>12.0f}{planned / peak:>8.2f}   {parts}", flush=True)


if __name__ == "__main__":
    main()
