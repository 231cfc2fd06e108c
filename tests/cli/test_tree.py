"""A graph as a tree, against trees drawn by hand."""

from pathlib import Path

from pipeline.cli.tree import tree
from tests.written import recipe

TEXT = """\
run: r
stages:
  tokenize: {data: pydocs}
  pretrain: {}
  sft: {data: pydocs}
  reward: {data: pydocs}
  ppo: {}
  dpo: {data: pydocs}
  after: {stage: dpo, init: ppo, data: pydocs}
  eval: {models: [sft, dpo]}
"""


def test_the_demos_graph(tmp_path: Path) -> None:
    lines = tree(recipe(tmp_path, TEXT).nodes)
    assert [line.drawn + line.stage for line in lines] == [
        "tokenize",
        "└─ pretrain",
        "   └─ sft",
        "      ├─ reward",
        "      ├─ ppo",
        "      │  └─ after",
        "      └─ dpo",
        "eval",
    ]
    others = {line.stage: line.others for line in lines}
    assert others["ppo"] == ("reward",)
    assert set(others["eval"]) == {"sft", "dpo", "tokenize", "reward"}
    assert not others["after"]
