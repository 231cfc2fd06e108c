"""Log-likelihoods against a loop over single rows."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.evals import likelihood
from pipeline.evals.likelihood import Beginning, Request, log_likelihoods
from pipeline.evals.subject import Subject
from pipeline.model.attention import reach_of_masks


def naive(subject: Subject, request: Request) -> float:
    """One row, one forward pass, no batching: the definition."""
    row = torch.tensor([[*request.prompt, *request.completion]])
    with torch.inference_mode():
        logprobs = subject.model(input_ids=row).logits[0].log_softmax(-1)
    start = len(request.prompt)
    return sum(float(logprobs[start + i - 1, token]) for i, token in enumerate(request.completion))


def requests(vocab: int) -> list[Request]:
    rng = random.Random(0)
    made = []
    for _ in range(8):
        prompt = tuple(rng.randrange(vocab) for _ in range(rng.randint(1, 14)))
        for _ in range(rng.randint(1, 5)):
            made.append(Request(prompt, tuple(rng.randrange(vocab) for _ in range(rng.randint(1, 20)))))
    return [*made, made[3]]


def test_equal_to_a_naive_loop(chat_subject: Subject) -> None:
    asked = requests(len(chat_subject.tokenizer))
    found = log_likelihoods(chat_subject.model, asked)
    np.testing.assert_allclose(found, [naive(chat_subject, request) for request in asked], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("token_budget", [1, 60, 100_000])
def test_independent_of_the_batch(chat_subject: Subject, token_budget: int) -> None:
    asked = requests(len(chat_subject.tokenizer))
    whole = log_likelihoods(chat_subject.model, asked)
    found = log_likelihoods(chat_subject.model, asked, token_budget=token_budget)
    np.testing.assert_allclose(found, whole, rtol=1e-6, atol=1e-5)


def test_independent_of_company_and_order(chat_subject: Subject) -> None:
    asked = requests(len(chat_subject.tokenizer))
    whole = log_likelihoods(chat_subject.model, asked)
    backwards = log_likelihoods(chat_subject.model, asked[::-1])[::-1]
    np.testing.assert_allclose(backwards, whole, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(log_likelihoods(chat_subject.model, asked[5:6]), whole[5:6], rtol=1e-6, atol=1e-5)


def test_completions_that_share_a_prompt_are_one_row(chat_subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt of 6, four completions of 5: 6 + 4 * 4 tokens, since the last of each is only predicted."""
    seen = []
    forward = chat_subject.model.forward

    def counting(*args: object, **kwargs: torch.Tensor) -> object:
        seen.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    monkeypatch.setattr(likelihood, "reach_of_masks", lambda model: 64)
    monkeypatch.setattr(chat_subject.model, "forward", counting)
    prompt = tuple(range(6))
    log_likelihoods(chat_subject.model, [Request(prompt, tuple(range(i, i + 5))) for i in range(4)] * 2)
    assert seen == [(1, 22)]


def test_a_row_at_a_time_for_models_without_masks(chat_subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = requests(len(chat_subject.tokenizer))
    whole = log_likelihoods(chat_subject.model, asked)
    monkeypatch.setattr(likelihood, "reach_of_masks", lambda model: 0)
    found = log_likelihoods(chat_subject.model, asked, token_budget=80)
    np.testing.assert_allclose(found, whole, rtol=1e-6, atol=1e-5)


def test_which_models_take_masks(chat_subject: Subject) -> None:
    from transformers import (
        BloomConfig,
        BloomForCausalLM,
        FalconConfig,
        FalconForCausalLM,
        Lfm2Config,
        Lfm2ForCausalLM,
        Mamba2Config,
        Mamba2ForCausalLM,
    )

    bloom = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2))
    mamba = Mamba2ForCausalLM(
        Mamba2Config(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_heads=4, head_dim=8, state_size=8)
    )
    size = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    falcon = FalconForCausalLM(FalconConfig(**size, num_attention_heads=2, alibi=True))
    lfm2 = Lfm2ForCausalLM(
        Lfm2Config(**size, num_attention_heads=2, num_key_value_heads=2, layer_types=["conv", "full_attention"])
    )
    assert reach_of_masks(chat_subject.model) == math.inf
    assert [reach_of_masks(each) for each in (bloom, mamba, falcon, lfm2)] == [0] * 4


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "llama4_text"])
def test_layers_that_look_back_on_a_window_keep_it(chat_subject: Subject, family: str) -> None:
    """Of 12 tokens, or a chunk of 12: requests of 4 to 43 tokens, among them such of 12 and of 13."""
    window = {"attention_chunk_size": 12, "num_local_experts": 2, "intermediate_size_mlp": 48, "use_qk_norm": False}
    config = AutoConfig.for_model(
        family,
        **(window if family == "llama4_text" else {"sliding_window": 12}),
        **{"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.3},
        **({"layer_types": ["sliding_attention", "full_attention"]} if family == "gemma3_text" else {}),
    )
    torch.manual_seed(0)
    subject = replace(chat_subject, model=AutoModelForCausalLM.from_config(config).eval())
    assert reach_of_masks(subject.model) == 12
    edges = [Request(tuple(range(9)), tuple(range(40, 40 + more))) for more in (4, 5)]
    assert [request.length for request in edges] == [12, 13]
    asked = [*edges, *requests(320), *shared_requests(320)]
    found = log_likelihoods(subject.model, asked)
    np.testing.assert_allclose(found, [naive(subject, request) for request in asked], rtol=1e-5, atol=1e-4)


def test_ticks_after_every_batch(chat_subject: Subject) -> None:
    ticks: list[int] = []
    asked = [Request((1, 2), (3, token)) for token in range(3)] + [Request((2, 2), (3, 4))]
    log_likelihoods(chat_subject.model, asked, token_budget=1, tick=lambda: ticks.append(1))
    assert len(ticks) == 2


def test_nothing_asked(chat_subject: Subject) -> None:
    assert log_likelihoods(chat_subject.model, []).shape == (0,)


def shared_requests(vocab: int) -> list[Request]:
    """Two beginnings of 24 and 30 tokens with nine questions each of four answers, and what shares nothing."""
    rng = random.Random(1)
    made = []
    for length in (24, 30):
        begin = tuple(rng.randrange(vocab) for _ in range(length))
        for _ in range(9):
            prompt = begin + tuple(rng.randrange(vocab) for _ in range(rng.randint(1, 9)))
            answers = [tuple(rng.randrange(vocab) for _ in range(rng.randint(1, 4))) for _ in range(4)]
            made += [Request(prompt, answer, length) for answer in answers]
    alone = tuple(rng.randrange(vocab) for _ in range(20))
    return [*made, Request(alone, (1, 2), 20), Request(made[0].prompt[:24], (3,), 24), Request(alone[:3], (4, 5), 3)]


@pytest.mark.slow
@pytest.mark.parametrize("token_budget", [1, 40, 100_000])
def test_a_shared_beginning_changes_nothing(chat_subject: Subject, token_budget: int) -> None:
    asked = shared_requests(len(chat_subject.tokenizer))
    kept = Beginning()
    for _ in range(2):  # the second time it is there already
        found = log_likelihoods(chat_subject.model, asked, token_budget=token_budget, beginning=kept)
        np.testing.assert_allclose(found, [naive(chat_subject, request) for request in asked], rtol=1e-5, atol=1e-4)


def tokens_read(subject: Subject, monkeypatch: pytest.MonkeyPatch, asked: list[Request]) -> int:
    """Tokens that go through the model's blocks, padding too."""
    seen = []
    forward = subject.model.base_model.forward

    def counting(*args: object, **kwargs: torch.Tensor) -> object:
        seen.append(kwargs["input_ids"].numel())
        return forward(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(subject.model.base_model, "forward", counting)
        log_likelihoods(subject.model, asked)
    return sum(seen)


def test_five_examples_before_every_question_are_read_once(
    chat_subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MMLU by letters: 100 questions of 8 tokens behind 40 shared ones, four letters each. A request a row: 400 × 48
    tokens; a prompt a row: 100 × 48; the beginning once: 40 + 100 × 8, 22.9 times fewer than the first."""
    rng = random.Random(2)
    begin = tuple(rng.randrange(300) for _ in range(40))
    prompts = [begin + tuple(rng.randrange(300) for _ in range(8)) for _ in range(100)]
    asked = [Request(prompt, (letter,), 40) for prompt in prompts for letter in range(4)]
    apart = [Request(request.prompt, request.completion) for request in asked]
    assert tokens_read(chat_subject, monkeypatch, asked) == 40 + 100 * 8
    assert tokens_read(chat_subject, monkeypatch, apart) == 100 * 48
    assert 400 * 48 / (40 + 100 * 8) > 10
