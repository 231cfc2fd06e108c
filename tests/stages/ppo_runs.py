"""Runs of the ppo stage on a tiny random Llama, and what they left behind."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from pipeline.artifacts import Artifact
from pipeline.data.chat import stop_token_id
from pipeline.data.tokenizers import load_tokenizer, train_bpe
from pipeline.errors import Stopped
from pipeline.model.build import save_model
from pipeline.model.presets import Shape, build_config
from pipeline.model.reward import build_reward_model, load_reward_model, save_reward_model
from pipeline.recipe import DataEntry
from pipeline.rl.rollouts import Rollout
from pipeline.rl.scoring import Scorer
from pipeline.runtime import Runtime
from stages import ppo as stage

WORDS = "what does the function do it returns a list of all names sorts them in place and writes the file"
FUNCTIONS = """
def zero(prompts, responses, rows):
    return [0.0] * len(responses)

def constant(prompts, responses, rows):
    return [0.7] * len(responses)

def short(prompts, responses, rows):
    return [1.0 - len(response) / 20 for response in responses]

def vowels(prompts, responses, rows):
    return [sum(letter in "aeiou" for letter in response) / 10 for response in responses]

def letter(prompts, responses, rows):
    return [float(response[:1] in "aeiou") for response in responses]

def wrong(prompts, responses, rows):
    return [0.0]
"""


@dataclass(frozen=True)
class Parts:
    """What a run takes."""

    folder: Path
    init: Artifact
    reward: Artifact
    data: Path


def artifact(path: Path, kind: str) -> Artifact:
    return Artifact(f"tiny/{path.name}", path, kind, f"fingerprint of {path.name}", {"stage": path.name})


def make_parts(folder: Path) -> Parts:
    """A tiny policy, a reward model on it, reward functions and rows of prompts."""
    tokenizer = train_bpe(iter([WORDS] * 8), 300)
    tokenizer.save_pretrained(folder / "tokenizer")
    stop = stop_token_id(tokenizer)
    assert tokenizer.pad_token_id is not None
    torch.manual_seed(0)
    config = build_config(
        "llama",
        Shape(depth=2, width=32, heads=2, kv_heads=2, mlp_width=64, context=48, vocab=len(tokenizer), tied=True),
        {},
    )
    config.initializer_range = 0.1
    save_model(LlamaForCausalLM(config), folder / "sft" / "model", folder / "tokenizer", [stop], tokenizer.pad_token_id)
    init = artifact(folder / "sft", "causal-lm")
    reward_model = build_reward_model(init.model, tokenizer.pad_token_id, 0)
    save_reward_model(reward_model, folder / "reward" / "model", init, mean=0.3, std=0.7, suffix_ids=[stop])
    words = WORDS.split()
    rows = [
        {"messages": [{"role": "user", "content": f"{a} {b}"}, {"role": "assistant", "content": a}]}
        for a in words
        for b in words[:4]
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "rewards.py").write_text(FUNCTIONS)
    return Parts(folder, init, artifact(folder / "reward", "reward-model"), folder / "rows.jsonl")


def config_of(parts: Parts, **values: Any) -> stage.PPOConfig:
    small = {
        "data": (DataEntry(source=str(parts.data)),),
        "total_episodes": 48,
        "batch_size": 16,
        "per_device_train_batch_size": 5,
        "response_length": 12,
        "learning_rate": 3e-3,
        "eval_steps": 0,
    }
    return stage.PPOConfig(**{**small, **values})


@dataclass
class Done:
    """A run that has ended."""

    out: Path
    summary: dict[str, float]

    def policy(self) -> dict[str, Tensor]:
        return load_file(self.out / "model" / "model.safetensors")

    def checkpoint(self) -> dict[str, Tensor]:
        """Everything the newest checkpoint holds."""
        return load_file(sorted(self.out.glob("checkpoints/step-*"))[-1] / "state.safetensors")

    def lines(self) -> list[dict[str, Any]]:
        """metrics.jsonl without what a clock measured."""
        found = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        timed = ("time", "seconds_", "samples_per", "tokens_per", "mfu")
        return [{key: value for key, value in line.items() if not key.startswith(timed)} for line in found]


def run(
    parts: Parts,
    out: Path,
    *,
    reward: str | None = None,
    tokens: Artifact | None = None,
    stop_at: int = 0,
    **values: Any,
) -> Done:
    """Run the stage against the reward model, or the function `reward`; asked to stop in step `stop_at`."""
    if reward is not None:
        values["reward"] = f"{parts.folder / 'rewards.py'}:{reward}"
    config = config_of(parts, **values)
    out.mkdir(parents=True, exist_ok=True)
    runtime = Runtime.start(out, seed=config.seed, threads=1, quiet=True)
    runtime.bf16 = False  # whatever this machine would choose: the tests are of the mathematics
    ask_to_stop(runtime, stop_at)
    inputs = {
        "init": parts.init,
        "reward": None if reward else parts.reward,
        "ptx_tokens": tokens,
        "gold": parts.reward,
    }
    return Done(out, stage.run(config, inputs, out, runtime))


def ask_to_stop(runtime: Runtime, stop_at: int) -> None:
    """The run is asked to stop in step `stop_at`; 0 leaves it alone."""
    log = runtime.metrics.log

    def log_and_ask(step: int, *args: Any, **figures: Any) -> None:
        log(step, *args, **figures)
        if step == stop_at:
            runtime.halt.asked = Stopped

    runtime.metrics.log = log_and_ask  # type: ignore[method-assign]


class Spy:
    """Keeps every rollout the stage scores, with its scores."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[Rollout, Tensor]] = []
        original = Scorer.score

        def score(scorer: Scorer, rollout: Rollout, rows: list[dict[str, Any]]) -> tuple[Tensor, dict[str, Tensor]]:
            scores_B, terms = original(scorer, rollout, rows)
            self.seen.append((rollout, scores_B))
            return scores_B, terms

        monkeypatch.setattr(Scorer, "score", score)

    def rows(self, number: int = 0) -> list[tuple[list[int], list[int]]]:
        """(prompt, response) ids of a rollout."""
        rollout = self.seen[number][0]
        found = []
        for ids, prompt, length in zip(
            rollout.ids_BL.tolist(), rollout.prompt_lengths_B.tolist(), rollout.lengths_B.tolist(), strict=True
        ):
            found.append((ids[:prompt], ids[prompt : prompt + length]))
        return found


def naive_score(parts: Parts, folder: Path, prompt: list[int], response: list[int]) -> float:
    """The reward model's score of one row alone, closed with the stop token where it was cut off."""
    runtime = Runtime.start(folder / "scoring", seed=0, threads=1, quiet=True)
    runtime.bf16 = False
    stop = stop_token_id(load_tokenizer(parts.init.model))
    ids = prompt + response + ([] if response[-1] == stop else [stop])
    return load_reward_model(parts.reward, runtime).score(torch.tensor([ids]), torch.tensor([len(ids)])).item()


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(left[key].equal(right[key]) for key in left)


def furthest(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    return max((left[key] - right[key]).abs().max().item() for key in left)


def start(parts: Parts) -> dict[str, Tensor]:
    return load_file(parts.init.model / "model.safetensors")
