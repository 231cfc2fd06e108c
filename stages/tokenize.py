"""Text into tokens: a tokenizer trained on the corpus, and the corpus as token files.

A byte-level BPE (Sennrich et al. 2016; Radford et al. 2019 on bytes) with GPT-4's pre-tokenisation, trained
on a sample of the training documents alone. Departures: digits stand alone by default, since a small
vocabulary has no tokens to spend on numbers; pad is a token of its own, not eos; documents are divided before
anything looks at them, so neither the tokenizer nor a model ever sees held-out text.

Leaves model/ (the tokenizer, with a chat template), and train.ds and valid.ds, each with its index, bytes and
metadata (see pipeline.data.shards). Killed at any moment, it goes on from what it has kept (pipeline.data.begun) to the
same bytes, under any number of processes.
"""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import ValidationInfo, field_validator

from pipeline.errors import ArtifactError, ConfigError, DataError, Halt, MachineError
from pipeline.recipe import Data, Ref, StageConfig, field

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerFast

    from pipeline.artifacts import Artifact
    from pipeline.data.begun import Begun
    from pipeline.data.corpus import Survey
    from pipeline.data.encoding import BulkEncoder
    from pipeline.data.passes import Files
    from pipeline.data.shards import ShardWriter
    from pipeline.data.units import Unit
    from pipeline.progress import Bar
    from pipeline.runtime import Runtime


SMALLEST = 260
"""Tokens that every trained vocabulary has (`tokenizers.SMALLEST_VOCAB`, which is dear to import)."""


class TokenizeConfig(StageConfig):
    """What `tokenize` can be told."""

    data: Data = field(..., "the text: files, folders, globs, `pydocs`, `arithmetic`, or `hub:org/name`")
    tokenizer: Ref | None = field(
        None, "taken instead of training one: a folder or hub name that holds a tokenizer, a tokenize stage, a model"
    )
    added_merges: int = field(
        0, "tokenizer: merges learnt on the text and put after the given tokenizer's own", unit="new tokens", ge=0
    )
    added_tokens: tuple[str, ...] = field((), "special tokens to add, to a trained tokenizer as to a given one")
    algorithm: Literal["bpe", "bytes", "characters"] = field(
        "bpe", "byte-level BPE, the 256 bytes alone, or the text's characters (vocab_size at most, others as bytes)"
    )
    vocab_size: int = field(8192, "size of the trained vocabulary, bytes and specials included", unit="tokens", gt=0)
    split: Literal["gpt4", "gpt2"] = field("gpt4", "bpe: how text is cut into words before merging")
    digits: int = field(1, "bpe: digits that may share a token", ge=1, le=3)
    sample_bytes: int = field(100_000_000, "text the tokenizer is trained on, at most", unit="bytes", gt=0)
    held_out: float = field(0.05, "share of the documents that is held out", gt=0, lt=1)
    held_out_tail: float = field(
        0.1, "share held out at the end of each document, where a source has fewer than 100", gt=0, lt=1
    )
    num_proc: int | None = field(
        None, "processes that read and encode; unset: one for each 32 MB, up to the cores", run_only=True
    )

    @field_validator("added_merges")
    @classmethod
    def have_something_to_stand_on(cls, count: int, others: ValidationInfo) -> int:
        """Merges are added to a given tokenizer; one that is trained here is as large as `vocab_size` says."""
        if count and others.data.get("tokenizer") is None:
            raise ValueError("there is no `tokenizer` to add merges to; name one, or set vocab_size")
        return count

    @field_validator("vocab_size")
    @classmethod
    def has_room_for_the_bytes(cls, size: int, others: ValidationInfo) -> int:
        """Said before a corpus is read. The bytes alone, and a given tokenizer, are as large as they are."""
        is_trained = others.data.get("tokenizer") is None and others.data.get("algorithm") != "bytes"
        if is_trained and size < SMALLEST:
            raise ValueError(f"the 256 bytes and 4 special tokens take {SMALLEST} of it (4096 suits some dozen MB)")
        return size


INPUTS = {"tokenizer": "tokenizer"}
KIND = "tokens"
RESULT_VERSION = 1


def run(
    config: TokenizeConfig, inputs: dict[str, Artifact | list[Artifact] | None], out: Path, runtime: Runtime
) -> dict[str, float]:
    """Makes the tokenizer and the token files in `out`; all of it on rank 0. Returns the counts."""
    figures: dict[str, float] = {}
    if runtime.is_main:
        given = inputs["tokenizer"]
        assert not isinstance(given, list)
        units, begun = begin(config, given, out, runtime)
        survey = look_through(config, units, begun, runtime)
        tokenizer = make_tokenizer(config, given, survey, begun, runtime)
        figures = write_tokens(config, tokenizer, units, survey, begun, runtime)
    runtime.barrier()
    return figures


def begin(config: TokenizeConfig, given: Artifact | None, out: Path, runtime: Runtime) -> tuple[list[Unit], Begun]:
    """The corpus in units, and what is there of an earlier try."""
    from pipeline.data.begun import Begun
    from pipeline.data.units import cut
    from pipeline.hashes import tokenizer_hash

    harvest_pydocs(config, runtime)
    units = cut(config.data, config.held_out, config.held_out_tail, runtime.say)
    values = config.model_dump(
        mode="json", exclude={"data": {"__all__": {"source"}}, "num_proc": True, "tokenizer": True}
    )
    begun = Begun(out)
    if not begun.check(units, [values, tokenizer_hash(given.model) if given else "", RESULT_VERSION]):
        runtime.say("begun anew: the data or the libraries are others than when it was broken off")
    return units, begun


class Meter:
    """Bytes that are done, from whichever thread, as a bar of MB; hears the wish to stop."""

    def __init__(self, bar: Bar, runtime: Runtime, done: int) -> None:
        self.bar, self.halt, self.done, self.before = bar, runtime.halt, done, done
        self.lock, self.start = threading.Lock(), time.monotonic()
        bar.start_at(done // 1_000_000)

    def tell(self, done: int) -> None:
        """So many more."""
        with self.lock:
            self.done += done

    def look_up(self) -> None:
        """Shows what is done. Raises where the stage is to stop: what is done is kept on the way out."""
        if self.halt.asked is not None:
            raise self.halt.asked(
                "stopped; what is done is kept", mend="run the same command again to go on from there"
            )
        self.show()

    def show(self) -> None:
        """What is done, and how fast."""
        if self.done // 1_000_000 > self.bar.done:
            speed = (self.done - self.before) / 1e6 / (time.monotonic() - self.start)
            self.bar.advance(self.done // 1_000_000 - self.bar.done, **{"MB/s": speed})


# 1. Look through the corpus: count it, divide it, draw the tokenizer's sample.


def look_through(config: TokenizeConfig, units: list[Unit], begun: Begun, runtime: Runtime) -> Survey:
    """Both sides counted, and a sample of the training side. DataError where a side is empty."""
    from pipeline.data import encoding, passes
    from pipeline.data.files import left_out
    from pipeline.data.workers import Crew

    survey, seconds = begun.survey(config.sample_bytes)
    done, total = len(survey.units), sum(unit.bytes for unit in units)
    if done:
        runtime.metrics.cut(0, seconds)
        runtime.checkpoints.resumed_from = done
        runtime.say(f"kept: {done:,} of {len(units):,} parts of the data had been read, {survey.bytes / 1e6:,.1f} MB")
    pays = encoding.processes_for(sum(unit.bytes for unit in units[done:]))
    processes = min(config.num_proc or pays, pays)
    with (
        runtime.progress("read", total // 1_000_000, "MB") as bar,
        Crew(processes) if processes > 1 else nullcontext() as crew,
    ):
        meter = Meter(bar, runtime, survey.bytes)
        read = sum(unit.bytes for unit in units[:done])
        bar.total = round(survey.bytes / read * total) // 1_000_000 if read else bar.total
        try:
            for unit in passes.look_through(units, survey, passes.Hands(crew, meter.tell, meter.look_up)):
                begun.looked_through(unit, runtime.metrics.seconds())
                read += units[len(survey.units) - 1].bytes
                bar.total = round(survey.bytes / max(1, read) * total) // 1_000_000
            meter.show()
        finally:
            if done or begun.log.exists() or runtime.halt.asked:
                begun.save_survey()
    check(config, survey)
    runtime.say(
        f"{survey.train_documents:,} documents, {survey.train_bytes / 1e6:.1f} MB to train on; "
        f"{survey.held_out_documents:,} held out, {survey.held_out_bytes / 1e6:.1f} MB"
    )
    for source, (count, *first) in sorted(survey.left_out.items()):
        runtime.say(left_out(config.data[source].source, count, first))
    return survey


def check(config: TokenizeConfig, survey: Survey) -> None:
    """DataError where a side is empty."""
    sources = ", ".join(entry.source for entry in config.data)
    if survey.train_documents + survey.held_out_documents == 0:
        raise DataError("there is no text in the data", where=sources, mend="name files that hold text")
    if survey.held_out_documents == 0:
        raise DataError(
            f"none of the {survey.train_documents:,} documents is held out",
            where=sources,
            mend=f"raise held_out (now {config.held_out:g}), or give more documents",
        )
    if survey.train_documents == 0:
        raise DataError("all documents are held out", where=sources, mend="lower held_out")


def harvest_pydocs(config: TokenizeConfig, runtime: Runtime) -> None:
    """Parses the documentation on first use, which takes a while, with a bar of its own."""
    from pipeline.data.harvest import harvest
    from pipeline.data.sources import PYDOCS

    if not any(entry.source == PYDOCS for entry in config.data):
        return
    with runtime.progress("harvest", None, "files") as bar:

        def advance(done: int, total: int) -> None:
            runtime.check_stop()
            bar.total = total
            bar.advance(done - bar.done)

        harvest(advance)


# 2. The tokenizer: trained on the sample, or one that is there.


def make_tokenizer(
    config: TokenizeConfig, given: Artifact | None, survey: Survey, begun: Begun, runtime: Runtime
) -> PreTrainedTokenizerFast:
    """The tokenizer, saved as the stage's model; the one that is there already, where it had been made."""
    from pipeline.data import extend, tokenizers

    if begun.model.exists():
        runtime.say("kept: the tokenizer")
        return tokenizers.load_tokenizer(begun.model)
    begun.forget_written()
    if given is not None:
        tokenizer = tokenizers.load_tokenizer(given.model)
        runtime.say(tokenizers.complete(tokenizer))
    else:
        tokenizer = train_tokenizer(config, survey, runtime)
    if config.added_tokens:
        runtime.say(extend.add_specials(tokenizer, config.added_tokens))
    made = begun.folder / "model"
    if not config.added_merges:
        tokenizer.save_pretrained(made)
    else:
        with runtime.progress("learn merges", None, "texts") as bar:
            texts = watched(survey, runtime, bar)
            tokenizer = extend.extend(tokenizer, texts, config.added_merges, made)
    begun.save_model(made)
    return tokenizer


def train_tokenizer(config: TokenizeConfig, survey: Survey, runtime: Runtime) -> PreTrainedTokenizerFast:
    """A tokenizer trained on the sample; ConfigError where that has too little text for `vocab_size`."""
    from pipeline.data import tokenizers

    with runtime.progress("train the tokenizer", None, "texts") as bar:
        texts = watched(survey, runtime, bar)
        if config.algorithm == "bytes":
            return tokenizers.train_bytes()
        if config.algorithm == "characters":
            return tokenizers.train_characters(texts, config.vocab_size)
        pattern = tokenizers.split_pattern(config.digits, config.split)
        tokenizer = tokenizers.train_bpe(texts, config.vocab_size, pattern=pattern)
    if len(tokenizer) < config.vocab_size:
        raise ConfigError(
            f"{survey.sample.size:,} bytes of text make only {len(tokenizer):,} different tokens",
            where="tokenize.vocab_size",
            mend=f"vocab_size: {len(tokenizer)} or less, or more text",
        )
    return tokenizer


def watched(survey: Survey, runtime: Runtime, bar: Bar) -> Iterator[str]:
    """The sample on its way into the trainer."""
    for text in survey.sample.texts:
        runtime.check_stop()
        bar.advance()
        yield text


# 3. Encode both sides into token files.


def write_tokens(
    config: TokenizeConfig,
    tokenizer: PreTrainedTokenizerFast,
    units: list[Unit],
    survey: Survey,
    begun: Begun,
    runtime: Runtime,
) -> dict[str, float]:
    """train.ds and valid.ds; returns the stage's figures."""
    from pipeline.artifacts import need_disk
    from pipeline.data import encoding
    from pipeline.data.shards import token_dtype

    sample = survey.sample.spread(500_000)
    encoder, choice = encoding.choose(begun.model, sample)
    runtime.say(choice)
    files = open_files(config, tokenizer, begun, runtime)
    left = survey.bytes - files.text_bytes
    tokens = left / encoding.bytes_per_token(encoder, sample)
    need_disk(begun.out, int(1.1 * tokens * token_dtype(len(tokenizer)).itemsize), "writing the token files")
    start = time.monotonic()
    with files.train as train, files.valid as valid:
        encode(units, survey, encoder, files, config.num_proc or encoding.processes_for(left), begun, runtime)
    figures = counts(train, valid) | {"mb_per_second": left / 1e6 / (time.monotonic() - start)}
    if survey.left_out:
        figures["bad_rows"] = float(sum(each.rows for each in survey.left_out.values()))
    runtime.metrics.log(0, tokens=train.tokens, **figures)
    runtime.say(
        f"{train.tokens:,} tokens to train on, {valid.tokens:,} held out; "
        f"{figures['bytes_per_token']:.2f} bytes a token, {figures['mb_per_second']:.1f} MB/s"
    )
    if len(train.sources) > 1:
        for one, other in zip(train.sources, valid.sources, strict=True):
            runtime.say(f"  {one.label}: {one.documents:,} documents, {one.tokens:,} tokens; {other.tokens:,} held out")
    return figures


def open_files(config: TokenizeConfig, tokenizer: PreTrainedTokenizerFast, begun: Begun, runtime: Runtime) -> Files:
    """The token files, empty or where an earlier try had saved them."""
    from pipeline.data.passes import SIDES, Files
    from pipeline.data.shards import ShardWriter, Source
    from pipeline.data.sources import labels
    from pipeline.data.tokenizers import separator_id
    from pipeline.hashes import tokenizer_hash

    sources = [Source(label, entry.weight) for label, entry in zip(labels(config.data), config.data, strict=True)]
    what = (len(tokenizer), separator_id(tokenizer), tokenizer_hash(begun.model), sources)
    written, seconds = begun.written()
    if written is not None:
        try:
            files = Files(
                *[ShardWriter(begun.out / side, *what, have) for side, have in zip(SIDES, written, strict=True)]
            )
        except ArtifactError as error:
            runtime.say(f"encoding begins anew: {error.where}: {error.what}")
        else:
            runtime.metrics.cut(0, seconds)
            runtime.checkpoints.resumed_from += files.documents
            runtime.say(f"kept: {files.text_bytes / 1e6:,.1f} MB of text had been encoded")
            return files
    return Files(*[ShardWriter(begun.out / side, *what) for side in SIDES])


def encode(
    units: list[Unit],
    survey: Survey,
    encoder: BulkEncoder,
    files: Files,
    processes: int,
    begun: Begun,
    runtime: Runtime,
) -> None:
    """Writes what `files` lack of the corpus; saves how far it is now and then, and where it is stopped."""
    from pipeline.data import passes
    from pipeline.data.workers import Crew

    with (
        runtime.progress("encode", survey.bytes // 1_000_000, "MB") as bar,
        Crew(processes) if processes > 1 else nullcontext() as crew,
    ):
        meter = Meter(bar, runtime, files.text_bytes)
        hands = passes.Hands(crew, meter.tell, meter.look_up)
        try:
            for _ in passes.write(units, survey, encoder, files, hands, begun.parts()):
                if begun.is_due():
                    begun.save_written(files, runtime.metrics.seconds())
            meter.show()
        except DataError:  # what was read before can't be read again: it is other data
            begun.forget()
            raise
        except (Halt, MachineError):
            begun.save_written(files, runtime.metrics.seconds())
            raise
        if begun.mark.exists():  # what is left, publishing, takes a while too
            begun.save_written(files, runtime.metrics.seconds())


def counts(train: ShardWriter, valid: ShardWriter) -> dict[str, float]:
    """What was written; `bytes_per_token` leaves the separators out."""
    return {
        "vocab_size": float(train.vocab_size),
        "train_tokens": float(train.tokens),
        "train_documents": float(train.documents),
        "train_bytes": float(train.text_bytes),
        "valid_tokens": float(valid.tokens),
        "valid_documents": float(valid.documents),
        "valid_bytes": float(valid.text_bytes),
        "bytes_per_token": train.text_bytes / (train.tokens - train.documents),
    }
