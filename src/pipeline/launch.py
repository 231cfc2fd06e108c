"""One stage as one process or many, under accelerate.

The command's process imports torch once and forks a child for every stage (a fresh state in a tenth of a second); with
several processes it forks one child a rank and gives them the variables that accelerate and torch.distributed read.
Started by torchrun or `accelerate launch` (WORLD_SIZE is set) the process itself is a rank and forks nothing.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from pipeline import failure
from pipeline.artifacts import BEGUN, Artifact, Store, need_disk, now, write_begun
from pipeline.errors import ConfigError, Halt, Stopped
from pipeline.fingerprint import PACKAGES, reached
from pipeline.forking import fork, has_gpu
from pipeline.hashes import template_hash, tokenizer_hash
from pipeline.lineage import Standing
from pipeline.tracking import TRACK, Sender, Track

STRATEGIES = ("auto", "single", "ddp", "fsdp")
VERSIONS_OF = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "tokenizers", "llmpipe")


@dataclass(frozen=True)
class Launch:
    """How stages are started; none of it changes a result beyond float order."""

    num_processes: int | None = None
    strategy: str = "auto"
    quiet: bool = False
    tracks: tuple[Track, ...] = ()

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ConfigError(f"--strategy is one of {', '.join(STRATEGIES)}, not {self.strategy!r}")
        if self.num_processes is not None and self.num_processes < 1:
            raise ConfigError("--num-processes is at least 1")
        if self.strategy == "single" and (self.num_processes or 1) > 1:
            raise ConfigError("--strategy single is one process", mend="--strategy ddp")

    def processes(self) -> int:
        """How many processes: what was asked for, else one a GPU, else one."""
        if self.num_processes is not None:
            return self.num_processes
        if self.strategy == "single":
            return 1
        import torch

        return max(1, torch.cuda.device_count())  # asks the driver, opens no context


def world_size_from_outside() -> int:
    """Ranks that torchrun or `accelerate launch` started, 0 when neither did."""
    return int(os.environ.get("WORLD_SIZE", "0"))


def rank_from_outside() -> int:
    """This process's place among them; the first speaks."""
    return int(os.environ.get("RANK", "0"))


def run_stage(standing: Standing, inputs: Mapping[str, Any], store: Store, run: str, launch: Launch) -> None:
    """Run the stage to its published artifact; call with its lock held. Raises what the stage raised."""
    partial = store.partial(run, standing.node.name, standing.planned)
    need_disk(partial, 256 * 2**20, f"{run}/{standing.node.name}")
    _preload(standing.node.stage.file)
    processes = launch.processes()

    def work(rank: int) -> None:
        execute(standing, inputs, store, run, partial, processes, launch)

    if sys.platform != "linux" and processes == 1:
        work(0)
        return
    fork(work, processes)


def _preload(stage_file: Path) -> None:
    """Import what the stage will need before forking, so that it is imported once a command.

    Where there is a GPU, only what does not look at it: bitsandbytes, which peft imports where it is installed, opens
    CUDA, and no forked process can open it again.

    Waiting threads of OpenMP sleep almost at once: spinning for them costs up to twenty times on cores that somebody
    else uses too, and nothing that can be measured on cores of one's own (docs/notes.md).
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # is there one? Asked of the driver, nothing opened
    import pipeline.runtime

    if not has_gpu() and PACKAGES / "pipeline" / "trainer.py" in reached(stage_file):
        import pipeline.trainer  # noqa: F401


def execute(
    standing: Standing,
    inputs: Mapping[str, Any],
    store: Store,
    run: str,
    partial: Path,
    processes: int,
    launch: Launch,
    *,
    last: bool = True,
) -> None:
    """In the process that works: set up the runtime, run the stage, publish on rank 0.

    `last` says that this process does nothing after it, so that the ranks part here.
    """
    from pipeline.data.places import naming_rows
    from pipeline.model.merging import drop_merged, merged_inputs
    from pipeline.progress import Stop
    from pipeline.runtime import Runtime, default_threads

    node = standing.node
    halt = Stop()
    halt.listen()
    runtime = Runtime.start(
        partial,
        seed=node.config.seed,
        threads=default_threads(processes),
        world_size=processes,
        quiet=launch.quiet,
        shards=launch.strategy == "fsdp" and node.stage.shards and processes > 1,
    )
    runtime.halt = halt
    if launch.strategy == "fsdp" and node.stage.shards and not runtime.shards:
        runtime.say("--strategy fsdp: one process keeps the model whole")
    if runtime.is_main:
        failure.forget(partial)
        _write_config(partial / "config.yaml", to_jsonable_python(node.config))
        write_begun(partial, node.stage.type, standing.parts)
    runtime.barrier()
    folder = store.folder(run, node.name).parent / TRACK / f"{node.name}-{standing.planned[:16]}"
    tracks = launch.tracks if runtime.is_main else ()
    sender = Sender(tracks, folder, run, node.name, to_jsonable_python(node.config))
    with failure.noted(partial), naming_rows(node.config), sender.following(runtime.metrics):
        inputs = merged_inputs(inputs, partial, runtime.is_main, runtime.barrier)
        figures = node.stage.run(node.config, inputs, partial, runtime)
    runtime.barrier()
    if runtime.is_main:
        drop_merged(partial)
        (partial / BEGUN).unlink()
        runtime.metrics.sync()
        (partial / "metrics.jsonl").touch()
        store.publish(partial, run, node.name, _manifest(standing, inputs, run, partial, figures, runtime))
    runtime.barrier()
    if runtime.stop_requested():  # heard too late to stop the stage: at least nothing follows it
        kind: type[Halt] = halt.asked or Stopped
        raise kind("stopped after the stage was done", mend="run the same command again for the rest")
    if processes > 1 and last:
        import torch

        torch.distributed.destroy_process_group()


def _manifest(
    standing: Standing,
    inputs: Mapping[str, Any],
    run: str,
    partial: Path,
    figures: Mapping[str, float],
    runtime: Any,
) -> dict[str, Any]:
    node = standing.node
    parents = {
        role: [{"reference": a.reference, "fingerprint": a.fingerprint} for a in _each(value)]
        for role, value in inputs.items()
    }
    if node.rows:
        writers = zip(dict.fromkeys(node.rows.values()), standing.parts["inputs"]["data"], strict=True)
        parents["data"] = [{"reference": f"{run}/{name}", "fingerprint": fingerprint} for name, fingerprint in writers]
    return {
        "stage": node.stage.type,
        "name": node.name,
        "run": run,
        "kind": node.stage.kind,
        "fingerprint": standing.planned,
        "parts": standing.parts,
        "config": to_jsonable_python(node.config),
        "inputs": parents,
        "tokenizer_hash": tokenizer_hash(partial / "model"),
        "template_hash": template_hash(partial / "model"),
        "metrics": {name: float(value) for name, value in figures.items()},
        "tokens": runtime.metrics.tokens,
        "flops": figures.get("flops", 0.0),
        "seconds": round(runtime.metrics.seconds(), 3),
        "resumed_from": runtime.checkpoints.resumed_from,
        "processes": runtime.world_size,
        "shards": runtime.shards,
        "threads": runtime.threads,
        "device": _device(runtime.device),
        "versions": versions(),
        "git_commit": _git_commit(),
        "created": now(),
    }


def _each(value: Any) -> list[Artifact]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def versions() -> dict[str, str]:
    """Versions of what computes a stage."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in VERSIONS_OF:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _device(device: Any) -> str:
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.processor() or platform.machine()}, {os.cpu_count()} cores)"


def _git_commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=PACKAGES.parent, capture_output=True, text=True, check=False
    )
    return found.stdout.strip()


def _write_config(path: Path, values: Mapping[str, Any]) -> None:
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    with path.open("w", encoding="utf-8") as file:
        yaml.dump(json.loads(json.dumps(values)), file)


def wait_line(run: str, stage: str) -> Callable[[str], None]:
    """What is said while another process works on the same stage."""
    began = time.strftime("%H:%M:%S")
    return lambda who: print(f"  {began} waiting for {who}, which works on {run}/{stage}", file=sys.stderr, flush=True)
