"""Whether a model was trained on what a task of the user's own asks: said, and never a figure.

Looked at are the local files that the stages a model goes back to were given as `data`, where they still lie there. A
row of the task counts as seen where its question is one of the texts of a training row, whatever its case and spaces,
or where question, choices or reference share a run of 13 words with one (Brown et al. 2020, appendix C;
`data/duplicates.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.artifacts import Artifact
from pipeline.data.duplicates import shared_runs
from pipeline.data.files import ROWS, file_rows, kind, read_text
from pipeline.data.hub_rows import HUB
from pipeline.data.sources import BUILT_IN, local_files
from pipeline.errors import PipelineError
from pipeline.evals.own_tasks import OwnTask
from pipeline.evals.spent import lineage
from pipeline.recipe import DataEntry

MOST = 2**26
"""Bytes of a source's files that are looked through (64 MB); a larger one is said not to be."""


def note(tasks: Sequence[OwnTask], models: Sequence[Artifact], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """What was seen, said and returned, a row for each task and source of data: task, stage, source, seen, of."""
    asked = {own.name: own for own in tasks if own.questions or own.exercises}
    stages = {each.fingerprint: each for model in models for each in lineage(model)[0]} if asked else {}
    found = []
    looked: set[tuple[str, ...]] = set()
    for stage in stages.values():
        for source, files in _sources(stage):
            key = tuple(map(str, files))
            if not files or key in looked:
                continue
            looked.add(key)
            size = sum(file.stat().st_size for file in files)
            if size > MOST:
                say(f"{source}: {size / 2**20:.0f} MB of training data, not looked through for what is asked")
                continue
            corpus = list(_texts(files))
            for name, own in asked.items():
                count, total = len(_seen(own, corpus)), len(own.questions) + len(own.exercises)
                if count:
                    say(
                        f"{name}: {count:,} of {total:,} rows stand in what {stage.reference} was trained on ({source})"
                    )
                row = {"task": name, "stage": stage.reference, "source": source, "seen": count, "of": total}
                found.append(row)
    return found


def _sources(stage: Artifact) -> Iterator[tuple[str, list[Path]]]:
    """The sources of the stage's `data` that are local files, of those that are there."""
    for values in stage.manifest.get("config", {}).get("data") or ():
        source = values.get("source", "") if isinstance(values, dict) else ""
        if source and source not in BUILT_IN and not source.startswith(HUB):
            try:
                yield Path(source).name, local_files(DataEntry.model_validate(values))
            except (PipelineError, ValueError):
                continue  # they lie there no more, or are another release's


def _texts(files: Sequence[Path]) -> Iterator[list[str]]:
    """The texts of every row, or of every file that is a text."""
    for file in files:
        try:
            if kind(file) in ROWS:
                for row, _ in file_rows(file, bad=lambda error: None):
                    yield list(_leaves(row))
            else:
                yield [read_text(file)]
        except PipelineError:
            continue  # a broken file has been told of by the stage that reads it


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _leaves(each)


def _seen(own: OwnTask, corpus: Sequence[Sequence[str]]) -> set[int]:
    """The places of the task's rows that stand in the corpus."""
    texts = [[each.text, *each.choices] for each in own.questions] or [
        [each.text, each.reference] for each in own.exercises
    ]
    known = {_plain(text) for parts in corpus for text in parts}
    same = {place for place, parts in enumerate(texts) if _plain(parts[0]) in known}
    return same | set(shared_runs(texts, corpus).matches)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
