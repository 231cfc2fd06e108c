"""A stage's metrics to a tracker too: accelerate's (TensorBoard, W&B, MLflow, trackio, …), or a class of the user's.

metrics.jsonl stays the truth. A tracker's run is a stage at one fingerprint: what resumes the stage goes on in the same
one, where the tracker can, and a stage that has changed begins another. A tracker that fails is told of once and left
out from then on; it never ends the stage.

    <artifacts>/<run>/.track/<stage>-<fingerprint>/     where trackers that write files write them, and started.json
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import MachineError, MissingInputError, RecipeError
from pipeline.progress import Metrics
from pipeline.reading import Document, meant
from pipeline.recipe import USER_CODE

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

PACKAGES = {
    "aim": ("aim",),
    "clearml": ("clearml",),
    "comet_ml": ("comet_ml",),
    "dvclive": ("dvclive",),
    "mlflow": ("mlflow",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
"""Tracker of accelerate -> the packages of which it needs one."""
PROJECTS = ("clearml", "comet_ml", "mlflow", "swanlab", "trackio", "wandb")
"""Trackers that are made with the name of a project, which is the run's; the others with the stage's."""
Row = Mapping[str, Any]
TRACK, STARTED = ".track", "started.json"


@dataclass(frozen=True)
class Track:
    """One tracker of a recipe."""

    name: str
    """As accelerate calls it, or `/folder/file.py:Class` of a `GeneralTracker` of the user's."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Handed to the tracker as it is made."""


def read_tracks(value: str | Sequence[str] | Mapping[str, Any] | None, document: Document) -> tuple[Track, ...]:
    """What a recipe's `track:` says. RecipeError for a tracker that accelerate has not, at its line."""
    if value is None:
        return ()
    named: Mapping[str, Any] = (
        value if isinstance(value, Mapping) else dict.fromkeys([value] if isinstance(value, str) else value)
    )
    found = []
    for number, (name, options) in enumerate(named.items()):
        key = name if isinstance(value, Mapping) else number
        found.append(Track(_known(name, document, document.place("track", key)), options or {}))
    return tuple(found)


def _known(name: str, document: Document, where: str) -> str:
    if USER_CODE.fullmatch(name):
        file, _, member = name.rpartition(":")
        path = ((Path.cwd() if document.is_set("track") else document.base) / file).resolve()
        if not path.is_file():
            raise MissingInputError(f"`track`: no file {path}", where=where)
        _check_class(path, member, where)
        return f"{path}:{member}"
    if name not in PACKAGES:
        mend = "or ./file.py:Class, a GeneralTracker of accelerate's of your own"
        raise RecipeError(f"`track`: no tracker `{name}`{meant(name, PACKAGES)}", where=where, mend=mend)
    return name


def _check_class(path: Path, name: str, where: str) -> None:
    """RecipeError where the file, which is read and not run, can't be read or gives nothing of that name."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        raise RecipeError(f"`track`: {path}:{line} is no Python ({error})", where=where) from error
    names = list(dict.fromkeys(_names(tree.body)))
    if name not in names and "*" not in names:
        classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
        mend = f"classes there: {', '.join(classes)}" if classes else "name a class of the file"
        raise RecipeError(f"`track`: {path} defines no `{name}`{meant(name, classes)}", where=where, mend=mend)


def _names(body: Sequence[ast.AST]) -> Iterator[str]:
    """What statements bind, those of an `if`, `try` or `with` too; `*` for what only an import would tell."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (each.asname or each.name for each in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif not isinstance(node, ast.expr) or isinstance(node, ast.Tuple):
            yield from _names(list(ast.iter_child_nodes(node)))


def check_packages(tracks: Sequence[Track]) -> None:
    """MachineError for a tracker whose package is not installed; asked before anything runs."""
    for track in tracks:
        packages = PACKAGES.get(track.name, ())
        if packages and not any(importlib.util.find_spec(package) for package in packages):
            extra = "llmpipe[track]" if track.name in ("tensorboard", "trackio") else packages[0]
            mend = f'pip install "{extra}", or --set track=null'
            raise MachineError(f"`{track.name}` needs the package {packages[0]}", where="track", mend=mend)


class Sender:
    """Sends the lines of one stage's metrics to its trackers. Of the main process alone."""

    def __init__(self, tracks: Sequence[Track], folder: Path, run: str, stage: str, config: Mapping[str, Any]) -> None:
        self.tracks, self.folder, self.run, self.stage, self.config = tracks, folder, run, stage, config
        self.working: dict[str, GeneralTracker] | None = None
        """None until the first line: only then is it known at which step a resumed stage goes on."""

    @contextlib.contextmanager
    def following(self, metrics: Metrics) -> Iterator[None]:
        """While it lasts, every line of the metrics is sent."""
        metrics.also = (lambda line: self.send(line, metrics.path)) if self.tracks else None
        try:
            yield
        finally:
            metrics.also = None
            self.finish()

    def send(self, line: Row, file: Path) -> None:
        """The line that metrics.jsonl, which is `file`, has just got; of its figures those that are numbers."""
        if self.working is None:
            self.working = {}
            for track in self.tracks:
                with self._surviving(track.name):
                    self.working[track.name] = self._started(track, int(line["step"]))
            if "tensorboard" in self.working:  # that it was told to forget, of a step that has two lines
                self._log("tensorboard", _before(file, line))
        for name in list(self.working):
            self._log(name, [line])

    def _log(self, name: str, lines: Sequence[Row]) -> None:
        assert self.working is not None
        with self._surviving(name):
            for line in lines:
                values = {key: value for key, value in line.items() if key != "step" and _is_number(value)}
                self.working[name].log(values, step=int(line["step"]))

    def finish(self) -> None:
        """Let every tracker write what it still holds."""
        for name, tracker in list((self.working or {}).items()):
            with self._surviving(name):
                tracker.finish()
        self.working = {}

    def _started(self, track: Track, step: int) -> GeneralTracker:
        self.folder.mkdir(parents=True, exist_ok=True)
        note = self.folder / STARTED
        before: dict[str, Any] = json.loads(note.read_text()) if note.exists() else {}
        kind = _class_of(track.name)
        options = {**resuming(track.name, self.run, self.folder.name, step, before), **track.options}
        if kind.requires_logging_directory:
            options.setdefault("logging_dir", str(self.folder.parent))
        if track.name == "dvclive":  # which knows no names: a folder of its own, in which it goes on
            options = {"dir": str(self.folder / "dvclive"), "resume": True, **options}
        first = self.run if track.name in PROJECTS else self.folder.name
        tracker: GeneralTracker = kind(first, **options)
        tracker.start()
        if track.name not in before:
            tracker.store_init_configuration(flat(self.config))
            note.write_text(json.dumps(before | {track.name: _run_id(track.name, tracker)}))
        return tracker

    @contextlib.contextmanager
    def _surviving(self, name: str) -> Iterator[None]:
        """What goes wrong inside ends this tracker and not the stage: whatever a tracker's library raises."""
        try:
            yield
        except Exception as error:
            (self.working or {}).pop(name, None)
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            print(
                f"  track: {name} failed and gets no more ({said}); metrics.jsonl has all", file=sys.stderr, flush=True
            )


def _before(file: Path, line: Row) -> list[Row]:
    """The lines of the same step that stand before the last one, which is `line`."""
    rows = [json.loads(text) for text in file.read_bytes().splitlines()[:-1]]
    return [row for row in rows if row["step"] >= line["step"]]


def _class_of(name: str) -> type[GeneralTracker]:
    if USER_CODE.fullmatch(name):
        from pipeline.usercode import load_member

        found: type[GeneralTracker] = load_member(name)
        return found
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    known: type[GeneralTracker] = LOGGER_TYPE_TO_CLASS[name]
    return known


def resuming(name: str, run: str, stage: str, step: int, before: Mapping[str, Any]) -> dict[str, Any]:
    """Options by which the tracker's run bears the stage's name, and one that was begun `before` goes on at `step`.

    stage: its name with its fingerprint, which is the same when it is resumed.
    """
    unique = hashlib.sha256(f"{run}/{stage}".encode()).hexdigest()[:32]
    if name == "tensorboard":
        return {"purge_step": step}  # what a killed run wrote behind its last checkpoint is written again
    if name == "wandb":
        return {"id": unique, "name": stage, "group": run, "resume": "allow"}
    if name == "trackio":
        return {"name": stage, "resume": "allow"}
    if name == "comet_ml":
        return {"experiment_key": unique}
    if name == "mlflow":
        return {"run_id": before[name]} if before.get(name) else {"run_name": stage}
    if name == "clearml":
        return {"project_name": run, "task_name": stage}
    if name == "swanlab":
        return {"experiment_name": stage}
    return {}


def _run_id(name: str, tracker: GeneralTracker) -> str:
    """What the tracker calls its run, where only it can say."""
    return str(tracker.tracker.info.run_id) if name == "mlflow" else ""


def flat(config: Mapping[str, Any], name: str = "") -> dict[str, str | int | float | bool]:
    """Dotted field -> a value that every tracker takes; what is not set is left out."""
    found: dict[str, str | int | float | bool] = {}
    for key, value in config.items():
        whole = f"{name}.{key}" if name else key
        if isinstance(value, Mapping):
            found |= flat(value, whole)
        elif isinstance(value, str | int | float | bool):
            found[whole] = value
        elif value is not None:
            found[whole] = json.dumps(value)
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
