"""The text that a stage trained on, as token ids with a name for each piece: its shards, or its rows.

Of shards, the documents that the run read, where that can be worked out from its config; of rows, those it could draw.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from pipeline.artifacts import Artifact, Store
from pipeline.data.formats import COMPARED, placed_rows
from pipeline.data.messages import Message, words
from pipeline.data.nearest import Near, nearest
from pipeline.data.placed import Placed
from pipeline.data.samples import Packed, Shares, run_samples
from pipeline.data.shards import TokenFile
from pipeline.data.sources import BUILT_IN, read_options, source_fingerprint
from pipeline.data.survey import format_of
from pipeline.data.tokenizers import plain_text
from pipeline.errors import PipelineError
from pipeline.evals.ancestors import LeftOut, recorded_input
from pipeline.hashes import digest, sha256
from pipeline.recipe import DataEntry

SHOWN = 24
"""Tokens of a document that are shown on either side of what it shares."""
MOST_SAMPLES = 50_000
"""Samples of a run whose documents are looked up: a tenth of a millisecond each."""


@dataclass(frozen=True)
class Row:
    """A piece of training text that shares words with the answer."""

    where: str
    """Document of a token file, or file and line."""
    side: str
    """What the text was: `document`, `answer`, `chosen`, `rejected`, …"""
    score: float
    shared: str
    """The longest run of tokens that both have."""
    text: str
    """The row, or a document around that run."""
    prompt: str = ""
    """What the row answers."""


@dataclass
class Text:
    """What a stage learnt from."""

    rows: list[Row] = field(default_factory=list)
    is_searched: bool = False
    notes: list[str] = field(default_factory=list)
    """What has to be known to read them: whose data it is, what is missing."""


@dataclass(frozen=True)
class Asked:
    """The answer as tokens, and which of them are looked for."""

    ids: Sequence[int]
    is_sought: Sequence[bool]
    tokenizer: PreTrainedTokenizerFast
    count: int


def nearest_rows(artifact: Artifact, asked: Asked, store: Store) -> Text:
    """The rows of what `artifact` was trained on that share most with the sought tokens of the answer.

    ppo writes its own answers and is told what they are worth: of it, the rows its reward models were trained on.
    """
    text = Text()
    inputs: Mapping[str, list[dict[str, str]]] = artifact.manifest.get("inputs", {})
    if not artifact.manifest:
        text.notes.append("a model from outside: what it was trained on is not known")
    elif inputs.get("tokens"):
        _shards(text, artifact, inputs["tokens"][0], asked, store)
    elif any(role.startswith("reward") for role in inputs):
        rewards = [each for role, found in inputs.items() if role.startswith("reward") for each in found]
        names = ", ".join(each["reference"] for each in rewards)
        own = "it learnt from its own answers"
        text.notes.append(f"{own}; these are rows its reward model {names} was trained on" if names else own)
        for each in rewards:
            found = recorded_input(artifact, each, store)
            if isinstance(found, LeftOut):
                text.notes.append(f"{found.reference}: {found.why}")
            else:
                _rows(text, found, asked, store)
    else:
        _rows(text, artifact, asked, store)
    text.rows = sorted(text.rows, key=lambda row: -row.score)[: asked.count]
    if text.is_searched and not text.rows:
        text.notes.append("no row shares two tokens in a row with what it raised")
    return text


def _shards(text: Text, artifact: Artifact, recorded: dict[str, str], asked: Asked, store: Store) -> None:
    found = recorded_input(artifact, recorded, store)
    if isinstance(found, LeftOut):
        text.notes.append(f"{found.reference}: {found.why}")
        return
    try:
        file = TokenFile(found.path / "train.ds")
        read = documents_read(artifact, file)
    except PipelineError as error:
        text.notes.append(f"{found.reference}: {error.what}")
        return
    is_read_D = None
    if read is None:
        text.notes.append("of all documents: which of them the run read is not known")
    else:
        is_read_D = np.zeros(file.metadata.documents, dtype=bool)
        is_read_D[read] = True
        text.notes.append(f"of the {len(read):,} documents that the run read, whole or in part, of {len(is_read_D):,}")
    vocabulary = file.metadata.vocab_size
    text.is_searched = True
    for each in nearest(file.tokens, file.ends, asked.ids, asked.is_sought, vocabulary, asked.count, is_read_D):
        ids = file.document(each.document)[:-1].tolist()
        source = next(s.label for i, s in enumerate(file.metadata.sources) if each.document in file.documents_of(i))
        where = f"{found.reference}/train.ds document {each.document + 1:,} ({source})"
        text.rows.append(_row(where, "document", each, ids, asked))


def documents_read(artifact: Artifact, file: TokenFile) -> list[int] | None:
    """The documents that the samples of a pretrain run reach into, rising: a pure function of its config. None where
    that is too long a list, or the stage is not pretrain or has another version's config."""
    config: Mapping[str, Any] = artifact.manifest["config"]
    needed = ("context_length", "packing", "document_mask", "mixture", "max_epochs", "anneal", "max_steps", "seed")
    if artifact.stage != "pretrain" or any(name not in config for name in needed):
        return None
    batch = config["per_device_train_batch_size"] * config["gradient_accumulation_steps"]
    if config["max_steps"] * batch > MOST_SAMPLES:
        return None
    late = config["anneal"] or {"share": 0.0, "mixture": None}
    shares = Shares(config["mixture"], config["max_epochs"], late["share"], late["mixture"])
    packed = Packed(config["context_length"], config["packing"], config["document_mask"])
    samples = run_samples(file, packed, shares, config["max_steps"], batch, config["seed"])
    return samples.order.documents(range(config["max_steps"] * batch))


def _rows(text: Text, artifact: Artifact, asked: Asked, store: Store) -> None:
    """The nearest answers in the rows that the artifact's config names."""
    config: Mapping[str, Any] = artifact.manifest["config"]
    written = [recorded_input(artifact, each, store) for each in artifact.manifest["inputs"].get("data", [])]
    text.notes += [f"{each.reference}: {each.why}" for each in written if isinstance(each, LeftOut)]
    epochs = artifact.manifest.get("metrics", {}).get("epochs", 1.0)
    if epochs < 1:
        text.notes.append(f"of all its rows, of which it read {epochs:.0%}")
    made = [] if written else artifact.manifest["parts"]["data"].get("data", [])
    for number, given in enumerate(config.get("data") or []):
        entry = DataEntry.model_validate(given)
        try:
            if number < len(made) and not _is_unchanged(entry, made[number]):
                text.notes.append(f"{entry.source}: changed since, and looked at as it is now")
            rows = list(_answers(entry, artifact.stage, config.get("held_out") or 0.0))
        except PipelineError as error:
            text.notes.append(f"{entry.source}: {error.what}")
            continue
        backend = plain_text(asked.tokenizer).prefixed
        encoded = [each.ids for each in backend.encode_batch_fast([row.text for row in rows], add_special_tokens=False)]
        text.is_searched = True
        if not encoded:
            continue
        ends = np.cumsum([len(ids) for ids in encoded])
        tokens = np.concatenate([np.array(ids, dtype=np.int64) for ids in encoded])
        for each in nearest(tokens, ends, asked.ids, asked.is_sought, len(asked.tokenizer), asked.count):
            row = rows[each.document]
            text.rows.append(_row(row.where, row.side, each, encoded[each.document], asked, row.prompt))


def _is_unchanged(entry: DataEntry, made: str) -> bool:
    """Whether the source holds what it held when the stage ran (as `lineage` counts it)."""
    options = read_options(entry)
    return digest({"content": source_fingerprint(entry, hash_file=sha256), "options": options}) == made


def _answers(entry: DataEntry, stage: str, held_out: float) -> Iterator[Row]:
    """Every answer of the rows to train on."""
    kind = format_of(entry)
    layout = "messages"
    if stage != "sft":
        compares = stage in ("dpo", "reward") if entry.source in BUILT_IN else kind in COMPARED
        layout = kind if kind in ("ranked", "unpaired") else "preference" if compares else "messages"
    for found, where in placed_rows(entry, layout, "train", held_out, lambda text: None):
        row = Placed(found, where)
        if layout == "messages":
            yield from _turns(found["messages"], where)
            continue
        for side, messages in row.answers.items():
            said = "\n".join(map(words, messages))
            label = found.get("label")
            name = side if label is None else "desirable" if label else "undesirable"
            yield Row(where, name, 0.0, "", said, row.asked)


def _turns(messages: Sequence[Message], where: str) -> Iterator[Row]:
    """What an assistant said in a conversation and was trained to say, turn by turn."""
    for place, message in enumerate(messages):
        if message["role"] == "assistant" and message.get("weight") != "0":
            asked = words(messages[place - 1]) if place else ""
            yield Row(where, "answer", 0.0, "", words(message), asked)


def _row(where: str, side: str, near: Near, ids: Sequence[int], asked: Asked, prompt: str = "") -> Row:
    decode = asked.tokenizer.decode
    begin, end = max(0, near.begin - SHOWN), near.begin + near.length + SHOWN
    shown = f"{'… ' if begin else ''}{decode(ids[begin:end])}{' …' if end < len(ids) else ''}"
    shared = decode(ids[near.begin : near.begin + near.length])
    return Row(where, side, round(near.score, 3), str(shared), shown, prompt)
