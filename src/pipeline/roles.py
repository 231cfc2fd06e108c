"""What a stage's role takes: the kinds that fit it, and the artifact a reference is to it.

A role of kind `tokenizer` takes any folder that holds one: a tokenizer alone, a model, what a tokenize stage made. Of a
folder or a hub name from outside only the tokenizer's files are looked at, counted in the fingerprint and fetched.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.adapted import adapted_model, is_adapter
from pipeline.artifacts import MANIFEST, Artifact, Store
from pipeline.errors import MissingInputError
from pipeline.hashes import digest, sha256
from pipeline.hub import hub_folder

TOKENIZER = "tokenizer"
MODEL = "causal-lm"
ROWS = "rows.jsonl"
HOLD_A_TOKENIZER = ("tokens", "causal-lm", "reward-model")

VOCABULARY = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken")
"""One of these makes a tokenizer; what has no tokenizer.json is converted as it is read."""
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.*")
CONFIG = "config.json"  # of the model; says of which class the tokenizer is where its own settings don't

NO_TOKENIZER = "name what holds one: a folder with tokenizer.json, a model, a tokenize stage, hub:org/name"


def rows_of(store: Store, run: str, stage: str) -> Path:
    """The file that a stage of kind `rows` writes: what another stage's `data: [{source: STAGE}]` reads."""
    return store.folder(run, stage) / ROWS


def fits(kind: str, found: str) -> bool:
    """Whether a role of `kind` takes an artifact of the kind `found`."""
    return found == kind or (kind == TOKENIZER and found in HOLD_A_TOKENIZER)


def input_of(store: Store, reference: str, kind: str) -> Artifact:
    """What `run/stage`, a path or `hub:org/name` is to a role of `kind`. MissingInputError where it is not there.

    A language model may be an adapter's folder, with the base that it names. An artifact counts by its own fingerprint,
    even if it is taken for its tokenizer alone.
    """
    if kind != TOKENIZER:
        path = Path(reference).absolute()
        is_path = reference.startswith(("./", "../", "/"))
        return adapted_model(path) if is_path and kind == MODEL and is_adapter(path) else store.resolve(reference)
    if reference.startswith("hub:"):
        folder = hub_folder(reference, VOCABULARY, (*VOCABULARY, *SETTINGS, CONFIG))
        return Artifact(reference, folder, TOKENIZER, tokenizer_fingerprint(folder), {})
    path = Path(reference).absolute()
    if reference.startswith(("./", "../", "/")) and not (path / MANIFEST).exists():
        _need_vocabulary(path)
        return Artifact(str(path), path, TOKENIZER, tokenizer_fingerprint(path), {})
    found = store.resolve(reference)
    if fits(kind, found.kind):
        _need_vocabulary(found.model)
    return found


def to_talk_to(store: Store, reference: str) -> Artifact | Path:
    """A language model, which may be an adapter's folder; of a stage that has not finished, the folder it works in."""
    if reference.startswith(("./", "../", "/")):
        return input_of(store, reference, MODEL)
    return store.resolve_or_unfinished(reference)


def tokenizer_fingerprint(folder: Path) -> str:
    """Hash of the tokenizer's files by name and content; weights and where the folder lies don't count."""
    files = [[path.name, sha256(path)] for path in sorted(_files(folder))]
    config = folder / CONFIG
    values: dict[str, Any] = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    return digest([files, values.get("model_type"), values.get("tokenizer_class")])


def _files(folder: Path) -> Iterator[Path]:
    for pattern in (*VOCABULARY, *SETTINGS):
        yield from folder.glob(pattern)


def _need_vocabulary(folder: Path) -> None:
    if not any(any(folder.glob(pattern)) for pattern in VOCABULARY):
        what = "no tokenizer: it has no tokenizer.json" if folder.is_dir() else "no folder that holds a tokenizer"
        raise MissingInputError(what, where=str(folder), mend=NO_TOKENIZER)
