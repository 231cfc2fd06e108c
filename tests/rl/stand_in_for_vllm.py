"""What of vLLM's offline interface the engine uses, over our own generation: a copy of the model in fused matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pipeline.model.build import load_causal_lm
from pipeline.model.generation import GREEDY, Sampling, draw_uniforms, generate


@dataclass
class Faults:
    """What is wrong with the engines made from now on."""

    drops_weights: bool = False
    misses: str = ""
    skews_logits: float = 1.0
    draws_at: float = 1.0
    """Factor on the temperature that tokens are drawn at; the log-probs are of that distribution."""


@dataclass
class Output:
    token_ids: list[int]
    logprobs: list[dict[int, Any]]
    prompt_logprobs: list[Any]

    @property
    def outputs(self) -> list[Output]:
        return [self]


@dataclass
class Logprob:
    logprob: float


class SamplingParams:
    def __init__(self, **options: Any) -> None:
        self.options = options


class Worker:
    """The model as vLLM shows it: query, key and value are one matrix, with two more rows of zeros."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        held = dict(self.llm.model.named_parameters())
        for name, weight in held.items():
            if "q_proj" in name:
                parts = [held[name.replace("q_proj", f"{each}_proj")] for each in "qkv"]
                yield name.replace("q_proj", "qkv_proj"), torch.cat([*parts, torch.zeros(2, weight.shape[1])])
            elif "k_proj" not in name and "v_proj" not in name:
                yield name, weight

    def parameters(self) -> Iterator[Tensor]:
        return (weight for _, weight in self.named_parameters())

    def load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> set[str]:
        self.llm.loads += 1
        held, loaded, faults = dict(self.llm.model.named_parameters()), set[str](), self.llm.faults
        for name, weight in weights:
            if faults.misses and faults.misses in name:
                continue
            if not faults.drops_weights:
                held[name].copy_(weight)
            loaded.add(name.replace("q_proj", "qkv_proj"))
        return loaded


class LLM:
    def __init__(self, faults: Faults, model: str, dtype: str, **options: Any) -> None:
        self.faults, self.options, self.loads, self.calls = faults, options, 0, list[str]()
        self.model = load_causal_lm(Path(model)).eval().to(getattr(torch, dtype)).requires_grad_(False)

    def apply_model(self, function: Callable[[Any], Any]) -> list[Any]:
        self.calls.append("apply_model")
        return [function(Worker(self))]

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset_prefix_cache")

    def wake_up(self) -> None:
        self.calls.append("wake_up")

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")

    def generate(
        self, prompts: Sequence[dict[str, list[int]]], parameters: Sequence[SamplingParams], use_tqdm: bool
    ) -> list[Output]:
        assert not use_tqdm
        self.calls.append("generate")
        return [
            self._answer(each["prompt_token_ids"], own.options) for each, own in zip(prompts, parameters, strict=True)
        ]

    def _answer(self, prompt: list[int], options: dict[str, Any]) -> Output:
        if "prompt_logprobs" in options:
            logits = self.model(input_ids=torch.tensor([prompt])).logits[0].float() * self.faults.skews_logits
            found = logits[:-1].log_softmax(dim=-1).gather(1, torch.tensor(prompt)[1:, None])[:, 0].tolist()
            return Output([0], [], [None, *({i: Logprob(f)} for i, f in zip(prompt[1:], found, strict=True))])
        assert (options["top_p"], options["top_k"], options["logprobs"], options["ignore_eos"]) == (1.0, -1, 0, True)
        steps, is_greedy = options["max_tokens"], options["temperature"] == 0
        uniforms = draw_uniforms(1, steps, torch.Generator().manual_seed(options["seed"] or 0))
        written = generate(
            self.model, [prompt], max_new_tokens=steps, stop_ids=options["stop_token_ids"], pad_id=0,
            sampling=GREEDY if is_greedy else Sampling(options["temperature"] * self.faults.draws_at),
            uniforms_BT=None if is_greedy else uniforms,
        )  # fmt: skip
        (ids,), logprobs = written.responses(), written.logprobs_BT[0].tolist()
        return Output(ids, [{i: Logprob(logprob)} for i, logprob in zip(ids, logprobs, strict=False)], [])


def stand_in(faults: Faults) -> tuple[ModuleType, list[LLM]]:
    """The module, and the engines that are made by it."""
    module, made = ModuleType("vllm"), list[LLM]()

    def make(**options: Any) -> LLM:
        made.append(LLM(faults, **options))
        return made[-1]

    module.LLM = make  # type: ignore[attr-defined]
    module.SamplingParams = SamplingParams  # type: ignore[attr-defined]
    return module, made
