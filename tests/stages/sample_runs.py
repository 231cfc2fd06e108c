"""Runs of the sample stage on a tiny random Llama, and what they left behind."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.recipe import DataEntry
from pipeline.runtime import Runtime
from stages import sample as stage
from tests.stages.ppo_runs import Parts

Row = dict[str, Any]


def config_of(parts: Parts, *, reward: str | None = None, **values: Any) -> stage.SampleConfig:
    """`reward`: a function of the parts' rewards.py, or "model"."""
    given: dict[str, Any] = {
        "data": (DataEntry(source=str(parts.data)),),
        "prompts": 20,
        "response_length": 10,
        "num_generations": 3,
        "batch_size": 12,
        "unfinished": "keep",
        "bf16": False,
    }
    if reward is not None:
        given["reward"] = "reward" if reward == "model" else f"{parts.folder / 'rewards.py'}:{reward}"
    return stage.SampleConfig(**{**given, **values})


def sample(parts: Parts, out: Path, *, seed: int = 0, **values: Any) -> tuple[list[Row], dict[str, float]]:
    """(rows, figures) of a run; the same folder again is a resumed run."""
    config = config_of(parts, **values)
    out.mkdir(parents=True, exist_ok=True)
    runtime = Runtime.start(out, seed=seed, threads=1, quiet=True)
    inputs = {"init": parts.init, "reward": parts.reward if config.reward == "reward" else None}
    figures = stage.run(config, inputs, out, runtime)
    return rows_in(out), figures


def rows_in(out: Path) -> list[Row]:
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


def killed_at(targets: Sequence[int], out: Path, run: Callable[[], object]) -> int:
    """`run` begun in a process of its own, again and again, each time killed when so many parts lie in `out`; how many
    of the tries were killed before their end."""
    done = 0
    for target in targets:
        pid = os.fork()
        if pid == 0:
            run()
            os._exit(0)
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            if len(list((out / "checkpoints" / "parts").glob("*.json"))) >= target:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                done += 1
                break
            time.sleep(0.0005)
    return done
