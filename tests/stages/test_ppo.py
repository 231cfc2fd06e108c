"""The ppo stage on a tiny random Llama: what it learns, what leaves it unmoved, resuming, ranks, refusals."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from pipeline.data.chat import encode_prompt, stop_token_id
from pipeline.data.tokenizers import load_tokenizer, train_bpe
from pipeline.errors import ConfigError, DataError, MismatchError, PipelineError, Stopped, TrainingError
from pipeline.model.build import load_causal_lm
from pipeline.rl.updates import update
from stages import ppo as stage
from tests.stages.ppo_runs import Done, Parts, Spy, artifact, furthest, naive_score, run, same, start

if TYPE_CHECKING:
    from tests.conftest import Warm

# ---- what it learns ----


@pytest.mark.slow
@pytest.mark.parametrize("reward", ["short", "vowels"])
def test_the_reward_rises(parts: Parts, tmp_path: Path, reward: str):
    values: dict[str, Any] = {"total_episodes": 20 * 32, "batch_size": 32, "kl_coef": 0.0, "learning_rate": 1e-2}
    done = run(parts, tmp_path, reward=reward, missing_eos_rule="keep", **values)
    lines = done.lines()
    first, last = (sum(line["reward"] for line in part) / 4 for part in (lines[:4], lines[-4:]))
    assert last > first + 0.15
    assert lines[0]["kl"] == 0.0
    assert lines[-1]["kl"] > 1.0
    assert done.summary["reward_first"] == lines[0]["reward"]
    assert done.summary["reward"] == pytest.approx(sum(line["reward"] for line in lines[-10:]) / 10)


@pytest.mark.slow
def test_a_price_on_kl_holds_the_policy_back(parts: Parts, tmp_path: Path):
    kls = []
    for kl_coef in (0.0, 1.0):
        done = run(
            parts, tmp_path / str(kl_coef), reward="vowels", total_episodes=15 * 32, batch_size=32, kl_coef=kl_coef
        )
        kls.append(done.lines()[-1]["kl"])
    assert kls[1] < 0.5 * kls[0]


@pytest.mark.slow
def test_a_step_against_a_reward_model(parts: Parts, tmp_path: Path):
    """The first step's figures from an independent reading of what the stage must have done."""
    done = run(parts, tmp_path)
    lines = done.lines()
    assert [line["step"] for line in lines] == [1, 2, 3]
    first = lines[0]
    assert (first["kl"], first["kl_coef"], first["updates"]) == (0.0, 0.05, 1.0)
    assert first["clip_fraction"] == 0.0
    assert first["approx_kl"] < 1e-10  # ratio 1: on-policy
    assert first["rollout_gap"] < 1e-5
    assert [line["learning_rate"] for line in lines] == pytest.approx([3e-3, 2e-3, 1e-3])
    assert lines[-1]["tokens"] == pytest.approx(sum(line["length"] for line in lines) * 16)
    assert all(line["policy_grad_norm"] > 0 < line["value_grad_norm"] for line in lines)

    # The artifact: loads as transformers' own, says the same as the init about its tokens, ends at the stop token.
    model = AutoModelForCausalLM.from_pretrained(done.out / "model")
    tokenizer = AutoTokenizer.from_pretrained(done.out / "model")
    stop = stop_token_id(tokenizer)
    assert model.generation_config.eos_token_id == stop
    made = artifact(done.out, "causal-lm")
    assert (made.tokenizer_hash, made.template_hash) == (parts.init.tokenizer_hash, parts.init.template_hash)
    assert furthest(done.policy(), start(parts)) > 1e-3

    # The KL of the second step: samples of the saved policy are dearer to it than to the reference.
    assert lines[1]["kl"] != 0.0


@pytest.mark.slow
def test_scores_are_the_reward_models_of_prompt_and_response(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each response scored alone gives the stage's score; one that was cut off is closed with the stop token."""
    spy = Spy(monkeypatch)
    done = run(parts, tmp_path, total_episodes=16)
    rollout, scores_B = spy.seen[0]
    expected = [naive_score(parts, tmp_path, prompt, response) for prompt, response in spy.rows()]
    assert scores_B.tolist() == pytest.approx(expected, abs=1e-4)
    rewards = [score if ended else -1.0 for score, ended in zip(expected, rollout.is_ended_B.tolist(), strict=True)]
    line = done.lines()[0]
    assert line["score"] == pytest.approx(sum(expected) / 16, abs=1e-4)
    assert line["reward"] == pytest.approx(sum(rewards) / 16, abs=1e-4)
    assert line["ended"] == sum(rollout.is_ended_B.tolist()) / 16


def naive_step(
    rows: list[tuple[list[int], list[int]]], scores: list[float], policy: Any, reference: Any, critic: Any
) -> tuple[Tensor, Tensor]:
    """The losses of one on-policy step with the tests' numbers, row by row and token by token in plain Python.

    kl_coef 0.5, gamma 0.9, lambda 0.8, values (x - 0.3) / 0.7, vf_coef 0.1; advantages whitened.
    """
    logprobs, values, advantages, returns = [], [], [], []
    for (prompt, response), score in zip(rows, scores, strict=True):
        ids, places = torch.tensor([prompt + response]), range(len(prompt) - 1, len(prompt) + len(response) - 1)
        own = policy(input_ids=ids).logits[0].log_softmax(-1)
        other = reference(input_ids=ids).logits[0].log_softmax(-1)
        hidden = critic.base_model(input_ids=ids).last_hidden_state[0]
        v = [(critic.score(hidden[place])[0] - 0.3) / 0.7 for place in places]
        reward = [-0.5 * (own[p, t] - other[p, t]).item() for p, t in zip(places, response, strict=True)]
        reward[-1] += score
        following, a = 0.0, 0.0
        own_advantages = []
        for t in reversed(range(len(response))):
            a = reward[t] + 0.9 * following - v[t].item() + 0.9 * 0.8 * a
            following = v[t].item()
            own_advantages.insert(0, a)
        logprobs += [own[p, t] for p, t in zip(places, response, strict=True)]
        values += v
        advantages += own_advantages
        returns += [a + value.item() for a, value in zip(own_advantages, v, strict=True)]
    count = len(advantages)
    mean = sum(advantages) / count
    std = (sum((a - mean) ** 2 for a in advantages) / count) ** 0.5
    # At ratio 1 the clipped objective has the gradient of -A log pi; the clipped value error is the plain one.
    loss = sum(-(a - mean) / std * lp for a, lp in zip(advantages, logprobs, strict=True)) / count
    value_loss = 0.5 * sum((v - r) ** 2 for v, r in zip(values, returns, strict=True)) / count
    return loss, 0.1 * value_loss


@pytest.mark.slow
@pytest.mark.parametrize("max_grad_norm", [1e6, 1e-3])
def test_a_whole_step_is_the_naive_one(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_grad_norm: float
):
    """Weights of policy and critic after one step against plain autograd and AdamW.

    Adam's epsilon of 1 leaves the size of the gradients in the update, so normaliser, vf_coef and clip show.
    """
    values = {"learning_rate": 1.0, "adam_epsilon": 1.0, "max_grad_norm": max_grad_norm}
    spy = Spy(monkeypatch)
    done = run(parts, tmp_path, total_episodes=16, kl_coef=0.5, gamma=0.9, lam=0.8, **values)
    policy, reference = (load_causal_lm(parts.init.model).eval() for _ in range(2))
    critic = AutoModelForSequenceClassification.from_pretrained(parts.reward.model).eval()
    rows, ended = spy.rows(), spy.seen[0][0].is_ended_B.tolist()
    scores = [
        naive_score(parts, tmp_path, *row) if is_ended else -1.0 for row, is_ended in zip(rows, ended, strict=True)
    ]
    state, line = done.checkpoint(), done.lines()[0]
    losses = naive_step(rows, scores, policy, reference, critic)
    for name, model, loss, rate in zip(("policy", "critic"), (policy, critic), losses, (1.0, 3.0), strict=True):
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, eps=1.0, weight_decay=0.0)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        assert line[f"{name.replace('critic', 'value')}_grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        moved = 0.0
        before = dict(load_file((parts.init if name == "policy" else parts.reward).model / "model.safetensors"))
        for key, parameter in model.named_parameters():
            moved = max(moved, (parameter - before[key]).abs().max().item())
            torch.testing.assert_close(state[f"{name}.{key}"], parameter.detach(), atol=2e-6, rtol=1e-5)
        assert moved > (1e-3 if max_grad_norm > 1 else 1e-5)


# ---- what leaves it unmoved ----


@pytest.mark.slow
def test_a_constant_reward_without_kl_leaves_policy_and_critic_where_they_were(parts: Parts, tmp_path: Path):
    """Reward 0, values 0: advantages of 0 whiten to 0, and no weight moves by a bit."""
    done = run(parts, tmp_path, reward="zero", kl_coef=0.0, missing_eos_rule="keep")
    assert same(done.policy(), start(parts))
    state = done.checkpoint()
    moments = [tensor for name, tensor in state.items() if name.endswith(("exp_avg", "exp_avg_sq"))]
    assert moments
    assert not any(tensor.any() for tensor in moments)
    assert not state["critic.score.weight"].any()
    assert all(line["kl"] == 0 and line["approx_kl"] < 1e-10 for line in done.lines())


def test_a_constant_that_is_not_zero_leaves_the_policy_too(parts: Parts, tmp_path: Path):
    """At lambda 1 every token's advantage is the constant: whitened it is 0, and not what rounding left of it."""
    done = run(parts, tmp_path, reward="constant", total_episodes=16, kl_coef=0.0, lam=1.0, missing_eos_rule="keep")
    assert furthest(done.policy(), start(parts)) < 1e-7
    assert done.checkpoint()["critic.score.weight"].any()  # the critic learns the constant


@pytest.mark.slow
def test_without_updates_kl_and_ratio_stay(parts: Parts, tmp_path: Path):
    done = run(parts, tmp_path, learning_rate=1e-30)
    assert all(abs(line["kl"]) < 1e-6 and line["clip_fraction"] == 0 for line in done.lines())


# ---- exactness ----


@pytest.mark.slow
def test_stopped_and_resumed_gives_the_same_bits(parts: Parts, tmp_path: Path):
    values = {
        "total_episodes": 6 * 16, "num_ppo_epochs": 2, "num_mini_batches": 2, "adaptive_kl": True, "save_steps": 4,
    }  # fmt: skip
    whole = run(parts, tmp_path / "whole", **values)
    with pytest.raises(Stopped, match="stopped at step 3"):
        run(parts, tmp_path / "parts", stop_at=3, **values)
    resumed = run(parts, tmp_path / "parts", **values)
    assert same(resumed.checkpoint(), whole.checkpoint())
    assert same(resumed.policy(), whole.policy())
    assert resumed.lines() == whole.lines()
    names = ("reward_first", "reward", "kl", "flops")
    assert [resumed.summary[name] for name in names] == [whole.summary[name] for name in names]
    assert len({line["kl_coef"] for line in whole.lines()}) == 6


@pytest.mark.slow
def test_what_follows_the_last_checkpoint_is_done_again_alike(parts: Parts, tmp_path: Path):
    """As after kill -9: metrics and a half-written checkpoint past the last whole one go."""
    values = {"total_episodes": 4 * 16, "save_steps": 2}
    whole = run(parts, tmp_path / "whole", **values)
    with pytest.raises(Stopped):
        run(parts, tmp_path / "killed", stop_at=2, **values)
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "reward": 99}\n{"step": 4')
    shutil.copytree(tmp_path / "killed/checkpoints/step-00000002", tmp_path / "killed/checkpoints/step-00000003")
    (tmp_path / "killed/checkpoints/step-00000003/whole.json").unlink()
    resumed = run(parts, tmp_path / "killed", **values)
    assert same(resumed.policy(), whole.policy())
    assert resumed.lines() == whole.lines()


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 64), (16, 3)])
def test_microbatches_do_not_count(parts: Parts, tmp_path: Path, sizes: tuple[int, int]):
    """One row at a time or all, the gradient of a token weighs the same."""
    values: dict[str, Any] = {"total_episodes": 32, "num_mini_batches": 2}
    usual = run(parts, tmp_path / "usual", **values)
    train, rollout = sizes
    other = run(
        parts, tmp_path / "other", per_device_train_batch_size=train, local_rollout_forward_batch_size=rollout, **values
    )
    assert furthest(usual.policy(), other.policy()) < 2e-5
    for left, right in zip(usual.lines(), other.lines(), strict=True):
        assert left == pytest.approx(right, abs=1e-4, rel=1e-3)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(parts: Parts, tmp_path: Path):
    runs = [run(parts, tmp_path / str(i), seed=seed, total_episodes=16) for i, seed in enumerate((1, 1, 2))]
    assert same(runs[0].policy(), runs[1].policy())
    assert not same(runs[0].policy(), runs[2].policy())


def test_weights_disturbed_after_the_rollout_are_noticed(parts: Parts, tmp_path: Path, monkeypatch: Any):
    def disturbed(policy: Any, *args: Any, **options: Any) -> Any:
        with torch.no_grad():
            policy.model.lm_head.weight.mul_(1.1)
        return update(policy, *args, **options)

    monkeypatch.setattr("pipeline.rl.loop.update", disturbed)
    with pytest.raises(TrainingError, match="ratio of the first minibatch is off 1"):
        run(parts, tmp_path)


RECIPE = """\
run: tiny
stages:
  ppo:
    init: {init}
    reward: {reward}
    data: {data}
    total_episodes: 160
    batch_size: 16
    num_mini_batches: 2
    num_ppo_epochs: 2
    per_device_train_batch_size: 5
    response_length: 12
    learning_rate: 3e-3
    adaptive_kl: true
    bf16: false
    save_steps: 2
"""


def recipe(parts: Parts, folder: Path, reward: str = "") -> None:
    reward = f"{parts.folder / 'rewards.py'}:{reward}" if reward else str(parts.reward.model)
    (folder / "ppo.yaml").write_text(RECIPE.format(init=parts.init.model, reward=reward, data=parts.data))


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_bits(parts: Parts, tmp_path: Path, warm: Warm):
    """kill -9 three times, wherever it happens to be; the run that gets through is the undisturbed one."""
    recipe(parts, tmp_path)
    whole = warm("run", "ppo.yaml", "--artifacts", "whole")
    assert whole.code == 0, whole.stderr
    for seen in (3, 5, 8):
        running = warm.start("run", "ppo.yaml", "--artifacts", "killed")
        running.wait_for(lambda seen=seen: lines_in(tmp_path / "killed/tiny") >= seen)  # type: ignore[misc]
        time.sleep(random.Random(seen).random() * 0.05)
        running.signal(signal.SIGKILL, group=True)
        running.wait()
    last = warm("run", "ppo.yaml", "--artifacts", "killed")
    assert last.code == 0, last.stderr
    assert "resumed at step" in last.stderr
    runs = [Done(tmp_path / name / "tiny/ppo", {}) for name in ("whole", "killed")]
    assert same(runs[0].policy(), runs[1].policy())
    assert runs[0].lines() == runs[1].lines()


def lines_in(folder: Path) -> int:
    """Lines of metrics that the stage at work (or done) in `folder` has written."""
    return max((len(path.read_text().splitlines()) for path in folder.glob("*/metrics.jsonl")), default=0)


@pytest.mark.slow
@pytest.mark.parametrize("reward", ["", "vowels"])
def test_two_processes_give_one_processs_numbers(parts: Parts, tmp_path: Path, warm: Warm, reward: str):
    recipe(parts, tmp_path, reward)
    for count in (1, 2):
        done = warm("run", "ppo.yaml", "--artifacts", count, "--num-processes", count, "--set", "ppo.total_episodes=48")
        assert done.code == 0, done.stderr
        manifest = json.loads((tmp_path / str(count) / "tiny/ppo/manifest.json").read_text())
        assert manifest["processes"] == count
    one, two = (Done(tmp_path / str(count) / "tiny/ppo", {}) for count in (1, 2))
    assert len(one.lines()) == len(two.lines()) == 3
    for left, right in zip(one.lines(), two.lines(), strict=True):
        assert left == pytest.approx(right, abs=1e-4, rel=1e-3)
    assert furthest(one.policy(), two.policy()) < 1e-4


# ---- options ----


@pytest.mark.slow
def test_adaptive_kl_follows_its_equation(parts: Parts, tmp_path: Path):
    done = run(
        parts, tmp_path, total_episodes=5 * 16, adaptive_kl=True, adaptive_kl_target=0.5, adaptive_kl_horizon=100
    )
    lines = done.lines()
    assert lines[0]["kl_coef"] == 0.15
    for line, following in itertools.pairwise(lines):
        error = min(max(line["kl"] / 0.5 - 1, -0.2), 0.2)
        assert following["kl_coef"] == pytest.approx(line["kl_coef"] * (1 + error * 16 / 100))


@pytest.mark.slow
def test_target_kl_ends_a_steps_updates(parts: Parts, tmp_path: Path):
    values: dict[str, Any] = {"num_ppo_epochs": 4, "num_mini_batches": 2, "total_episodes": 16}
    free = run(parts, tmp_path / "free", **values)
    held = run(parts, tmp_path / "held", target_kl=1e-4, **values)
    assert free.lines()[0]["updates"] == 8.0
    assert free.lines()[0]["approx_kl"] > 1e-4
    assert 1.0 <= held.lines()[0]["updates"] < 8.0
    assert furthest(held.policy(), start(parts)) < furthest(free.policy(), start(parts))


@pytest.mark.slow
def test_every_variant_of_the_losses_runs(parts: Parts, tmp_path: Path):
    base = run(parts, tmp_path / "base", num_ppo_epochs=2)
    changes: list[dict[str, Any]] = [
        {"whiten_rewards": True},
        {"mask_truncated_completions": True},
        {"whiten_advantages": False},
        {"cliprange_value": None},
        {"clip_higher": 0.28, "cliprange": 0.01},
        {"dual_clip": 1.01, "cliprange": 0.01},
        {"gamma": 0.9, "lam": 1.0},
        {"missing_eos_rule": "subtract", "missing_eos_penalty": 3.0},
        {"score_clip": 0.1},
        {"lr_scheduler_type": "constant"},
        {"value_learning_rate": 1e-4},
        {"temperature": 0.7},
        {"bf16": True},
    ]
    for number, change in enumerate(changes):
        changed = run(parts, tmp_path / str(number), num_ppo_epochs=2, **change)
        assert not same(changed.checkpoint(), base.checkpoint()), change
        assert len(changed.lines()) == 3


def test_long_prompts_can_be_left_out(parts: Parts, tmp_path: Path):
    tokenizer = load_tokenizer(parts.init.model)
    lengths = [
        len(encode_prompt(tokenizer, json.loads(line)["messages"][:1])) for line in parts.data.read_text().splitlines()
    ]
    longest = sorted(lengths)[len(lengths) // 2]
    assert longest < max(lengths)
    assert run(parts, tmp_path, max_prompt_length=longest, total_episodes=16).lines()[0]["step"] == 1


# ---- refusals ----


def refused(parts: Parts, out: Path, kind: type[PipelineError], what: str, **values: Any) -> PipelineError:
    with pytest.raises(kind, match=what) as caught:
        run(parts, out, **values)
    assert not (out / "model" / "model.safetensors").exists()
    return caught.value


def test_a_reward_model_of_another_tokenizer_is_refused(parts: Parts, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(parts.reward.path, other)
    tokenizer = train_bpe(iter(["quite other words than those of the policy " * 3] * 8), 300)
    tokenizer.save_pretrained(other / "model")
    settings = json.loads((other / "model/reward.json").read_text())
    settings["tokenizer_hash"] = artifact(other, "reward-model").tokenizer_hash
    (other / "model/reward.json").write_text(json.dumps(settings))
    refused(
        replace(parts, reward=artifact(other, "reward-model")), tmp_path / "out", MismatchError, "another tokenizer"
    )


def test_a_reward_model_of_another_template_is_refused(parts: Parts, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(parts.reward.path, other)
    template = other / "model/chat_template.jinja"
    template.write_text(template.read_text() + "\n")
    settings = json.loads((other / "model/reward.json").read_text())
    settings["template_hash"] = artifact(other, "reward-model").template_hash
    (other / "model/reward.json").write_text(json.dumps(settings))
    mixed = replace(parts, reward=artifact(other, "reward-model"))
    refused(mixed, tmp_path / "out", MismatchError, "another chat template")


def test_a_reward_model_of_another_row_end_is_refused(parts: Parts, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(parts.reward.path, other)
    settings = json.loads((other / "model/reward.json").read_text())
    settings["suffix_ids"] = [*settings["suffix_ids"], 7]
    (other / "model/reward.json").write_text(json.dumps(settings))
    mixed = replace(parts, reward=artifact(other, "reward-model"))
    refused(mixed, tmp_path / "out", MismatchError, "rows that end in")


def test_a_reward_model_without_its_normaliser_is_refused(parts: Parts, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(parts.reward.path, other)
    (other / "model/reward.json").unlink()
    mixed = replace(parts, reward=artifact(other, "reward-model"))
    refused(mixed, tmp_path / "out", MismatchError, "no reward.json")


def test_prompts_that_cannot_be_answered_are_refused(parts: Parts, tmp_path: Path):
    error = refused(parts, tmp_path / "long", DataError, "response_length leaves 1 of the context", response_length=46)
    assert "max_prompt_length=1" in error.mend
    empty = tmp_path / "empty.jsonl"
    empty.write_text(json.dumps({"prompt": " ", "completion": "a"}) + "\n")
    refused(replace(parts, data=empty), tmp_path / "empty", DataError, "an empty prompt", held_out=0.0)


def test_a_batch_that_does_not_divide_is_refused(parts: Parts, tmp_path: Path):
    error = refused(parts, tmp_path, ConfigError, "not divisible by 3 num_mini_batches", num_mini_batches=3)
    assert error.mend == "--set ppo.batch_size=18"


def test_a_reward_function_that_is_wrong_is_refused(parts: Parts, tmp_path: Path):
    refused(parts, tmp_path / "wrong", TrainingError, "gave 1 scores for 16 responses", reward="wrong")
    refused(parts, tmp_path / "absent", ConfigError, "defines no `nothing`", reward="nothing")


def test_what_is_not_finite_is_refused(parts: Parts, tmp_path: Path):
    refused(parts, tmp_path, TrainingError, "not finite", learning_rate=1e30)


@pytest.mark.slow
def test_the_reference_is_the_init(parts: Parts, tmp_path: Path):
    """KL logged in the last step, measured again with the models as saved and the init."""
    done = run(parts, tmp_path, total_episodes=2 * 16, learning_rate=1e-2)
    init, policy = load_causal_lm(parts.init.model).eval(), load_causal_lm(done.out / "model").eval()
    prompt = torch.tensor([encode_prompt(load_tokenizer(parts.init.model), [{"role": "user", "content": "what"}])])
    with torch.no_grad():
        p, q = (model(input_ids=prompt).logits[0, -1].log_softmax(-1) for model in (policy, init))
    assert (p.exp() * (p - q)).sum().item() > 1e-4
    assert done.lines()[1]["kl"] != 0


@pytest.mark.slow
def test_every_field_and_figure_is_in_the_docs(parts: Parts, tmp_path: Path):
    text = (Path(__file__).parents[2] / "docs/ppo.md").read_text()
    groups = {"num_generations": 4, "dynamic_sampling": True, "eval_steps": 1, "held_out": 0.3, "gold": "reward"}
    figures = set(run(parts, tmp_path, total_episodes=16, **groups).lines()[0]) - {"step", "tokens", "learning_rate"}
    missing = [name for name in [*stage.PPOConfig.model_fields, *figures] if f"`{name}`" not in text]
    assert missing == []
