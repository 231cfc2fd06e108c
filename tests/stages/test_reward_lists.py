"""reward on lists, ties and margins, and ensembles of several seeds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import load_file
from trl import RewardConfig as Arguments
from trl import RewardTrainer

from pipeline.artifacts import Artifact, outside_model
from pipeline.data.chat import encode_messages
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import DataError, MismatchError, Stopped
from pipeline.model.reward import Ensemble, build_reward_model, load_reward_model, load_scorer_of, members_of
from pipeline.recipe import DataEntry, PeftConfig
from pipeline.runtime import derive_seed
from pipeline.schedule import schedule
from stages import reward
from tests.ranks import run_script

pytestmark = pytest.mark.slow


@pytest.fixture
def config(small_run: dict[str, Any], lists: Path, demonstrations: Path) -> Any:
    """A small run on the lists; keywords change fields."""

    def make(**changed: Any) -> reward.RewardConfig:
        values = small_run | {
            "data": (DataEntry(source=str(lists)),),
            "demonstrations": (DataEntry(source=str(demonstrations)),),
        }
        return reward.RewardConfig(**(values | changed))

    return make


def losses(lines: Any, out: Path) -> list[float]:
    return [line["loss"] for line in lines(out) if "loss" in line]


def as_artifact(out: Path) -> Artifact:
    """What a stage wrote, as though it were published."""
    return replace(outside_model(out / "model"), path=out, manifest={"stage": "reward"})


def encoded(init: Any, rows: list[dict[str, Any]]) -> list[list[list[int]]]:
    """The ids of each row's answers, best first."""
    tokenizer = load_tokenizer(init.model)
    found = []
    for row in rows:
        asked = [{"role": "user", "content": row["prompt"]}] if isinstance(row["prompt"], str) else row["prompt"]
        answers = row.get("answers") or [row["chosen"], row["rejected"]]
        texts = [answer if isinstance(answer, str) else answer[0]["content"] for answer in answers]
        said = [{"role": "assistant", "content": text} for text in texts]
        found.append([encode_messages(tokenizer, [*asked, answer]).input_ids for answer in said])
    return found


def naive_losses(init: Any, rows: list[dict[str, Any]], settings: Any, here: Any) -> list[float]:
    """Three steps of four rows: every pair of a list by itself, every answer forwarded without padding."""
    texts = encoded(init, rows)
    plan = schedule([sum(map(len, answers)) for answers in texts], settings, here)
    model = build_reward_model(init.model, 0, derive_seed(0, "reward head"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    found = []
    for step, batch in enumerate(plan.order.reshape(3, 4).tolist()):
        total = torch.zeros(())
        for place in batch:
            scores = [
                model.score(model.model(torch.tensor([ids])).last_hidden_state[:, -1])[0, 0] for ids in texts[place]
            ]
            ranks = rows[place].get("ranks", list(range(len(scores))))
            pairs = [(i, j) for i in range(len(scores)) for j in range(i + 1, len(scores))]
            for i, j in pairs:
                mu = rows[place].get("preference", 1.0) if ranks[i] < ranks[j] else 0.5
                delta = scores[i] - scores[j] - rows[place].get("margin", 0.0)
                pair = -mu * F.logsigmoid(delta) - (1 - mu) * F.logsigmoid(-delta)
                total = total + (pair + 0.01 * (scores[i] + scores[j]) ** 2) / len(pairs) / 4
        total.backward()
        found.append(total.item())
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / 3)
        optimizer.step()
        optimizer.zero_grad()
    return found


def test_three_steps_on_lists_are_their_pairs_one_by_one(
    init: Any, runtime: Any, config: Any, lines: Any, lists: Path
) -> None:
    settings = config(max_steps=3, held_out=0.0, warmup_steps=0.0, max_grad_norm=1e9)
    out, here = runtime("lists")
    reward.run(settings, {"init": init}, out, here)
    rows = [json.loads(line) for line in lists.read_text().splitlines()]
    found, expected = losses(lines, out), naive_losses(init, rows, settings, here)
    assert found[0] == pytest.approx(expected[0], abs=1e-6)
    assert found == pytest.approx(expected, abs=1e-5)  # Adam's first steps make more of the float order
    first = lines(out)[0]
    assert first["min_reward"] <= first["mean_reward"] <= first["max_reward"]
    assert 0 <= first["accuracy"] <= 1


def test_margins_are_trls_and_ties_the_equation(
    init: Any, runtime: Any, config: Any, lines: Any, preferences: Path, tmp_path: Path
) -> None:
    """Pairs with margins against raw RewardTrainer; with ties and doubts, which TRL has not, against pair by pair."""
    rows = [json.loads(line) | {"margin": index % 3 / 2} for index, line in enumerate(preferences.open())]
    path = tmp_path / "margins.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = config(
        data=(DataEntry(source=str(path)),), max_steps=3, held_out=0.0, warmup_steps=0.0, max_grad_norm=1e9,
        margin_weight=1.0,
    )  # fmt: skip
    out, here = runtime("margins")
    reward.run(settings, {"init": init}, out, here)
    texts = encoded(init, rows)
    plan = schedule([sum(map(len, answers)) for answers in texts], settings, here)
    tokenizer = load_tokenizer(init.model)
    raw = RewardTrainer(
        model=build_reward_model(init.model, tokenizer.pad_token_id, derive_seed(0, "reward head")),
        args=Arguments(
            output_dir=str(tmp_path / "raw"), use_cpu=True, bf16=False, max_steps=3, learning_rate=1e-3,
            per_device_train_batch_size=4, train_sampling_strategy="sequential", report_to="none", save_strategy="no",
            logging_steps=1, gradient_checkpointing=False, max_grad_norm=1e9, disable_tqdm=True,
            center_rewards_coefficient=0.01,
        ),
        train_dataset=Dataset.from_list([
            {"chosen_ids": texts[i][0], "rejected_ids": texts[i][1], "margin": rows[i]["margin"]}
            for i in plan.order.tolist()
        ]),
        processing_class=tokenizer,
    )  # fmt: skip
    raw.train()
    trls = [line["loss"] for line in raw.state.log_history if "loss" in line]
    assert losses(lines, out) == pytest.approx(trls, abs=1e-6)

    rows = [row | {"margin": 0.0, "preference": (0.5, 0.8, 1.0)[index % 3]} for index, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, here = runtime("ties")
    reward.run(settings, {"init": init}, out, here)
    found, expected = losses(lines, out), naive_losses(init, rows, settings, here)
    assert found[0] == pytest.approx(expected[0], abs=1e-6)
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_margin_counts_as_much_as_it_is_asked_to(
    init: Any, runtime: Any, config: Any, lines: Any, preferences: Path, tmp_path: Path
) -> None:
    """Unless asked for, margins in another model's units, as `sample` writes them, are those of no row; a half of 3 is
    1.5; and what is asked for is not of a row in doubt."""
    rows = [json.loads(line) for line in preferences.read_text().splitlines()[:4]]
    path = tmp_path / "rows.jsonl"

    def first_loss(name: str, weight: float, fields: dict[str, float]) -> float:
        path.write_text("".join(json.dumps(row | fields) + "\n" for row in rows))
        out, here = runtime(name)
        settings = config(data=(DataEntry(source=str(path)),), max_steps=1, held_out=0.0, margin_weight=weight)
        reward.run(settings, {"init": init}, out, here)
        return losses(lines, out)[0]

    plain = first_loss("plain", 1.0, {})
    unless_set = reward.RewardConfig.model_fields["margin_weight"].default
    assert first_loss("not asked for", unless_set, {"margin": 3}) == plain
    half = first_loss("half", 0.5, {"margin": 3})
    assert half == first_loss("as it says", 1.0, {"margin": 1.5})
    assert half > plain + 0.3
    doubtful = {"margin": 1, "preference": 0.7}
    assert first_loss("in doubt", 0.0, doubtful) == first_loss("without one", 0.0, {"preference": 0.7})
    with pytest.raises(DataError, match="a margin of 1 is sure that chosen is better"):
        first_loss("refused", 1.0, doubtful)


def test_ties_have_no_accuracy_and_no_margin(
    init: Any, runtime: Any, config: Any, lines: Any, preferences: Path, tmp_path: Path
) -> None:
    """Two of four rows are ties: both figures are of the other two, by the untrained model's scores. Of ties alone
    there is neither."""
    path = tmp_path / "rows.jsonl"
    rows = [json.loads(line) for line in preferences.read_text().splitlines()[:4]]
    settings = config(data=(DataEntry(source=str(path)),), max_steps=1, held_out=0.0)
    texts = encoded(init, rows)
    model = build_reward_model(init.model, 0, derive_seed(0, "reward head"))
    with torch.inference_mode():
        read = [[model.model(torch.tensor([ids])).last_hidden_state[:, -1] for ids in row] for row in texts]
        deltas = [(model.score(chosen) - model.score(rejected)).item() for chosen, rejected in read]
    last = {}
    for name, told in (("some", (1.0, 0.5, 0.8, 0.5)), ("none", (0.5, 0.5, 0.5, 0.5))):
        path.write_text("".join(json.dumps(row | {"preference": p}) + "\n" for row, p in zip(rows, told, strict=True)))
        out, here = runtime(name)
        reward.run(settings, {"init": init}, out, here)
        last[name] = lines(out)[0]
    assert last["some"]["margin"] == pytest.approx((deltas[0] + deltas[2]) / 2, abs=1e-5)
    assert last["some"]["accuracy"] == ((deltas[0] > 0) + (deltas[2] > 0)) / 2
    assert "loss" in last["none"]
    assert not {"accuracy", "margin"} & last["none"].keys()


def test_one_list_eight_times_is_eight_lists_at_once(init: Any, runtime: Any, config: Any, lines: Any) -> None:
    weights, found = [], []
    for name, rows, micro in (("at once", 8, 1), ("one by one", 1, 8)):
        out, here = runtime(name)
        fields = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": micro, "held_out": 0.0}
        reward.run(config(train_sampling_strategy="random", **fields), {"init": init}, out, here)
        weights.append(load_file(out / "model" / "model.safetensors"))
        found.append(losses(lines, out))
    assert len(found[0]) == 4
    assert found[1] == pytest.approx(found[0], abs=2e-6)
    apart = max((weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0])
    assert apart < 2e-4  # Adam turns the float order of near-zero gradients into parts of a step of 1e-3


def test_with_adapters_they_and_the_head_move_and_the_trunk_does_not(init: Any, runtime: Any, config: Any) -> None:
    out, here = runtime("adapted")
    reward.run(config(peft=PeftConfig(r=2, target_modules=("q_proj",))), {"init": init}, out, here)
    before = build_reward_model(init.model, 0, derive_seed(0, "reward head")).state_dict()
    after = load_file(out / "model" / "model.safetensors")
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {"score.weight", *(f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2))}


def test_every_parameter_moves_on_lists(init: Any, runtime: Any, config: Any) -> None:
    out, here = runtime("moves")
    figures = reward.run(config(max_steps=40, learning_rate=5e-3), {"init": init}, out, here)
    before = build_reward_model(init.model, 0, derive_seed(0, "reward head")).state_dict()
    for name, value in load_file(out / "model" / "model.safetensors").items():
        assert not torch.equal(value, before[name]), name
    assert figures["accuracy"] > 0.9


TWO = """
import sys
from pathlib import Path
import pipeline.trainer
from pipeline.artifacts import outside_model
from pipeline.recipe import DataEntry
from pipeline.runtime import Runtime
from stages import reward
from tests.ranks import one_and_two

model, rows, demonstrations, root = sys.argv[1:5]

def work(world):
    out = Path(root, str(world))
    out.mkdir(exist_ok=True)
    runtime = Runtime.start(out, seed=0, threads=1, world_size=world, quiet=True)
    config = reward.RewardConfig(
        data=(DataEntry(source=rows),), demonstrations=(DataEntry(source=demonstrations),), learning_rate=1e-3,
        per_device_train_batch_size=4, max_steps=4, bf16=False, logging_steps=1, save_steps=2, held_out=0.1, ensemble=2,
    )
    reward.run(config, {"init": outside_model(Path(model))}, out, runtime)

sys.exit(not one_and_two(work, int(sys.argv[-1])))
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["lists", "pairs"])
def test_two_processes_are_one(
    warm: Any,
    model_folder: Path,
    lists: Path,
    preferences: Path,
    demonstrations: Path,
    lines: Any,
    tmp_path: Path,
    what: str,
) -> None:
    """An ensemble of two, the rows of each step split over two gloo ranks: losses, figures and weights."""
    rows = lists if what == "lists" else preferences
    run_script(warm, TWO, model_folder, rows, demonstrations, tmp_path)
    one, two = (lines(tmp_path / world) for world in "12")
    assert len(one) == len(two) == 9
    for ours, theirs in zip(two[:-1], one[:-1], strict=True):
        for name in ("loss", "grad_norm", "accuracy", "margin", "mean_reward", "min_reward", "max_reward", "tokens"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), (ours["step"], name)
    for folder in ("model", "member-1"):
        weights = [load_file(tmp_path / world / folder / "model.safetensors") for world in "12"]
        apart = max((weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0])
        assert apart < 2e-4  # of steps of 1e-3: Adam's first ones make much of the float order of small gradients


# ---- ensembles ----


@pytest.mark.slow
def test_a_member_is_the_model_of_its_seed_alone(init: Any, runtime: Any, config: Any, lines: Any) -> None:
    """To the bit, with a normaliser of its own; and the ensemble scores the members' mean."""
    out, here = runtime("ensemble")
    figures = reward.run(config(ensemble=3), {"init": init}, out, here)
    for seed in range(3):
        alone, own = runtime(f"seed {seed}")
        own.seed = seed
        expected = reward.run(config(seed=seed), {"init": init}, alone, own)
        folder = out / (f"member-{seed}" if seed else "model")
        for name in ("model.safetensors", "reward.json", "tokenizer.json"):
            assert (folder / name).read_bytes() == (alone / "model" / name).read_bytes(), (seed, name)
        assert figures[f"member_accuracy/{seed}"] == expected["accuracy"]
    steps = [line["step"] for line in lines(out) if "loss" in line]
    assert steps == list(range(1, 13))
    assert [line.get("member", 0) for line in lines(out) if "loss" in line] == [0] * 4 + [1] * 4 + [2] * 4

    here.bf16 = False
    made = as_artifact(out)
    scorer = load_scorer_of(made, here)
    assert isinstance(scorer, Ensemble)
    ids, lengths = torch.tensor([[5, 6, 7, 8], [9, 5, 0, 0]]), torch.tensor([4, 2])
    alone_scores = [load_reward_model(member, here).score(ids, lengths) for member in members_of(made)]
    torch.testing.assert_close(scorer.score(ids, lengths), sum(alone_scores) / 3)
    assert not torch.equal(alone_scores[0], alone_scores[1])
    with pytest.raises(MismatchError, match="holds an ensemble"):
        load_reward_model(made, here)


@pytest.mark.slow
@pytest.mark.parametrize("at", [2, 4, 6])
def test_an_ensemble_that_was_stopped_goes_on_to_the_same_bits(
    init: Any, runtime: Any, config: Any, lines: Any, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Stopped in the first member, at the first step of the second, and within it; at the bound, killed."""
    out, here = runtime("undisturbed")
    calm = reward.run(config(ensemble=2), {"init": init}, out, here)
    stopped, here = runtime("stopped")
    steps = iter(range(100))
    monkeypatch.setattr(here, "stop_requested", lambda: next(steps) == at)
    with pytest.raises(Stopped, match=f"stopped at step {at + 1} "):
        reward.run(config(ensemble=2), {"init": init}, stopped, here)
    stopped, here = runtime("stopped")
    assert reward.run(config(ensemble=2), {"init": init}, stopped, here) == calm
    assert here.checkpoints.resumed_from == at + 1 + (at >= 4)
    for name in ("model/model.safetensors", "model/reward.json", "member-1/model.safetensors", "member-1/reward.json"):
        assert (stopped / name).read_bytes() == (out / name).read_bytes()
    assert losses(lines, stopped) == losses(lines, out)


@pytest.mark.slow
def test_killed_between_two_members_the_first_is_not_trained_again(
    init: Any, runtime: Any, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, here = runtime("undisturbed")
    reward.run(config(ensemble=2), {"init": init}, out, here)
    killed, here = runtime("killed")
    real = reward._member

    def dies(*args: Any) -> Any:
        if args[-1]:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(reward, "_member", dies)
    with pytest.raises(KeyboardInterrupt):
        reward.run(config(ensemble=2), {"init": init}, killed, here)
    assert [path.name for path in (killed / "checkpoints").glob("*-*")] == ["step-00000005"]
    trained = []
    monkeypatch.setattr(reward, "_member", lambda *args: trained.append(len(args[-1])) or real(*args))
    killed, here = runtime("killed")
    reward.run(config(ensemble=2), {"init": init}, killed, here)
    assert trained == [1]
    for name in ("model/model.safetensors", "member-1/model.safetensors"):
        assert (killed / name).read_bytes() == (out / name).read_bytes()


# ---- held out ----


def test_gold_and_the_figure(init: Any, runtime: Any, config: Any, tmp_path: Path) -> None:
    """A gold of the user's that likes short answers; labels of the lists with three answers or more agree in part."""
    (tmp_path / "gold.py").write_text("def short(prompts, responses, rows): return [-len(r) for r in responses]\n")
    out, here = runtime("gold")
    figures = reward.run(config(gold=f"{tmp_path}/gold.py:short", held_out=0.3), {"init": init}, out, here)
    assert {"gold_agreement", "gold_agreement_low", "accuracy_low", "ece", "length_spearman"} <= figures.keys()
    assert list(figures)[:3] == ["accuracy", "ece", "length_spearman"]
    assert (out / "reliability.svg").read_text().startswith("<svg")


def test_a_gold_that_compares_needs_references(init: Any, runtime: Any, config: Any) -> None:
    out, here = runtime("no references")
    with pytest.raises(DataError, match="compares with a row's `reference`"):
        reward.run(config(gold="rouge_l"), {"init": init}, out, here)
    with pytest.raises(ValueError, match="is none of rouge_l, exact, number"):
        config(gold="bleu")
    with pytest.raises(ValueError, match="held_out is 0: keep some, or take gold out"):
        config(gold="rouge_l", held_out=0.0)
