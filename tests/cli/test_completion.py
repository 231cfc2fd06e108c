"""What the shell offers, asked as bash asks: by the words on the line."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest


def offered(cli: Any, line: str) -> list[str]:
    """The completions of the last word of `line`, as bash gets them."""
    words = line.split(" ")
    env = {"_LLMPIPE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = cli(env=env)
    assert done.code == 0, done.stderr
    return [word for word in done.stdout.splitlines() if word]


@pytest.fixture
def folder(warm: Any) -> Any:
    """A folder with a recipe and the manifests of two runs."""
    warm.write(
        "mine.yaml", "run: a\nstages:\n  tokenize: {data: [pydocs]}\n  first: {stage: dpo, init: ./m, data: [p]}\n"
    )
    for name in ("a/sft", "a/dpo@1", "b/pretrain"):
        warm.write(f"artifacts/{name}/manifest.json", "{}")
    warm.write("artifacts/a/.dpo.123.partial/manifest.json", "{}")
    return warm


@pytest.mark.slow
def test_recipes_stages_and_references(folder: Any):
    assert offered(folder, "llmpipe run dpo-") == ["dpo-variants"]
    assert offered(folder, "llmpipe plan mi") == ["mine.yaml"]
    assert offered(folder, "llmpipe run --until re") == ["reward"]  # of the demo
    assert offered(folder, "llmpipe run mine.yaml --until ") == ["tokenize", "first"]
    assert offered(folder, "llmpipe preview mine.yaml f") == ["first"]
    assert offered(folder, "llmpipe chat ") == ["a/dpo@1", "a/sft", "b/pretrain"]
    assert offered(folder, "llmpipe export b") == ["b/pretrain"]
    assert offered(folder, "llmpipe status a/s") == ["a/sft"]
    assert offered(folder, "llmpipe run --run ") == ["a", "b"]
    assert offered(folder, "llmpipe eject to") == ["tokenize"]


@pytest.mark.slow
def test_another_root_and_what_cannot_be_read(folder: Any):
    folder.write("there/c/sft/manifest.json", "{}")
    assert offered(folder, "llmpipe serve --artifacts there ") == ["c/sft"]
    folder.write("bad.yaml", "run: [")
    assert offered(folder, "llmpipe run bad.yaml --until ") == []
    assert offered(folder, "llmpipe chat ./") == []  # paths are the shell's own


@pytest.mark.slow
def test_bash_takes_what_install_completion_writes(folder: Any, tmp_path: Path):
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    done = folder(
        "--install-completion", "bash", env={"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    )
    assert done.code == 0, done.stderr
    (script,) = tmp_path.glob(".bash_completions/*.sh")
    assert str(script) in (tmp_path / ".bashrc").read_text()
    asked = f"source {script} && complete -p llmpipe"
    found = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=False)
    assert "_llmpipe_completion llmpipe" in found.stdout, found.stderr
