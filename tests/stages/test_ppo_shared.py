"""Policy, critic and reward model as sets of adapters on one frozen trunk: the same numbers as on trunks of their own,
and nothing leaks."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from pipeline.artifacts import Artifact
from pipeline.data.chat import stop_token_id
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import MachineError, Stopped
from pipeline.model.adapters import adapt, lora
from pipeline.model.build import load_causal_lm
from pipeline.model.reward import (
    RewardModel,
    build_reward_model,
    load_reward_model,
    reward_model_on,
    save_adapter,
    save_reward_model,
    stands_on,
)
from pipeline.recipe import PeftConfig
from pipeline.rl.forwards import response_values
from pipeline.rl.learners import restore, saved
from pipeline.rl.models import Models, Optimisation, prepare
from pipeline.rl.offload import Offload
from pipeline.rl.rollouts import Experience, assemble
from pipeline.rl.scoring import load_scorer
from pipeline.rl.updates import Objective, update
from pipeline.runtime import Runtime
from stages import ppo as stage
from tests.stages.ppo_runs import Done, Parts, artifact, furthest, run, same, start

if TYPE_CHECKING:
    from tests.conftest import Warm

IDS = torch.tensor([[5, 6, 7, 8, 9]])
ROLLOUT = assemble([[5, 6]], torch.tensor([[7, 8, 9]]), torch.tensor([3]), torch.tensor([False]), 0)
CPU = torch.device("cpu")


def shared(parts: Parts, folder: Path) -> Models:
    """The models of a run, their adapters as after some training."""
    tokenizer = load_tokenizer(parts.init.model)
    runtime = Runtime.start(folder, seed=0, threads=1, quiet=True)
    scorer = load_scorer(
        f"{parts.folder / 'rewards.py'}:zero", {"init": parts.init}, tokenizer, stop_id=stop_token_id(tokenizer),
        pad_id=0, batch_size=4, bf16=False, runtime=runtime,
    )  # fmt: skip
    models = prepare(
        load_causal_lm(parts.init.model), lambda trunk: scorer, parts.init, Optimisation(1e-5, 0.0, 1.0),
        temperature=1.0, has_critic=True, adapters=lora(PeftConfig(r=4), "CAUSAL_LM"), of_critic=None, seed=0,
        bf16=False, longest=48, offload=Offload.of(CPU, False), shares_trunk=True,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    assert models.critic is not None
    with torch.no_grad():
        for parameter in (*models.policy.parameters, *models.critic.parameters):
            parameter.normal_(0, 0.1, generator=generator)
    return models


def apart(models: Models, parts: Parts) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(policy, critic) on trunks of their own, with the weights of `models`."""
    assert models.critic is not None
    policy = load_causal_lm(parts.init.model).eval()
    critic = AutoModelForSequenceClassification.from_pretrained(parts.init.model, num_labels=1).eval()
    critic.score.weight.data.copy_(models.critic.model.score.weight)
    for model, name, kind in ((policy, "default", "CAUSAL_LM"), (critic, "critic", "SEQ_CLS")):
        settings = lora(PeftConfig(r=4), kind)
        assert settings is not None
        adapt(model, settings, 7, train_rows=False)
        held = dict(models.policy.model.named_parameters())
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.copy_(held[key.replace(".default.", f".{name}.")])
    return policy, critic


def test_each_of_the_three_says_what_it_says_alone(parts: Parts, tmp_path: Path):
    models = shared(parts, tmp_path)
    assert models.critic is not None
    trunk = models.policy.model.base_model
    assert models.critic.model.base_model is trunk
    policy, critic = apart(models, parts)
    reference = load_causal_lm(parts.init.model).eval()
    with torch.no_grad():
        for _ in range(2):  # and again, after the others have been active
            torch.testing.assert_close(models.policy.model(input_ids=IDS).logits, policy(input_ids=IDS).logits)
            with models.critic.active() as model:
                values_BT = response_values(model, ROLLOUT, *models.value_scale)
            torch.testing.assert_close(values_BT, response_values(critic, ROLLOUT, 0.0, 1.0))
            with models.reference() as start:
                torch.testing.assert_close(start(input_ids=IDS).logits, reference(input_ids=IDS).logits)
        assert (policy(input_ids=IDS).logits - reference(input_ids=IDS).logits).abs().max() > 0.1
        assert values_BT.abs().max() > 0.01


def test_one_trunk_is_in_memory(parts: Parts, tmp_path: Path):
    models = shared(parts, tmp_path)
    assert models.critic is not None
    assert models.start is None
    plain = sum(parameter.numel() for parameter in load_causal_lm(parts.init.model).parameters())
    held = {id(p): p.numel() for m in (models.policy.model, models.critic.model) for p in m.parameters()}
    own = sum(p.numel() for p in (*models.policy.parameters, *models.critic.parameters))
    assert sum(held.values()) == plain + own
    assert all(p.device == CPU for p in models.critic.model.parameters())  # nothing is left of its own trunk


def test_a_gradient_is_of_the_active_adapters_only(parts: Parts, tmp_path: Path):
    models = shared(parts, tmp_path)
    assert models.critic is not None
    policys, critics = models.policy.parameters, models.critic.parameters
    assert not {id(p) for p in policys} & {id(p) for p in critics}
    assert len(critics) == len(policys) + 1  # and the head
    policy, critic = apart(models, parts)
    models.policy.model(input_ids=IDS).logits.square().mean().backward()
    assert all(p.grad is not None for p in policys)
    assert all(p.grad is None for p in critics)
    kept = [p.grad.clone() for p in policys]
    with models.critic.active() as model:
        response_values(model, ROLLOUT, 0.0, 1.0).square().mean().backward()
    assert all(p.grad is not None for p in critics)
    assert all(p.grad.equal(before) for p, before in zip(policys, kept, strict=True))
    # And they are those of separate models.
    policy(input_ids=IDS).logits.square().mean().backward()
    response_values(critic, ROLLOUT, 0.0, 1.0).square().mean().backward()
    for alone, own in ((policy, policys), (critic, critics)):
        theirs = [p for p in alone.parameters() if p.requires_grad]
        for left, right in zip(theirs, own, strict=True):
            torch.testing.assert_close(left.grad, right.grad)
    trunk = [p for name, p in models.policy.model.named_parameters() if "lora_" not in name]
    assert all(p.grad is None for p in trunk)


def test_a_checkpoint_holds_each_once_and_puts_it_back(parts: Parts, tmp_path: Path):
    models = shared(parts, tmp_path)
    tensors, settings = saved(models.learners)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    assert not any(".critic." in name for name in tensors if name.startswith("policy."))
    assert not any(".default." in name for name in tensors if name.startswith("critic."))
    assert sum(".lora_A." in name for name in tensors) == 2 * 14  # seven matrices in two blocks, for each
    for learner in models.learners.values():
        with torch.no_grad():
            for parameter in learner.parameters:
                parameter.zero_()
    restore(models.learners, tensors, copy.deepcopy(settings))
    again, _ = saved(models.learners)
    assert again.keys() == tensors.keys()
    assert all(again[name].equal(tensors[name]) for name in tensors)


VALUES: dict[str, Any] = {"reward": "vowels", "peft": {"r": 4}, "learning_rate": 1e-2, "num_ppo_epochs": 2}


@pytest.mark.slow
def test_a_run_is_that_of_two_trunks(parts: Parts, tmp_path: Path):
    """A function's critic starts from the policy's trunk with a head of zeros, shared or not."""
    two = run(parts, tmp_path / "two", **VALUES)
    one = run(parts, tmp_path / "one", shared_trunk=True, **VALUES)
    assert furthest(one.policy(), two.policy()) < 1e-5
    for left, right in zip(one.lines(), two.lines(), strict=True):
        assert left == pytest.approx(right, abs=1e-4, rel=1e-3)
    assert one.lines()[-1]["value_grad_norm"] > 0


@pytest.mark.slow
def test_stopped_and_resumed_gives_the_same_bits(parts: Parts, tmp_path: Path):
    values = VALUES | {"shared_trunk": True, "ema_decay": 0.9, "load_best_model_at_end": True, "eval_steps": 1,
                       "held_out": 0.3, "total_episodes": 4 * 16}  # fmt: skip
    whole = run(parts, tmp_path / "whole", **values)
    with pytest.raises(Stopped):
        run(parts, tmp_path / "parts", stop_at=2, save_steps=2, **values)
    resumed = run(parts, tmp_path / "parts", **values)
    assert same(resumed.checkpoint(), whole.checkpoint())
    assert same(resumed.policy(), whole.policy())
    assert resumed.lines() == whole.lines()


RECIPE = """\
run: tiny
stages:
  ppo:
    init: {init}
    reward: {reward}
    data: {data}
    peft: {{r: 4}}
    shared_trunk: true
    total_episodes: 48
    batch_size: 16
    num_ppo_epochs: 2
    response_length: 12
    learning_rate: 3e-3
    bf16: false
    eval_steps: 0
"""


@pytest.mark.slow
def test_two_processes_give_one_processs_numbers(parts: Parts, tmp_path: Path, warm: Warm):
    reward = f"{parts.folder / 'rewards.py'}:vowels"
    (tmp_path / "ppo.yaml").write_text(RECIPE.format(init=parts.init.model, reward=reward, data=parts.data))
    for count in (1, 2):
        done = warm("run", "ppo.yaml", "--artifacts", count, "--num-processes", count)
        assert done.code == 0, done.stderr
    one, two = (Done(tmp_path / str(count) / "tiny/ppo", {}) for count in (1, 2))
    assert len(one.lines()) == 3
    for left, right in zip(one.lines(), two.lines(), strict=True):
        assert left == pytest.approx(right, abs=1e-4, rel=1e-3)
    assert furthest(one.policy(), two.policy()) < 1e-4


@pytest.mark.slow
def test_a_reward_model_kept_apart(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The critic starts at zero in the reward's own units, though that model's normaliser is (0.3, 0.7)."""
    seen: list[tuple[Experience, Objective]] = []

    def spy(policy: Any, critic: Any, experience: Experience, objective: Objective, *rest: Any) -> dict[str, float]:
        seen.append((experience, objective))
        return update(policy, critic, experience, objective, *rest)

    monkeypatch.setattr("pipeline.rl.loop.update", spy)
    run(parts, tmp_path, **VALUES | {"reward": None, "shared_trunk": True, "total_episodes": 32})
    (first, objective), (second, _) = seen
    assert not first.values_BT.any()
    assert second.values_BT.abs().max() > 1e-3
    assert (objective.value_mean, objective.value_std) == (0.0, 1.0)


@pytest.fixture
def adapted_reward(parts: Parts, tmp_path: Path) -> Artifact:
    """A reward model trained by adapters on the policy's start, as the reward stage writes it."""
    stop = stop_token_id(load_tokenizer(parts.init.model))
    model = build_reward_model(parts.init.model, 0, 3)
    settings = lora(PeftConfig(r=2, lora_alpha=8), "SEQ_CLS", ["score"])
    assert settings is not None
    adapted = adapt(model, settings, 5, train_rows=False)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.2, generator=generator)
    folder = tmp_path / "adapted" / "model"
    save_adapter(adapted, folder)
    merged = adapted.merge_and_unload()
    save_reward_model(merged, folder, parts.init, mean=0.3, std=0.7, suffix_ids=[stop])
    return artifact(tmp_path / "adapted", "reward-model")


def apart_from(reward: Artifact, folder: Path) -> Artifact:
    """The same reward model without its adapters: the merged weights alone."""
    shutil.copytree(reward.path, folder / "merged")
    shutil.rmtree(folder / "merged" / "model" / "adapter")
    return artifact(folder / "merged", "reward-model")


def test_a_reward_model_on_the_policys_trunk_scores_as_on_its_own(
    parts: Parts, tmp_path: Path, adapted_reward: Artifact
):
    models = shared(parts, tmp_path)
    adapters = models.policy.adapters
    assert adapters is not None
    assert stands_on(adapted_reward, parts.init)
    ids_BT, lengths_B = torch.tensor([[5, 6, 7, 8], [9, 5, 0, 0]]), torch.tensor([4, 2])
    with torch.no_grad():
        said = models.policy.model(input_ids=IDS).logits
    on_trunk = reward_model_on(adapters, adapted_reward, "reward", bf16=False)
    runtime = Runtime.start(tmp_path / "own", seed=0, threads=1, quiet=True)
    runtime.bf16 = False
    alone = load_reward_model(adapted_reward, runtime)
    torch.testing.assert_close(on_trunk.score(ids_BT, lengths_B), alone.score(ids_BT, lengths_B))
    plain = load_reward_model(parts.reward, runtime)
    assert (on_trunk.score(ids_BT, lengths_B) - plain.score(ids_BT, lengths_B)).abs().max() > 0.1
    with torch.no_grad():
        assert models.policy.model(input_ids=IDS).logits.equal(said)
    assert {id(p) for p in models.policy.parameters} == {id(p) for p in adapters.parameters() if p.requires_grad}
    assert on_trunk.model.base_model is models.policy.model.base_model


def test_a_reward_model_of_another_start_has_a_trunk_of_its_own(parts: Parts, adapted_reward: Artifact):
    other = dataclasses.replace(parts.init, fingerprint="another")
    assert not stands_on(adapted_reward, other)
    assert not stands_on(parts.reward, parts.init)


@pytest.mark.slow
@pytest.mark.parametrize("values", [{}, {"algorithm": "grpo", "num_generations": 4}], ids=["ppo", "grpo"])
def test_a_run_against_it_is_that_against_the_merged_model(
    parts: Parts, tmp_path: Path, adapted_reward: Artifact, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    loaded: list[Artifact] = []

    def spy(artifact: Artifact, runtime: Runtime) -> RewardModel:
        loaded.append(artifact)
        return load_reward_model(artifact, runtime)

    monkeypatch.setattr("pipeline.rl.scoring.load_reward_model", spy)
    values = VALUES | {"reward": None, "shared_trunk": True} | values
    merged = apart_from(adapted_reward, tmp_path)
    two = run(dataclasses.replace(parts, reward=merged), tmp_path / "two", **values)
    assert loaded == [merged]
    one = run(dataclasses.replace(parts, reward=adapted_reward), tmp_path / "one", **values)
    assert loaded == [merged]  # no trunk was loaded for it
    assert furthest(one.policy(), two.policy()) < 1e-4
    for left, right in zip(one.lines(), two.lines(), strict=True):
        assert left == pytest.approx(right, abs=1e-3, rel=1e-3)
    assert one.policy().keys() == two.policy().keys()


def test_what_does_not_go_with_it_is_refused():
    with pytest.raises(ValueError, match="there are none: set peft"):
        stage.PPOConfig(shared_trunk=True)
    with pytest.raises(ValueError, match="load_in_4bit is of what adapters stand on"):
        stage.PPOConfig(load_in_4bit=True)
    with pytest.raises(ValueError, match="are not sent to vLLM"):
        stage.PPOConfig(load_in_4bit=True, peft=PeftConfig(), rollout_engine="vllm")


def test_four_bits_are_refused_here(parts: Parts, tmp_path: Path):
    with pytest.raises(MachineError, match="need a CUDA device"):
        run(parts, tmp_path, **VALUES | {"load_in_4bit": True})
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_what_is_written_of_four_bits_are_the_starts_weights_with_the_adapters(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With a stand-in of all bits: the run, and what it writes, are the plain one's."""
    plain = run(parts, tmp_path / "plain", **VALUES)
    monkeypatch.setattr("pipeline.model.four_bit.check_four_bit", lambda device, where: None)
    monkeypatch.setattr(
        "pipeline.model.four_bit.load_four_bit", lambda folder, device, *, bf16: load_causal_lm(folder).to(device)
    )
    four = run(parts, tmp_path / "four", load_in_4bit=True, **VALUES)
    assert four.lines() == plain.lines()
    assert furthest(four.policy(), plain.policy()) < 1e-6
    assert furthest(four.policy(), start(parts)) > 1e-3
