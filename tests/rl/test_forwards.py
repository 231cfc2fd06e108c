"""Log-probs and values of a ragged rollout against one plain forward a row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from pipeline.rl.forwards import (
    Cut,
    Reading,
    logprobs_and_entropies,
    response_values,
    sweep,
    token_logprobs,
)
from pipeline.rl.rollouts import Rollout, assemble

PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12], [13, 14, 15, 16]]
RESPONSES = [[3, 4], [20, 21, 22, 23, 24, 25], [1], [30, 31, 1]]
TEMPERATURE = 0.7
READING = Reading(TEMPERATURE, plain_head=False)

TINY = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "attn_pdrop": 0.5, "resid_pdrop": 0.5},
    # caps its logits after the head, at a value that these logits reach
    "gemma2": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
               "num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 2.0},
    # has a bias on its head
    "phi": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
}  # fmt: skip


def config(architecture: str) -> AutoConfig:
    torch.manual_seed(0)
    return AutoConfig.for_model(
        architecture, vocab_size=40, initializer_range=0.3, pad_token_id=0, num_labels=1, **TINY[architecture]
    )


def policy(architecture: str) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(config(architecture)).eval()
    if architecture == "phi":
        torch.nn.init.normal_(model.lm_head.bias)
    return model


def rollout() -> Rollout:
    ids_BT = torch.tensor([[*response, *[0] * (7 - len(response))] for response in RESPONSES])
    lengths_B = torch.tensor([len(response) for response in RESPONSES])
    return assemble(PROMPTS, ids_BT, lengths_B, torch.tensor([False, False, True, True]), pad_id=0)


def naive_logprobs(model: PreTrainedModel) -> Tensor:
    """Row by row, the whole logits, token by token."""
    found_BT = torch.zeros(len(PROMPTS), 7)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        logits_LV = model(input_ids=torch.tensor([prompt + response])).logits[0]
        for t, token in enumerate(response):
            found_BT[row, t] = (logits_LV[len(prompt) - 1 + t] / TEMPERATURE).log_softmax(-1)[token]
    return found_BT


@pytest.mark.parametrize("architecture", TINY)
def test_logprobs_are_those_of_plain_forwards(architecture: str):
    model = policy(architecture)
    expected_BT = naive_logprobs(model)
    torch.testing.assert_close(token_logprobs(model, rollout(), READING), expected_BT)
    for size in (1, 3):
        swept_BT, entropies_BT = sweep(
            rollout(), Cut(size), 2, lambda part: logprobs_and_entropies(model, part, READING)
        )
        torch.testing.assert_close(swept_BT, expected_BT.detach())
        assert not swept_BT.requires_grad
    assert (entropies_BT > 0).equal(rollout().response_mask_BT)


@pytest.mark.parametrize("architecture", TINY)
def test_the_gradient_is_that_of_plain_forwards(architecture: str):
    model, weights_BT = policy(architecture), torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
    gradients = []
    for logprobs_BT in (naive_logprobs(model), token_logprobs(model, rollout(), READING)):
        model.zero_grad()
        (logprobs_BT * weights_BT).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-4)


def test_entropies_are_those_of_the_distributions():
    model = policy("llama")
    _, entropies_BT = sweep(rollout(), Cut(2), 2, lambda part: logprobs_and_entropies(model, part, READING))
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        with torch.no_grad():
            logits_LV = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        expected = torch.distributions.Categorical(logits=logits_LV / TEMPERATURE).entropy()
        torch.testing.assert_close(entropies_BT[row, : len(response)], expected)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_values_are_the_heads_numbers_before_each_token(architecture: str):
    """Normalised as the reward is; right whatever stands in the padding."""
    critic = AutoModelForSequenceClassification.from_config(config(architecture)).eval()
    values_BT = response_values(critic, rollout(), 0.25, 2.0)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        for t in range(len(response)):
            text = torch.tensor([prompt + response[:t]])
            raw = critic.score(critic.base_model(input_ids=text).last_hidden_state[0, -1])
            assert values_BT[row, t].item() == pytest.approx((raw.item() - 0.25) / 2.0, abs=1e-5)
    assert not values_BT[~rollout().response_mask_BT].any()
    (swept_BT,) = sweep(rollout(), Cut(3), 1, lambda part: (response_values(critic, part, 0.25, 2.0),))
    torch.testing.assert_close(swept_BT, values_BT.detach())


def test_the_head_is_as_it_was():
    """The hook that narrows its input is gone, after a failure too."""
    model = policy("llama")
    token_logprobs(model, rollout(), READING)
    with pytest.raises(IndexError):
        token_logprobs(
            model, assemble([[99]], torch.tensor([[3]]), torch.tensor([1]), torch.tensor([True]), 0), READING
        )
    assert not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize("entropies", [False, True])
def test_chunks_of_logits_give_what_whole_ones_do(monkeypatch: pytest.MonkeyPatch, entropies: bool):
    """A llama's head is plain: three tokens' logits at a time, values and gradients."""
    monkeypatch.setattr("pipeline.rl.logprobs.CHUNK_LOGITS", 3 * 40)
    gradients = []
    for plain_head in (False, True):
        model, reading = policy("llama"), Reading(TEMPERATURE, plain_head)
        weights_BT = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
        if entropies:
            found = logprobs_and_entropies(model, rollout(), reading)
        else:
            found = (token_logprobs(model, rollout(), reading),)
        sum((part * weights_BT).sum() for part in found).backward()
        gradients.append([*found, *(p.grad for p in model.parameters() if p.grad is not None)])
    for ours, theirs in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_a_sweep_on_a_cpu_is_in_parts_that_stay_in_its_cache(monkeypatch: pytest.MonkeyPatch):
    """Rows and logits cut small give what whole ones do; log-probs alone are those that come with entropies."""
    model = policy("llama")
    whole = sweep(rollout(), Cut(4), 2, lambda part: logprobs_and_entropies(model, part, READING))
    monkeypatch.setattr("pipeline.rl.logprobs.CPU_CHUNK_LOGITS", 3 * 40)
    monkeypatch.setattr("pipeline.rl.rollouts.CACHED_TOKENS", 14)
    rows: list[int] = []

    def small(part: Rollout) -> tuple[Tensor, ...]:
        rows.append(len(part.lengths_B))
        return logprobs_and_entropies(model, part, Reading(TEMPERATURE, plain_head=True))

    for ours, theirs in zip(sweep(rollout(), Cut(4), 2, small), whole, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert rows == [2, 2]  # of 7 tokens at most
    (alone_BT,) = sweep(
        rollout(), Cut(4), 1, lambda part: (token_logprobs(model, part, Reading(TEMPERATURE, plain_head=True)),)
    )
    torch.testing.assert_close(alone_BT, whole[0], atol=1e-5, rtol=1e-4)
