"""Text into tokens: a tokenizer trained on the corpus, and the corpus as token files.

A byte-level BPE (Sennrich et al. 2016; Radford et al. 2019 on bytes) with GPT-4's pre-tokenisation, trained
on a sample of the training documents alone. Departures: digits stand alone by default, since a small
vocabulary has no tokens to spend on numbers; pad is a token of its own, not eos; documents are divided before
anything looks at them, so neither the tokenizer nor a model ever sees held-out text.

Leaves model/ (the tokenizer, with a chat template), and train.ds and valid.ds, each with its index, bytes and
metadata (see pipeline.data.shards).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import ValidationInfo, field_validator

from pipeline.errors import ConfigError, DataError
from pipeline.recipe import Data, Ref, StageConfig, field

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedTokenizerFast

    from pipeline.artifacts import Artifact
    from pipeline.data.corpus import Piece, Survey
    from pipeline.data.shards import ShardWriter
    from pipeline.progress import Bar
    from pipeline.runtime import Runtime


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
        None, "processes that encode; unset: one for each 32 MB, up to the cores", run_only=True
    )

    @field_validator("added_merges")
    @classmethod
    def have_something_to_stand_on(cls, count: int, others: ValidationInfo) -> int:
        """Merges are added to a given tokenizer; one that is trained here is as large as `vocab_size` says."""
        if count and others.data.get("tokenizer") is None:
            raise ValueError("there is no `tokenizer` to add merges to; name one, or set vocab_size")
        return count


INPUTS = {"tokenizer": "tokenizer"}
KIND = "tokens"
RESULT_VERSION = 1


def run(
    config: TokenizeConfig, inputs: dict[str, Artifact | list[Artifact] | None], out: Path, runtime: Runtime
) -> dict[str, float]:
    """Makes the tokenizer and the token files in `out`; all of it on rank 0. Returns the counts."""
    figures: dict[str, float] = {}
    if runtime.is_main:
        survey = look_through(config, runtime)
        tokenizer = make_tokenizer(config, inputs["tokenizer"], survey, out, runtime)
        figures = write_tokens(config, tokenizer, survey, out, runtime)
    runtime.barrier()
    return figures


# 1. Look through the corpus: count it, divide it, draw the tokenizer's sample.


def look_through(config: TokenizeConfig, runtime: Runtime) -> Survey:
    """Both sides counted, and a sample of the training side. DataError where a side is empty."""
    from pipeline.data.corpus import Sample, Survey

    harvest_pydocs(config, runtime)
    survey = Survey(Sample(config.sample_bytes))
    with runtime.progress("read", None, "documents") as bar:
        for piece in read(config, runtime, runtime.say):
            survey.add(piece, config.data[piece.source].weight)
            bar.advance(1, MB=(survey.train_bytes + survey.held_out_bytes) / 1e6)
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
    runtime.say(
        f"{survey.train_documents:,} documents, {survey.train_bytes / 1e6:.1f} MB to train on; "
        f"{survey.held_out_documents:,} held out, {survey.held_out_bytes / 1e6:.1f} MB"
    )
    return survey


def read(config: TokenizeConfig, runtime: Runtime, say: Callable[[str], None]) -> Iterator[Piece]:
    """The corpus, piece by piece; ends the stage between two of them where it is asked to stop."""
    from pipeline.data.corpus import pieces

    for piece in pieces(config.data, config.held_out, config.held_out_tail, say):
        runtime.check_stop()
        yield piece


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
    config: TokenizeConfig, given: Artifact | list[Artifact] | None, survey: Survey, out: Path, runtime: Runtime
) -> PreTrainedTokenizerFast:
    """The tokenizer, saved to out/model."""
    from pipeline.data import extend, tokenizers

    if given is not None:
        assert not isinstance(given, list)
        tokenizer = tokenizers.load_tokenizer(given.model)
        runtime.say(tokenizers.complete(tokenizer))
    else:
        tokenizer = train_tokenizer(config, survey, runtime)
    if config.added_tokens:
        runtime.say(extend.add_specials(tokenizer, config.added_tokens))
    if not config.added_merges:
        tokenizer.save_pretrained(out / "model")
        return tokenizer
    with runtime.progress("learn merges", None, "texts") as bar:
        texts = watched(survey, runtime, bar)
        return extend.extend(tokenizer, texts, config.added_merges, out / "model")


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
    config: TokenizeConfig, tokenizer: PreTrainedTokenizerFast, survey: Survey, out: Path, runtime: Runtime
) -> dict[str, float]:
    """train.ds and valid.ds; returns the stage's figures."""
    from pipeline.artifacts import need_disk, tokenizer_hash
    from pipeline.data import encoding
    from pipeline.data.shards import ShardWriter, Source, token_dtype
    from pipeline.data.sources import labels
    from pipeline.data.tokenizers import separator_id

    sample = survey.sample.spread(500_000)
    encoder, choice = encoding.choose(out / "model", sample)
    runtime.say(choice)
    total_bytes = survey.train_bytes + survey.held_out_bytes
    tokens = total_bytes / encoding.bytes_per_token(encoder, sample)
    need_disk(out, int(1.1 * tokens * token_dtype(len(tokenizer)).itemsize), "writing the token files")
    processes = config.num_proc or encoding.processes_for(total_bytes)

    sources = [Source(label, entry.weight) for label, entry in zip(labels(config.data), config.data, strict=True)]
    what = (len(tokenizer), separator_id(tokenizer), tokenizer_hash(out / "model"), sources)
    start = time.monotonic()
    with (
        runtime.progress("encode", total_bytes // 1_000_000, "MB") as bar,
        ShardWriter(out / "train.ds", *what) as train,
        ShardWriter(out / "valid.ds", *what) as valid,
    ):
        corpus = again(config, survey, runtime)
        tagged = (((piece.is_held_out, piece.bytes, piece.source), piece.text) for piece in corpus)
        for (is_held_out, size, source), ids in encoding.encode_all(tagged, encoder, processes):
            (valid if is_held_out else train).append(ids, size, source)
            done = train.text_bytes + valid.text_bytes
            if done // 1_000_000 > bar.done:
                bar.advance(done // 1_000_000 - bar.done, **{"MB/s": done / 1e6 / (time.monotonic() - start)})
    figures = counts(train, valid) | {"mb_per_second": total_bytes / 1e6 / (time.monotonic() - start)}
    runtime.metrics.log(0, tokens=train.tokens, **figures)
    runtime.say(
        f"{train.tokens:,} tokens to train on, {valid.tokens:,} held out; "
        f"{figures['bytes_per_token']:.2f} bytes a token, {figures['mb_per_second']:.1f} MB/s"
    )
    if len(sources) > 1:
        for one, other in zip(train.sources, valid.sources, strict=True):
            runtime.say(f"  {one.label}: {one.documents:,} documents, {one.tokens:,} tokens; {other.tokens:,} held out")
    return figures


def again(config: TokenizeConfig, survey: Survey, runtime: Runtime) -> Iterator[Piece]:
    """The corpus a second time: from memory where it is small enough to have been kept, else read again."""
    if survey.pieces is None:
        yield from read(config, runtime, lambda text: None)
        return
    for piece in survey.pieces:
        runtime.check_stop()
        yield piece


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
