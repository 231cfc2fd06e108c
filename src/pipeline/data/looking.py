"""What files hold before a recipe is written for them: how much text, in which scripts, which rows, how long.

Documents are read whole up to `READ_BYTES` of files; of more, files spread over all of them are read, and the rest is
taken to be like them. Rows are read to the last: a bad one is an error with its file and line.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.files import COMPRESSED, ROWS, file_rows, kind
from pipeline.data.formats import KEYS, placed_rows, prompt_key
from pipeline.data.messages import letters
from pipeline.data.sources import local_files, read_documents, share
from pipeline.data.survey import format_of
from pipeline.errors import ConfigError, DataError
from pipeline.recipe import DataEntry

READ_BYTES = 200_000_000
SAMPLE_BYTES = 2_000_000
"""Of text that a tokenizer is tried on."""
UNPACKED = 3.0
"""Text in a byte of a compressed or parquet file, where one is too large to be read whole."""
TEXT_FIELDS = ("text", "content", "body", "document", "article", "raw_content")


@dataclass(frozen=True)
class Text:
    """A corpus: `bytes` of UTF-8 (about so many where `is_guessed`), documents that were read, a sample of them."""

    bytes: float
    is_guessed: bool
    documents: int
    kinds: dict[str, int]
    """Suffix -> files."""
    scripts: dict[str, float]
    """Script -> share of the sample's letters, the largest first."""
    sample: list[str]
    text_field: str


@dataclass(frozen=True)
class Rows:
    """Rows of one file: their format, how many, and bytes of prompts and answers (UTF-8), row by row."""

    format: str
    prompts: list[int]
    answers: list[int]
    """The longest of a row."""
    shares: list[float]
    """Where each falls between 0 and 1: below the held-out share it is held out."""

    @property
    def count(self) -> int:
        return len(self.prompts)

    def held(self, share: float) -> int:
        """How many are held out at this share."""
        return sum(each < share for each in self.shares)


def look_at_text(sources: Sequence[str]) -> Text:
    """What the files, folders and globs hold as documents. Raises DataError (file and line) for what cannot be read,
    ConfigError for rows that are no documents."""
    files = [path for source in sources for path in local_files(DataEntry(source=source))]
    field = _text_field(files)
    sizes = {path: path.stat().st_size for path in files}
    read, texts, size, documents, packed, is_cut = 0.0, list[str](), 0, 0, 0, False
    for path in _spread(files):
        if read >= READ_BYTES:
            is_cut = True
            break
        for document in read_documents(DataEntry(source=str(path), text_field=field)):
            length = len(document.text.encode("utf-8", "surrogatepass"))
            read, documents = read + length, documents + 1
            if size < SAMPLE_BYTES:
                texts.append(document.text[: SAMPLE_BYTES // 8])
                size += min(length, SAMPLE_BYTES // 8)
            if read >= 2 * READ_BYTES:  # one file of many gigabytes
                factor = UNPACKED if path.suffix in COMPRESSED or kind(path) == ".parquet" else 1.0
                rest = sum(sizes.values()) * factor
                return Text(max(read, rest), True, documents, _kinds(files), _scripts(texts), texts, field)
        packed += sizes[path]
    if not documents:
        raise DataError("no text in it", where=", ".join(sources), mend="name a folder with text")
    total = read * sum(sizes.values()) / packed if is_cut else read
    return Text(total, is_cut, documents, _kinds(files), _scripts(texts), texts, field)


def _spread(files: Sequence[Path]) -> Iterator[Path]:
    """All files, so that the first ones are spread over the whole list: every 64th, then those behind them, …"""
    for start in range(64):
        yield from files[start::64]


def _kinds(files: Sequence[Path]) -> dict[str, int]:
    return dict(Counter("".join(path.suffixes[-2:]) if path.suffix in COMPRESSED else path.suffix for path in files))


def _text_field(files: Sequence[Path]) -> str:
    """The field with the text in the first file of rows; ConfigError where it holds chats or preferences."""
    first = next((path for path in files if kind(path) in ROWS), None)
    found = next(file_rows(first), None) if first else None
    if found is None:
        return "text"
    row, where = found
    for name in TEXT_FIELDS:
        if isinstance(row.get(name), str):
            return name
    layout = next((name for name, keys in KEYS.items() if all(key in row for key in keys)), None)
    what = f"{layout} rows, no documents" if layout else f"no field with a text (it has {', '.join(row) or 'none'})"
    flag = "--preferences" if layout and "chosen" in KEYS[layout] else "--chats"
    mend = f"rename the field to one of {', '.join(TEXT_FIELDS)}, or a --data without this file"
    mend = f"{flag} {first}, and a --data without it" if layout else mend
    raise ConfigError(what, where=where, mend=mend)


def _scripts(texts: Sequence[str]) -> dict[str, float]:
    letters = [letter for text in texts[:200] for letter in text[:2000] if letter.isalpha()]
    counts = Counter(unicodedata.name(letter, "OTHER").split()[0].capitalize() for letter in letters)
    return {name: count / len(letters) for name, count in counts.most_common(4)}


def try_tokenizer(sample: Sequence[str], vocab_size: int) -> tuple[float, int]:
    """(UTF-8 bytes of a token, tokens) of a tokenizer of `vocab_size` trained on four texts of five, read on the rest.

    Of at most 8,192 tokens: two megabytes hold no larger one, so of those the bytes are somewhat too low.
    """
    from pipeline.data.tokenizers import encode_text, train_bpe

    pieces = [text[at : at + 2000] for text in sample for at in range(0, len(text), 2000)]
    kept = pieces[::5]
    trained = [piece for number, piece in enumerate(pieces) if number % 5] or pieces
    tokenizer = train_bpe(iter(trained), min(vocab_size, 8192))
    tokens = sum(len(encode_text(tokenizer, piece)) for piece in kept)
    return sum(len(piece.encode("utf-8", "surrogatepass")) for piece in kept) / max(1, tokens), len(tokenizer)


def look_at_rows(source: str, layout: str) -> Rows:
    """The rows of a file, folder or glob as `messages` or `preference` rows. Raises DataError with file and line."""
    entry = DataEntry(source=source)
    found = format_of(entry)
    if layout == "preference" and found == "unpaired":
        layout = "unpaired"
    prompts, answers, shares = list[int](), list[int](), list[float]()
    for row, _ in placed_rows(entry, layout, "all", 0.05, lambda text: None):
        if layout == "messages":
            asked, sides = row["messages"][:-1], [row["messages"][-1:]]
        else:
            asked = row["prompt"]
            sides = [row[name] for name in ("chosen", "rejected", "completion") if name in row]
        prompts.append(sum(len(letters(message).encode()) for message in asked))
        answers.append(max(sum(len(letters(message).encode()) for message in side) for side in sides))
        shares.append(share(prompt_key(row)))
    if not prompts:
        raise DataError("no row in it", where=source, mend="name a file with rows")
    return Rows(found, prompts, answers, shares)
