"""The graph of a recipe: references, defaults, order, and everything that can be refused before a model is loaded."""

import json
from pathlib import Path

import pytest

from pipeline.artifacts import SCHEMA_VERSION, write_json
from pipeline.errors import MissingInputError
from tests.written import line, recipe, refused

ROAD = """\
seed: 7
stages:
  eval: {models: [sft, ppo, dpo-ipo]}
  ppo: {init: sft, reward: reward}
  dpo-ipo: {stage: dpo, init: sft, data: rows.jsonl, loss_type: ipo}
  reward: {init: sft, data: rows.jsonl}
  sft: {init: pretrain, data: [rows.jsonl, {source: more.jsonl, limit: 3}], seed: 3}
  pretrain: {max_steps: 3}
  tokenize: {data: text.txt}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("rows.jsonl", "more.jsonl", "text.txt"):
        (tmp_path / name).write_text("{}\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    return tmp_path


def artifact(folder: Path, run: str, stage: str, kind: str, tokenizer: object = "words") -> None:
    path = folder / "artifacts" / run / stage
    (path / "model").mkdir(parents=True)
    (path / "model" / "tokenizer.json").write_text(json.dumps({"model": tokenizer}))
    write_json(
        path / "manifest.json", {"schema_version": SCHEMA_VERSION, "kind": kind, "fingerprint": "f", "stage": stage}
    )


def hugging_face_folder(path: Path, architecture: str, tokenizer: object = "words") -> None:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    (path / "tokenizer.json").write_text(json.dumps({"model": tokenizer}))


def test_the_graph_is_ordered_parents_first(folder: Path):
    nodes = recipe(folder, ROAD).nodes
    assert list(nodes) == ["tokenize", "pretrain", "sft", "dpo-ipo", "reward", "ppo", "eval"]
    assert [node.stage.type for node in nodes.values()] == [
        "tokenize",
        "pretrain",
        "sft",
        "dpo",
        "reward",
        "ppo",
        "eval",
    ]
    assert nodes["eval"].inputs == {
        "models": ("sft", "ppo", "dpo-ipo"),
        "tokens": ("tokenize",),
        "reward": ("reward",),
        "baseline": ("sft",),
        "judge": (),
    }


def test_ancestors_and_descendants(folder: Path):
    whole = recipe(folder, ROAD)
    assert whole.ancestors("reward") == ["tokenize", "pretrain", "sft", "reward"]
    assert whole.descendants("reward") == {"ppo", "eval"}
    assert whole.descendants("tokenize") == set(whole.nodes) - {"tokenize"}
    assert whole.descendants("eval") == set()


def test_defaults_are_printed_and_never_guessed(folder: Path):
    nodes = recipe(folder, ROAD).nodes
    assert nodes["pretrain"].config.tokens == "tokenize"  # type: ignore[attr-defined]
    assert nodes["pretrain"].origins["tokens"] == "default"
    assert nodes["ppo"].config.data == nodes["sft"].config.data  # type: ignore[attr-defined]
    assert nodes["ppo"].origins["data"] == "default: the data of `sft`"
    assert nodes["reward"].origins["demonstrations"] == "default: the data of `sft`"
    assert nodes["reward"].config.demonstrations[1].limit == 3  # type: ignore[attr-defined]


def test_seeds_come_from_the_stage_or_the_recipe(folder: Path):
    nodes = recipe(folder, ROAD).nodes
    assert (nodes["sft"].config.seed, nodes["ppo"].config.seed) == (3, 7)
    assert nodes["ppo"].origins["seed"].endswith("r.yaml:1")
    assert nodes["sft"].origins["seed"].endswith("r.yaml:7")
    unset = recipe(folder, "stages:\n  tokenize: {data: text.txt}\n").nodes["tokenize"]
    assert (unset.config.seed, unset.origins["seed"]) == (0, "default")


def test_paths_start_at_the_recipe_and_those_of_set_at_the_current_folder(folder: Path):
    Path("mine.jsonl").write_text("{}\n")
    data = recipe(folder, ROAD).nodes["sft"].config.data  # type: ignore[attr-defined]
    assert [entry.source for entry in data] == [str(folder / "rows.jsonl"), str(folder / "more.jsonl")]
    data = recipe(folder, ROAD, "sft.data=mine.jsonl").nodes["sft"].config.data  # type: ignore[attr-defined]
    assert [entry.source for entry in data] == [str(folder / "elsewhere" / "mine.jsonl")]
    data = recipe(folder, ROAD, "sft.data.1.source=mine.jsonl").nodes["sft"].config.data  # type: ignore[attr-defined]
    assert [entry.source for entry in data] == [str(folder / "rows.jsonl"), str(folder / "elsewhere" / "mine.jsonl")]


def test_globs_pydocs_and_the_hub_are_sources(folder: Path):
    text = "stages:\n  tokenize: {data: ['*.txt', pydocs, 'hub:org/name']}\n"
    data = recipe(folder, text).nodes["tokenize"].config.data  # type: ignore[attr-defined]
    assert [entry.source for entry in data] == [str(folder / "*.txt"), "pydocs", "hub:org/name"]


@pytest.mark.parametrize(
    ("old", "new", "at", "what"),
    [
        ("init: sft, reward: reward", "init: stf, reward: reward", 4, "`init`: no stage `stf`; did you mean `sft`?"),
        ("ppo, dpo-ipo]", "ppo, dpo-ip]", 3, "`models`: no stage `dpo-ip`; did you mean `dpo-ipo`?"),
        (
            "init: sft, reward: reward",
            "init: sft, reward: sft",
            4,
            "`reward` takes a reward-model, and `sft` makes a causal-lm",
        ),
        ("init: pretrain", "init: reward", 7, "`init` takes a causal-lm, and `reward` makes a reward-model"),
        ("init: pretrain", "init: dpo-ipo", 7, "the stages go round in a circle: "),
        ("init: pretrain", "init: sft", 7, "the stages go round in a circle: sft → sft"),
        ("stage: dpo", "stage: dpoo", 5, "no stage `dpoo`; did you mean `dpo`?"),
        ("  tokenize:", "  tokenise:", 9, "no stage `tokenise`; did you mean `tokenize`?"),
        ("  dpo-ipo:", "  ../dpo:", 5, "'../dpo' is no name"),
        ("  dpo-ipo:", "  dpo@1:", 5, "'dpo@1' is no name"),
        ("seed: 7", "run: ../x", 1, "'../x' is no name"),
        ("seed: 7", "run: .hidden", 1, "'.hidden' is no name"),
        ("seed: 7", "sede: 7", 1, "unknown key `sede`; did you mean `seed`?"),
        ("seed: 7", "seed: -1", 1, "`seed`: input should be greater than or equal to 0"),
        ("reward: {init: sft,", "reward: {init: pretrain,", 6, "`demonstrations` is required here"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(folder: Path, old: str, new: str, at: int, what: str):
    assert ROAD.count(old) == 1
    text = ROAD.replace(old, new)
    if old == "  dpo-ipo:":
        text = text.replace("ppo, dpo-ipo", "ppo")
    error = refused(folder, text)
    assert what in error.what
    assert line(error) == at


def test_a_circle_is_drawn_whole(folder: Path):
    text = ROAD.replace("init: pretrain", "init: dpo-ipo")
    what = refused(folder, text).what
    assert what.endswith(("dpo-ipo → sft → dpo-ipo", "sft → dpo-ipo → sft"))


def test_a_reference_in_a_list_is_refused_at_its_own_line(folder: Path):
    text = ROAD.replace("eval: {models: [sft, ppo, dpo-ipo]}", "eval:\n    models:\n      - sft\n      - spo")
    error = refused(folder, text)
    assert "no stage `spo`" in error.what
    assert line(error) == 6


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("tokenize: {data: text.txt}", "tokenize: {data: txet.txt}", "no file or folder {folder}/txet.txt"),
        ("tokenize: {data: text.txt}", "tokenize: {data: '*.parquet'}", "no file or folder {folder}/*.parquet"),
        ("init: pretrain", "init: ./nothing", "`init`: nothing at {folder}/nothing"),
        ("init: pretrain", "init: old/sft", "`init`: no artifact old/sft under {folder}/artifacts"),
        ("stage: dpo", "stage: ./mine.py", "no stage file {folder}/mine.py"),
    ],
)
def test_what_is_not_there_is_named_with_its_line(folder: Path, old: str, new: str, what: str):
    error = refused(folder, ROAD.replace(old, new), kind=MissingInputError)
    assert what.format(folder=folder) in error.what
    assert line(error) == 1 + ROAD[: ROAD.index(old)].count("\n")


def test_a_folder_that_is_no_model_is_refused(folder: Path):
    (folder / "empty").mkdir()
    error = refused(folder, ROAD.replace("init: pretrain", "init: ./empty"), kind=MissingInputError)
    assert error.what == f"`init`: {folder}/empty is no model folder: it has neither manifest.json nor config.json"
    assert line(error) == 7
    assert not error.mend
    (folder / "empty" / "small.gguf").write_bytes(b"GGUF")
    for name in ("empty", "empty/small.gguf"):
        error = refused(folder, ROAD.replace("init: pretrain", f"init: ./{name}"), kind=MissingInputError)
        assert error.mend == "a GGUF file is converted into such a folder once: docs/base-models.md"


def test_a_name_that_may_be_a_hub_name_gets_both_mends(folder: Path):
    error = refused(folder, ROAD.replace("init: pretrain", "init: org/name"), kind=MissingInputError)
    assert error.mend == "hub:org/name for a model of the hub, ./org/name for a folder"
    error = refused(folder, ROAD.replace("data: text.txt", "data: org/name"), kind=MissingInputError)
    assert error.mend == "hub:org/name for a dataset of the hub"


def test_models_from_outside_are_checked_for_their_kind(folder: Path):
    artifact(folder, "old", "sft", "causal-lm")
    artifact(folder, "old", "reward", "reward-model")
    hugging_face_folder(folder / "base", "LlamaForCausalLM")
    hugging_face_folder(folder / "scorer", "LlamaForSequenceClassification")
    for reference in ("old/sft", "./base", str(folder / "base"), "./artifacts/old/sft"):
        node = recipe(folder, ROAD.replace("init: pretrain", f"init: {reference}")).nodes["sft"]
        expected = reference if reference == "old/sft" else str((folder / reference).resolve())
        assert node.inputs["init"] == (expected,)
    for reference in ("old/reward", "./scorer", "./artifacts/old/reward"):
        error = refused(folder, ROAD.replace("init: pretrain", f"init: {reference}"))
        assert "`init` takes a causal-lm, and " in error.what
        assert error.what.endswith("is a reward-model")
        assert line(error) == 7


def test_a_tokenizer_is_taken_from_whatever_holds_one(folder: Path):
    hugging_face_folder(folder / "base", "LlamaForCausalLM")
    (folder / "alone").mkdir()
    (folder / "alone" / "tokenizer.json").write_text("{}")
    for run, kind in (("t", "tokens"), ("p", "causal-lm"), ("r", "reward-model")):
        artifact(folder, run, "made", kind)
    paths = ("./base", "./alone", str(folder / "alone"), "./artifacts/t/made")
    for reference in (*paths, "t/made", "p/made", "r/made", "other", "hub:org/name@v1"):
        text = ROAD.replace("data: text.txt", f"data: text.txt, tokenizer: {reference}")
        nodes = recipe(folder, text + "  other: {stage: tokenize, data: text.txt}\n").nodes
        expected = str((folder / reference).resolve()) if reference in paths else reference
        assert nodes["tokenize"].inputs["tokenizer"] == (expected,)


def test_what_holds_no_tokenizer_is_refused(folder: Path):
    (folder / "empty").mkdir()
    (folder / "file.json").write_text("{}")
    artifact(folder, "e", "made", "evaluation")
    artifact(folder, "p", "made", "causal-lm")
    (folder / "artifacts/p/made/model/tokenizer.json").unlink()
    for reference, kind, what in (
        ("./empty", MissingInputError, f"{folder}/empty is no tokenizer: it has no tokenizer.json"),
        ("./file.json", MissingInputError, f"{folder}/file.json is no folder that holds a tokenizer"),
        ("./nothing", MissingInputError, f"nothing at {folder}/nothing"),
        ("p/made", MissingInputError, "p/made is no tokenizer: it has no tokenizer.json"),
    ):
        text = ROAD.replace("data: text.txt", f"data: text.txt, tokenizer: {reference}")
        error = refused(folder, text, kind=kind)
        assert (error.what, line(error)) == (f"`tokenizer`: {what}", 9)
    for reference, what in (("e/made", "e/made is a evaluation"), ("eval", "`eval` makes a evaluation")):
        error = refused(folder, ROAD.replace("data: text.txt", f"data: text.txt, tokenizer: {reference}"))
        assert (error.what, line(error)) == (f"`tokenizer` takes a tokenizer, and {what}", 9)
        assert error.mend.startswith("name what holds one: a folder with tokenizer.json")
    error = refused(folder, ROAD.replace("init: pretrain", "init: ./empty/"), kind=MissingInputError)
    assert "is no model folder" in error.what, "only a tokenizer's role takes a folder without a model"
    error = refused(folder, ROAD.replace("data: text.txt", "data: text.txt, tokenizer: sft"))
    assert "the stages go round in a circle" in error.what


TWO_TOKENIZERS = (
    ROAD.replace("init: sft, data: rows.jsonl}\n  sft", "init: other-sft, data: rows.jsonl}\n  sft")
    + """\
  other-tokens: {stage: tokenize, data: text.txt, vocab_size: 999}
  other-base: {stage: pretrain, tokens: other-tokens}
  other-sft: {stage: sft, init: other-base, data: rows.jsonl}
"""
)


def test_a_reward_model_of_another_tokenizer_is_refused(folder: Path):
    error = refused(folder, TWO_TOKENIZERS)
    assert error.what == (
        "the reward model `reward` has another tokenizer (stage:other-tokens) than `sft` (stage:tokenize)"
    )
    assert line(error) == 4


def test_two_tokenize_stages_with_the_tokenizer_of_one_model_are_not_refused(folder: Path):
    hugging_face_folder(folder / "base", "LlamaForCausalLM")
    text = TWO_TOKENIZERS.replace("data: text.txt", "data: text.txt, tokenizer: ./base")
    assert recipe(folder, text).nodes["ppo"].inputs["reward"] == ("reward",)


def test_reward_models_from_outside_are_compared_by_the_tokenizers_content(folder: Path):
    hugging_face_folder(folder / "base", "LlamaForCausalLM")
    hugging_face_folder(folder / "same", "LlamaForSequenceClassification")
    hugging_face_folder(folder / "other", "LlamaForSequenceClassification", tokenizer="letters")
    artifact(folder, "old", "reward", "reward-model")
    artifact(folder, "new", "reward", "reward-model", tokenizer="letters")
    text = ROAD.replace("init: pretrain", "init: ./base")
    for reference in ("./same", "old/reward", "./artifacts/old/reward"):
        recipe(folder, text, f"ppo.reward={reference.replace('./', f'{folder}/', 1)}")
    for reference in ("./other", "new/reward", "./artifacts/new/reward"):
        error = refused(folder, text.replace("reward: reward", f"reward: {reference}"))
        assert "has another tokenizer" in error.what
        assert line(error) == 4


STAGE = """
from pipeline.recipe import Ref, StageConfig, field
class C(StageConfig):
    init: Ref | None = field(None, "x")
    reward: str = field(..., "y")
INPUTS = {"init": "causal-lm"}
KIND = "causal-lm"
def run(config, inputs, out, runtime): return {}
"""


def test_a_users_files_stand_where_names_do(folder: Path):
    (folder / "mine.py").write_text(STAGE)
    (folder / "rewards.py").write_text("def exact(): pass\n")
    mine = "  mine: {stage: ./mine.py, init: sft, reward: './rewards.py:exact'}\n"
    node = recipe(folder, ROAD + mine).nodes["mine"]
    assert (node.stage.type, node.stage.file) == ("./mine.py", folder / "mine.py")
    assert node.config.reward == f"{folder}/rewards.py:exact"  # type: ignore[attr-defined]
    assert node.inputs == {"init": ("sft",)}
    error = refused(folder, ROAD + mine.replace("rewards.py", "reward.py"), kind=MissingInputError)
    assert error.what == f"`reward`: no file {folder}/reward.py"
    assert line(error) == 10


def test_a_users_reward_stands_in_a_role(folder: Path):
    (folder / "rewards.py").write_text("def exact(): pass\n")
    node = recipe(folder, ROAD.replace("reward: reward", "reward: ./rewards.py:exact")).nodes["ppo"]
    assert node.config.reward == f"{folder}/rewards.py:exact"  # type: ignore[attr-defined]
    assert node.inputs["reward"] == ()


def test_an_empty_recipe_and_an_empty_stage(folder: Path):
    assert refused(folder, "stages: {}\n").what == "no stages"
    assert refused(folder, "run: x\n").what == "`stages` is required"
    assert refused(folder, "stages:\n  tokenize:\n").what == "`data` is required"
    assert recipe(folder, "stages:\n  pretrain:\n  tokenize: {data: text.txt}\n").nodes["pretrain"].config.seed == 0


def test_a_default_reference_that_the_recipe_lacks(folder: Path):
    error = refused(folder, "stages:\n  pretrain:\n")
    assert error.what == "`tokens` is `tokenize` by default, and the recipe has no such stage"
    whole = recipe(folder, "stages:\n  tokenize: {data: text.txt}\n  pretrain:\n  eval: {models: [pretrain]}\n")
    assert whole.nodes["eval"].inputs["reward"] == ()  # may be null: none


# ---- references inside the sections of a list: the terms of a reward ----

TERMS = """\
stages:
  tokenize: {data: text.txt}
  pretrain: {max_steps: 3}
  sft: {init: pretrain, data: rows.jsonl}
  r0: {stage: reward, init: sft, data: rows.jsonl}
  r1: {stage: reward, init: sft, data: rows.jsonl, seed: 1}
  r2: {stage: reward, init: sft, data: rows.jsonl, seed: 2}
  ppo:
    init: sft
    reward:
"""


def with_terms(folder: Path, *terms: str) -> str:
    (folder / "rules.md").write_text("Be kind.\n")
    (folder / "rewards.py").write_text("def f(prompts, responses, rows): return [0.0] * len(rows)\n")
    return TERMS + "".join(f"      - {term}\n" for term in terms)


def test_terms_take_their_references_in_order(folder: Path):
    text = with_terms(
        folder,
        "{model: r2, name: last}",
        "{function: ./rewards.py:f}",
        "{models: [r1, r0]}",
        "{judge: pretrain, constitution: rules.md}",
        "{model: r0, weight: -1}",
    )
    whole = recipe(folder, text)
    ppo = whole.nodes["ppo"]
    assert {role: refs for role, refs in ppo.inputs.items() if refs} == {
        "init": ("sft",),
        "reward.model": ("r2", "r0"),
        "reward.models": ("r1", "r0"),
        "reward.judge": ("pretrain",),
    }
    assert [role for role in ppo.inputs if ppo.is_list[role]] == ["reward.model", "reward.models", "reward.judge"]
    terms = ppo.config.reward  # type: ignore[attr-defined]
    assert terms[1].function == f"{folder / 'rewards.py'}:f"
    assert terms[3].constitution == folder / "rules.md"
    assert [term.model for term in terms] == ["r2", None, None, None, "r0"]
    assert set(whole.ancestors("ppo")) == {"tokenize", "pretrain", "sft", "r0", "r1", "r2", "ppo"}
    assert "ppo" in whole.descendants("r1")


def test_what_no_term_takes_is_no_role(folder: Path):
    inputs = recipe(folder, with_terms(folder, "{function: exact}")).nodes["ppo"].inputs
    assert {role: refs for role, refs in inputs.items() if refs} == {"init": ("sft",)}
    assert not any(role.startswith("reward.") for role in inputs)
    inputs = recipe(folder, ROAD).nodes["ppo"].inputs
    assert {role: refs for role, refs in inputs.items() if refs} == {"init": ("sft",), "reward": ("reward",)}


@pytest.mark.parametrize(
    ("term", "what"),
    [
        ("{model: pretrian}", "`reward.1.model`: no stage `pretrian`; did you mean `pretrain`?"),
        ("{models: [r0, r7]}", "`reward.1.models`: no stage `r7`"),
        ("{model: sft}", "`reward.1.model` takes a reward-model, and `sft` makes a causal-lm"),
        ("{models: [r0, pretrain]}", "`reward.1.models` takes a reward-model, and `pretrain` makes a causal-lm"),
        ("{judge: r0, constitution: rules.md}", "`reward.1.judge` takes a causal-lm, and `r0` makes a reward-model"),
        ("{judge: './rewards.py:f', constitution: rules.md}", "code of yours stands for a reward alone"),
        ("{judge: ppo, constitution: rules.md}", "the stages go round in a circle: ppo → ppo"),
    ],
)
def test_a_term_with_a_wrong_reference_is_refused(folder: Path, term: str, what: str):
    error = refused(folder, with_terms(folder, "{function: exact}", term))
    assert what in error.what
    assert line(error) == (8 if "circle" in what else 12)


@pytest.mark.parametrize(
    ("term", "what"),
    [
        ("{model: ./none}", "`reward.0.model`: nothing at "),
        ("{model: other/reward}", "`reward.0.model`: no artifact other/reward"),
        ("{function: ./none.py:f}", "`function`: no file "),
        ("{judge: sft, constitution: ./none.md}", "`constitution`: no file "),
        ("{judge: sft, constitution: .}", "`constitution`: no file "),
        ("{function: json_schema, schema_file: none.json}", "`schema_file`: no file "),
    ],
)
def test_a_term_that_names_what_is_not_there_is_refused(folder: Path, term: str, what: str):
    error = refused(folder, with_terms(folder, term), kind=MissingInputError)
    assert what in error.what
    assert line(error) == 11


def test_a_terms_reward_model_of_another_tokenizer_is_refused(folder: Path):
    artifact(folder, "other", "base", "causal-lm")
    artifact(folder, "other", "reward", "reward-model", tokenizer="other words")
    for term in ("{model: other/reward}", "{models: [other/reward, other/base-reward]}"):
        if "base-reward" in term:
            artifact(folder, "other", "base-reward", "reward-model")
        text = with_terms(folder, term).replace("init: sft\n    reward", "init: other/base\n    reward")
        text = text.replace("    reward:\n", "    data: rows.jsonl\n    reward:\n")
        assert "has another tokenizer" in refused(folder, text).what


def test_set_reaches_into_a_term(folder: Path):
    text = with_terms(folder, "{model: r0}", "{function: exact}")
    terms = recipe(folder, text, "ppo.reward.1.weight=0.5", "ppo.reward.0.model=r1").nodes["ppo"].config.reward  # type: ignore[attr-defined]
    assert (terms[0].model, terms[1].weight) == ("r1", 0.5)
    (folder / "elsewhere" / "mine.md").write_text("x")  # a path of --set starts at the current folder
    text = with_terms(folder, "{judge: sft, constitution: rules.md}")
    term = recipe(folder, text, "ppo.reward.0.constitution=mine.md").nodes["ppo"].config.reward[0]  # type: ignore[attr-defined]
    assert term.constitution == folder / "elsewhere" / "mine.md"


LABEL = """\
from pipeline.recipe import StageConfig
class LabelConfig(StageConfig): ...
INPUTS = {}
KIND = "rows"
def run(config, inputs, out, runtime): ...
"""
LABELLED = """\
run: labelled
stages:
  ppo: {init: sft, reward: reward}
  sft: {init: ./model, data: [{source: label, limit: 9}, rows.jsonl]}
  reward: {init: sft, data: rows.jsonl}
  label: {stage: ./label.py}
"""


def test_the_rows_that_a_stage_writes_are_data_by_its_name(folder: Path):
    (folder / "label.py").write_text(LABEL)
    hugging_face_folder(folder / "model", "LlamaForCausalLM")
    nodes = recipe(folder, LABELLED).nodes
    rows = str(folder / "artifacts" / "labelled" / "label" / "rows.jsonl")
    assert list(nodes) == ["label", "sft", "reward", "ppo"]
    sources = [(entry.source, entry.limit) for entry in nodes["sft"].config.data]  # type: ignore[attr-defined]
    assert sources == [(rows, 9), (str(folder / "rows.jsonl"), None)]
    assert nodes["sft"].parents(nodes) == ["label"]
    assert nodes["ppo"].parents(nodes) == ["sft", "reward", "label"], "its data are sft's"


def test_a_name_that_is_a_stage_and_a_file_is_refused_as_data(folder: Path):
    (folder / "label.py").write_text(LABEL)
    (folder / "label").write_text("{}\n")
    hugging_face_folder(folder / "model", "LlamaForCausalLM")
    error = refused(folder, LABELLED)
    assert error.what == "`label` is a stage of the recipe and a file beside it"
    assert error.mend.startswith("./label for the file")
    assert line(error) == 4
    plain = recipe(folder, LABELLED.replace("source: label", "source: ./label")).nodes["sft"]
    assert plain.config.data[0].source == str(folder / "label")  # type: ignore[attr-defined]
    assert not plain.rows
