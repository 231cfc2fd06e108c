"""The two sides of ppo_vs_trl.py: what they start from, and either of them as a process that takes turns.

    python ppo_sides.py NAME FOLDER STEPS SEED THREADS

TRL's runs in an environment of its own: at import this file knows nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROMPT, ANSWER, BATCH, PROMPTS = 32, 64, 64, 512
WIDTH, DEPTH, MLP, VOCABULARY = 256, 6, 704, 4096
RATE, KL_COEF = 1e-4, 0.05

TRL_SIDES: dict[str, dict[str, Any]] = {
    "trl": {},
    "trl, microbatches of 16": {"micro": 16},
    "trl, plain attention": {"attention": "eager"},
    "trl, launched with bf16": {"mixed": True},
    "trl, all in bf16": {"autocast": True},
    "trl, all in bf16, plain attention": {"autocast": True, "attention": "eager"},
    "trl, compiled": {"compile": True},
}
"""`mixed` is `accelerate launch --mixed_precision bf16`, which holds for the training forward only (the flag `bf16` of
its config reaches nothing); `autocast` is a context around its whole loop, which a user would have to think of."""
OUR_SIDES: dict[str, dict[str, Any]] = {"llmpipe": {}, "llmpipe, fp32": {"bf16": False}}


# ---- what both sides start from ----


def prepare(folder: Path) -> None:
    """Writes the tokenizer, the policy, the reward model and the prompts."""
    import random

    import torch

    from pipeline.artifacts import Artifact
    from pipeline.data.chat import encode_prompt, stop_token_id
    from pipeline.data.tokenizers import train_bpe
    from pipeline.model.build import initialise, save_model
    from pipeline.model.presets import build_model, shape_of
    from pipeline.model.reward import save_reward_model

    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 9))) for _ in range(6000)]
    tokenizer = train_bpe((" ".join(draw.choices(words, k=40)) for _ in range(1000)), VOCABULARY)
    assert len(tokenizer) == VOCABULARY
    tokenizer.save_pretrained(folder / "tokenizer")
    stop_id, pad_id = stop_token_id(tokenizer), tokenizer.pad_token_id
    shape = shape_of({"depth": DEPTH, "hidden_size": WIDTH, "intermediate_size": MLP}, PROMPT + ANSWER + 32, VOCABULARY)
    policy = build_model("llama", shape, {})
    initialise(policy, torch.Generator().manual_seed(0))
    save_model(policy, folder / "policy", folder / "tokenizer", [stop_id], pad_id)
    trunk = build_model("llama", shape, {})
    initialise(trunk, torch.Generator().manual_seed(1))
    let_it_average(trunk)
    save_model(trunk, folder / "trunk", folder / "tokenizer", [stop_id], pad_id)

    rows: list[tuple[str, list[int]]] = []
    while len(rows) < PROMPTS:
        text = " ".join(draw.choices(words, k=draw.randint(6, 14)))
        ids = encode_prompt(tokenizer, [{"role": "user", "content": text}])
        if len(ids) == PROMPT:
            rows.append((text, ids))
    lines = [json.dumps({"prompt": text, "completion": "."}) for text, _ in rows]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    init = Artifact("policy", folder / "policy", "causal-lm", "", {})
    reward = normalised(folder / "trunk", pad_id, stop_id, [ids for _, ids in rows])
    save_reward_model(reward, folder / "reward", init, mean=0.0, std=1.0, suffix_ids=[stop_id])
    (folder / "ids.json").write_text(json.dumps({"stop": stop_id, "prompts": [ids for _, ids in rows]}))


def let_it_average(trunk: Any) -> None:
    """Every layer's attention looks at all tokens alike and its values are large: what the last token's state is then
    tells which tokens the row has. A drawn model's tells little but the last token itself."""
    import torch

    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in trunk.model.layers:
            layer.self_attn.q_proj.weight.zero_()
            for projection in (layer.self_attn.v_proj, layer.self_attn.o_proj):
                projection.weight.normal_(0.0, WIDTH**-0.5, generator=generator)


def normalised(trunk: Path, pad_id: int, stop_id: int, prompts: list[list[int]]) -> Any:
    """The reward model on `trunk`, its head turned and scaled: scores of random answers have mean 0 and deviation 1."""
    import torch

    from pipeline.model.reward import build_reward_model

    model = build_reward_model(trunk, pad_id, 0).eval()
    answers = torch.randint(VOCABULARY, (len(prompts), ANSWER), generator=torch.Generator().manual_seed(3))
    ids = torch.cat([torch.tensor(prompts), answers, torch.full((len(prompts), 1), stop_id)], dim=1)
    with torch.no_grad():
        states = torch.cat([model.base_model(part).last_hidden_state[:, -1] for part in ids.split(BATCH)])
        head, mean = model.score.weight, states.mean(dim=0)
        head -= (head @ mean)[:, None] * mean / mean.dot(mean)
        head /= (states @ head[0]).std()
    return model


# ---- one side, in a process of its own ----


class Turns:
    """Takes turns with the other sides: tells what a step was and took, and waits to be asked for the next."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever else prints is no part of the conversation
        self.start = (time.perf_counter(), time.process_time())

    def wait(self, told: dict[str, Any]) -> None:
        """Tell, wait, start the clock."""
        self.out.write(json.dumps(told) + "\n")
        self.out.flush()
        if not sys.stdin.readline():
            os._exit(0)
        self.start = (time.perf_counter(), time.process_time())

    def step(self, score: float, kl: float, **figures: float) -> None:
        """A step is over."""
        seconds, cpu = time.perf_counter() - self.start[0], time.process_time() - self.start[1]
        self.wait({"seconds": seconds, "cpu": cpu, "score": score, "kl": kl, **figures})


def ours(folder: Path, out: Path, steps: int, seed: int, threads: int, bf16: bool | None = None) -> None:
    """The stage itself."""
    from pipeline.artifacts import Artifact
    from pipeline.recipe import DataEntry
    from pipeline.runtime import Runtime
    from stages import ppo

    turns = Turns()
    config = ppo.PPOConfig(
        data=(DataEntry(source=str(folder / "prompts.jsonl")),), held_out=0.0, total_episodes=steps * BATCH,
        batch_size=BATCH, response_length=ANSWER, learning_rate=RATE, value_learning_rate=RATE, kl_coef=KL_COEF,
        lr_scheduler_type="constant", max_grad_norm=1e9, score_clip=None, missing_eos_rule="subtract",
        eval_steps=0, save_steps=10 * steps, seed=seed, bf16=bf16,
    )  # fmt: skip
    runtime = Runtime.start(out, seed=seed, threads=threads, quiet=True)
    log = runtime.metrics.log

    def log_and_wait(step: int, *args: Any, **figures: float) -> None:
        log(step, *args, **figures)
        parts = {name: value for name, value in figures.items() if name.startswith("seconds_")}
        turns.step(figures["reward"], figures["kl"], **parts)

    runtime.metrics.log = log_and_wait  # type: ignore[method-assign]
    on = runtime.bf16 if bf16 is None else bf16
    turns.wait({"dtype": "bf16 autocast" if on else "fp32", "threads": threads, "compiled": False})
    inputs = {
        "init": Artifact("policy", folder / "policy", "causal-lm", "", {}),
        "reward": Artifact("reward", folder / "reward", "reward-model", "", {}),
    }
    ppo.run(config, inputs, out, runtime)


def trl(
    folder: Path, out: Path, steps: int, seed: int, threads: int, micro: int = BATCH, rollout: int = BATCH,
    attention: str = "sdpa", mixed: bool = False, autocast: bool = False, compile: bool = False,
) -> None:  # fmt: skip
    """TRL's trainer. Runs in its own environment: nothing of llmpipe can be imported here."""
    turns = Turns()
    if mixed:
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    if compile:
        os.environ["ACCELERATE_DYNAMO_BACKEND"] = "INDUCTOR"
    import torch
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOTrainer

    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    tokenizer.add_special_tokens({"pad_token": "<|never written|>"})
    told = json.loads((folder / "ids.json").read_text())
    as_loaded = {"dtype": torch.float32, "attn_implementation": attention}
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "policy", **as_loaded) for _ in range(2))
    reward, critic = (
        AutoModelForSequenceClassification.from_pretrained(folder / "reward", num_labels=1, **as_loaded)
        for _ in range(2)
    )

    class Clock(TrainerCallback):  # type: ignore[misc]
        logged: dict[str, float] = {}

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            is_compiled = hasattr(trainer.model, "_orig_mod")
            dtype = named(trainer.accelerator.mixed_precision == "bf16", autocast)
            turns.wait({"dtype": dtype, "threads": torch.get_num_threads(), "compiled": is_compiled})

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            self.logged = logs

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.step(self.logged["objective/scores"], self.logged["objective/kl"])

    arguments = peers_settings(out, steps, seed, micro, rollout)
    assert tokenizer.eos_token_id == told["stop"]
    trainer = PPOTrainer(
        args=arguments, processing_class=tokenizer, model=policy, ref_model=reference,
        reward_model=closing(reward, told["stop"]), value_model=critic,
        train_dataset=Dataset.from_dict({"input_ids": told["prompts"]}), callbacks=[Clock()],
    )  # fmt: skip
    # Without its cache: that is only dropped at the end of the outermost context, and weights move in this one.
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast, cache_enabled=False):
        trainer.train()


def peers_settings(out: Path, steps: int, seed: int, micro: int, rollout: int) -> Any:
    """TRL's config with the numbers that `ours` has."""
    from trl.experimental.ppo import PPOConfig

    return PPOConfig(
        output_dir=str(out), total_episodes=steps * BATCH, per_device_train_batch_size=micro,
        gradient_accumulation_steps=BATCH // micro, local_rollout_forward_batch_size=rollout, response_length=ANSWER,
        temperature=1.0, learning_rate=RATE, lr_scheduler_type="constant", adam_epsilon=1e-5, weight_decay=0.0,
        num_ppo_epochs=1, num_mini_batches=1, kl_coef=KL_COEF, cliprange=0.2, cliprange_value=0.2, vf_coef=0.1,
        gamma=1.0, lam=0.95, missing_eos_penalty=1.0, stop_token="eos", whiten_rewards=False, seed=seed,
        num_sample_generations=0, bf16=False, gradient_checkpointing=False, use_cpu=True,
        save_strategy="no", logging_steps=1, report_to="none", disable_tqdm=True,
    )  # fmt: skip


def named(mixed: bool, autocast: bool) -> str:
    """What is computed in which precision."""
    return "bf16 autocast" if autocast else "fp32, bf16 autocast in training" if mixed else "fp32"


def closing(model: Any, stop_id: int) -> Any:
    """The reward model as TRL asks for one, which reads a cut-off row with the stop token put on."""
    from types import SimpleNamespace

    import torch

    class Trunk(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model.base_model

        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, **asked: Any) -> Any:
            is_cut = attention_mask[:, -1] & (input_ids[:, -1] != stop_id)
            found = self.inner(
                input_ids=torch.nn.functional.pad(input_ids, (0, 1), value=stop_id),
                attention_mask=torch.cat([attention_mask, is_cut[:, None]], dim=1),
                position_ids=torch.nn.functional.pad(position_ids, (0, 1), value=input_ids.shape[1]),
                **asked,
            )
            states = found.hidden_states[-1]
            states[is_cut, -2] = states[is_cut, -1]
            return SimpleNamespace(hidden_states=(states[:, :-1],))

    class Closing(torch.nn.Module):
        base_model_prefix = "trunk"

        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.score = Trunk(), model.score

    return Closing().eval()


def main() -> None:
    """Runs one side."""
    name, folder, steps, seed, threads = sys.argv[1:]
    run, settings = (trl, TRL_SIDES[name]) if name in TRL_SIDES else (ours, OUR_SIDES[name])
    with tempfile.TemporaryDirectory() as out:
        run(Path(folder), Path(out), int(steps), int(seed), int(threads), **settings)  # type: ignore[operator]


if __name__ == "__main__":
    main()
