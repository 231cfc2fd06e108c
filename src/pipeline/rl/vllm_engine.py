"""Rollouts by vLLM (an extra) in this process, on the device that trains; the policy's weights sent anew each step.

Three things are checked at every sending, since an engine that is not the policy spoils a run in silence. Every weight
of the engine has been loaded over. Its weights add up to what the policy's do, as they are and by magnitude: vLLM fuses
matrices and pads them, so it has other names and shapes, but the same numbers. And on a probe, a prompt of the run,
both give the tokens the same log-probs, as far as two forwards can.

Written against vLLM's offline interface (`LLM`, `SamplingParams`, `apply_model`), and tested with a stand-in for it: it
has not run against vLLM itself.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.errors import MachineError, TrainingError
from pipeline.model.generation import Generation
from pipeline.rl.forwards import precision
from pipeline.rl.place import Place

SUM_TOLERANCE = 1e-10
"""Relative to the sum of magnitudes: two orders of adding up the same numbers in float64."""
PROBE_TOLERANCE = {False: 0.02, True: 0.2}
"""By bf16: mean difference of a token's log-prob, nats, that two forwards of one model may have."""
PROBE_LENGTH = 64
WHERE = "ppo.rollout_engine"


class Sums(NamedTuple):
    """What the weights of a model are compared by, whatever their names, order and shapes."""

    total: float
    magnitude: float

    def agrees(self, other: Sums) -> bool:
        """Whether they can be of the same numbers."""
        limit = SUM_TOLERANCE * max(self.magnitude, 1e-30)
        return abs(self.total - other.total) <= limit and abs(self.magnitude - other.magnitude) <= limit


class VLLMEngine:
    """vLLM's engine with the policy's weights."""

    def __init__(
        self, llm: Any, sampling_params: Any, place: Place, probe: Sequence[int], *, stop_id: int, pad_id: int,
        temperature: float,
    ) -> None:  # fmt: skip
        self.llm, self.sampling_params, self.place = llm, sampling_params, place
        self.probe = list(probe)[:PROBE_LENGTH]
        self.stop_id, self.pad_id, self.temperature = stop_id, pad_id, temperature
        self.dtype = torch.bfloat16 if place.bf16 else torch.float32
        self.sleeps = place.device.type == "cuda"

    @torch.no_grad()
    def sync(self, policy: PreTrainedModel) -> None:
        """The weights of `policy`, in eval mode, become the engine's. TrainingError where they don't."""
        if self.sleeps:
            self.llm.wake_up()
        expected = sums(weight for _, weight in self._weights(policy))

        def load(model: Any) -> tuple[list[str], Sums]:
            loaded = model.load_weights(self._weights(policy))
            missing = [] if loaded is None else [name for name, _ in model.named_parameters() if name not in loaded]
            return missing, sums(parameter.detach() for parameter in model.parameters())

        (found,) = self.llm.apply_model(load)
        self.llm.reset_prefix_cache()
        missing, held = found
        if missing:
            raise _stale(f"it did not load {', '.join(missing[:3])} ({len(missing)} weights)")
        if not held.agrees(expected):
            raise _stale(f"its weights add up to {held.total!r}, the policy's to {expected.total!r}")
        gap = (self._probe_logprobs() - probe_logprobs(policy, self.probe, self.place)).abs().mean().item()
        if not gap <= PROBE_TOLERANCE[self.place.bf16]:
            raise _stale(f"on a probe its log-probs are off by {gap:.3f} nats a token")

    def _weights(self, policy: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
        """As they are sent: one at a time, so that no second model is in memory."""
        for name, weight in merged_weights(policy):
            yield name, weight.to(self.dtype)

    def rest(self) -> None:
        """Give its memory back until the next `sync`."""
        if self.sleeps:
            self.llm.sleep(level=2)

    def write(self, prompts: Sequence[Sequence[int]], uniforms_BT: Tensor | None, steps: int) -> Generation:
        """As `generate`, `steps` tokens at most. vLLM takes a seed a row, here the row's first random number: the same
        numbers give the same answers as far as vLLM's own arithmetic does."""
        seeds = [None] * len(prompts) if uniforms_BT is None else (uniforms_BT[:, 0] * 2**31).long().tolist()
        parameters = [
            self.sampling_params(
                temperature=0.0 if seed is None else self.temperature,
                top_p=1.0,
                top_k=-1,
                seed=seed,
                max_tokens=steps,
                stop_token_ids=[self.stop_id],
                ignore_eos=True,
                logprobs=0,
                detokenize=False,
            )
            for seed in seeds
        ]
        with torch.autocast(self.place.device.type, enabled=False):  # its precision is its own
            outputs = self.llm.generate(
                [{"prompt_token_ids": list(prompt)} for prompt in prompts], parameters, use_tqdm=False
            )
        return self._generation([output.outputs[0] for output in outputs], steps, uniforms_BT is None)

    def _generation(self, written: list[Any], steps: int, is_greedy: bool) -> Generation:
        ids_BT = torch.full((len(written), steps), self.pad_id)
        logprobs_BT = torch.zeros(len(written), steps)
        for row, each in enumerate(written):
            ids = list(each.token_ids)
            ids_BT[row, : len(ids)] = torch.tensor(ids)
            if not is_greedy:
                found = [at[token].logprob for at, token in zip(each.logprobs, ids, strict=True)]
                logprobs_BT[row, : len(ids)] = torch.tensor(found)
        lengths_B = torch.tensor([len(each.token_ids) for each in written])
        is_ended_B = torch.tensor([each.token_ids[-1] == self.stop_id for each in written])
        return Generation(ids_BT, lengths_B, is_ended_B, logprobs_BT, logprobs_BT)

    def _probe_logprobs(self) -> Tensor:
        parameters = self.sampling_params(temperature=1.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        (output,) = self.llm.generate([{"prompt_token_ids": self.probe}], [parameters], use_tqdm=False)
        pairs = zip(output.prompt_logprobs[1:], self.probe[1:], strict=True)  # the first token has none
        return torch.tensor([at[token].logprob for at, token in pairs])


def load_engine(
    model: Path, place: Place, probe: Sequence[int], *, longest: int, stop_id: int, pad_id: int, temperature: float,
    seed: int, memory: float,
) -> VLLMEngine:  # fmt: skip
    """The engine for a policy that starts from the folder `model`; `longest` is that of a whole row, `memory` the share
    of the device's that it may take. MachineError where vLLM is not installed."""
    check_vllm()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, so that weights are handed over as they are
    vllm = importlib.import_module("vllm")
    llm = vllm.LLM(
        model=str(model),
        dtype="bfloat16" if place.bf16 else "float32",
        max_model_len=longest,
        gpu_memory_utilization=memory,
        enable_sleep_mode=place.device.type == "cuda",
        logprobs_mode="processed_logprobs",  # after the temperature, as they are drawn
        distributed_executor_backend="external_launcher" if place.world_size > 1 else None,
        seed=seed,
    )
    return VLLMEngine(llm, vllm.SamplingParams, place, probe, stop_id=stop_id, pad_id=pad_id, temperature=temperature)


def check_vllm() -> None:
    """MachineError unless vLLM is installed."""
    if find_spec("vllm") is None:
        raise MachineError(
            "vLLM is not installed", where=WHERE, mend='pip install "llmpipe[vllm]", or rollout_engine: native'
        )


def merged_weights(policy: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Name -> weight, each once, as a plain model of its kind has them: adapters added in, in a copy."""
    for name, parameter in policy.named_parameters():
        if ".lora_" in name:
            continue
        weight = parameter.detach()
        if name.endswith(".base_layer.weight"):
            layer = policy.get_submodule(name.removesuffix(".base_layer.weight"))
            assert isinstance(layer, LoraLayer)
            for adapter in layer.active_adapters:
                weight = weight + layer.get_delta_weight(adapter).detach()
        yield name.replace(".base_layer.", "."), weight


def sums(weights: Iterator[Tensor]) -> Sums:
    """Of all numbers in `weights`, added up in float64."""
    total = magnitude = 0.0
    for weight in weights:
        total += weight.sum(dtype=torch.float64).item()
        magnitude += weight.abs().sum(dtype=torch.float64).item()
    return Sums(total, magnitude)


@torch.no_grad()
def probe_logprobs(policy: PreTrainedModel, ids: Sequence[int], place: Place) -> Tensor:
    """log pi(token | what stands before it) of all tokens but the first, [tokens - 1], on the CPU."""
    ids_1L = torch.tensor([list(ids)], device=policy.device)
    with precision(place.device, place.bf16):
        logits_LV = policy(input_ids=ids_1L, use_cache=False).logits[0, :-1].float()
    found_L: Tensor = logits_LV.log_softmax(dim=-1).gather(1, ids_1L[0, 1:, None])[:, 0]
    return found_L.cpu()


def _stale(what: str) -> TrainingError:
    return TrainingError(
        f"vLLM does not hold the policy's weights: {what}",
        where=WHERE,
        mend="rollout_engine: native; or a version and a model that vLLM loads by transformers' names",
    )
