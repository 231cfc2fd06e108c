"""The files that a stage's config names, where they lie: data entries, and the user's own.

Paths of a recipe start at its folder, those of `--set` at the current one. Rows that a stage of the recipe writes are
named by the stage.
"""

from __future__ import annotations

import glob
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pipeline.data.hub_rows import HUB
from pipeline.data.sources import BUILT_IN
from pipeline.errors import MissingInputError, RecipeError
from pipeline.evaluation_config import Task, check_names, with_files
from pipeline.reading import Document, Key
from pipeline.recipe import USER_CODE, DataEntry, is_data, is_section_list
from pipeline.trainer_config import TrainerConfig
from pipeline.trainer_options import with_files_read
from pipeline.unroll import carry_key, meaning


def written_by(config: BaseModel, rows: Mapping[str, str]) -> dict[str, str]:
    """Of the config's data sources those that a stage writes, with that stage; `rows`: stage -> the file it writes."""
    stage_of = {path: name for name, path in rows.items()}
    fields = [name for name in type(config).model_fields if is_data(type(config), name)]
    sources = [entry.source for name in fields for entry in getattr(config, name) or ()]
    return {source: stage_of[source] for source in sources if source in stage_of}


def absolute_paths(
    document: Document, key: Key, config: BaseModel, rows: Mapping[str, str], roles: Collection[str] = ()
) -> dict[str, Any]:
    """The config's data entries and user files, those of its sections too, with absolute paths.

    `rows`: stage of the recipe -> the file of rows that it writes. Raises MissingInputError where nothing is there.
    """
    updates: dict[str, Any] = {}
    if isinstance(config, Task):
        base = Path.cwd() if any(document.is_set(*key, name) for name in ("task", "data")) else document.base
        return vars(with_files(config, base, document.place(*key)))
    for name in type(config).model_fields:
        value, place = getattr(config, name), (*key, name)
        if is_data(type(config), name) and value:
            updates[name] = tuple(
                found for i, entry in enumerate(value) for found in _entries(document, (*place, i), entry, rows)
            )
        elif isinstance(value, BaseModel):
            updates[name] = value.model_copy(update=absolute_paths(document, place, value, rows))
        elif is_section_list(value):
            updates[name] = tuple(
                section.model_copy(update=absolute_paths(document, (*place, i), section, rows))
                for i, section in enumerate(value)
            )
            check_names([each for each in updates[name] if isinstance(each, Task)], document.place(*place))
        elif isinstance(value, str) and USER_CODE.fullmatch(value) and name not in roles:
            file, _, member = value.rpartition(":")
            updates[name] = f"{_file(document, place, file)}:{member}"
        elif isinstance(value, Path):
            updates[name] = _file(document, place, str(value))
        elif isinstance(config, TrainerConfig) and name == "trainer":
            updates[name] = with_files_read(value, partial(_option_file, document, place))
    return updates


def _option_file(document: Document, place: Key, key: str, file: str) -> Path:
    return _file(document, (*place, key), file)


def _file(document: Document, key: Key, file: str) -> Path:
    base = Path.cwd() if document.is_set(*key) else document.base
    path = (base / file).resolve()
    if not path.is_file():
        raise MissingInputError(f"`{key[-1]}`: no file {path}", where=document.place(*key))
    return path


def _entries(document: Document, key: Key, entry: DataEntry, rows: Mapping[str, str]) -> Iterator[DataEntry]:
    """The entry as it is meant in its stage: with a name of its round, or one for each of several stages of rows."""
    found = meaning(document, str(key[1]), entry.source)
    is_rows = all(source in rows for source in found)
    is_outside = found[0] not in document.values["stages"]  # what `carry` names, or a path as it was written
    at: Key = (*key, "source")
    carried = carry_key(document.scopes[str(key[1])], entry.source) if str(key[1]) in document.scopes else at
    at = carried if document.is_set(*carried) else at
    for source in found if is_rows or is_outside else (entry.source,):
        yield _entry(document, at, entry.model_copy(update={"source": source}), rows)


def _entry(document: Document, at: Key, entry: DataEntry, rows: Mapping[str, str]) -> DataEntry:
    """The entry with an absolute path; `at` is the key of what names its source."""
    if entry.source in BUILT_IN or entry.source.startswith(HUB):
        return entry
    where = document.place(*at)
    base = Path.cwd() if document.is_set(*at) else document.base
    path = str((base / Path(entry.source).expanduser()).absolute())
    if entry.source in rows:
        if Path(path).exists():
            what = f"`{entry.source}` is a stage of the recipe and a file beside it"
            raise RecipeError(what, where=where, mend=f"./{entry.source} for the file, or another name for the stage")
        return entry.model_copy(update={"source": rows[entry.source]})
    if not Path(path).exists() and not glob.glob(path, recursive=True):
        mend = f"hub:{entry.source} for a dataset of the hub" if entry.source.count("/") == 1 else ""
        raise MissingInputError(f"no file or folder {path}", where=where, mend=mend)
    return entry.model_copy(update={"source": path})
