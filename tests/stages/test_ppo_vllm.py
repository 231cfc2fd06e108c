"""ppo with another engine for the rollouts: a stand-in for vLLM, which is not installed here. What is sent and checked,
what comes back, and what is made of the difference. None of it has met vLLM itself."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import MachineError, TrainingError
from pipeline.model.adapters import adapt, lora
from pipeline.model.build import load_causal_lm
from pipeline.recipe import PeftConfig
from pipeline.rl import updates
from pipeline.rl.loop import HEALTHY_GAP
from pipeline.rl.masking import alone
from pipeline.rl.place import Place
from pipeline.rl.vllm_engine import VLLMEngine, load_engine, merged_weights, sums
from tests.rl.stand_in_for_vllm import LLM, Faults, stand_in
from tests.stages.ppo_runs import Parts, furthest, run, same

CPU = Place(torch.device("cpu"), False, 0, 1, alone, lambda *keys: torch.Generator())


class Installed:
    """vLLM, as far as anybody can see."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.faults = Faults()
        module, self.made = stand_in(self.faults)
        module.__spec__ = ModuleSpec("vllm", None)
        monkeypatch.setitem(sys.modules, "vllm", module)

    @property
    def llm(self) -> LLM:
        return self.made[-1]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Installed:
    return Installed(monkeypatch)


def engine_of(parts: Parts, *, bf16: bool = False) -> VLLMEngine:
    place = Place(CPU.device, bf16, 0, 1, alone, CPU.generator)
    return load_engine(
        parts.init.model, place, list(range(5, 30)), longest=48, stop_id=1, pad_id=0, temperature=0.7, seed=3,
        memory=0.3,
    )  # fmt: skip


def moved(parts: Parts) -> Any:
    """The policy after an update."""
    policy = load_causal_lm(parts.init.model).eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=1e-4)
    return policy


def test_without_vllm_it_says_what_to_install(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipeline.rl.vllm_engine.find_spec", lambda name: None)
    with pytest.raises(MachineError, match="vLLM is not installed") as caught:
        run(parts, tmp_path, rollout_engine="vllm")
    assert 'pip install "llmpipe[vllm]"' in caught.value.mend
    assert caught.value.where == "ppo.rollout_engine"


@pytest.mark.parametrize("bf16", [False, True])
def test_the_weights_are_sent_by_name(parts: Parts, vllm: Installed, bf16: bool):
    engine, policy = engine_of(parts, bf16=bf16), moved(parts)
    engine.sync(policy)
    for name, weight in policy.named_parameters():
        assert dict(vllm.llm.model.named_parameters())[name].equal(weight.to(engine.dtype))
    assert vllm.llm.calls == ["apply_model", "reset_prefix_cache", "generate"]  # the last one is the probe
    options = vllm.llm.options
    assert (options["max_model_len"], options["seed"], options["gpu_memory_utilization"]) == (48, 3, 0.3)
    assert options["logprobs_mode"] == "processed_logprobs"


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ({"drops_weights": True}, r"its weights add up to .*, the policy's to"),
        ({"misses": "model.norm"}, r"it did not load model\.norm\.weight \(1 weights\)"),
        ({"skews_logits": 2.0}, r"on a probe its log-probs are off by 0\.\d+ nats a token"),
    ],
)
@pytest.mark.parametrize("bf16", [False, True])
def test_an_engine_that_is_not_the_policy_is_noticed(
    parts: Parts, vllm: Installed, fault: dict[str, Any], what: str, bf16: bool
):
    """A step of 1e-4 a weight is enough, in bf16 too, where most weights don't change by it."""
    engine = engine_of(parts, bf16=bf16)
    vars(vllm.faults).update(fault)
    with pytest.raises(TrainingError, match=f"does not hold the policy's weights: {what}"):
        engine.sync(moved(parts))


def test_sums_do_not_see_how_the_numbers_are_laid_out():
    numbers = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    left, right = sums(iter([numbers])), sums(iter([numbers.T[1:], torch.zeros(3), numbers.T[:1].flatten()]))
    assert left.agrees(right)
    assert left.magnitude == pytest.approx(numbers.double().abs().sum().item())
    flipped = numbers.clone()
    flipped[0, 0] *= 1 + 1e-6
    assert not left.agrees(sums(iter([flipped])))
    assert not left.agrees(sums(iter([-numbers])))
    assert not left.agrees(sums(iter([numbers, torch.tensor([1.0, -1.0])])))


def test_adapters_are_sent_added_in(parts: Parts):
    """As merge_and_unload leaves them, by the plain names, and the policy stays as it was."""
    policy = load_causal_lm(parts.init.model).eval()
    settings = lora(PeftConfig(r=4), "CAUSAL_LM")
    assert settings is not None
    adapted = adapt(policy, settings, 0, train_rows=False)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    sent = dict(merged_weights(policy))
    assert all(value.equal(before[name]) for name, value in policy.state_dict().items())
    plain = dict(adapted.merge_and_unload().named_parameters())
    assert sent.keys() == plain.keys()
    start = dict(load_causal_lm(parts.init.model).named_parameters())
    for name, weight in plain.items():
        torch.testing.assert_close(sent[name], weight, atol=1e-6, rtol=1e-6)
        assert sent[name].equal(start[name]) == ("proj" not in name)


@pytest.mark.slow
def test_answers_come_back_with_their_log_probs(parts: Parts, vllm: Installed):
    engine, policy = engine_of(parts), moved(parts)
    engine.sync(policy)
    prompts = [[5, 6, 7], [8, 9]] * 4
    uniforms_BT = torch.rand(8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    written = engine.write(prompts, uniforms_BT, 12)
    assert written.ids_BT.shape == (8, 12)
    for row, prompt in enumerate(prompts):
        length = int(written.lengths_B[row])
        ids = written.ids_BT[row, :length].tolist()
        logits = policy(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / 0.7
        expected = logits.log_softmax(dim=-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(written.logprobs_BT[row, :length], expected.detach(), atol=1e-4, rtol=1e-4)
        assert written.is_ended_B[row] == (ids[-1] == 1)
        assert not written.logprobs_BT[row, length:].any()
    assert len({tuple(row) for row in written.ids_BT.tolist()}) == 8  # a seed a row
    again = engine.write(prompts, uniforms_BT, 12)
    assert again.ids_BT.equal(written.ids_BT)
    greedy = engine.write(prompts, None, 12)
    assert greedy.ids_BT[0].equal(greedy.ids_BT[2])
    assert not greedy.logprobs_BT.any()


@pytest.mark.slow
def test_a_run_sends_the_weights_once_a_step_and_corrects_for_the_engine(
    parts: Parts, tmp_path: Path, vllm: Installed, monkeypatch: pytest.MonkeyPatch
):
    """The weight of each token is min(p(training) / p(engine), cap), from the log-probs that the engine gave."""
    seen = []
    original = updates.policy_loss

    def spy(logprobs_BT: Any, old_BT: Any, advantages_BT: Any, weights_BT: Any, **options: Any) -> Any:
        seen.append((old_BT, options["correction_BT"], weights_BT > 0))
        return original(logprobs_BT, old_BT, advantages_BT, weights_BT, **options)

    monkeypatch.setattr(updates, "policy_loss", spy)
    plain = run(parts, tmp_path / "plain", rollout_engine="vllm", dynamic_sampling=True, num_generations=2,
                importance_sampling_cap=1.5)  # fmt: skip
    assert vllm.llm.loads == 3
    assert [line["rollout_gap"] < 1e-4 for line in plain.lines()] == [True] * 3
    assert all((weight[mask] - 1).abs().max() < 1e-2 for _, weight, mask in seen)
    again = run(parts, tmp_path / "again", rollout_engine="vllm", dynamic_sampling=True, num_generations=2,
                importance_sampling_cap=1.5)  # fmt: skip
    assert same(plain.policy(), again.policy())

    seen.clear()
    vllm.faults.draws_at = 0.5
    done = {
        cap: run(parts, tmp_path / str(cap), rollout_engine="vllm", importance_sampling_cap=cap, total_episodes=16)
        for cap in (2.0, 1.1, None)
    }
    assert len(vllm.made) == 5
    of_cap = dict(zip((2.0, 1.1, None), (seen[:4], seen[4:8], seen[8:]), strict=True))
    assert all(weight is None for _, weight, _ in of_cap[None])
    for cap in (2.0, 1.1):
        assert max(weight[mask].max().item() for _, weight, mask in of_cap[cap]) == pytest.approx(cap)
        assert min(weight[mask].min().item() for _, weight, mask in of_cap[cap]) < 0.9
    assert furthest(done[2.0].policy(), done[None].policy()) > 1e-5
    assert furthest(done[2.0].policy(), done[1.1].policy()) > 1e-5


@pytest.mark.slow
def test_a_stale_engine_ends_the_run(parts: Parts, tmp_path: Path, vllm: Installed):
    vllm.faults.drops_weights = True  # the first step's weights are the start's, which it has
    with pytest.raises(TrainingError, match="does not hold the policy's weights"):
        run(parts, tmp_path, rollout_engine="vllm", save_steps=1)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
def test_a_gap_is_said_once_it_opens(parts: Parts, tmp_path: Path, vllm: Installed, monkeypatch: pytest.MonkeyPatch):
    """Below, above, above, below, above: said twice."""
    factors, said = iter([1.0, 0.3, 0.3, 1.0, 0.3]), list[str]()
    original = VLLMEngine.sync

    def sync(engine: VLLMEngine, policy: Any) -> None:
        vllm.faults.draws_at = next(factors)
        original(engine, policy)

    monkeypatch.setattr(VLLMEngine, "sync", sync)
    monkeypatch.setattr("pipeline.runtime.Runtime.say", lambda runtime, text: said.append(text))
    done = run(parts, tmp_path, rollout_engine="vllm", total_episodes=5 * 16, learning_rate=1e-5)
    assert [line["rollout_gap"] > HEALTHY_GAP for line in done.lines()] == [False, True, True, False, True]
    assert sum("rollout and training differ" in text for text in said) == 2


@pytest.mark.slow
def test_adapters_and_an_engine(parts: Parts, tmp_path: Path, vllm: Installed):
    done = run(parts, tmp_path, rollout_engine="vllm", peft={"r": 4}, learning_rate=1e-2, save_steps=1)
    assert vllm.llm.loads == 3
    assert all(line["rollout_gap"] < 1e-4 for line in done.lines())
