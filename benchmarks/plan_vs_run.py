"""What `llmpipe plan` says of each stage before anything has run, beside what a finished run of the recipe took.

    python benchmarks/plan_vs_run.py demo artifacts/demo [--processor-time CORES]

The planner is given an empty store, so that it has no run to look up. Manifests made on an idle machine are the fair
ones. `--processor-time`: on a machine that others use, steps are timed on one thread in the processor's time and taken
to be CORES times faster on the run's own threads (for two 1.8, which is an assumption); what begins a stage is left as
it is.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

import pipeline.hardware
import pipeline.plan.speed
from pipeline.cli.session import open_session
from pipeline.hardware import measure_device
from pipeline.lineage import survey
from pipeline.plan.planner import Planner
from pipeline.plan.site import Estimate
from pipeline.plan.speed import Probe


def planned(recipe: str, cores: float | None) -> dict[str, Estimate]:
    """Stage -> estimate, in an empty store."""
    if cores is not None:
        clock = SimpleNamespace(monotonic=time.process_time)
        pipeline.hardware.time = pipeline.plan.speed.time = clock  # type: ignore[attr-defined]
        torch.set_num_threads(1)
    device = measure_device()
    found = {}
    with tempfile.TemporaryDirectory() as empty:
        session = open_session(recipe, artifacts=Path(empty))
        planner = Planner(session.recipe, session.store, device, 1, probe=Probe(device))
        for name, standing in survey(session.recipe, session.store).items():
            each = planner.estimate(standing)
            steps = (each.seconds or 0.0) - each.beginning
            if cores is not None and each.flops is not None:
                each = replace(each, seconds=each.beginning + steps / cores)
            found[name] = each
    return found


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("recipe")
    words.add_argument("run", type=Path, help="the finished run's folder")
    words.add_argument("--processor-time", type=float, metavar="CORES")
    given = words.parse_args()
    print(f"{'stage':<16}{'planned, s':>12}{'took, s':>12}{'planned / took':>16}")
    whole = [0.0, 0.0]
    for name, found in planned(given.recipe, given.processor_time).items():
        manifest = given.run / name / "manifest.json"
        if found.seconds is None or not manifest.exists():
            print(f"{name:<16}{'-':>12}")
            continue
        took = json.loads(manifest.read_text(encoding="utf-8"))["seconds"]
        whole = [whole[0] + found.seconds, whole[1] + took]
        print(f"{name:<16}{found.seconds:>12.1f}{took:>12.1f}{found.seconds / took:>16.2f}")
    print(f"{'whole':<16}{whole[0]:>12.1f}{whole[1]:>12.1f}{whole[0] / max(whole[1], 1e-9):>16.2f}")


if __name__ == "__main__":
    main()
