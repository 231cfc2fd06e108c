"""The methods that are presets of ppo: what each sets, that it learns, resumes, and is the same on two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import ConfigError, Stopped
from pipeline.model.build import load_causal_lm
from pipeline.model.unfinished import load_unfinished
from pipeline.recipe import PeftConfig
from pipeline.rl.family import PRESETS
from stages import ppo as stage
from tests.stages.ppo_runs import Parts, Spy, furthest, naive_score, run, same, start

if TYPE_CHECKING:
    from tests.conftest import Warm

FAMILY = sorted(set(PRESETS) - {"ppo"})
SMALL: dict[str, Any] = {"batch_size": 32, "total_episodes": 20 * 32, "learning_rate": 1e-2}


def small_groups(config: stage.PPOConfig) -> dict[str, Any]:
    """Groups that fit into a small batch."""
    return {"num_generations": min(config.num_generations, 8)}


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", FAMILY)
def test_every_method_learns(parts: Parts, tmp_path: Path, algorithm: str):
    values = SMALL | small_groups(stage.PPOConfig(algorithm=algorithm))
    if algorithm == "gspo":
        values["cliprange"], values["clip_higher"] = 0.05, None  # its clip is of steps of 1e-6 on large models
    done = run(parts, tmp_path, reward="vowels", algorithm=algorithm, **values)
    lines = done.lines()
    first, last = (sum(line["reward"] for line in part) / 4 for part in (lines[:4], lines[-4:]))
    assert last > first + 0.1
    assert "value_loss" not in lines[0]
    assert "explained_variance" not in lines[0]
    assert not any(name.startswith("critic") for name in done.checkpoint())


def test_a_preset_sets_what_the_recipe_does_not():
    grpo = stage.PPOConfig(algorithm="grpo")
    assert (grpo.num_generations, grpo.kl_loss, grpo.kl_coef, grpo.loss_aggregation) == (8, "k3", 0.04, "sequence")
    assert (grpo.advantage_estimator, grpo.whiten_advantages, grpo.missing_eos_rule) == ("grpo", False, "keep")
    assert stage.PPOConfig(algorithm="grpo", num_generations=4, kl_coef=0.0).model_dump(
        include={"num_generations", "kl_coef", "kl_loss"}
    ) == {"num_generations": 4, "kl_coef": 0.0, "kl_loss": "k3"}
    dapo = stage.PPOConfig(algorithm="dapo")
    assert (dapo.clip_higher, dapo.dynamic_sampling, dapo.overlong_buffer, dapo.kl_coef) == (0.28, True, 0.2, 0.0)
    assert stage.PPOConfig() == stage.PPOConfig(algorithm="ppo")


@pytest.mark.parametrize("algorithm", FAMILY)
def test_what_a_preset_sets_is_a_field_and_no_default(algorithm: str):
    plain = stage.PPOConfig()
    for name, value in PRESETS[algorithm].items():
        assert getattr(stage.PPOConfig(algorithm=algorithm), name) == value
        assert getattr(plain, name) != value, f"{algorithm} sets {name} to its default"


@pytest.mark.slow
def test_config_show_tells_what_a_preset_set(parts: Parts, tmp_path: Path, warm: Warm):
    (tmp_path / "g.yaml").write_text(
        f"stages:\n  ppo:\n    algorithm: grpo\n    init: {parts.init.model}\n    num_generations: 4\n"
        f"    reward: {parts.folder / 'rewards.py'}:short\n    data: {parts.data}\n"
    )
    shown = warm("config", "show", "g.yaml", "--json")
    assert shown.code == 0, shown.stderr
    lines = {line["stage"] + "." + line["field"]: line["from"] for line in json.loads(shown.stdout)}
    assert lines["ppo.kl_loss"] == "algorithm: grpo"
    assert lines["ppo.num_generations"] == "g.yaml:5"
    assert lines["ppo.gamma"] == "default"


def test_the_gradient_of_grpo_is_the_naive_one(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One step's weights against plain autograd: group advantages, each response its mean over tokens; KL by k3 has no
    gradient where policy and reference are one."""
    spy = Spy(monkeypatch)
    values: dict[str, Any] = {"learning_rate": 1.0, "adam_epsilon": 1.0, "max_grad_norm": 1e6}
    done = run(parts, tmp_path, reward="vowels", algorithm="grpo", num_generations=4, total_episodes=16, **values)
    rollout, scores_B = spy.seen[0]
    prompts = [prompt for prompt, _ in spy.rows()]
    assert all(prompts[row] == prompts[row // 4 * 4] for row in range(16))
    assert len({tuple(prompt) for prompt in prompts}) == 4
    policy = load_causal_lm(parts.init.model).eval()
    loss = torch.zeros(())
    for row in range(16):
        group = scores_B[row // 4 * 4 : row // 4 * 4 + 4]
        advantage = (scores_B[row] - group.mean()) / (group.std() + 1e-4)
        prompt, length = int(rollout.prompt_lengths_B[row]), int(rollout.lengths_B[row])
        ids = rollout.ids_BL[row, : prompt + length]
        logprobs = policy(input_ids=ids[None]).logits[0].log_softmax(-1)[prompt - 1 : -1]
        loss = loss - advantage * logprobs.gather(1, ids[prompt:, None]).mean() / 16
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1.0, eps=1.0, weight_decay=0.0)
    loss.backward()
    optimizer.step()
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(done.checkpoint()[f"policy.{name}"], parameter.detach(), atol=2e-6, rtol=1e-5)
    assert furthest(done.policy(), start(parts)) > 1e-3


DYNAMIC: dict[str, Any] = {
    "algorithm": "dapo", "num_generations": 4, "reward": "letter", "batch_size": 16, "total_episodes": 6 * 16,
    "ema_decay": 0.9, "entropy_coef": 0.01, "kl_loss": "k2", "kl_coef": 0.02, "num_mini_batches": 2,
    "num_ppo_epochs": 2,
}  # fmt: skip


@pytest.mark.slow
def test_dynamic_sampling_trains_on_groups_that_differ(parts: Parts, tmp_path: Path):
    lines = run(parts, tmp_path, **DYNAMIC).lines()
    assert max(line["sampling_rounds"] for line in lines) > 1
    assert all(line["episodes"] == 16 * line["sampling_rounds"] for line in lines)
    assert all(0 <= line["varying_groups"] <= 1 for line in lines)


@pytest.mark.slow
def test_stopped_and_resumed_gives_the_same_bits(parts: Parts, tmp_path: Path):
    """With what a checkpoint must hold beside weights: how far the prompts are, and the average."""
    whole = run(parts, tmp_path / "whole", **DYNAMIC)
    with pytest.raises(Stopped, match="stopped at step 3"):
        run(parts, tmp_path / "parts", stop_at=3, **DYNAMIC)
    resumed = run(parts, tmp_path / "parts", **DYNAMIC)
    assert same(resumed.checkpoint(), whole.checkpoint())
    assert same(resumed.policy(), whole.policy())
    assert resumed.lines() == whole.lines()


@pytest.mark.slow
def test_the_average_is_what_is_written(parts: Parts, tmp_path: Path):
    """m <- 0.9 m + 0.1 w after each of two steps, from the weights of runs without it."""
    values: dict[str, Any] = {"reward": "vowels", "lr_scheduler_type": "constant"}
    one, two = (run(parts, tmp_path / str(n), total_episodes=16 * n, **values).policy() for n in (1, 2))
    averaged = run(parts, tmp_path / "ema", total_episodes=32, ema_decay=0.9, **values)
    average = averaged.policy()
    for name, first in start(parts).items():
        expected = 0.9 * (0.9 * first + 0.1 * one[name]) + 0.1 * two[name]
        torch.testing.assert_close(average[name], expected, atol=1e-6, rtol=1e-5)
    (averaged.out / "model/model.safetensors").unlink()
    talked_to, _, step = load_unfinished(averaged.out, torch.float32)  # and what chat loads while it runs
    assert step == 2
    assert talked_to.model.embed_tokens.weight.equal(average["model.embed_tokens.weight"])
    for name in two:  # what is trained goes on as without it
        assert averaged.checkpoint()[f"policy.{name}"].equal(two[name])


def test_answers_that_are_cut_off_can_be_left_out(parts: Parts, tmp_path: Path):
    """All rows truncated: nothing to train on, no step is taken, and the run goes on."""
    values: dict[str, Any] = {"reward": "vowels", "response_length": 1, "missing_eos_rule": "keep"}
    done = run(parts, tmp_path, mask_truncated_completions=True, **values)
    lines = done.lines()
    cut = [line for line in lines if line["ended"] == 0]
    assert cut
    assert all(line["updates"] == 0.0 and line["policy_loss"] == 0.0 for line in cut)
    if len(cut) == len(lines):
        assert same(done.policy(), start(parts))


@pytest.mark.slow
def test_a_constant_reward_moves_nothing(parts: Parts, tmp_path: Path):
    """Every group's advantages are 0: by no bit, whatever the constant."""
    for algorithm in ("dr_grpo", "grpo", "rloo"):
        values = {"num_generations": 4, "kl_coef": 0.0}
        done = run(parts, tmp_path / algorithm, reward="constant", algorithm=algorithm, **values)
        assert same(done.policy(), start(parts))
        assert all(line["varying_groups"] == 0 for line in done.lines())


@pytest.mark.slow
def test_adapters_are_trained_and_merged(parts: Parts, tmp_path: Path):
    """LoRA against a reward model: policy and critic move by their adapters alone, what is written is a whole model."""
    peft = PeftConfig(r=4, lora_alpha=8)
    done = run(parts, tmp_path, peft=peft, learning_rate=1e-2)
    state = done.checkpoint()
    trained = {name for name in state if name.startswith(("policy.", "critic."))}
    assert trained
    assert all("lora_" in name or "score" in name for name in trained)
    assert done.lines()[0]["kl"] == 0.0
    assert done.lines()[-1]["kl"] != 0.0
    policy = done.policy()
    assert policy.keys() == start(parts).keys()
    assert furthest(policy, start(parts)) > 1e-4
    embedding = "model.embed_tokens.weight"
    assert policy[embedding].equal(start(parts)[embedding])
    AutoModelForCausalLM.from_pretrained(done.out / "model")
    assert len(load_tokenizer(done.out / "model"))


@pytest.mark.slow
def test_with_adapters_the_scores_are_the_reward_models(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The critic stands on the reward model: scoring sees neither its adapters nor its head, in any step."""
    spy = Spy(monkeypatch)
    run(parts, tmp_path, peft=PeftConfig(r=4, lora_alpha=8), learning_rate=0.1)
    rollout, scores_B = spy.seen[-1]
    for row in range(4):
        prompt, length = int(rollout.prompt_lengths_B[row]), int(rollout.lengths_B[row])
        ids = rollout.ids_BL[row].tolist()
        expected = naive_score(parts, tmp_path, ids[:prompt], ids[prompt : prompt + length])
        assert scores_B[row].item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_adapters_resume_to_the_same_bits(parts: Parts, tmp_path: Path):
    values: dict[str, Any] = {"peft": PeftConfig(r=4, lora_alpha=8), "total_episodes": 64}
    whole = run(parts, tmp_path / "whole", **values)
    with pytest.raises(Stopped):
        run(parts, tmp_path / "parts", stop_at=2, **values)
    resumed = run(parts, tmp_path / "parts", **values)
    assert same(resumed.checkpoint(), whole.checkpoint())
    assert same(resumed.policy(), whole.policy())


def test_a_group_of_one_is_refused(parts: Parts, tmp_path: Path):
    for values in ({"algorithm": "grpo", "num_generations": 1}, {"dynamic_sampling": True}):
        with pytest.raises(ConfigError, match="compares the answers to one prompt") as caught:
            run(parts, tmp_path, reward="vowels", **values)
        assert caught.value.mend == "--set ppo.num_generations=8"
    with pytest.raises(ConfigError, match="not divisible by 5 processes with 5 answers a prompt"):
        run(parts, tmp_path, reward="vowels", algorithm="grpo", num_generations=5)


def test_whitened_rewards_are_for_gae_alone(parts: Parts, tmp_path: Path):
    with pytest.raises(ConfigError, match="they would pay its length") as caught:
        run(parts, tmp_path, reward="vowels", algorithm="rloo", whiten_rewards=True)
    assert caught.value.where == "ppo.whiten_rewards"


def test_constant_aggregation_divides_by_all_rows(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of 16 answers those that ended are trained on: - sum over them of A x tokens, over 16 x 12 whatever is masked."""
    spy = Spy(monkeypatch)
    values: dict[str, Any] = {"algorithm": "dr_grpo", "num_generations": 4, "total_episodes": 16, "score_clip": None}
    masked = {"mask_truncated_completions": True, "stop_strings": ("e",)}
    line = run(parts, tmp_path, reward="vowels", **values, **masked).lines()[0]
    rollout, scores_B = spy.seen[0]
    advantages_B = (scores_B.view(4, 4) - scores_B.view(4, 4).mean(dim=1, keepdim=True)).flatten()
    ended_B = rollout.is_ended_B
    assert 0 < ended_B.sum() < 16
    expected = -(advantages_B * rollout.lengths_B)[ended_B].sum() / (16 * 12)
    assert line["policy_loss"] == pytest.approx(expected.item(), abs=1e-6)


RECIPE = """\
run: tiny
stages:
  ppo:
    algorithm: dapo
    init: {init}
    reward: {reward}
    data: {data}
    total_episodes: 64
    batch_size: 16
    num_generations: 4
    num_mini_batches: 2
    token_budget: 90
    response_length: 12
    learning_rate: 3e-3
    bf16: false
    held_out: 0.3
    eval_steps: 2
    eval_prompts: 7
"""


@pytest.mark.slow
def test_two_processes_keep_the_groups_that_one_does(parts: Parts, tmp_path: Path, warm: Warm):
    reward = f"{parts.folder / 'rewards.py'}:letter"
    (tmp_path / "ppo.yaml").write_text(RECIPE.format(init=parts.init.model, reward=reward, data=parts.data))
    for count in (1, 2):
        done = warm("run", "ppo.yaml", "--artifacts", count, "--num-processes", count)
        assert done.code == 0, done.stderr
    folders = [tmp_path / str(count) / "tiny/ppo" for count in (1, 2)]
    one, two = ([json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in folders)
    assert len(one) == len(two) == 4
    names = ("reward", "length", "entropy", "policy_loss", "varying_groups", "sampling_rounds", "policy_grad_norm")
    for left, right in zip(one, two, strict=True):
        assert [left[name] for name in names] == pytest.approx([right[name] for name in names], abs=1e-4, rel=1e-3)
    assert max(line["sampling_rounds"] for line in one) > 1
    evaluated = [name for name in one[-1] if name.startswith("eval_")]
    assert len(evaluated) == 11
    assert [one[-1][name] for name in evaluated] == pytest.approx([two[-1][name] for name in evaluated], abs=1e-4)
    left, right = (load_file(f / "model/model.safetensors") for f in folders)
    assert furthest(left, right) < 1e-4
