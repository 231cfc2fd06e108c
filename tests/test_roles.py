"""What a role takes: a tokenizer counts by its own files, and of the hub nothing else is fetched."""

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from pipeline import roles
from pipeline.artifacts import SCHEMA_VERSION, Store, write_json
from pipeline.errors import MissingInputError
from pipeline.hub import hub_folder


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "artifacts")


def tokenizer_folder(path: Path, **files: str) -> Path:
    path.mkdir(parents=True)
    for name, text in {"tokenizer.json": "{}", "tokenizer_config.json": "{}", **files}.items():
        (path / name).write_text(text)
    return path


def test_which_kinds_fit():
    found = ("tokens", "causal-lm", "reward-model", "rows", "evaluation", "tokenizer")
    assert [roles.fits("tokenizer", kind) for kind in found] == [True, True, True, False, False, True]
    assert [roles.fits("causal-lm", kind) for kind in found] == [False, True, False, False, False, False]


def test_a_tokenizer_counts_by_its_own_files(store: Store, tmp_path: Path):
    def fingerprint(name: str, **files: str) -> str:
        return roles.input_of(store, str(tokenizer_folder(tmp_path / name, **files)), "tokenizer").fingerprint

    alone = fingerprint("alone")
    assert fingerprint("same", **{"README.md": "read me", "model.safetensors": "1"}) == alone
    for name, changed in (
        ("merges", {"tokenizer.json": '{"model": 1}'}),
        ("settings", {"tokenizer_config.json": '{"eos_token": "x"}'}),
        ("template", {"chat_template.jinja": "{{ x }}"}),
        ("sentencepiece", {"tokenizer.model": "x"}),
        ("class", {"config.json": '{"model_type": "gpt2"}'}),  # AutoTokenizer's choice of a class hangs on it
    ):
        assert fingerprint(name, **changed) != alone, name
    model = {"config.json": '{"model_type": "gpt2", "dtype": "float32"}', "model.safetensors": "1"}
    retrained = {"config.json": '{"model_type": "gpt2", "dtype": "bfloat16"}', "model.safetensors": "2"}
    assert fingerprint("model", **model) == fingerprint("retrained", **retrained)


def test_an_artifact_is_taken_as_it_is(store: Store, tmp_path: Path):
    path = store.root / "run" / "tokenize"
    tokenizer_folder(path / "model")
    manifest = {"schema_version": SCHEMA_VERSION, "kind": "tokens", "fingerprint": "f", "stage": "tokenize"}
    write_json(path / "manifest.json", manifest)
    for reference in ("run/tokenize", str(path)):
        found = roles.input_of(store, reference, "tokenizer")
        assert (found.kind, found.fingerprint, found.model) == ("tokens", "f", path / "model")
    with pytest.raises(MissingInputError, match=r"no tokenizer: it has no tokenizer\.json"):
        roles.input_of(store, str(tmp_path), "tokenizer")


class Hub:
    """A hub of one repository behind `snapshot_download`, with its cache."""

    def __init__(self, cache: Path, files: dict[str, str]) -> None:
        self.cache, self.files = cache, files
        self.fetched: list[str] = []

    def download(
        self, name: str, *, revision: Any, allow_patterns: Any, ignore_patterns: Any, local_files_only: bool
    ) -> str:
        assert (name, revision) == ("org/name", "v1")
        folder = self.cache / "commit"
        if local_files_only and not folder.exists():
            raise huggingface_hub.errors.LocalEntryNotFoundError("not there")
        wanted = [f for f in self.files if any(fnmatch(f, p) for p in allow_patterns)]
        folder.mkdir(parents=True, exist_ok=True)
        for file in wanted if not local_files_only else ():
            if not (folder / file).exists():
                (folder / file).write_text(self.files[file])
                self.fetched.append(file)
        return str(folder)


MODEL = {"tokenizer.json": "{}", "tokenizer_config.json": "{}", "config.json": "{}", "model.safetensors": "w"}


def test_of_the_hub_the_tokenizer_alone_is_fetched(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub = Hub(tmp_path / "cache", {**MODEL, "original/consolidated.pth": "w", "README.md": ""})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.download)
    found = roles.input_of(store, "hub:org/name@v1", "tokenizer")
    assert sorted(hub.fetched) == ["config.json", "tokenizer.json", "tokenizer_config.json"]
    assert (found.kind, found.model) == ("tokenizer", tmp_path / "cache" / "commit")
    local = tokenizer_folder(tmp_path / "local", **{"config.json": "{}"})
    assert found.fingerprint == roles.input_of(store, str(local), "tokenizer").fingerprint
    roles.input_of(store, "hub:org/name@v1", "tokenizer")
    assert len(hub.fetched) == 3, "the second time it is there"


def test_a_fetched_tokenizer_is_not_taken_for_the_model(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub = Hub(tmp_path / "cache", {**MODEL, "config.json": '{"architectures": ["GPT2LMHeadModel"]}'})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.download)
    roles.input_of(store, "hub:org/name@v1", "tokenizer")
    assert "model.safetensors" not in hub.fetched
    model = roles.input_of(store, "hub:org/name@v1", "causal-lm")
    assert (model.kind, hub.fetched[-1]) == ("causal-lm", "model.safetensors")


def test_a_real_cache_without_the_weights_is_no_model(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What huggingface_hub itself says of a cache folder, offline, where only the tokenizer was fetched."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "a" * 40
    snapshot = tokenizer_folder(tmp_path / "models--org--name" / "snapshots" / commit, **{"config.json": "{}"})
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text(commit)
    assert roles.input_of(store, "hub:org/name", "tokenizer").model == snapshot
    with pytest.raises(MissingInputError, match=r"to be had: it has no \*\.safetensors or \*\.bin") as caught:
        store.resolve("hub:org/name")
    assert caught.value.where == "hub:org/name"
    (snapshot / "model.safetensors").write_text("w")
    (snapshot / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    assert store.resolve("hub:org/name").kind == "causal-lm"
    with pytest.raises(MissingInputError, match="neither in the local cache nor to be had"):
        hub_folder("hub:org/other", ("*",), ("*",))
