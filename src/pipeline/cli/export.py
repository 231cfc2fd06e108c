"""`llmpipe export REF --to merged --out DIR`: a plain Hugging Face folder of what REF names.

What a stage leaves is one already and is copied. An adapter folder as peft saves it is merged into its base.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from pipeline.artifacts import Store, need_disk
from pipeline.errors import ArtifactError, ConfigError, MissingInputError
from pipeline.hub import hub_folder

ADAPTER = "adapter_config.json"


def export(store: Store, reference: str, *, to: str, out: Path, base: str | None) -> None:
    """Write the folder `out`, whole or not at all. `base`: what an adapter stands on, unless its own config's word is
    taken. Raises ConfigError where `out` is there already, ArtifactError for what is no model."""
    if to != "merged":
        raise ConfigError(f"no such form: {to!r}", where="--to", mend="--to merged")
    if out.exists():
        raise ConfigError("there is something already", where=str(out), mend="--out with a new name")
    folder = Path(reference)
    is_adapter = reference.startswith(("./", "../", "/")) and (folder / ADAPTER).exists()
    if base is not None and not is_adapter:
        raise ConfigError(f"{reference} is no adapter: it has no {ADAPTER}", where="--base", mend="leave it out")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    if is_adapter:
        from pipeline.model.adapters import merge_folder

        merge_folder(folder, _base(store, folder, base), partial)
    else:
        artifact = store.resolve(reference)
        if artifact.kind not in ("causal-lm", "reward-model"):
            raise ArtifactError(f"{reference} holds no model, but {artifact.kind}", mend="llmpipe status")
        files = [path for path in artifact.model.iterdir() if path.is_file()]
        need_disk(out.parent, sum(path.stat().st_size for path in files), "the model's folder")
        partial.mkdir()
        for path in files:
            shutil.copyfile(path, partial / path.name)
    partial.rename(out)
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
            return hub_folder(f"hub:{name}", ("*.safetensors", "*.bin"))
    except MissingInputError as error:
        raise MissingInputError(error.what, where=str(adapter / ADAPTER), mend="--base REF") from error
    problem = f"it names {name!r} as its base, which is not there" if name else "it names no base"
    raise MissingInputError(problem, where=str(adapter / ADAPTER), mend="--base REF")
