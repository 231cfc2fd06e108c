"""The eval stage over tiny random models: what is measured of whom, resuming, and that batches do not count."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.artifacts import Artifact
from pipeline.data import pydocs
from pipeline.data.chat import stop_token_id
from pipeline.data.formats import read_rows
from pipeline.data.harvest import Entry
from pipeline.data.shards import ShardWriter
from pipeline.data.tokenizers import encode_text, train_bpe
from pipeline.errors import ConfigError, Stopped
from pipeline.evals import scorers
from pipeline.evals.export import read_csv
from pipeline.evals.planned import Unit
from pipeline.model.build import save_model
from pipeline.model.presets import Shape, build_config
from pipeline.model.reward import build_reward_model, save_reward_model
from pipeline.recipe import DataEntry
from pipeline.rl.comparing import Compared
from pipeline.runtime import Runtime
from stages import eval as stage

VERBS = ("Return", "Read", "Sort", "Open", "Close", "Write", "Count", "Find", "Split", "Join")
NOUNS = ("list", "file", "door", "number", "string", "table", "queue", "graph")
ENTRIES = tuple(
    Entry(f"m.{verb.lower()}_{noun}", "function", "(x)", f"{verb} the {noun} of them all.", "", number % 3 == 0)
    for number, (verb, noun) in enumerate((verb, noun) for verb in VERBS for noun in NOUNS)
)
SMALL = {
    "documents": 4,
    "questions": 6,
    "swapped_questions": 3,
    "prompts": 5,
    "preference_rows": 8,
    "max_length": 128,
    "max_new_tokens": 10,
    "bf16": False,
}


def llama(folder: Path, tokenizer_folder: Path, stop: int, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    torch.manual_seed(seed)
    config = build_config(
        "llama",
        Shape(depth=1, width=32, heads=2, kv_heads=2, mlp_width=64, context=128, vocab=len(tokenizer), tied=True),
        {},
    )
    config.initializer_range = 0.3
    assert tokenizer.pad_token_id is not None
    save_model(LlamaForCausalLM(config), folder, tokenizer_folder, [stop], tokenizer.pad_token_id)


def artifact(path: Path, kind: str) -> Artifact:
    return Artifact(f"tiny/{path.name}", path, kind, f"fingerprint of {path.name}", {"stage": path.name})


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """tokenize, pretrain, sft, ppo and reward, as the store would hand them over."""
    root = tmp_path_factory.mktemp("house")
    tokenizer = train_bpe(iter([f"`{entry.name}`: {entry.sentence}" for entry in ENTRIES]), 400)
    tokenizer.save_pretrained(root / "tokenize" / "model")
    assert tokenizer.bos_token_id is not None
    with ShardWriter(root / "tokenize" / "valid.ds", len(tokenizer), tokenizer.bos_token_id, "") as shard:
        for entry in ENTRIES[:6]:
            shard.append(encode_text(tokenizer, entry.sentence), len(entry.sentence.encode()))
    folder = root / "tokenize" / "model"
    llama(root / "pretrain" / "model", folder, tokenizer.bos_token_id, tokenizer, 0)
    llama(root / "sft" / "model", folder, stop_token_id(tokenizer), tokenizer, 1)
    llama(root / "ppo" / "model", folder, stop_token_id(tokenizer), tokenizer, 2)
    sft = artifact(root / "sft", "causal-lm")
    head = build_reward_model(sft.model, tokenizer.pad_token_id, 0)
    save_reward_model(head, root / "reward" / "model", sft, mean=0.1, std=2.0, suffix_ids=[stop_token_id(tokenizer)])
    return {
        "tokenize": artifact(root / "tokenize", "tokens"),
        "reward": artifact(root / "reward", "reward-model"),
        **{name: artifact(root / name, "causal-lm") for name in ("pretrain", "sft", "ppo")},
    }


@pytest.fixture(autouse=True)
def tiny_pydocs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pydocs, "harvest", lambda: ENTRIES)


def measure(house: dict[str, Artifact], out: Path, halt: Any = None, **fields: Any) -> dict[str, float]:
    """Run the stage in `out`; `fields` are the config's."""
    out.mkdir(exist_ok=True)
    config = stage.EvalConfig(**({"models": ("pretrain", "sft", "ppo")} | SMALL | fields))
    inputs: dict[str, Any] = {"models": [house[name] for name in config.models]}
    for role in ("tokens", "reward", "baseline", "judge"):
        name = getattr(config, role)
        inputs[role] = None if name is None else house[name]
    runtime = Runtime.start(out, seed=config.seed, threads=1, quiet=True)
    if halt is not None:
        runtime.halt = halt
    return stage.run(config, inputs, out, runtime)


def rows(out: Path, name: str = "results") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def value(out: Path, model: str, task: str, metric: str) -> float:
    found = [row for row in rows(out) if (row["model"], row["task"], row["metric"]) == (model, task, metric)]
    assert len(found) == 1, (model, task, metric)
    return float(found[0]["value"])


@pytest.fixture(scope="module")
def whole(house: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One undisturbed run of everything."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pydocs, "harvest", lambda: ENTRIES)
        measure(house, out)
    return out


def test_who_is_measured_on_what(whole: Path) -> None:
    tasks = {(row["model"], row["task"]) for row in rows(whole)}
    likelihood = {"bits_per_byte", "multiple_choice"}
    assert {task for model, task in tasks if model == "pretrain"} == likelihood
    assert {task for model, task in tasks if model == "sft"} == likelihood | {"greedy", "sampled"}
    assert {task for model, task in tasks if model == "ppo"} == likelihood | {
        "preference_accuracy",
        "greedy",
        "sampled",
    }
    assert {task for model, task in tasks if model == "reward"} == {"reward_accuracy"}


def test_every_row_has_its_model_interval_and_number(whole: Path) -> None:
    numbers = {"bits_per_byte": 4, "multiple_choice": 6, "reward_accuracy": 8, "preference_accuracy": 8}
    for row in rows(whole):
        assert list(row) == ["model", "fingerprint", "task", "metric", "value", "low", "high", "n"]
        assert row["fingerprint"] == f"fingerprint of {row['model']}"
        if row["n"] == 1:
            assert row["low"] is row["high"] is None
        else:
            assert row["low"] <= row["value"] <= row["high"]
        if "/" not in row["metric"] and row["metric"] not in ("pmi_swapped", "length_spearman", "length_pearson"):
            assert row["n"] == numbers.get(row["task"], 5)
    assert value(whole, "ppo", "sampled", "kl") > 1  # two random models of this spread are far apart
    assert {row["metric"] for row in rows(whole) if row["model"] == "sft" and row["task"] == "sampled"} == {
        "length",
        "ended",
        "gold",
        "reward",
    }


def test_items_behind_the_figures(whole: Path) -> None:
    items = rows(whole, "samples")
    counts = Counter((item["model"], item["task"]) for item in items)
    assert counts["sft", "greedy"] == counts["ppo", "sampled"] == 5
    assert counts["pretrain", "multiple_choice"] == 6
    gold = [item["gold"] for item in items if (item["model"], item["task"]) == ("ppo", "greedy")]
    assert value(whole, "ppo", "greedy", "gold") == pytest.approx(sum(gold) / 5)
    prompts = {
        model: [item["prompt"] for item in items if (item["model"], item["task"]) == (model, "sampled")]
        for model in ("sft", "ppo")
    }
    assert prompts["sft"] == prompts["ppo"]


@pytest.mark.slow
def test_batches_do_not_count(house: dict[str, Artifact], whole: Path, tmp_path: Path) -> None:
    measure(house, tmp_path, token_budget=50)
    for ours, theirs in zip(rows(tmp_path), rows(whole), strict=True):
        assert ours["metric"] == theirs["metric"]
        assert ours["value"] == pytest.approx(theirs["value"], abs=1e-4)


class StopAfter:
    """A wish to stop that is felt at the n-th look."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    @property
    def asked(self) -> type[Stopped] | None:
        self.looks -= 1
        return Stopped if self.looks < 0 else None


@pytest.mark.slow
def test_stopped_and_resumed_gives_the_same_bytes(
    house: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = 12  # parts of a few samples
    apart = tmp_path / "apart"
    measure(house, apart, token_budget=budget)
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        measure(house, out, halt=StopAfter(40), token_budget=budget)
    files = sorted((out / "checkpoints" / "units").iterdir())
    parts = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    of_unit = Counter((part["model"], part["task"]) for part in parts)
    assert max(of_unit.values()) > 1, "a unit is cut into parts"
    assert not (out / "results.jsonl").exists()
    torn = next(file for file in files[::-1] if file.read_text().count("\n") > 1)
    lines = torn.read_bytes().splitlines(keepends=True)
    torn.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])  # killed as it wrote its last part
    lost = json.loads(lines[-1])
    scored: list[tuple[str, str, int]] = []
    job = scorers.Scorers.job

    def counting(self: scorers.Scorers, unit: Unit) -> scorers.Job:
        made = job(self, unit)

        def score(places: Sequence[int]) -> list[scorers.Placed]:
            scored.extend((unit.model.name, unit.task, place) for place in places)
            return made.score(places)

        return replace(made, score=score)

    monkeypatch.setattr(scorers.Scorers, "job", counting)
    measure(house, out, token_budget=budget)
    kept = {(part["model"], part["task"], place) for part in parts if part != lost for place in part["places"]}
    assert len(scored) == len(set(scored)), "nothing twice"
    assert not kept & set(scored), "nothing again"
    assert {(lost["model"], lost["task"], place) for place in lost["places"]} <= set(scored)
    for name in ("results.jsonl", "samples.jsonl"):
        assert (out / name).read_bytes() == (apart / name).read_bytes()
    assert len(rows(out, "metrics")) == 1


@pytest.mark.slow
def test_a_model_equals_itself(house: dict[str, Artifact], tmp_path: Path) -> None:
    """The baseline under another name: nothing differs, every comparison is a tie."""
    found = measure(house | {"twin": replace(house["sft"], fingerprint="twin")}, tmp_path, models=("twin",))
    assert found["twin.sampled.kl"] == pytest.approx(0, abs=1e-3)
    assert found["twin.sampled.reward_sd"] == 0
    assert found["twin.sampled.gold_win_rate"] == found["twin.greedy.gold_win_rate"] == 0.5
    assert found["twin.multiple_choice.pmi_difference"] == 0
    assert found["twin.preference_accuracy.accuracy"] == 0.5
    assert {row["model"] for row in rows(tmp_path)} == {"twin", "reward"}  # the baseline itself was not asked for


def test_files_of_ones_own(house: dict[str, Artifact], tmp_path: Path) -> None:
    """Held-out rows of jsonl files; multiple choice does not apply."""
    chats, pairs = tmp_path / "chats.jsonl", tmp_path / "pairs.jsonl"
    said = [{"prompt": f"{entry.name}?", "completion": entry.sentence} for entry in ENTRIES]
    chats.write_text("".join(json.dumps(row) + "\n" for row in said))
    worse = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "No."} for r in said]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in worse))
    measure(
        house,
        tmp_path / "out",
        models=("ppo",),
        data=(DataEntry(source=str(chats)),),
        preferences=(DataEntry(source=str(pairs)),),
        held_out=0.2,
    )
    found = {row["task"] for row in rows(tmp_path / "out")}
    assert found == {"bits_per_byte", "reward_accuracy", "preference_accuracy", "greedy", "sampled"}
    prompts = {item["prompt"][0]["content"] for item in rows(tmp_path / "out", "samples") if item["task"] == "greedy"}
    assert prompts < {row["prompt"] for row in said}


def test_prompts_without_answers_are_refused(house: dict[str, Artifact], tmp_path: Path) -> None:
    """A figure of no prompt at all would be null, and nothing would say why."""
    asked = [{"messages": [{"role": "user", "content": f"{entry.name}?"}]} for entry in ENTRIES]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    with pytest.raises(ConfigError, match="no held-out row has an answer"):
        measure(house, tmp_path / "out", data=(DataEntry(source=str(tmp_path / "asked.jsonl")),), held_out=0.5)


@pytest.mark.slow
def test_a_list_is_one_row_of_the_reward_model_and_a_policys_pairs(house: dict[str, Artifact], tmp_path: Path) -> None:
    """Held out are lists of three and ties: a list's three pairs are one row and its answers count once; ties are of
    ece and nll alone, and of no policy's."""
    lists = [{"prompt": f"{e.name}?", "answers": [e.sentence, f"No {e.name}.", "Hm."]} for e in ENTRIES]
    pairs = [{"prompt": f"And {e.name}?", "chosen": e.sentence, "rejected": "No."} for e in ENTRIES]
    ties = [row | {"preference": 0.5, "margin": 1.0} for row in pairs]
    for name, given in (("lists", lists), ("ties", ties)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    preferences = tuple(DataEntry(source=str(tmp_path / f"{name}.jsonl")) for name in ("lists", "ties"))
    held_out = read_rows(preferences, "ranked", split="held_out", held_out=0.5)
    three = sum(len(row["answers"]) == 3 for row in held_out)
    two = len(held_out) - three
    assert three > 1
    assert two > 1
    tasks = ("reward_accuracy", "preference_accuracy")
    fields: dict[str, Any] = {"preferences": preferences, "held_out": 0.5, "preference_rows": 100, "tasks": tasks}
    measure(house, tmp_path / "out", models=("ppo",), **fields)
    counts = {(row["task"], row["metric"]): row["n"] for row in rows(tmp_path / "out")}
    assert counts["reward_accuracy", "accuracy"] == counts["preference_accuracy", "accuracy"] == 3 * three
    assert counts["reward_accuracy", "ece"] == counts["reward_accuracy", "nll"] == 3 * three + two
    assert counts["reward_accuracy", "length_pearson"] == 3 * three + 2 * two
    items = [item for item in rows(tmp_path / "out", "samples") if item["task"] == "reward_accuracy"]
    places = Counter(item["item"] for item in items)
    assert sorted(places.values()) == [1] * two + [3] * three


def test_without_reward_model_and_baseline(house: dict[str, Artifact], tmp_path: Path) -> None:
    measure(house, tmp_path, models=("sft", "ppo"), reward=None, baseline=None, tokens=None)
    assert {row["task"] for row in rows(tmp_path)} == {"multiple_choice", "greedy", "sampled"}
    assert {row["metric"] for row in rows(tmp_path) if row["task"] == "sampled"} == {"length", "ended", "gold"}


def test_another_tokenizer_is_measured_but_not_by_the_reward_model(house: dict[str, Artifact], tmp_path: Path) -> None:
    tokenizer = train_bpe(iter(["something else entirely, in other words"] * 9), 300)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    llama(tmp_path / "alien" / "model", tmp_path / "tokenizer", stop_token_id(tokenizer), tokenizer, 0)
    alien = artifact(tmp_path / "alien", "causal-lm")
    measure(house | {"alien": alien}, tmp_path / "out", models=("sft", "alien"), tasks=("bits_per_byte", "sampled"))
    found = {row["metric"] for row in rows(tmp_path / "out") if row["model"] == "alien"}
    assert found == {"bits_per_byte", "length", "ended", "gold", "gold_win_rate", "gold_difference"}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tasks": ("bits_per_byte",), "tokens": None}, "tokens"),
        ({"tasks": ("reward_accuracy",), "reward": None}, "reward"),
        ({"tasks": ("preference_accuracy",), "baseline": None}, "baseline"),
        ({"tasks": ("greedy",), "data": None}, "data"),
        ({"tasks": ("sampled",), "models": ("pretrain",), "baseline": None}, "no task applies"),
    ],
)
def test_a_task_that_cannot_be_done_is_refused(
    house: dict[str, Artifact], tmp_path: Path, fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        measure(house, tmp_path, **fields)


@pytest.mark.slow
def test_win_rates_by_the_reward_model(house: dict[str, Artifact], tmp_path: Path) -> None:
    """A model against its like is a half; turned round, wins are losses and the scores change sides. Without a judge it
    is measured where it is asked for alone."""
    twin = house | {"twin": replace(house["sft"], fingerprint="twin")}
    found = measure(twin, tmp_path / "twin", models=("twin",), tasks=("win_rate",))
    assert found == {"twin.win_rate.win_rate": 0.5}
    won = {}
    for ours, theirs in (("ppo", "sft"), ("sft", "ppo")):
        out = tmp_path / ours
        rate = measure(house, out, models=(ours, theirs), baseline=theirs, tasks=("win_rate",))
        won[ours] = rows(out, "samples")
        assert rate == {f"{ours}.win_rate.win_rate": pytest.approx(sum(item["win"] for item in won[ours]) / 5)}
    for item, turned in zip(won["ppo"], won["sft"], strict=True):
        assert (item["prompt"], item["answer"], item["against"]) == (
            turned["prompt"],
            turned["against"],
            turned["answer"],
        )
        assert (item["score"], item["score_against"]) == pytest.approx((turned["score_against"], turned["score"]))
        assert item["win"] == float(item["score"] > item["score_against"]) == 1 - turned["win"]
    with pytest.raises(ConfigError, match="win_rate needs `judge`"):
        measure(house, tmp_path / "none", models=("ppo",), reward=None, tasks=("win_rate",))


class FirstIsBetter:
    """A judge in this process that sees the place alone."""

    def compare(self, prompts: Any, pairs: Any) -> list[Compared]:
        return [Compared(0.5, True) for _ in pairs]


def test_win_rates_by_a_judge(house: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = tmp_path / "rules.txt"
    rules.write_text("Short is good.")
    seen = []

    def load(artifact: Artifact, constitution: str, **options: Any) -> FirstIsBetter:
        seen.append((artifact.reference, constitution))
        return FirstIsBetter()

    monkeypatch.setattr(scorers, "load_comparer", load)
    found = measure(
        house, tmp_path / "out", models=("ppo",), judge="pretrain", constitution=rules, reward=None, tasks=("win_rate",)
    )
    assert found == {"ppo.win_rate.win_rate": 0.5, "ppo.win_rate.swayed": 1.0, "ppo.win_rate.unread": 0.0}
    assert seen == [("tiny/pretrain", "Short is good.")], "loaded once"
    for fields in ({"judge": "pretrain"}, {"constitution": rules}, {"judge_url": "http://127.0.0.1/v1"}):
        with pytest.raises(ValueError, match="go together"):
            stage.EvalConfig(models=("ppo",), **fields)


def test_exact_match_is_measured_where_it_is_told_how(house: dict[str, Artifact], tmp_path: Path) -> None:
    """`correct` is 1 for an answer whose text is the reference; the difference is paired with the baseline's."""
    with pytest.raises(ConfigError, match="needs `match`"):
        measure(house, tmp_path / "untold", tasks=("exact_match",))
    out = tmp_path / "told"
    measure(house, out, tasks=("exact_match",), match="exact", models=("sft", "ppo"))
    assert {row["metric"] for row in rows(out) if row["model"] == "sft"} == {"accuracy", "length", "ended"}
    assert {row["metric"] for row in rows(out) if row["model"] == "ppo"} == {
        "accuracy",
        "length",
        "ended",
        "difference",
    }
    items = rows(out, "samples")
    assert len(items) == 10
    for item in items:
        assert item["correct"] == float(item["ended"] and item["answer"].split() == item["reference"].split())


@pytest.mark.slow
def test_members_of_a_matrix_are_averaged_and_compared(house: dict[str, Artifact], tmp_path: Path) -> None:
    """Two variants of two seeds, each variant two times the same two models: the difference is that of the models."""
    own = {f"ppo@beta={beta}@seed={seed}": house[("sft", "ppo")[seed]] for beta in (1, 2) for seed in (0, 1)}
    own["dpo"] = house["ppo"]
    models = {
        name: replace(each, fingerprint=name, manifest={"stage": "ppo", "flops": 1e9 * place})
        for place, (name, each) in enumerate(own.items())
    }
    out = tmp_path / "out"
    measure(house | models, out, models=("sft", *models), tasks=("multiple_choice", "sampled"), matched_by="kl")
    table = read_csv(out / "table.csv")
    assert {(line["kind"], line["model"], line["against"]) for line in table} == {
        *(("model", name, "") for name in ("sft", *models)),
        *(("mean", f"ppo@beta={beta}", "") for beta in (1, 2)),
        ("difference", "ppo@beta=2", "ppo@beta=1"),
        ("matched", "dpo", "ppo@beta=1"),  # as near as the other one, and before it
    }
    for line in table:
        if line["kind"] == "model":
            assert line["value"] == value(out, line["model"], line["task"], line["metric"])
        elif line["kind"] == "mean":
            both = [value(out, f"{line['model']}@seed={seed}", line["task"], line["metric"]) for seed in (0, 1)]
            assert line["value"] == pytest.approx(sum(both) / 2)
            assert line["seeds_high"] - line["seeds_low"] == pytest.approx(12.7062 * abs(both[0] - both[1]))
        elif line["kind"] == "difference":
            assert [line[key] for key in ("value", "seeds_low", "seeds_high", "low", "high")] == [0.0] * 5
    flops = {(line["kind"], line["model"]): line["flops"] for line in table}
    assert flops["mean", "ppo@beta=2"] == 2.5e9
    assert flops["model", "ppo@beta=1@seed=0"] is None, "a stage that counts none"
    kls = {line["model"]: line["kl"] for line in table}
    assert kls["ppo@beta=1"] == pytest.approx(kls["dpo"] / 2, abs=0.01), "one of the two is the baseline's model"
    assert (out / "table.tex").read_text().count("\\begin{tabular}") == 2


def test_a_match_in_kl_needs_what_measures_it(house: dict[str, Artifact], tmp_path: Path) -> None:
    for fields in ({"tasks": ("greedy",)}, {"baseline": None}, {"data": None, "tasks": ("bits_per_byte",)}):
        with pytest.raises(ConfigError, match="matched_by: kl needs the task sampled and a baseline"):
            measure(house, tmp_path / "out", matched_by="kl", **fields)


def test_reward_bench_rows_are_all_measured_by_subset_and_section(house: dict[str, Artifact], tmp_path: Path) -> None:
    """And an ensemble is measured by its one name: two members of one model score as the model alone."""
    subsets = ["hep-go", "hep-go", "math-prm", "of mine"]
    given = [
        {"prompt": f"Question {number}?", "chosen": f"Yes {number}.", "rejected": "No no.", "subset": subset}
        for number, subset in enumerate(subsets)
    ]
    path = tmp_path / "bench.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    both = tmp_path / "both"
    shutil.copytree(house["reward"].path / "model", both / "model")
    shutil.copytree(house["reward"].path / "model", both / "member-1")
    found = []
    for name, reward in (("alone", house["reward"]), ("ensemble", artifact(both, "reward-model"))):
        out = tmp_path / name
        measure(
            house | {"reward": reward}, out, models=("sft",), tasks=("reward_bench", "reward_accuracy"),
            reward_bench=(DataEntry(source=str(path)),),
        )  # fmt: skip
        found.append({(row["task"], row["metric"]): row["value"] for row in rows(out)})
        counts = {row["metric"]: row["n"] for row in rows(out) if row["task"] == "reward_bench"}
        assert counts == {"accuracy": 4, "accuracy/hep-go": 2, "accuracy/math-prm": 1, "accuracy/of mine": 1,
                          "section/reasoning": 3}  # fmt: skip
        assert len([item for item in rows(out, "samples") if item["task"] == "reward_bench"]) == 4
    alone, ensemble = found
    assert {key: ensemble[key] for key in alone} == pytest.approx(alone, abs=1e-4)
    assert ensemble["reward_accuracy", "members_disagree"] == 0.0
    with pytest.raises(ConfigError, match="reward_bench needs `reward_bench`"):
        measure(house, tmp_path / "none", models=("sft",), tasks=("reward_bench",))
