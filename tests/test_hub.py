"""Models of the hub, through the real client from a hub on this machine: what is fetched, and what is not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub import hub

pytestmark = pytest.mark.slow

FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
BESIDE = [
    "LICENSE",
    "README.md",
    "chat_template.jinja",
    "config.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer.model",
]
OTHERS = [
    "consolidated.safetensors", "flax_model.msgpack", "model-q4.gguf", "onnx/model.onnx",
    "original/consolidated.00.pth", "pytorch_model.bin", "tf_model.h5", "training_args.bin", "unet/model.safetensors",
]  # fmt: skip
PROGRAM = """\
import json, sys
from huggingface_hub import snapshot_download
from pipeline.hub import hub_weights
if sys.argv[1:]:
    snapshot_download("org/model", allow_patterns=sys.argv[1:])  # as far as it came before a kill
folder = hub_weights("hub:org/model")
print(json.dumps(sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())))
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    for name in (FIRST, SECOND, *BESIDE, *OTHERS):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def fetched(address: str, home: Path, *before: str) -> list[str]:
    env = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home)}
    program = [sys.executable, "-c", PROGRAM, *before]
    found: list[str] = json.loads(subprocess.run(program, env=env, capture_output=True, check=True).stdout)
    return found


def test_weights_are_fetched_once_and_of_one_kind(repository: Path, tmp_path: Path) -> None:
    with hub(repository) as (address, _):
        assert fetched(address, tmp_path / "home") == sorted([FIRST, SECOND, *BESIDE])
    assert fetched(address, tmp_path / "home") == sorted([FIRST, SECOND, *BESIDE]), "the hub is gone, the cache is not"


def test_weights_of_the_older_kind_where_there_are_no_others(repository: Path, tmp_path: Path) -> None:
    (repository / FIRST).unlink()
    (repository / SECOND).unlink()
    with hub(repository) as (address, _):
        assert fetched(address, tmp_path / "home") == sorted(["pytorch_model.bin", *BESIDE])


def test_a_part_of_the_weights_is_no_model(repository: Path, tmp_path: Path) -> None:
    with hub(repository) as (address, asked):
        assert fetched(address, tmp_path / "home", "config.json", FIRST) == sorted([FIRST, SECOND, *BESIDE])
    assert sorted(asked) == sorted([FIRST, SECOND, *BESIDE])
