"""A run as its folder tells it: what is whole, what is still being made, what came from what."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import failure
from pipeline.artifacts import MANIFEST, Store
from pipeline.errors import ArtifactError, MissingInputError
from pipeline.reading import meant
from pipeline.recipe import NAME

PARTIAL = re.compile(r"\.(?P<stage>.+)\.[0-9a-f]+\.partial")
NOT_A_PARENT = ("stage", "objective", "algorithm", "optimizer", "loss_type")
"""Fields whose value may be a word that a stage is called too (`algorithm: ppo`)."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class StageRecord:
    """One stage of a run. `manifest` is empty while it has not finished."""

    name: str
    type: str
    """`sft`, or the path of the user's file; of an unfinished stage as far as its folder tells, else empty."""
    path: Path
    manifest: Mapping[str, Any]
    config: Mapping[str, Any]
    metrics: tuple[Row, ...]
    parents: tuple[str, ...]
    """Stages of this run by their names, others as `run/stage`, path or `hub:`."""
    is_again: bool = False
    """Whether it is being made anew while this artifact stands."""

    @property
    def is_done(self) -> bool:
        return bool(self.manifest)

    @property
    def failed(self) -> failure.Failure | None:
        """What an unfinished stage ended with, unless it goes on or was killed."""
        return None if self.is_done else failure.read(self.path)

    @property
    def seconds(self) -> float:
        """Of work; of an unfinished stage up to its last line of metrics."""
        return float(self.manifest["seconds"] if self.manifest else _last(self.metrics, "time"))

    @property
    def tokens(self) -> int:
        return int(self.manifest["tokens"] if self.manifest else _last(self.metrics, "tokens"))

    @property
    def flops(self) -> float | None:
        """None where the stage counts none, or has not finished."""
        return float(self.manifest["flops"]) or None if self.manifest else None

    @property
    def processes(self) -> int:
        return int(self.manifest.get("processes", 1))

    @property
    def base(self) -> str:
        """Its name as a recipe writes it: `dpo` of `dpo@beta=0.1@seed=0`."""
        return self.name.partition("@")[0]

    @property
    def step(self) -> int:
        return int(_last(self.metrics, "step"))

    @property
    def steps(self) -> int:
        """All there will be, where the config says so; else 0."""
        asked = self.config.get("max_steps")
        return asked if isinstance(asked, int) and asked > 0 else 0


@dataclass(frozen=True)
class RunRecord:
    """A run; `stages` in an order in which they can have run."""

    name: str
    folder: Path
    stages: tuple[StageRecord, ...]

    def stage(self, name: str) -> StageRecord:
        return next(each for each in self.stages if each.name == name)

    def seconds_of(self, names: Sequence[str]) -> float:
        return sum(each.seconds for each in self.stages if each.name in names)

    def evaluations(self) -> list[StageRecord]:
        return [each for each in self.stages if each.manifest.get("kind") == "evaluation"]


def read_run(store: Store, run: str) -> RunRecord:
    """The run's stages. MissingInputError where there are none, ArtifactError for files that can't be read."""
    folder = store.root / run
    runs = sorted(path.name for path in store.root.glob("*") if NAME.fullmatch(path.name) and _is_run(path))
    named, _, stage = run.partition("/")
    if stage and named in runs:
        what = f"{run} is a stage, and a report is of a run"
        raise MissingInputError(what, where=str(store.root), mend=f"llmpipe report {named}")
    if (folder / MANIFEST).exists():  # named by its path
        what = f"{store.root.name}/{run} is a stage, and a report is of a run"
        raise MissingInputError(what, where=str(folder), mend=f"llmpipe report {store.root}")
    if not NAME.fullmatch(run) or not folder.is_dir():
        what = f"no run {run!r}{meant(run, runs)}"
        mend = f"runs there: {', '.join(runs)}" if runs else "llmpipe run, or --artifacts"
        raise MissingInputError(what, where=str(store.root), mend=mend)
    whole = [path.parent.name for path in sorted(folder.glob(f"*/{MANIFEST}")) if not path.parent.name.startswith(".")]
    begun = {shape["stage"] for path in sorted(folder.glob(".*")) if (shape := PARTIAL.fullmatch(path.name))}
    found = [_whole(store, run, name, name in begun) for name in whole]
    types = {each.name: each.type for each in found}
    for name in sorted(begun - {*whole}):
        path = store.unfinished(run, name)
        if path is not None and (path / "config.yaml").exists():
            found.append(_unfinished(path, name, folder, types, {*whole, *begun}))
    if not found:
        raise MissingInputError("the run has no stage yet", where=str(folder), mend="llmpipe run")
    return RunRecord(run, folder, _ordered(found))


def _is_run(folder: Path) -> bool:
    """Whether a stage lies there, finished or not."""
    return any(folder.glob(f"*/{MANIFEST}")) or any(folder.glob(".*.partial/config.yaml"))


def _whole(store: Store, run: str, name: str, is_again: bool) -> StageRecord:
    artifact = store.artifact(run, name)
    references = [each["reference"] for parents in artifact.manifest["inputs"].values() for each in parents]
    parents = dict.fromkeys(reference.removeprefix(f"{run}/") for reference in references)
    return StageRecord(
        name,
        artifact.stage,
        artifact.path,
        artifact.manifest,
        artifact.manifest["config"],
        tuple(read_rows(artifact.path / "metrics.jsonl")),
        tuple(parents),
        is_again,
    )


def _unfinished(path: Path, name: str, folder: Path, types: Mapping[str, str], names: set[str]) -> StageRecord:
    from ruamel.yaml import YAML

    config = YAML(typ="safe", pure=True).load((path / "config.yaml").read_text(encoding="utf-8")) or {}
    base = name.partition("@")[0]
    siblings = [kind for other, kind in types.items() if other.partition("@")[0] == base]
    parents = dict.fromkeys(_named_in(config, names - {name}, folder))
    rows = tuple(read_rows(path / "metrics.jsonl"))
    return StageRecord(name, siblings[0] if siblings else base, path, {}, config, rows, tuple(parents))


def _named_in(value: Any, names: set[str], folder: Path) -> Iterator[str]:
    """The stages that a config names as inputs, or whose rows it reads."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in NOT_A_PARENT:
                yield from _named_in(inner, names, folder)
    elif isinstance(value, list):
        for inner in value:
            yield from _named_in(inner, names, folder)
    elif isinstance(value, str):
        stage = Path(value).parent
        if value in names:
            yield value
        elif value.startswith("/") and stage.name in names and stage.parent.name == folder.name:
            yield stage.name


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl, none where it is missing. A last line that is being written is left out."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()  # a text would be cut at U+2028 as well
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise ArtifactError(f"no JSON ({error})", where=f"{path}:{number}", mend="run its stage again") from error
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _last(rows: Sequence[Row], name: str) -> float:
    return next((row[name] for row in reversed(rows) if row.get(name) is not None), 0)


def _ordered(stages: Sequence[StageRecord]) -> tuple[StageRecord, ...]:
    """Parents before children; beyond that by when they were published, those that have not been last."""
    left = sorted(stages, key=lambda each: (not each.is_done, each.manifest.get("created", ""), each.name))
    names = {each.name for each in left}
    done: list[StageRecord] = []
    while left:
        placed = {each.name for each in done}
        ready = next((each for each in left if {*each.parents} & names <= placed), left[0])
        done.append(ready)
        left.remove(ready)
    return tuple(done)
