"""What of a tokenize stage that was broken off is on disk, so that the same command goes on from there.

    begun.json      what it was begun with: other data or other libraries begin anew
    survey.jsonl    a line a unit of the corpus: its counts, what it gives to the tokenizer's sample, its bad rows
    ../model/       the tokenizer: there when it is whole
    written.json    how far the token files are written

After a kill a line that is torn, and what a token file has beyond `written.json`, is dropped. The passes save every
SECONDS_BETWEEN_SAVES, and not at all where they take no longer.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.artifacts import write_json
from pipeline.data.corpus import LeftOut, Sample, Survey
from pipeline.data.passes import SIDES, Files
from pipeline.data.shards import Source
from pipeline.data.units import Unit
from pipeline.hashes import digest

SECONDS_BETWEEN_SAVES = 20.0
LIBRARIES = ("tokenizers", "tiktoken", "transformers")
"""Whose release may change a token."""


class Begun:
    """The folder of one stage: `out`, with what is kept in its `checkpoints`."""

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, out / "checkpoints"
        self.model = out / "model"
        self.log, self.mark = self.folder / "survey.jsonl", self.folder / "written.json"
        self.waiting: list[tuple[Survey, float]] = []
        self.saved = time.monotonic()

    def check(self, units: Sequence[Unit], others: Any) -> bool:
        """Whether what is there was begun with the same; drops it where it was not."""
        key = digest([[unit.content() for unit in units], others, [version(name) for name in LIBRARIES]])
        file = self.folder / "begun.json"
        there = json.loads(file.read_text())["key"] if file.exists() else None
        if there != key:
            for path in (self.folder, self.model):
                shutil.rmtree(path, ignore_errors=True)
            self.folder.mkdir(parents=True)
            write_json(file, {"key": key})
        for path in self.folder.glob("parts-*"):  # of workers that were killed
            shutil.rmtree(path, ignore_errors=True)
        return there in (None, key)

    def forget(self) -> None:
        """The next try begins anew."""
        (self.folder / "begun.json").unlink()

    def is_due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self.saved >= SECONDS_BETWEEN_SAVES

    # The first pass.

    def survey(self, limit: int) -> tuple[Survey, float]:
        """The units that were looked through, and the seconds it took."""
        survey, seconds, good = Survey(Sample(limit)), 0.0, 0
        if not self.log.exists():
            return survey, seconds
        with self.log.open("rb") as file:
            for line in file:
                try:
                    found = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    found = None
                if found is None:
                    break
                sample = Sample(limit, found["threshold"], texts=found["texts"])
                unit = Survey(sample, *found["counts"], pieces=None)
                unit.left_out = {source: LeftOut(*bad) for source, *bad in found.get("bad", [])}
                survey.add_unit(unit)
                seconds, good = found["seconds"], good + len(line)
        os.truncate(self.log, good)
        return survey, seconds

    def looked_through(self, unit: Survey, seconds: float) -> None:
        """One more unit, `seconds` of work after the stage's begin; written when it is time."""
        self.waiting.append((unit, seconds))
        if self.is_due():
            self.save_survey()

    def save_survey(self) -> None:
        """What waits is on disk when this returns."""
        with self.log.open("a", encoding="utf-8") as file:
            for unit, seconds in self.waiting:
                sample = unit.sample
                line = {"counts": unit.counts, "threshold": sample.threshold, "seconds": seconds}
                line |= {"bad": [[source, *bad] for source, bad in unit.left_out.items()]} if unit.left_out else {}
                file.write(json.dumps(line | {"texts": sample.texts}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.waiting, self.saved = [], time.monotonic()

    # The tokenizer.

    def save_model(self, made: Path) -> None:
        """The folder `made` is whole and becomes the stage's model."""
        for path in (*made.iterdir(), made):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        made.rename(self.model)

    # The second pass.

    def written(self) -> tuple[list[list[Source]] | None, float]:
        """What had been written of each source to each side, and the seconds it took."""
        if not self.mark.exists():
            return None, 0.0
        found = json.loads(self.mark.read_text())
        return [[Source(**source) for source in found[side]] for side in SIDES], found["seconds"]

    def forget_written(self) -> None:
        """The token files begin anew."""
        self.mark.unlink(missing_ok=True)

    def parts(self) -> Path:
        """A folder for what this process's workers write."""
        return self.folder / f"parts-{os.getpid()}"

    def save_written(self, files: Files, seconds: float) -> None:
        """The token files are on disk as far as they are written when this returns."""
        sides = zip(SIDES, (files.train.sync(), files.valid.sync()), strict=True)
        write_json(
            self.mark, {side: [asdict(source) for source in sources] for side, sources in sides} | {"seconds": seconds}
        )
        self.saved = time.monotonic()
