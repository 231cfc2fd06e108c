"""The harvest of pydocs: the docstrings of Python and of llmpipe's requirements, and their split.

Read from source files by `docstrings.py`, in parallel, nothing imported that is not the standard library's;
cached under ~/.cache/llmpipe (`LLMPIPE_CACHE`, `XDG_CACHE_HOME`). Two functions described alike fall on the
same side of the split, since it goes by the normalised first sentence (split by name, 8 % of the held-out
sentences had been seen in training); a training entry that quotes a held-out sentence is dropped.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path

from pipeline.data import docstrings
from pipeline.errors import MachineError

HARVESTER_VERSION = 1  # raised when the same packages would give other entries

# Distribution name -> the top-level package it installs. All of them are llmpipe's requirements, or theirs.
PACKAGES = {
    "torch": "torch",
    "transformers": "transformers",
    "trl": "trl",
    "peft": "peft",
    "accelerate": "accelerate",
    "datasets": "datasets",
    "huggingface-hub": "huggingface_hub",
    "numpy": "numpy",
    "pandas": "pandas",
    "pyarrow": "pyarrow",
    "sympy": "sympy",
    "mpmath": "mpmath",
    "networkx": "networkx",
    "jinja2": "jinja2",
    "fsspec": "fsspec",
    "filelock": "filelock",
    "psutil": "psutil",
    "pydantic": "pydantic",
    "pydantic-core": "pydantic_core",
    "rich": "rich",
    "typer": "typer",
    "pygments": "pygments",
    "markdown-it-py": "markdown_it",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "tqdm": "tqdm",
    "packaging": "packaging",
    "regex": "regex",
}

# Folders that are not documentation, or that some builds of Python leave out.
SKIPPED = {"tests", "test", "_vendor", "vendored", "site-packages", "dist-packages", "__pycache__"}
SKIPPED |= {
    "lib-dynload",
    "pydoc_data",
    "idlelib",
    "tkinter",
    "lib2to3",
    "distutils",
    "ensurepip",
    "turtledemo",
}
SKIPPED_FILES = ("_sysconfigdata", "sitecustomize")

HELD_OUT = 0.06  # of the first sentences: about 2,200 functions with a question each
CHUNK_BYTES = 2_000_000  # of source, read by one process at a time
MIN_WORDS, MAX_WORDS, MAX_CHARS = 4, 40, 300  # of a sentence that describes its function

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Entry:
    """One documented thing. `sentence` is its first sentence, or "" where that does not describe it."""

    name: str  # qualified: `json.loads`
    kind: str  # module, class, function, method or topic
    signature: str  # "(s, *, cls=None)", or ""
    sentence: str
    body: str  # the docstring behind the sentence; all of it where there is no sentence
    is_held_out: bool


# --- the harvest --------------------------------------------------------------------------------------------


def fingerprint() -> dict[str, str]:
    """What the entries depend on: harvester, Python and package versions (20 ms). Raises MachineError."""
    versions = {"harvester": str(HARVESTER_VERSION), "python": platform.python_version()}
    for distribution in PACKAGES:
        try:
            versions[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            raise MachineError(
                f"pydocs reads the documentation of the package {distribution}, which is not installed",
                mend=f"pip install {distribution}, or give a `data` of your own instead of pydocs",
            ) from None
    return versions


def harvest(progress: Progress | None = None) -> tuple[Entry, ...]:
    """All entries, from the cache or (half a minute on two cores) from the sources.

    `progress(done, total)` is told of files; what it raises ends the harvest. Processes that harvest at once
    do not hurt each other; a cache that is cut or corrupt is built again.
    """
    key = hashlib.sha256(json.dumps(fingerprint()).encode()).hexdigest()[:16]
    path = _cache_folder() / f"pydocs-{key}.jsonl"
    entries = _load(path)
    if entries is None:
        entries = split(read_sources(source_files(), progress))
        _save(path, entries)
        _load.cache_clear()
    return entries


def _cache_folder() -> Path:
    if folder := os.environ.get("LLMPIPE_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmpipe"


@functools.lru_cache(maxsize=1)
def _load(path: Path) -> tuple[Entry, ...] | None:
    """The cached entries; None if there are none or the file is not what was written."""
    try:
        digest, _, body = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    if hashlib.sha256(body).hexdigest().encode() != digest:
        return None
    return tuple(Entry(*json.loads(line)) for line in body.splitlines())


def _save(path: Path, entries: tuple[Entry, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    body = "".join(json.dumps(astuple(entry)) + "\n" for entry in entries).encode()
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
    os.replace(partial, path)


def source_files() -> list[tuple[str, str, int]]:
    """(path, module, bytes) of every source file, in a fixed order; first of all "", the C modules."""
    found = [("", "", CHUNK_BYTES)]
    roots = [(Path(sysconfig.get_path("stdlib")), "")]
    for package in PACKAGES.values():
        spec = importlib.util.find_spec(package)  # of a top-level package: finds it, does not run it
        assert spec, package
        assert spec.submodule_search_locations, package
        roots.append((Path(spec.submodule_search_locations[0]), package))
    for root, package in roots:
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if SKIPPED.isdisjoint(parts) and not path.name.startswith(SKIPPED_FILES):
                module = ".".join(part for part in (package, *parts) if part and part != "__init__")
                found.append((str(path), module, path.stat().st_size))
    return found


def read_sources(files: list[tuple[str, str, int]], progress: Progress | None) -> list[docstrings.Docstring]:
    """The docstrings of (path, module, bytes) files, in their order, read by one process a core."""
    chunks: list[list[tuple[str, str]]] = [[]]
    room = CHUNK_BYTES
    for path, module, size in files:
        if room <= 0:
            chunks.append([])
            room = CHUNK_BYTES
        chunks[-1].append((path, module))
        room -= size
    found: list[docstrings.Docstring] = []
    done = 0
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as threads:
        try:
            for chunk, lines in zip(chunks, threads.map(_read_chunk, chunks)):
                found += [json.loads(line) for line in lines]
                done += len(chunk)
                if progress:
                    progress(done, len(files))
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
    return found


def _read_chunk(chunk: list[tuple[str, str]]) -> list[bytes]:
    """A script, not multiprocessing: the parent's main module and threads do not matter to it."""
    command = [sys.executable, "-I", "-S", docstrings.__file__]
    jobs = json.dumps(chunk).encode() + b"\n"
    done = subprocess.run(command, input=jobs, stdout=subprocess.PIPE, check=True)
    return done.stdout.splitlines()


# --- sentences and the split --------------------------------------------------------------------------------

_ROLE = re.compile(r":[\w:+-]+:`[~!]?([^`<]*?)(?:\s*<[^`>]*>)?`")  # :func:`~json.loads`
_LINK = re.compile(r"\[(`[^`\]]*`)\]")  # [`BertModel`]
_ABBREVIATION = r"(?<![\s.(][a-zA-Z])(?<!e\.g)(?<!i\.e)(?<!etc)(?<! vs)(?<! cf)"
_END = re.compile(_ABBREVIATION + r"[.!?](?=[`\"')]*\s+[^a-z\s])")
_NOT_A_DESCRIPTION = re.compile(r"[\w*`]+ \(|\.\.|[>:=*|-]|(todo|fixme|note|warning|deprecated|args|alias|see)\b", re.I)


def words(text: str) -> list[str]:
    """Lower-case words, digits and underscores included; everything else separates."""
    return re.findall(r"\w+", text.lower())


def normalise(text: str) -> str:
    """What is the same sentence to the split: its words."""
    return " ".join(words(text))


def _plain(doc: str) -> str:
    """Without the marks of reStructuredText roles, double backticks and linked names: `x` for all of them."""
    return _LINK.sub(r"\1", _ROLE.sub(r"`\1`", doc).replace("``", "`")).strip()


def first_sentence(doc: str) -> tuple[str, str]:
    """(first sentence on one line, the rest); a first paragraph without an end is a sentence."""
    paragraph, _, tail = doc.partition("\n\n")
    line = " ".join(paragraph.split())
    end = _END.search(line)
    cut = end.end() if end else len(line)
    return line[:cut], f"{line[cut:].strip()}\n\n{tail}".strip()


def _describes(kind: str, sentence: str) -> bool:
    return (
        kind in ("class", "function", "method")
        and MIN_WORDS <= len(words(sentence)) <= MAX_WORDS
        and len(sentence) <= MAX_CHARS
        and sentence[-1] not in ":,;"
        and not _NOT_A_DESCRIPTION.match(sentence)
    )


def hash32(*keys: str) -> int:
    """32 bits from strings, the same in every process."""
    return int.from_bytes(hashlib.sha256("\0".join(keys).encode()).digest()[:4])


def split(found: list[docstrings.Docstring]) -> tuple[Entry, ...]:
    """Entries from docstrings: the first of each name and of each text, held out by first sentence.

    Training entries that quote a held-out sentence anywhere are dropped.
    """
    names, texts = set[str](), set[str]()
    entries: list[Entry] = []
    for name, kind, signature, doc in found:
        doc = _plain(doc)
        text = normalise(doc)
        if not text or name in names or text in texts:
            continue
        names.add(name)
        texts.add(text)
        sentence, rest = first_sentence(doc)
        is_held_out = hash32("split", normalise(sentence)) < HELD_OUT * 2**32
        if _describes(kind, sentence):
            stop = "" if sentence[-1] in ".!?" else "."
            entries.append(Entry(name, kind, signature, sentence + stop, rest, is_held_out))
        else:
            entries.append(Entry(name, kind, signature, "", doc, is_held_out))
    return _without_quotes(entries)


def _without_quotes(entries: list[Entry]) -> tuple[Entry, ...]:
    held_out: dict[tuple[str, ...], list[str]] = {}  # by its first words, the sentence
    for entry in entries:
        if entry.is_held_out and entry.sentence:
            found = words(entry.sentence)
            held_out.setdefault(tuple(found[:MIN_WORDS]), []).append(" ".join(found))
    kept = []
    for entry in entries:
        found = [] if entry.is_held_out else words(f"{entry.sentence} {entry.body}")
        starts = held_out.keys() & set(zip(*(found[i:] for i in range(MIN_WORDS))))
        text = f" {' '.join(found)} " if starts else ""
        if not any(f" {sentence} " in text for start in starts for sentence in held_out[start]):
            kept.append(entry)
    return tuple(kept)
