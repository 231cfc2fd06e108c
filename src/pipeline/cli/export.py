"""`llmpipe export REF --to hf|merged|gguf --out PATH`: what REF names, for others to use.

    hf       a Hugging Face folder with a model card (`--push org/name` uploads it, with --yes)
    merged   the plain folder alone
    gguf     one file for llama.cpp and what is built on it, read back and compared

What a stage leaves is a Hugging Face folder already and is copied. An adapter folder as peft saves it is merged into
its base.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from pipeline.artifacts import Artifact, Store, need_disk, outside_model
from pipeline.cli.outputs import check_out, make_parent
from pipeline.errors import ArtifactError, ConfigError, MissingInputError
from pipeline.hub import hub_weights

ADAPTER = "adapter_config.json"
FORMS = ("hf", "merged", "gguf")
SUFFIX = ".gguf"


def export(
    store: Store, reference: str, *, to: str, out: Path, base: str | None, dtype: str = "f32", name: str = ""
) -> list[str]:
    """Write `out`, whole or not at all; what is to be known of it. `base`: what an adapter stands on, unless its own
    config's word is taken. `dtype` is of a GGUF, `name` of a card and a GGUF. Raises ConfigError where `out` is there
    already, ArtifactError for what is no model."""
    is_adapter = reference.startswith(("./", "../", "/")) and (Path(reference) / ADAPTER).exists()
    _check(reference, to, out, dtype)
    if base is not None and not is_adapter:
        raise ConfigError(f"{reference} is no adapter: it has no {ADAPTER}", where="--base", mend="leave it out")
    make_parent(out)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        folder = partial / "model"
        artifact = _plain_folder(store, reference, base, is_adapter, folder, to)
        named = name or _short(reference)
        notes = []
        if to == "hf":
            from pipeline.cli.card import card

            (folder / "README.md").write_text(card(store, artifact, named), encoding="utf-8")
        if to == "gguf":
            from pipeline.model.gguf_file import read_back, write_gguf

            write_gguf(folder, partial / out.name, dtype, named)
            notes = read_back(folder, partial / out.name, dtype)
        (partial / out.name if to == "gguf" else folder).rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return notes


def _check(reference: str, to: str, out: Path, dtype: str) -> None:
    """Raises ConfigError for what needs no look at the model."""
    if to not in FORMS:
        raise ConfigError(f"no such form: {to!r}", where="--to", mend=f"one of {', '.join(FORMS)}")
    if dtype != "f32" and to != "gguf":
        raise ConfigError("a GGUF alone has it", where="--dtype", mend="--to gguf, or leave it out")
    if (to == "gguf") != (out.suffix == SUFFIX):
        mend = "--out model.gguf" if to == "gguf" else "--to gguf, or --out with another name"
        raise ConfigError(f"a GGUF is a file that ends in {SUFFIX}, anything else a folder", where=str(out), mend=mend)
    if out.exists():
        raise ConfigError("there is something already", where=str(out), mend="--out with a new name")
    check_out(out)


def _check_speaks(model: Path, reference: str) -> None:
    """ConfigError where the folder's model is no language model: a GGUF would be its body without its head."""
    named = json.loads((model / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    wrong = [name for name in named if not name.endswith(("ForCausalLM", "LMHeadModel"))]
    if wrong:
        what = f"{reference} is a {wrong[0]}, and a GGUF holds a language model"
        raise ConfigError(what, where="--to gguf", mend="--to hf or --to merged")


def _short(reference: str) -> str:
    """A name for what the reference is of: `demo-dpo`, a folder's own name, a hub model's."""
    if reference.startswith(("./", "../", "/")):
        return Path(reference).absolute().name
    return reference.removeprefix("hub:").partition("@")[0].replace("/", "-")


def _plain_folder(
    store: Store, reference: str, base: str | None, is_adapter: bool, folder: Path, to: str
) -> Artifact:  # fmt: skip
    """Write the model as a plain folder; the artifact it is of, an adapter's being the folder itself."""
    if is_adapter:
        from pipeline.model.adapters import merge_folder

        merge_folder(Path(reference), _base(store, Path(reference), base), folder)
        if to == "gguf":
            _check_speaks(folder, reference)
        return outside_model(folder)
    artifact = store.resolve(reference)
    if artifact.kind not in ("causal-lm", "reward-model"):
        raise ArtifactError(f"{reference} holds no model, but {artifact.kind}", mend="llmpipe status")
    if to == "gguf":
        _check_speaks(artifact.model, reference)
    files = [path for path in artifact.model.iterdir() if path.is_file()]
    need_disk(folder.parent, sum(path.stat().st_size for path in files), "the model's folder")
    folder.mkdir()
    for path in files:
        shutil.copyfile(path, folder / path.name)
    return artifact


def check_repository(repository: str) -> None:
    """ConfigError for what is no name of a model on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(str(error).partition(". ")[0], where="--push", mend="--push org/name") from error
    if repository.count("/") != 1:
        raise ConfigError(f"{repository!r} is no name on the hub", where="--push", mend="--push org/name")


def push(folder: Path, repository: str, *, really: bool) -> str:
    """Upload the folder to the hub, private, with the user's own token; unless `really`, only say what would be done.
    The repository's address, or what would be. ConfigError for a name that is none, MissingInputError where the hub
    refuses."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    check_repository(repository)
    if not really:
        return f"would upload to {repository} (a private repository); --yes does"
    api = HfApi()
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="llmpipe export")
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        mend = "hf auth login, a name that you may write to, and no HF_HUB_OFFLINE"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MissingInputError(f"the hub did not take it: {reason}", where=repository, mend=mend) from error
    return f"uploaded to {address}"


def say_exported(
    store: Store, reference: str, *, to: str, out: Path, base: str | None, dtype: str, repository: str | None,
    really: bool, as_json: bool,
) -> None:  # fmt: skip
    """The command: export, then push where that is asked for."""
    if repository is not None and to != "hf":
        raise ConfigError("a folder with a model card is pushed, and nothing else", where="--push", mend="--to hf")
    if really and repository is None:
        raise ConfigError("there is nothing to upload", where="--yes", mend="--push org/name, or leave it out")
    if repository is not None:
        check_repository(repository)
    name = repository.rpartition("/")[2] if repository else ""
    notes = export(store, reference, to=to, out=out, base=base, dtype=dtype, name=name)
    files = {path.name: path.stat().st_size for path in sorted(out.iterdir() if out.is_dir() else [out])}
    if repository is not None:
        notes.append(push(out, repository, really=really))
    if as_json:
        fields: dict[str, Any] = {"reference": reference, "out": str(out), "files": files, "notes": notes}
        print(json.dumps(fields, indent=1))
        return
    for file, size in files.items():
        print(f"  {file:<32} {size / 1e6:10,.2f} MB", file=sys.stderr)
    for note in notes:
        print(f"  {note}", file=sys.stderr)
    print(f"{reference} is at {out}", file=sys.stderr)


def _base(store: Store, adapter: Path, given: str | None) -> Path:
    """The folder of the model that the adapter stands on: given, or as its config names it (a folder, a hub name)."""
    if given is not None:
        return store.resolve(given).model
    from peft import PeftConfig

    name = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path or ""
    for folder in (adapter / name, Path(name)):
        if name and (folder / "config.json").exists():
            return folder
    try:
        if name.count("/") == 1 and not name.startswith((".", "/")):
            return hub_weights(f"hub:{name}")
    except MissingInputError as error:
        raise MissingInputError(error.what, where=str(adapter / ADAPTER), mend="--base REF") from error
    problem = f"it names {name!r} as its base, which is not there" if name else "it names no base"
    raise MissingInputError(problem, where=str(adapter / ADAPTER), mend="--base REF")
