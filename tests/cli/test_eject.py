"""`llmpipe eject`, and files of one's own that stand where a stage does."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import recipe as installed

ROOT = Path(installed.__file__).parents[2]


def sha(folder: Path) -> str:
    manifest = json.loads((folder / "artifacts" / "tiny" / "pretrain" / "manifest.json").read_text())
    return str(manifest["files"]["model/model.safetensors"]["sha256"])


@pytest.mark.slow
def test_an_ejected_stage_gives_the_same_weights(warm: Any, tokenized: Path, made: Path):
    done = warm("eject", "pretrain")
    assert done.code == 0
    assert done.stdout == "my_pretrain.py\nin the recipe beside it:  pretrain: {stage: ./my_pretrain.py, …}\n"
    assert (warm.folder / "my_pretrain.py").read_text() == (ROOT / "stages" / "pretrain.py").read_text()
    tokenized.write_text(tokenized.read_text().replace("  pretrain:", "  pretrain:\n    stage: ./my_pretrain.py"))
    ran = warm("run", "tiny.yaml")
    assert ran.code == 0, ran.stderr
    assert sha(warm.folder) == sha(made)

    file = warm.folder / "my_pretrain.py"
    file.write_text(file.read_text().replace("=config.max_grad_norm,", "=2 * config.max_grad_norm,"))
    (row,) = json.loads(warm("status", "tiny.yaml", "--json").stdout)["stages"][1:]
    assert (row["state"], row["reasons"]) == ("stale", ["code: my_pretrain.py"])
    assert warm("run", "tiny.yaml", "--set", "pretrain.max_grad_norm=1e9").code == 0
    assert sha(warm.folder) != sha(made)


def test_eject_does_not_overwrite_and_knows_the_stages(warm: Any):
    assert warm("eject", "dpo", "--to", "deep/er").code == 0
    file = warm.folder / "deep" / "er" / "my_dpo.py"
    file.write_text("mine")
    done = warm("eject", "dpo", "--to", "deep/er")
    assert done.code == 2
    assert "the file is there already" in done.stderr
    assert file.read_text() == "mine"
    assert warm("eject", "dpo", "--to", "deep/er", "--force").code == 0
    assert file.read_text() == (ROOT / "stages" / "dpo.py").read_text()
    done = warm("eject", "dop")
    assert done.code == 2
    assert "no stage `dop`; did you mean `dpo`?" in done.stderr


MINE = '''
"""How often each token comes."""
from helper import count
from pipeline.recipe import StageConfig, field
class CountConfig(StageConfig):
    tokens: str = field("tokenize", "the tokens")
    top: int = field(3, "how many", gt=0)
INPUTS = {"tokens": "tokens"}
KIND = "rows"
def run(config, inputs, out, runtime):
    found = count(inputs["tokens"].path / "train.ds")[:config.top]
    (out / "rows.jsonl").write_text("".join(f"{token} {times}\\n" for token, times in found))
    return {"most": float(found[0][1])}
'''
HELPER = """
def count(path):
    import collections, numpy
    return collections.Counter(numpy.fromfile(path, dtype="<u2").tolist()).most_common()
"""


@pytest.mark.slow
def test_a_stage_of_ones_own_works_from_the_start(warm: Any, tokenized: Path):
    warm.write("deep/count.py", MINE)
    warm.write("deep/helper.py", HELPER)
    tokenized.write_text(tokenized.read_text() + "  often: {stage: ./deep/count.py, top: 2}\n")
    done = warm("run", "tiny.yaml", "--until", "often")
    assert done.code == 0, done.stderr
    rows = (warm.folder / "artifacts" / "tiny" / "often" / "rows.jsonl").read_text().splitlines()
    assert len(rows) == 2
    status = json.loads(warm("status", "tiny.yaml", "--json").stdout)["stages"]
    assert {row["stage"]: row["state"] for row in status}["often"] == "stands"
    warm.write("deep/helper.py", HELPER.replace("most_common()", "most_common(5)"))
    status = json.loads(warm("status", "tiny.yaml", "--json").stdout)["stages"]
    assert {row["stage"]: row["reasons"] for row in status}["often"] == ["code: helper.py"]
    bad = warm("run", "tiny.yaml", "--set", "often.topp=3")
    assert bad.code == 2
    assert "unknown key `topp`; did you mean `top`?" in bad.stderr
