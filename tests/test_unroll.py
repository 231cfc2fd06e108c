"""`repeat:` and `matrix:`: the names they make, what a reference means, what is refused, what stands."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.artifacts import Store
from pipeline.cli.stages import load_stage
from pipeline.errors import ConfigError, MissingInputError, RecipeError
from pipeline.graph import build
from pipeline.lineage import Standing, survey
from pipeline.reading import read_recipe
from pipeline.unroll import meaning, unroll
from tests.written import line, recipe, refused

ROWS = """
from pipeline.recipe import Ref, StageConfig, field
class C(StageConfig):
    model: Ref | None = field(None, "x")
INPUTS = {"model": "causal-lm"}
KIND = "rows"
def run(config, inputs, out, runtime): return {}
"""
TOP = """\
seed: 7
stages:
  tokenize: {data: text.txt}
  pretrain: {max_steps: 3}
  sft: {init: pretrain, data: rows.jsonl}
"""
MATRIX = f"""\
{TOP}\
  dpo:
    matrix:
      seed: [0, 1]
      beta: [0.05, 1e-5]
    init: sft
    data: rows.jsonl
  eval: {{models: [sft, dpo]}}
"""
ROUNDS = f"""\
{TOP}\
  repeat:
    times: 3
    carry:
      policy: {{first: sft, then: dpo}}
      seen: {{first: rows.jsonl, then: label}}
    stages:
      label: {{stage: ./label.py, model: policy}}
      dpo:
        init: policy
        data: [label, {{source: seen, limit: 5}}]
  eval: {{models: [sft, dpo@1, dpo]}}
"""
MEMBERS = ("dpo@beta=1e-5@seed=0", "dpo@beta=1e-5@seed=1", "dpo@beta=0.05@seed=0", "dpo@beta=0.05@seed=1")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("rows.jsonl", "more.jsonl", "text.txt"):
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "label.py").write_text(ROWS)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    return tmp_path


# ---- matrix ----


def test_a_matrix_is_a_stage_a_combination(folder: Path):
    nodes = recipe(folder, MATRIX).nodes
    assert list(nodes) == ["tokenize", "pretrain", "sft", *sorted(MEMBERS, key=lambda n: "1e-5" in n), "eval"]
    configs: dict[str, Any] = {name: nodes[name].config for name in MEMBERS}
    assert {name: (config.seed, config.beta) for name, config in configs.items()} == {
        "dpo@beta=1e-5@seed=0": (0, 1e-5),
        "dpo@beta=1e-5@seed=1": (1, 1e-5),
        "dpo@beta=0.05@seed=0": (0, 0.05),
        "dpo@beta=0.05@seed=1": (1, 0.05),
    }
    for name in MEMBERS:
        assert nodes[name].stage.type == "dpo"
        assert nodes[name].parents(nodes) == ["sft"]
        assert nodes[name].origins["beta"].endswith("r.yaml:9")
        assert nodes[name].origins["data"].endswith("r.yaml:11")


def test_the_order_in_which_a_matrix_is_written_does_not_count(folder: Path):
    other = MATRIX.replace("      seed: [0, 1]\n", "").replace("1e-5]\n", "1e-5]\n      seed: [1, 0]\n")
    assert set(recipe(folder, other).nodes) == set(recipe(folder, MATRIX).nodes)


@pytest.mark.parametrize(
    ("written", "labels"),
    [
        ("max_steps: [3, 40]", ["max_steps=3", "max_steps=40"]),
        ("learning_rate: [1e-4, 3.0e-06, 2e3]", ["learning_rate=0.0001", "learning_rate=3e-6", "learning_rate=2000.0"]),
        ("bf16: [true, false, null]", ["bf16=true", "bf16=false", "bf16=null"]),
        ("loss_type: [ipo, sigmoid_norm]", ["loss_type=ipo", "loss_type=sigmoid_norm"]),
        ("peft.r: [8, 16]", ["peft.r=8", "peft.r=16"]),
        ("data: {few: {source: rows.jsonl, limit: 3}, all: [rows.jsonl, more.jsonl]}", ["data=few", "data=all"]),
        ("loss_type: {both: [ipo, hinge], ipo: ipo}", ["loss_type=both", "loss_type=ipo"]),
    ],
)
def test_values_have_names(folder: Path, written: str, labels: list[str]):
    data = "" if written.startswith("data") else ", data: rows.jsonl"
    nodes = recipe(folder, f"{TOP}  dpo: {{matrix: {{{written}}}, init: sft{data}}}\n").nodes
    assert [name for name in nodes if name.startswith("dpo")] == [f"dpo@{label}" for label in labels]


def test_values_of_a_matrix_are_laid_where_they_belong(folder: Path):
    text = f"{TOP}  dpo:\n    init: sft\n    peft: {{lora_alpha: 3}}\n    matrix:\n      peft.r: [8, 16]\n"
    text += "      data:\n        one: rows.jsonl\n        two: [more.jsonl, {source: rows.jsonl, limit: 2}]\n"
    nodes = recipe(folder, text).nodes
    config: Any = nodes["dpo@data=two@peft.r=16"].config
    assert (config.peft.r, config.peft.lora_alpha) == (16, 3)
    assert [(entry.source, entry.limit) for entry in config.data] == [
        (str(folder / "more.jsonl"), None),
        (str(folder / "rows.jsonl"), 2),
    ]
    error = refused(folder, text.replace("limit: 2", "limt: 2"))
    assert error.what == "unknown key `data.1.limt`; did you mean `limit`?"
    assert line(error) == 13


def test_a_value_of_a_matrix_that_does_not_fit_is_refused_at_its_line(folder: Path):
    error = refused(folder, MATRIX.replace("[0.05, 1e-5]", "\n        - 0.05\n        - 0\n"))
    assert error.what == "`beta`: input should be greater than 0 (got 0)"
    assert line(error) == 11
    assert refused(folder, MATRIX.replace("beta:", "bet:")).what == "unknown key `bet`; did you mean `beta`?"
    assert "`seed`: input should be a valid integer" in refused(folder, MATRIX.replace("[0, 1]", "[0, x]")).what


def test_a_matrix_where_a_list_is_taken_is_all_of_it(folder: Path):
    def models(written: str) -> tuple[str, ...]:
        return recipe(folder, MATRIX.replace("[sft, dpo]", written)).nodes["eval"].inputs["models"]

    assert models("[sft, dpo]") == ("sft", *sorted(MEMBERS, key=lambda name: "1e-5" in name))
    assert models("[dpo@beta=0.05, sft]") == (*MEMBERS[2:], "sft")
    assert models("[dpo@seed=1]") == (MEMBERS[3], MEMBERS[1])
    assert models("[dpo@seed=1@beta=1e-5]") == (MEMBERS[1],), "in any order"
    error = refused(folder, MATRIX.replace("[sft, dpo]", "[dpo@seed=2]"))
    assert error.what.startswith("`models`: no stage `dpo@seed=2`; did you mean `dpo@")
    assert line(error) == 12
    config: Any = recipe(folder, MATRIX).nodes["eval"].config
    assert config.models[1:] == (MEMBERS[2], MEMBERS[3], MEMBERS[0], MEMBERS[1])


def test_two_names_of_one_stage_are_one_in_a_list(folder: Path):
    assert recipe(folder, ROUNDS, "repeat.times=1").nodes["eval"].inputs["models"] == ("sft", "dpo@1")
    text = f"{TOP}  repeat: {{times: 1, stages: {{rm: {{stage: reward, init: sft, data: rows.jsonl}}}}}}\n"
    text += "  other: {stage: reward, init: sft, data: rows.jsonl}\n"
    text += "  ppo: {reward: [{models: [rm@1, rm, other, rm]}]}\n"
    node: Any = recipe(folder, text).nodes["ppo"]
    assert node.inputs["reward.models"] == ("rm@1", "other")
    assert node.config.reward[0].models == ("rm@1", "other"), "an ensemble counts each member once"


def test_a_matrix_where_one_model_is_taken_is_refused_and_named(folder: Path):
    text = MATRIX + "  after: {stage: dpo, init: dpo@beta=0.05, data: rows.jsonl}\n"
    error = refused(folder, text)
    assert error.what == f"`init` takes one causal-lm, and `dpo@beta=0.05` is 2: {MEMBERS[2]}, {MEMBERS[3]}"
    assert error.mend == f"name one, such as {MEMBERS[2]}"
    assert line(error) == 13
    whole = recipe(folder, text.replace("0.05, data", "0.05@seed=1, data"))
    assert whole.nodes["after"].inputs["init"] == (MEMBERS[3],)
    error = refused(folder, TOP.replace("sft: {", "sft: {matrix: {seed: [1, 2]}, ") + "  eval: {models: [pretrain]}\n")
    assert error.what == "`baseline` takes one causal-lm, and `sft` is 2: sft@seed=1, sft@seed=2", "a default too"


def test_a_matrix_in_the_terms_of_a_reward(folder: Path):
    text = f"{TOP}  reward: {{matrix: {{seed: [0, 1]}}, init: sft, data: rows.jsonl}}\n"
    for written in ("[{models: [reward]}]", "{models: [reward]}"):
        whole = recipe(folder, f"{text}  ppo: {{init: sft, reward: {written}}}\n")
        assert whole.nodes["ppo"].inputs["reward.models"] == ("reward@seed=0", "reward@seed=1")
        terms: Any = whole.nodes["ppo"].config
        assert terms.reward[0].models == ("reward@seed=0", "reward@seed=1")
    lines = "  ppo:\n    init: sft\n    reward:\n      - models:\n        - reward\n        - rewrad\n"
    error = refused(folder, text + lines)
    assert error.what.startswith("`reward.0.models`: no stage `rewrad`")
    assert line(error) == 12
    error = refused(folder, text + "  ppo: {init: sft, reward: [{model: reward}]}\n")
    assert error.what.startswith("`reward.0.model` takes one reward-model, and `reward` is 2: ")
    error = refused(folder, text + "  ppo: {init: sft, reward: reward}\n")
    assert error.what.startswith("`reward` takes one reward-model, and `reward` is 2: ")


def test_a_matrix_of_rows_is_data_of_all(folder: Path):
    text = f"{TOP}  label: {{stage: ./label.py, model: sft, matrix: {{seed: [3, 4]}}}}\n"
    nodes = recipe(folder, text + "  dpo: {init: sft, data: {source: label, limit: 9}}\n").nodes
    rows = [folder / "artifacts" / "demo" / f"label@seed={seed}" / "rows.jsonl" for seed in (3, 4)]
    config: Any = nodes["dpo"].config
    assert [(entry.source, entry.limit) for entry in config.data] == [(str(rows[0]), 9), (str(rows[1]), 9)]
    assert nodes["dpo"].parents(nodes) == ["sft", "label@seed=3", "label@seed=4"]


@pytest.mark.parametrize(
    ("old", "new", "at", "what"),
    [
        ("seed: [0, 1]", "seed: []", 8, "`matrix.seed` is empty"),
        ("seed: [0, 1]", "seed: {}", 8, "`matrix.seed` is empty"),
        ("seed: [0, 1]", "seed: 3", 8, "`matrix.seed` is neither a list of values nor a mapping"),
        ("seed: [0, 1]", "seed: [1, 1]", 8, "`matrix.seed`: 1 is there twice"),
        ("seed: [0, 1]", "data: [./a.jsonl]", 8, "`matrix.data`"),
        ("seed: [0, 1]", "init: [./a]", 8, "`init` is set, and in the matrix too"),
        ("seed: [0, 1]", "lr: {a b: 1}", 8, "`matrix.lr`: '1' can't stand in a stage's name"),
        ("seed: [0, 1]", "loss_type: [[ipo]]", 8, "`matrix.loss_type`: \"['ipo']\" can't stand in a stage's name"),
        ("seed: [0, 1]", f"lr: [{'x' * 200}]", 7, "is too long a name"),
        ("seed: [0, 1]", "mixture.web/old: [0.5]", 8, "`matrix.mixture.web/old`: 'mixture.web/old' can't stand in a"),
        ("init: sft", "init: sft\n    peft: 3", 11, "`peft`: "),
        ("  dpo:", "  dpo@1:", 6, "'dpo@1' is no name: `@` stands in the names that"),
        ("  dpo:", "  d/o:\n    stage: dpo", 6, "'d/o' is no name: letters"),
        ("  dpo:", f"  {'x' * 65}:\n    stage: dpo", 6, "is no name: letters"),
        ("[sft, dpo]", "[sft, dop]", 12, "`models`: no stage `dop`"),
    ],
)
def test_a_matrix_that_cannot_be_is_refused_at_its_line(folder: Path, old: str, new: str, at: int, what: str):
    assert MATRIX.count(old) == 1
    text = MATRIX.replace(old, new)
    if new.startswith("data"):
        text = text.replace("    data: rows.jsonl\n", "")
    if old == "  dpo:":
        text = text.replace("[sft, dpo]", "[sft]")
    error = refused(folder, text)
    assert what in error.what
    assert line(error) == at


def test_a_field_that_has_no_name_is_mended_by_a_name(folder: Path):
    text = f"{TOP}  more: {{stage: pretrain, matrix: {{mixture.web/old: [0.5, 0.7]}}}}\n"
    error = refused(folder, text)
    assert (line(error), error.mend) == (6, "matrix: {mixture: {one: {web/old: …}, other: …}}")
    named = text.replace("mixture.web/old: [0.5, 0.7]", "mixture: {one: {text.txt: 1.0}}")
    assert "more@mixture=one" in recipe(folder, named).nodes
    block = ROUNDS.replace("    times: 3\n", "    times: 1\n    matrix: {dpo.a/b: [1]}\n")
    assert line(refused(folder, block)) == 8


@pytest.mark.parametrize("matrix", ["3", "[1]", "{}", "null"])
def test_what_is_no_matrix(folder: Path, matrix: str):
    error = refused(folder, f"{TOP}  dpo: {{matrix: {matrix}, init: sft, data: rows.jsonl}}\n")
    assert error.what == "`matrix` is a mapping of fields to lists of values"
    assert (line(error), error.mend) == (6, "matrix: {seed: [0, 1, 2], beta: [0.05, 0.1]}")


def test_a_matrix_that_reaches_into_what_is_no_mapping(folder: Path):
    text = f"{TOP}  dpo: {{peft: 3, matrix: {{peft.r: [1]}}, init: sft, data: rows.jsonl}}\n"
    assert refused(folder, text).what == "`matrix.peft.r`: `peft` holds no fields"


def test_set_reaches_a_field_of_a_matrix(folder: Path):
    text = f"{TOP}  dpo: {{matrix: {{peft.r: [8, 16], data: {{own: rows.jsonl}}}}, init: sft}}\n"

    def ranks(*overrides: str) -> list[int]:
        nodes: dict[str, Any] = dict(recipe(folder, text, *overrides).nodes)
        return [node.config.peft.r for name, node in nodes.items() if name.startswith("dpo")]

    assert ranks() == [8, 16]
    assert ranks("dpo.matrix.peft.r=[32]") == [32]
    assert ranks("dpo.matrix.peft.r.0=32") == [32, 16]
    assert ranks("dpo.matrix.peft.lora_alpha=[1, 2]") == [8, 16, 8, 16]
    assert "dpo@data=own@peft.r=8@seed=3" in recipe(folder, text, "dpo.matrix.seed=[3]").nodes
    assert "dpo@data=more@peft.r=8" in recipe(folder, text, f"dpo.matrix.data.more={folder / 'more.jsonl'}").nodes
    nodes = recipe(folder, CHAINS, "repeat.matrix.dpo.beta=[0.7]", "repeat.stages.dpo.matrix.peft.r=[4]").nodes
    member: Any = nodes["dpo@1@dpo.beta=0.7@peft.r=4@seed=1"]
    assert (member.config.beta, member.config.peft.r) == (0.7, 4)
    error = refused(folder, text, "dpo.matrix.peft.r=3")
    assert error.what == "`matrix.peft.r` is neither a list of values nor a mapping of names to values"
    assert error.where == "--set dpo.matrix.peft.r=3"


def test_set_reaches_all_or_one(folder: Path):
    def betas(*overrides: str) -> dict[str, tuple[Any, ...]]:
        nodes: dict[str, Any] = dict(recipe(folder, MATRIX, *overrides).nodes)
        return {name: (nodes[name].config.beta, nodes[name].config.max_steps) for name in nodes if "@" in name}

    assert {steps for _, steps in betas("dpo.max_steps=5").values()} == {5}
    found = betas("dpo.max_steps=5", "dpo@beta=0.05@seed=1.max_steps=9")
    assert {name: steps for name, (_, steps) in found.items()} == {
        **dict.fromkeys(MEMBERS, 5),
        "dpo@beta=0.05@seed=1": 9,
    }
    assert list(betas("dpo.matrix.seed=[4]")) == ["dpo@beta=0.05@seed=4", "dpo@beta=1e-5@seed=4"]
    whole = recipe(folder, MATRIX, "sft.matrix.seed=[1, 2]", "dpo.init=sft@seed=2", "eval.baseline=null")
    assert whole.nodes[MEMBERS[0]].inputs["init"] == ("sft@seed=2",)
    origin = recipe(folder, MATRIX, "dpo@beta=0.05@seed=1.max_steps=9").nodes["dpo@beta=0.05@seed=1"].origins
    assert origin["max_steps"] == "--set dpo@beta=0.05@seed=1.max_steps=9"


def test_a_set_that_leads_nowhere_is_refused_at_itself(folder: Path):
    for override, what in (
        ("dpo.beta=0.1", "`beta` is set, and in the matrix too"),
        ("dpo@seed=7.beta=0.1", "'dpo@seed=7.beta=0.1' begins with no stage"),
        ("dpo@beta=0.05@seed=1.bta=1", "unknown key `bta`; did you mean `beta`?"),
        ("dpo@beta=0.05@seed=1", "'dpo@beta=0.05@seed=1' begins with no stage"),
    ):
        error = refused(folder, MATRIX, override)
        assert what in error.what
        assert error.where.endswith("r.yaml:9") if "matrix" in what else error.where == f"--set {override}"


# ---- repeat ----


def test_a_block_is_its_stages_round_by_round(folder: Path):
    whole = recipe(folder, ROUNDS)
    nodes = whole.nodes
    assert list(nodes) == ["tokenize", "pretrain", "sft"] + [
        f"{n}@{k}" for k in (1, 2, 3) for n in ("label", "dpo")
    ] + ["eval"]
    assert {name: node.parents(nodes) for name, node in nodes.items() if "@" in name} == {
        "label@1": ["sft"],
        "dpo@1": ["sft", "label@1"],
        "label@2": ["dpo@1"],
        "dpo@2": ["dpo@1", "label@2", "label@1"],
        "label@3": ["dpo@2"],
        "dpo@3": ["dpo@2", "label@3", "label@2"],
    }
    config: Any = nodes["dpo@2"].config
    rows = folder / "artifacts" / "demo"
    assert [(entry.source, entry.limit) for entry in config.data] == [
        (str(rows / "label@2" / "rows.jsonl"), None),
        (str(rows / "label@1" / "rows.jsonl"), 5),
    ]
    first: Any = nodes["dpo@1"].config
    assert first.data[1].source == str(folder / "rows.jsonl")
    assert nodes["dpo@2"].origins["init"].endswith("r.yaml:14")
    assert nodes["eval"].inputs["models"] == ("sft", "dpo@1", "dpo@3"), "the bare name is the last round"


def test_every_round_draws_anew_unless_it_is_told_a_seed(folder: Path):
    nodes = recipe(folder, ROUNDS).nodes
    assert [nodes[f"dpo@{k}"].config.seed for k in (1, 2, 3)] == [7, 1007, 2007]
    assert nodes["dpo@1"].origins["seed"].endswith("r.yaml:1")
    assert nodes["dpo@3"].origins["seed"].endswith("r.yaml:1 + 2000, round 3")
    nodes = recipe(folder, ROUNDS, "repeat.stages.dpo.seed=4").nodes
    assert [nodes[f"dpo@{k}"].config.seed for k in (1, 2, 3)] == [4, 4, 4]


def test_what_a_name_means(folder: Path):
    text = ROUNDS.replace("      dpo:\n", "      dpo:\n        matrix: {beta: [0.1, 0.2]}\n")
    text = text.replace("{first: sft, then: dpo}", "{first: sft, then: label}")
    text = text.replace("init: policy", "init: sft").replace("model: policy", "model: sft")
    document = recipe(folder, text).document
    both = ("dpo@{}@beta=0.1", "dpo@{}@beta=0.2")
    for stage, reference, expected in (
        ("", "dpo", [name.format(3) for name in both]),
        ("", "dpo@2", [name.format(2) for name in both]),
        ("", "dpo@beta=0.2", ["dpo@3@beta=0.2"]),
        ("", "dpo@beta=0.2@1", ["dpo@1@beta=0.2"]),
        ("", "dpo@*", [name.format(k) for k in (1, 2, 3) for name in both]),
        ("", "dpo@*@beta=0.1", [f"dpo@{k}@beta=0.1" for k in (1, 2, 3)]),
        ("", "label", ["label@3"]),
        ("", "dpo@4", ["dpo@4"]),
        ("", "dpo@0", ["dpo@0"]),
        ("", "sft", ["sft"]),
        ("", "sft@*", ["sft@*"]),
        ("", "./dpo", ["./dpo"]),
        ("", "hub:org/dpo@1", ["hub:org/dpo@1"]),
        ("label@2", "dpo", [name.format(2) for name in both]),
        ("label@2", "dpo@beta=0.2", ["dpo@2@beta=0.2"]),
        ("label@2", "dpo@1@beta=0.2", ["dpo@1@beta=0.2"]),
        ("label@2", "policy", ["label@1"]),
        ("label@1", "policy", ["sft"]),
        ("label@1", "seen", ["rows.jsonl"]),
        ("sft", "policy", ["policy"]),
    ):
        assert meaning(document, stage, reference) == tuple(expected), (stage, reference)


def test_what_a_user_names_on_the_command_line(folder: Path):
    assert recipe(folder, ROUNDS).select("dpo") == ("dpo@3",)
    assert recipe(folder, ROUNDS).select("label@*") == ("label@1", "label@2", "label@3")
    assert recipe(folder, MATRIX).select("dpo@seed=0") == (MEMBERS[2], MEMBERS[0])
    assert recipe(folder, MATRIX).select("dop") == ()
    assert recipe(folder, MATRIX).select("dpo@seed=2") == ()


def test_a_default_reference_inside_a_block_is_this_rounds(folder: Path):
    text = f"{TOP.replace('  sft: {', '  start: {stage: sft, ')}  repeat:\n    times: 2\n    stages:\n"
    text += "      sft: {init: start, data: rows.jsonl}\n      dpo: {data: rows.jsonl}\n"
    nodes = recipe(folder, text).nodes
    assert [nodes[f"dpo@{k}"].inputs["init"] for k in (1, 2)] == [("sft@1",), ("sft@2",)]


def test_several_blocks(folder: Path):
    text = f"{TOP}  repeat:\n    - {{times: 2, stages: {{dpo: {{init: sft, data: rows.jsonl}}}}}}\n"
    text += "    - {times: 1, stages: {ipo: {stage: dpo, init: dpo, data: rows.jsonl}}}\n"
    nodes = recipe(folder, text, "repeat.1.times=2").nodes
    assert list(nodes)[3:] == ["dpo@1", "dpo@2", "ipo@1", "ipo@2"]
    assert nodes["ipo@1"].inputs["init"] == ("dpo@2",), "of another block the last round"
    error = refused(folder, text.replace("ipo: {stage: dpo, init: dpo", "dpo: {init: sft"))
    assert error.what == "`dpo` is a stage inside of `repeat` and outside"
    assert line(error) == 8


CARRY = "      policy: {first: sft, then: dpo}\n"
BLOCK = ROUNDS[ROUNDS.index("  repeat:") : ROUNDS.index("  eval:")]
BLOCK_STAGES = ROUNDS[ROUNDS.index("      label:") : ROUNDS.index("  eval:")]


@pytest.mark.parametrize(
    ("old", "new", "at", "what"),
    [
        ("times: 3", "times: 0", 7, "`times`: input should be greater than or equal to 1 (got 0)"),
        ("times: 3", "times: many", 7, "`times`: input should be a valid integer"),
        ("times: 3", "tims: 3", 7, "unknown key `tims`; did you mean `times`?"),
        ("    times: 3\n", "", 6, "`times` is required"),
        ("then: dpo}", "then: dop}", 9, "`carry.policy.then`: no stage `dop` in the block; did you mean `dpo`?"),
        ("then: dpo}", "then: sft}", 9, "`carry.policy.then`: no stage `sft` in the block"),
        ("first: sft", "first: label", 9, "`carry.policy.first`: `label` is of the block"),
        ("first: sft", "first: seen", 9, "`carry.policy.first`: `seen` is of the block"),
        ("first: sft", "first: stf", 12, "`model`: no stage `stf`"),
        ("first: sft, ", "", 9, "`carry.policy.first` is required"),
        (CARRY, CARRY.replace("policy", "dpo"), 9, "`carry.dpo` has the name of a stage"),
        (CARRY, CARRY.replace("policy", "sft"), 9, "`carry.sft` has the name of a stage"),
        ("      dpo:\n", "      sft:\n", 13, "`sft` is a stage inside of `repeat` and outside"),
        ("      dpo:\n", "      dpo@1:\n", 13, "'dpo@1' is no name: `@` stands in the names"),
        ("      dpo:\n", "      repeat:\n", 13, "a block in a block can't be unrolled"),
        ("      dpo:\n", "      dp/o:\n        stage: dpo\n", 13, "'dp/o' is no name: letters"),
        ("init: policy", "init: polcy", 14, "`init`: no stage `polcy`"),
        ("init: policy", "init: dpo", 13, "the stages go round in a circle: dpo@1 → dpo@1"),
        ("model: policy", "model: dpo", 12, "the stages go round in a circle: "),
        ("models: [sft, dpo@1, dpo]", "models: [dpo@4]", 16, "`models`: no stage `dpo@4`; did you mean `dpo@"),
        ("models: [sft, dpo@1, dpo]", "models: [policy]", 16, "`models`: no stage `policy`"),
        ("data: [label, ", "datta: [label, ", 15, "unknown key `datta`; did you mean `data`?"),
        (BLOCK_STAGES, "      {}\n", 11, "`repeat.stages` is empty"),
        (BLOCK, "  repeat: 3\n", 6, "`repeat` is a mapping of"),
        (BLOCK, "  repeat: []\n", 6, "`repeat` is a mapping of"),
        (BLOCK, "  repeat: [3]\n", 6, "`repeat` is a mapping of"),
    ],
)
def test_a_block_that_cannot_be_is_refused_at_its_line(folder: Path, old: str, new: str, at: int, what: str):
    assert old in ROUNDS
    text = ROUNDS.replace(old, new, 1)
    if old == "      dpo:\n":
        text = text.replace("then: dpo", f"then: {new.strip().partition(':')[0]}").replace(", dpo@1, dpo]", "]")
    error = refused(folder, text)
    assert what in error.what
    assert line(error) == at


def test_a_missing_file_of_a_carry_is_refused(folder: Path):
    text = ROUNDS.replace("first: rows.jsonl", "first: rosw.jsonl")
    error = refused(folder, text, kind=MissingInputError)
    assert error.what == f"no file or folder {folder}/rosw.jsonl"
    assert line(error) == 15


def test_a_carry_of_set_starts_at_the_current_folder(folder: Path):
    (folder / "elsewhere" / "mine.jsonl").write_text("{}\n")
    for written in ("./mine.jsonl", "mine.jsonl", "min*.jsonl"):
        nodes: dict[str, Any] = dict(recipe(folder, ROUNDS, f"repeat.carry.seen.first={written}").nodes)
        assert nodes["dpo@1"].config.data[1].source == str(folder / "elsewhere" / Path(written).name)
        assert nodes["dpo@2"].config.data[1].source.endswith("label@1/rows.jsonl")
    error = refused(folder, ROUNDS, "repeat.carry.seen.first=rows.jsonl", kind=MissingInputError)
    assert error.what == f"no file or folder {folder / 'elsewhere' / 'rows.jsonl'}"
    assert error.where == "--set repeat.carry.seen.first=rows.jsonl"


def test_set_reaches_a_round_or_all(folder: Path):
    nodes: dict[str, Any] = dict(recipe(folder, ROUNDS, "repeat.stages.dpo.beta=0.5", "dpo@2.beta=0.7").nodes)
    assert [nodes[f"dpo@{k}"].config.beta for k in (1, 2, 3)] == [0.5, 0.7, 0.5]
    assert "label@4" in recipe(folder, ROUNDS, "repeat.times=4").nodes
    error = refused(folder, ROUNDS, "dpo@4.beta=1")
    assert (error.what.partition(";")[0], error.where) == (
        "'dpo@4.beta=1' begins with no stage",
        "--set dpo@4.beta=1",
    )
    assert "there is no 'dpo'" in refused(folder, ROUNDS, "dpo.beta=1").what


def test_a_matrix_in_a_block(folder: Path):
    text = ROUNDS.replace("      dpo:\n", "      dpo:\n        matrix: {seed: [1, 2]}\n")
    error = refused(folder, text)
    assert error.what == "`model` takes one causal-lm, and `policy` is 2: dpo@1@seed=1, dpo@1@seed=2"
    assert line(error) == 12
    text = text.replace("model: policy", "model: sft").replace("init: policy", "init: sft")
    nodes = recipe(folder, text).nodes
    assert [name for name in nodes if name.startswith("dpo")] == [
        f"dpo@{k}@seed={s}" for k in (1, 2, 3) for s in (1, 2)
    ]
    assert nodes["eval"].inputs["models"] == ("sft", *(f"dpo@{k}@seed={s}" for k in (1, 3) for s in (1, 2)))


CHAINS = ROUNDS.replace("    times: 3\n", "    times: 2\n    matrix: {dpo.beta: [0.1, 0.2], seed: [0, 1]}\n")


def test_a_matrix_of_a_block_is_a_chain_of_rounds_a_combination(folder: Path):
    nodes: dict[str, Any] = dict(recipe(folder, CHAINS).nodes)
    ends = [f"@dpo.beta={beta}@seed={seed}" for beta in (0.1, 0.2) for seed in (0, 1)]
    assert [n for n in nodes if "@" in n] == [f"{n}@{k}{end}" for k in (1, 2) for end in ends for n in ("label", "dpo")]
    for end, beta, seed in zip(ends, (0.1, 0.1, 0.2, 0.2), (0, 1, 0, 1), strict=True):
        assert nodes[f"label@1{end}"].parents(nodes) == ["sft"]
        assert nodes[f"label@2{end}"].parents(nodes) == [f"dpo@1{end}"]
        assert nodes[f"dpo@2{end}"].parents(nodes) == [f"dpo@1{end}", f"label@2{end}", f"label@1{end}"]
        for turn in (1, 2):
            assert nodes[f"dpo@{turn}{end}"].config.beta == beta
            assert (
                nodes[f"dpo@{turn}{end}"].config.seed
                == nodes[f"label@{turn}{end}"].config.seed
                == seed + 1000 * (turn - 1)
            )
    assert nodes[f"dpo@2{ends[0]}"].origins["beta"].endswith("r.yaml:8")
    assert nodes["eval"].inputs["models"] == ("sft", *(f"dpo@{turn}{end}" for turn in (1, 2) for end in ends))
    whole = recipe(folder, CHAINS)
    assert whole.select("dpo@1@seed=1") == tuple(f"dpo@1{end}" for end in ends if end.endswith("1"))
    assert whole.select("dpo@dpo.beta=0.2@seed=0") == (f"dpo@2{ends[2]}",)


def test_a_stage_with_a_matrix_in_a_block_with_one(folder: Path):
    text = CHAINS.replace("      dpo:\n", "      dpo:\n        matrix: {max_steps: [3, 4]}\n").replace(
        " policy}", " sft}"
    )
    text = text.replace("init: policy", "init: sft").replace("dpo.beta: [0.1, 0.2], ", "")
    nodes = recipe(folder, text.replace("then: dpo}", "then: label}")).nodes
    assert [name for name in nodes if name.startswith("dpo@2")] == [
        f"dpo@2@max_steps={steps}@seed={seed}" for seed in (0, 1) for steps in (3, 4)
    ]
    assert nodes["dpo@2@max_steps=4@seed=1"].parents(nodes) == ["sft", "label@2@seed=1", "label@1@seed=1"]


@pytest.mark.parametrize(
    ("old", "new", "at", "what"),
    [
        ("dpo.beta", "beta", 8, "`matrix.beta`: a block's matrix is of `seed` and of its stages' fields"),
        ("dpo.beta", "sft.beta", 8, "`matrix.sft.beta`: a block's matrix is of `seed` and of its stages' fields"),
        ("dpo.beta", "dpo", 8, "`dpo` is set, and in the matrix too"),
        ("dpo.beta", "dpo.bta", 8, "unknown key `bta`; did you mean `beta`?"),
        ("[0, 1]", "[x, 1]", 8, "`seed`: input should be a valid integer"),
        ("[0, 1]", "[]", 8, "`matrix.seed` is empty"),
        ("{dpo.beta: [0.1, 0.2], seed: [0, 1]}", "{}", 8, "`matrix` is a mapping of fields to lists"),
        ("{dpo.beta: [0.1, 0.2], seed: [0, 1]}", "[1]", 8, "`matrix` is a mapping of fields to lists"),
        (
            "        init: policy\n",
            "        init: policy\n        beta: 3.0\n",
            8,
            "`dpo.beta` is set, and in the matrix",
        ),
        (
            "        init: policy\n",
            "        init: policy\n        seed: 3\n",
            8,
            "`seed` of `dpo` is set, and in the block's",
        ),
        (
            "        init: policy\n",
            "        init: policy\n        matrix: {beta: [3.0]}\n",
            8,
            "`beta` of `dpo` is set, and in the block's matrix too",
        ),
    ],
)
def test_a_matrix_of_a_block_that_cannot_be_is_refused(folder: Path, old: str, new: str, at: int, what: str):
    assert old in CHAINS
    error = refused(folder, CHAINS.replace(old, new, 1))
    assert what in error.what
    assert line(error) == at


def test_a_recipe_without_them_is_as_it_was(folder: Path):
    (folder / "r.yaml").write_text(TOP)
    document = read_recipe(folder / "r.yaml")
    made = unroll(document)
    assert (made.values, made.places, made.scopes) == (document.values, document.places, {})


# ---- what stands ----

MAKE = """
from pipeline.recipe import Ref, StageConfig, field
class C(StageConfig):
    init: Ref | None = field(None, "x")
    size: int = field(1, "x")
INPUTS = {"init": "rows"}
KIND = "rows"
def run(config, inputs, out, runtime): return {}
"""
CHAIN = """\
run: toy
stages:
  start: {stage: ./make.py}
  repeat:
    times: 3
    carry: {last: {first: start, then: b}}
    stages:
      a: {stage: ./make.py, init: last}
      b: {stage: ./make.py, init: a}
  end: {stage: ./make.py, init: b}
"""


class Toy:
    """A store in which a stage is made by its manifest alone."""

    def __init__(self, folder: Path, text: str) -> None:
        self.folder, self.store = folder, Store(folder / "artifacts")
        (folder / "make.py").write_text(MAKE)
        (folder / "r.yaml").write_text(text)

    def survey(self, *overrides: str, **options: Any) -> dict[str, Standing]:
        document = unroll(read_recipe(self.folder / "r.yaml", overrides))
        return survey(build(document, load_stage, self.store), self.store, **options)

    def states(self, *overrides: str) -> dict[str, str]:
        return {name: standing.state for name, standing in self.survey(*overrides).items()}

    def make(self, *overrides: str) -> None:
        for name in self.survey(*overrides):
            standing = self.survey(*overrides)[name]
            partial = self.store.partial("toy", name, standing.planned)
            (partial / "rows").write_text(name)
            manifest = {"stage": "./make.py", "kind": "rows", "fingerprint": standing.planned, "parts": standing.parts}
            self.store.publish(partial, "toy", name, manifest)


def test_another_round_leaves_the_earlier_ones_standing(tmp_path: Path):
    toy = Toy(tmp_path, CHAIN)
    toy.make()
    before = {name: standing.fingerprint for name, standing in toy.survey().items()}
    assert set(toy.states().values()) == {"stands"}
    assert len(set(before.values())) == len(before) == 8
    assert toy.states("repeat.times=4") == {
        **dict.fromkeys([f"{n}@{k}" for k in (1, 2, 3) for n in "ab"], "stands"),
        "start": "stands",
        "a@4": "missing",
        "b@4": "missing",
        "end": "stale",
    }
    after = {name: standing.fingerprint for name, standing in toy.survey("repeat.times=4").items()}
    assert {name for name in before if before[name] != after[name]} == {"end"}
    assert toy.survey("repeat.times=4")["end"].reasons == ("input: init (b@4)",)
    assert set(toy.states("repeat.times=2").values()) - {"stale"} == {"stands"}


def test_a_change_of_a_round_makes_the_later_ones_stale(tmp_path: Path):
    toy = Toy(tmp_path, CHAIN)
    toy.make()
    states = toy.states("a@2.size=3")
    assert {name for name, state in states.items() if state == "stale"} == {"a@2", "b@2", "a@3", "b@3", "end"}
    kept = toy.survey("a@2.size=3", keep=["a@2"])
    assert {standing.state for standing in kept.values()} == {"stands"}


def test_a_wider_matrix_leaves_its_members_standing(tmp_path: Path):
    toy = Toy(tmp_path, "run: toy\nstages:\n  a: {stage: ./make.py, matrix: {size: [2, 3], seed: [0, 1]}}\n")
    toy.make()
    assert set(toy.states().values()) == {"stands"}
    states = toy.states("a.matrix.seed=[0, 1, 2]")
    assert [name for name, state in states.items() if state == "missing"] == ["a@size=2@seed=2", "a@size=3@seed=2"]
    assert sum(state == "stands" for state in states.values()) == 4


def test_keep_takes_the_names_a_reference_may_have(tmp_path: Path):
    toy = Toy(tmp_path, "run: toy\nstages:\n  a: {stage: ./make.py, matrix: {seed: [0, 1]}}\n")
    toy.make()
    assert {each.state for each in toy.survey("a.size=5", keep=["a"], bless=False).values()} == {"stands"}
    with pytest.raises(ConfigError, match="--keep a@seed=2: the recipe has no such stage"):
        toy.survey(keep=["a@seed=2"])


def test_the_folder_of_a_member_is_its_name(tmp_path: Path):
    toy = Toy(tmp_path, "run: toy\nstages:\n  a: {stage: ./make.py, matrix: {size: [0.5], seed: [0]}}\n")
    with pytest.raises(RecipeError, match="`size`: input should be a valid integer"):
        toy.survey()
    store = Store(tmp_path)
    assert store.folder("toy", "a@rate=0.5@seed=0") == tmp_path / "toy" / "a@rate=0.5@seed=0"
    for name in ("a@rate=0", "a@rate=0.5"):
        store.partial("toy", name, "f" * 64)
    assert store.unfinished("toy", "a@rate=0") == tmp_path / "toy" / f".a@rate=0.{'f' * 16}.partial"
