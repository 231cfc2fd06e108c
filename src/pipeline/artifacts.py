"""The store: whole artifacts or none, whatever dies in between.

    <root>/<run>/<stage>/                           an artifact; its manifest.json was written last
    <root>/<run>/.<stage>.<fingerprint>.partial/    where the stage works and resumes from
    <root>/<run>/.<stage>.<fingerprint>.old/        the artifact that a publication is replacing
    <root>/<run>/.<stage>.lock                      held (flock) by whoever works on the stage

Publishing: everything is synced to disk, the manifest is written, the old artifact is moved aside, the partial folder
takes its name, the old one goes. Killed between any two of these, `heal` (run by the next holder of the lock) finishes
or undoes it. The kernel drops a dead holder's lock. Needs no torch.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ArtifactError, ConfigError, MachineError, MismatchError, MissingInputError
from pipeline.hashes import digest, sha256, template_hash, tokenizer_hash
from pipeline.hub import hub_weights
from pipeline.recipe import NAME, STAGE_NAME

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
BEGUN = "begun.json"
"""In a partial folder: of what a stage began to be made."""
NOT_OF_THE_ARTIFACT = ("checkpoints",)


@dataclass(frozen=True)
class Artifact:
    """A whole artifact of the store, or a model folder from outside (then `manifest` is empty)."""

    reference: str
    path: Path
    kind: str
    fingerprint: str
    manifest: Mapping[str, Any]
    adapter: Path | None = None
    """A peft folder that is still to be merged into the model (`pipeline.adapted`)."""

    @property
    def model(self) -> Path:
        """The Hugging Face folder: weights, tokenizer, chat template."""
        return self.path / "model" if self.manifest else self.path

    @property
    def stage(self) -> str:
        """The type of the stage that made it (`sft`), empty for a model from outside."""
        return str(self.manifest.get("stage", ""))

    @property
    def tokenizer_hash(self) -> str:
        return tokenizer_hash(self.model)

    @property
    def template_hash(self) -> str:
        return template_hash(self.model)


class Store:
    """All artifacts under one root."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def folder(self, run: str, stage: str) -> Path:
        """Where the artifact lies; ConfigError for a name that could leave the root."""
        for name, shape in ((run, NAME), (stage, STAGE_NAME)):
            if not shape.fullmatch(name):
                raise ConfigError(f"{name!r} is no name of a run or stage", where=str(self.root))
        return self.root / run / stage

    def find(self, run: str, stage: str) -> Artifact | None:
        """The artifact, or None where there is no whole one."""
        path = self.folder(run, stage)
        return read_artifact(path, f"{run}/{stage}") if (path / MANIFEST).exists() else None

    def artifact(self, run: str, stage: str) -> Artifact:
        """The artifact; ArtifactError where there is no whole one."""
        found = self.find(run, stage)
        if found is None:
            raise ArtifactError(f"no artifact {run}/{stage}", where=str(self.root), mend="llmpipe status")
        return found

    def resolve(self, reference: str) -> Artifact:
        """The artifact or outside model that `run/stage`, a path or `hub:org/name` names."""
        if reference.startswith("hub:"):
            return hub_model(reference)
        if reference.startswith(("./", "../", "/")):
            return outside_model(Path(reference).absolute())
        run, _, stage = reference.partition("/")
        if not stage:
            raise ConfigError(f"{reference!r} is no reference", mend="write run/stage, ./folder or hub:org/name")
        return self.artifact(run, stage)

    def resolve_or_unfinished(self, reference: str) -> Artifact | Path:
        """As `resolve`; for a stage that has not finished, the folder it works in."""
        run, slash, stage = reference.partition("/")
        is_name = bool(slash) and NAME.fullmatch(run) is not None and STAGE_NAME.fullmatch(stage) is not None
        if is_name and self.find(run, stage) is None:
            begun = self.unfinished(run, stage)
            if begun is not None:
                return begun
        return self.resolve(reference)

    def unfinished(self, run: str, stage: str) -> Path | None:
        """The newest folder in which the stage has begun to work; None where there is none."""
        return max(_siblings(self.folder(run, stage), "partial"), key=_begun_at, default=None)

    def partial_path(self, run: str, stage: str, fingerprint: str) -> Path:
        """Where the stage works, whether it has begun or not."""
        return self.folder(run, stage).parent / f".{stage}.{fingerprint[:16]}.partial"

    def partial(self, run: str, stage: str, fingerprint: str) -> Path:
        """The folder in which the stage works, made if need be."""
        path = self.partial_path(run, stage, fingerprint)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def holder(self, run: str, stage: str) -> str | None:
        """Who works on the stage at this moment (`process 12 on host`); None where nobody does."""
        return _holder(self.folder(run, stage).parent / f".{stage}.lock")

    @contextmanager
    def hold(self, run: str, stage: str, waiting: Callable[[str], None]) -> Iterator[None]:
        """Hold the stage's lock; `waiting` is told once who has it. Heals a half-done publication."""
        path = self.folder(run, stage).parent / f".{stage}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting(os.read(descriptor, 200).decode() or "another process")
                while not _try_lock(descriptor):
                    time.sleep(0.2)
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
            self.heal(run, stage)
            yield
        finally:
            os.close(descriptor)

    def publish(self, partial: Path, run: str, stage: str, manifest: Mapping[str, Any]) -> Artifact:
        """Make `partial` the artifact. Call on rank 0, after a barrier, with the lock held."""
        files = {str(p.relative_to(partial)): p for p in _files(partial)}
        for path in files.values():
            path.chmod(0o644)  # safetensors writes 0600, which another user of the store could not read
        for path in {*files.values(), *(path.parent for path in files.values())}:
            _sync(path)
        listed = {name: {"sha256": sha256(path), "bytes": path.stat().st_size} for name, path in files.items()}
        write_json(partial / MANIFEST, {**manifest, "schema_version": SCHEMA_VERSION, "files": listed})
        self._swap(partial, run, stage)
        return self.artifact(run, stage)

    def _swap(self, partial: Path, run: str, stage: str) -> None:
        final = self.folder(run, stage)
        if final.exists():
            old = json.loads((final / MANIFEST).read_text())["fingerprint"] if (final / MANIFEST).exists() else "none"
            aside = final.parent / f".{stage}.{old[:16]}.old"
            shutil.rmtree(aside, ignore_errors=True)
            final.rename(aside)
        partial.rename(final)
        _sync(final.parent)
        self._tidy(run, stage)

    def heal(self, run: str, stage: str) -> None:
        """Finish or undo a publication that was cut off. Call with the lock held."""
        final = self.folder(run, stage)
        for partial in _siblings(final, "partial"):
            if (partial / MANIFEST).exists():
                self._swap(partial, run, stage)
        for aside in _siblings(final, "old"):
            if not final.exists():
                aside.rename(final)
        self._tidy(run, stage)

    def _tidy(self, run: str, stage: str) -> None:
        """Drop what a publication leaves behind: the artifact it replaced, and the checkpoints."""
        final = self.folder(run, stage)
        for aside in _siblings(final, "old"):
            shutil.rmtree(aside)
        for name in NOT_OF_THE_ARTIFACT if (final / MANIFEST).exists() else ():
            shutil.rmtree(final / name, ignore_errors=True)

    def bless(self, artifact: Artifact, fingerprint: str, why: str) -> Artifact:
        """Let `artifact` stand for `fingerprint` too (`--keep`), on its own record."""
        record = {"fingerprint": fingerprint, "why": why, "time": now()}
        manifest = dict(artifact.manifest) | {"blessed": [*artifact.manifest.get("blessed", []), record]}
        write_json(artifact.path / MANIFEST, manifest)
        return read_artifact(artifact.path, artifact.reference)

    def garbage(self) -> list[tuple[Path, int, str]]:
        """Folders that nothing uses: (path, bytes, why). One that a live process works in is left out."""
        found = []
        for path in sorted(self.root.glob("*/.*")):
            name, _, end = path.name[1:].rpartition(".")
            if end not in ("partial", "old") or _holder(path.parent / f".{name.rpartition('.')[0]}.lock"):
                continue
            why = "an unfinished stage that would be resumed" if end == "partial" else "a replaced artifact"
            found.append((path, sum(p.stat().st_size for p in path.rglob("*") if p.is_file()), why))
        return found


def read_artifact(path: Path, reference: str) -> Artifact:
    """The artifact in folder `path`; ArtifactError for a manifest that cannot be read."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["schema_version"] > SCHEMA_VERSION:
            raise ArtifactError("written by a newer llmpipe", where=str(path), mend="pip install -U llmpipe")
        return Artifact(reference, path, manifest["kind"], manifest["fingerprint"], manifest)
    except (OSError, ValueError, KeyError) as error:
        mend = f"rm -r {path}, and run its stage again"
        raise ArtifactError(f"broken manifest ({error!r})", where=str(path / MANIFEST), mend=mend) from error


def write_begun(partial: Path, stage: str, parts: Mapping[str, Any]) -> None:
    """Note of what a stage begins to be made, so that an unfinished one can say why it is not gone on from."""
    write_json(partial / BEGUN, {"stage": stage, "parts": parts})


def read_begun(partial: Path) -> dict[str, Any] | None:
    """What `write_begun` noted; None where there is nothing that can be read."""
    try:
        found: dict[str, Any] = json.loads((partial / BEGUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def changed_files(artifact: Artifact) -> list[str]:
    """The files of the artifact that are missing or whose bytes have changed, re-read from disk."""
    wrong = []
    for name, listed in artifact.manifest["files"].items():
        path = artifact.path / name
        if not path.exists():
            wrong.append(f"{name}: missing")
        elif sha256(path, cached=False) != listed["sha256"]:
            wrong.append(f"{name}: bytes changed")
    return wrong


def outside_model(path: Path) -> Artifact:
    """A model folder of Hugging Face's layout, or another store's artifact, by its path."""
    if (path / MANIFEST).exists():
        return read_artifact(path, str(path))
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        mend = f"llmpipe export {path} --to merged --out {path}-merged, and name that folder"
        raise MissingInputError("an adapter without the model it stands on", where=str(path), mend=mend)
    if not (path / "config.json").exists():
        is_gguf = path.suffix == ".gguf" or any(path.glob("*.gguf"))
        mend = "a GGUF file is converted into such a folder once: docs/base-models.md" if is_gguf else ""
        what = "no model folder: it has neither manifest.json nor config.json"
        raise MissingInputError(what, where=str(path), mend=mend)
    architectures = json.loads((path / "config.json").read_text()).get("architectures") or [""]
    kind = "reward-model" if architectures[0].endswith("ForSequenceClassification") else "causal-lm"
    return Artifact(str(path), path, kind, content_hash(path), {})


def runs_code_of(model: Path) -> bool:
    """Whether code that a model's folder brings along is run: only in an artifact, or where a stage works on one, where
    it came from the user's own file. Raises MismatchError where another folder needs such code."""
    config = model / "config.json"
    if not config.exists() or "auto_map" not in json.loads(config.read_text(encoding="utf-8")):
        return False
    is_at_work = any(folder.suffix == ".partial" for folder in list(model.parents)[:2])
    if not is_at_work and not (model.parent / MANIFEST).exists():
        raise MismatchError(
            "the model needs code that its folder brings along, which is not run",
            where=str(model),
            mend="read the code; then name its class as pretrain's `model.architecture`, or convert the model",
        )
    return True


def hub_model(reference: str) -> Artifact:
    """A model of the hub, from the local cache if it is there; MissingInputError where it cannot be had."""
    folder = hub_weights(reference)
    name = reference.removeprefix("hub:").partition("@")[0]
    return Artifact(reference, folder, outside_model(folder).kind, digest(["hub", name, folder.name]), {})


def content_hash(path: Path) -> str:
    """Hash of a file, or of a folder's names and contents; where it lies does not count."""
    if path.is_file():
        return sha256(path)
    return digest([[str(p.relative_to(path)), sha256(p)] for p in _files(path)])


def write_json(path: Path, value: Any) -> None:
    """Write whole or not at all, and on disk when it returns."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync(path.parent)


def now() -> str:
    """The time in UTC, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def need_disk(folder: Path, bytes_needed: int, what: str) -> None:
    """MachineError before the work starts, rather than a full disk in the middle of it."""
    free = shutil.disk_usage(folder).free
    if free < bytes_needed:
        raise MachineError(
            f"{what} needs {bytes_needed / 1e6:,.0f} MB of disk, {free / 1e6:,.0f} MB are free",
            where=str(folder),
            mend="free some (`llmpipe gc`), or --artifacts on another disk",
        )


def _siblings(final: Path, end: str) -> list[Path]:
    """The artifact's `.<stage>.<fingerprint>.<end>` folders, not those of a stage whose name begins like its."""
    shape = re.compile(rf"\.{re.escape(final.name)}\.[^.]+\.{end}")
    return [path for path in final.parent.glob(".*") if shape.fullmatch(path.name)]


def _files(folder: Path) -> list[Path]:
    """The files of an artifact, sorted; checkpoints and the manifest itself are no part of it."""
    kept = []
    own = (MANIFEST, f".{MANIFEST}.tmp", f".{BEGUN}.tmp")  # the last are what a kill in `write_json` leaves
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and parts[0] not in (*NOT_OF_THE_ARTIFACT, *own):
            kept.append(path)
    return kept


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(lock: Path) -> str | None:
    """What the lock's holder wrote into it; None where it is free. A shared lock asks, so that a store that may only be
    read can be asked too."""
    if not lock.exists():
        return None
    descriptor = os.open(lock, os.O_RDONLY)
    try:
        if _try_lock(descriptor, fcntl.LOCK_SH):
            return None
        return os.read(descriptor, 200).decode() or "another process"
    finally:
        os.close(descriptor)


def _begun_at(partial: Path) -> float:
    """When a stage last began to work in the folder: its config is written then."""
    config = partial / "config.yaml"
    return max(each.stat().st_mtime for each in (partial, config) if each.exists())
