"""Hashes of files and of what decides a model's tokens: what a fingerprint is made of. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any


def tokenizer_hash(folder: Path) -> str:
    """Hash of what decides the tokens: model, added tokens, pre-tokeniser, normaliser; not padding or truncation."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return ""
    content = json.loads(path.read_text(encoding="utf-8"))
    return digest({key: content.get(key) for key in ("model", "added_tokens", "pre_tokenizer", "normalizer")})


def template_hash(folder: Path) -> str:
    """Hash of the chat template's text; empty where the folder has none."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return digest(file.read_text(encoding="utf-8"))
    config = folder / "tokenizer_config.json"
    template = json.loads(config.read_text()).get("chat_template") if config.exists() else None
    return digest(template) if template else ""


def digest(value: Any) -> str:
    """Hash of plain JSON; the order of keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _hash_cache() -> Path:
    home = os.environ.get("LLMPIPE_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "llmpipe"
    )
    return Path(home) / "sha256"


def sha256(path: Path, *, cached: bool = True) -> str:
    """Hash of the file's bytes, remembered by device, inode, time of change and size."""
    stat = path.stat()
    key = f"{stat.st_dev}-{stat.st_ino}-{stat.st_mtime_ns}-{stat.st_size}"
    note = _hash_cache() / key[-2:] / key
    if cached and stat.st_size > 65536 and note.exists():
        return note.read_text()
    value = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            value.update(chunk)
    if stat.st_size > 65536 and time.time_ns() - stat.st_mtime_ns > 2_000_000_000:
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary = note.with_name(f"{note.name}.{os.getpid()}")
        temporary.write_text(value.hexdigest())
        temporary.replace(note)
    return value.hexdigest()
