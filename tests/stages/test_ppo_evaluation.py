"""Evaluations of a ppo run on held-out prompts: what they report, the best policy, the early end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError, Stopped
from pipeline.recipe import DataEntry, PeftConfig
from pipeline.reward_config import RewardTerm
from pipeline.runtime import Runtime
from tests.stages.ppo_runs import Parts, run, same, start

EVALUATED: dict[str, Any] = {"eval_steps": 2, "held_out": 0.3, "eval_prompts": 12}
UP: dict[str, Any] = {**EVALUATED, "reward": "vowels", "kl_coef": 0.0, "missing_eos_rule": "keep", "batch_size": 32}


def evaluations(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if "eval_reward" in line]


@pytest.mark.slow
def test_the_reward_on_held_out_prompts_rises(parts: Parts, tmp_path: Path):
    found = evaluations(run(parts, tmp_path, **UP, total_episodes=20 * 32, learning_rate=1e-2).lines())
    assert [line["step"] for line in found] == list(range(2, 21, 2))
    first, last = found[0], found[-1]
    assert last["eval_reward"] > first["eval_reward"] + 0.1
    assert last["eval_win_rate"] > 0.6
    assert last["eval_kl"] > first["eval_kl"] > 0
    assert last["eval_sqrt_kl"] == pytest.approx(last["eval_kl"] ** 0.5)
    assert last["best_step"] > 0


@pytest.mark.slow
def test_without_updates_the_policy_is_its_start(parts: Parts, tmp_path: Path):
    """Half the rate of wins, no KL, the same marks every time: prompts and random numbers are the same."""
    found = evaluations(run(parts, tmp_path, **EVALUATED, learning_rate=1e-30).lines())
    assert [line["step"] for line in found] == [2, 3]
    for line in found:
        assert line["eval_win_rate"] == 0.5
        assert abs(line["eval_kl"]) < 1e-5
        assert line["best_step"] == 0.0
        assert 0 <= line["eval_ended"] <= 1
        assert 1 <= line["eval_length"] <= 12
        assert line["eval_entropy"] > 0
    assert found[0]["eval_reward"] == pytest.approx(found[1]["eval_reward"], abs=1e-5)


@pytest.mark.slow
def test_evaluations_change_no_bit_of_the_training(parts: Parts, tmp_path: Path):
    held_out = {"held_out": 0.3}
    without = run(parts, tmp_path / "without", **held_out)
    evaluated = run(parts, tmp_path / "with", **EVALUATED)
    assert same(evaluated.policy(), without.policy())


@pytest.mark.slow
def test_a_fifth_of_the_run_unless_set(parts: Parts, tmp_path: Path):
    values = {**EVALUATED, "eval_steps": None, "total_episodes": 11 * 16}
    assert [line["step"] for line in evaluations(run(parts, tmp_path, **values).lines())] == [3, 6, 9, 11]


DOWN: dict[str, Any] = {**EVALUATED, "eval_steps": 1, "missing_eos_rule": "keep", "total_episodes": 6 * 16}


@pytest.mark.slow
def test_the_run_ends_early_and_the_best_is_written(parts: Parts, tmp_path: Path):
    """A rate of zero never makes it better: the start stays the best, is written, and the run ends after two."""
    values = {**DOWN, "learning_rate": 1e-30, "load_best_model_at_end": True, "early_stopping_patience": 2}
    done = run(parts, tmp_path, **values)
    assert [line["step"] for line in done.lines()] == [1, 2]
    assert same(done.policy(), start(parts))


@pytest.mark.slow
@pytest.mark.parametrize("peft", [None, PeftConfig(r=4, lora_alpha=8)])
def test_the_best_policy_is_the_one_of_its_step(parts: Parts, tmp_path: Path, peft: PeftConfig | None):
    """What is written is what a run that ends at the best step writes; stopped and resumed too."""
    values = {**DOWN, "reward": "vowels", "learning_rate": 1e-2, "lr_scheduler_type": "constant", "peft": peft}
    best = run(parts, tmp_path / "best", **values, load_best_model_at_end=True)
    step = int(best.lines()[-1]["best_step"])
    assert step == max(best.lines(), key=lambda line: line["eval_reward"])["step"]
    until = run(parts, tmp_path / "until", **{**values, "total_episodes": step * 16})
    assert same(best.policy(), until.policy())
    for stop_at in (1, 4):
        with pytest.raises(Stopped):
            run(parts, tmp_path / f"at {stop_at}", **values, load_best_model_at_end=True, stop_at=stop_at)
        resumed = run(parts, tmp_path / f"at {stop_at}", **values, load_best_model_at_end=True)
        assert same(resumed.policy(), best.policy())
        assert same(resumed.checkpoint(), best.checkpoint())
        assert resumed.lines() == best.lines()


def test_no_evaluations_and_a_best_policy_are_refused(parts: Parts, tmp_path: Path):
    for wanted in ({"load_best_model_at_end": True}, {"early_stopping_patience": 3}):
        with pytest.raises(ConfigError, match="and there are none") as caught:
            run(parts, tmp_path, eval_steps=0, **wanted)
        assert caught.value.where == "ppo.eval_steps"


def test_nothing_held_out_is_no_evaluation_unless_it_is_asked_for(parts: Parts, tmp_path: Path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(parts.data.read_text().splitlines(keepends=True)[:3]))
    values: dict[str, Any] = {"data": (DataEntry(source=str(few)),), "held_out": 1e-6, "total_episodes": 16}
    assert not evaluations(run(parts, tmp_path / "none", **values, eval_steps=None).lines())
    with pytest.raises(ConfigError, match="no held-out row"):
        run(parts, tmp_path / "asked", **values, eval_steps=1)


@pytest.mark.slow
def test_gold_is_measured_and_its_fall_is_said(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The reward is vowels, of which long answers have more; gold is shortness: the one rises as the other falls."""
    said: list[str] = []
    monkeypatch.setattr(Runtime, "say", lambda runtime, text: said.append(text))
    gold = f"{parts.folder / 'rewards.py'}:short"
    values: dict[str, Any] = {"total_episodes": 20 * 32, "learning_rate": 1e-2, "eval_prompts": 24}
    done = run(parts, tmp_path, **{**UP, **values}, gold=gold, load_best_model_at_end=True)
    found = evaluations(done.lines())
    assert found[-1]["eval_gold"] < found[0]["eval_gold"]
    assert found[-1]["eval_reward"] > found[0]["eval_reward"]
    warnings = [text for text in said if "the reward is being gamed" in text]
    assert warnings
    best = max(found, key=lambda line: line["eval_gold"])["step"]
    assert found[-1]["best_step"] in (0.0, best)


@pytest.mark.slow
def test_gold_may_be_a_function_by_name_or_a_reward_model(parts: Parts, tmp_path: Path):
    """The data's answers are single words: rouge_l of the answers, by hand from none of them; the reward model is the
    reward itself."""
    by_name = evaluations(run(parts, tmp_path / "name", **EVALUATED, gold=(RewardTerm(function="rouge_l"),)).lines())
    assert all(0.0 <= line["eval_gold"] <= 1.0 for line in by_name)
    values = {**EVALUATED, "missing_eos_rule": "keep", "score_clip": None}
    itself = evaluations(run(parts, tmp_path / "model", **values, gold="reward").lines())
    assert [line["eval_gold"] for line in itself] == pytest.approx([line["eval_reward"] for line in itself], abs=1e-5)
