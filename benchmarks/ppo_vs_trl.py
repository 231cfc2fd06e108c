"""Episodes a second of `llmpipe ppo` against TRL's PPOTrainer, and whether both learn alike, in one run.

    python benchmarks/ppo_vs_trl.py [--steps 20] [--seeds 4] [--variant-steps 6] [--env DIR] [--threads N]

TRL removed its PPO in 1.13: 1.12.0 is installed, with the torch of constraints.txt, into an environment of its own
(`--env`, made on the first run). Nothing else is downloaded: the tokenizer is trained on made-up words, the models are
drawn.

Both sides have the same policy (a Llama of 5.5 M: 256 wide, 6 layers, vocabulary 4,096), reference, reward model and
critic (of that size), prompts of exactly 32 tokens and answers of up to 64, batches of 64, one epoch of one minibatch,
AdamW, rates, clips, KL price and missing-EOS rule. What TRL lacks is off in ours (gradient clipping, the clip of
scores, a rate of the critic's own), and a wrapper has TRL's reward model read a cut-off answer as ours does, with the
stop token put on. TRL's pad is an id that the policy cannot write, since TRL takes a pad for the end.

Each side is a process; they take turns step by step, so that a step of one stands beside a step of the other, and
their ratio is a median of pairs. Part 1: every way to run TRL, and ours in bf16 and fp32. Part 2: the fastest of TRL's
against ours as it comes, once for each seed; the steps' scores and KL are compared over the seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TRL, TRANSFORMERS = "1.12.0", "5.23.0"
PROMPT, ANSWER, BATCH, PROMPTS = 32, 64, 64, 512
WIDTH, DEPTH, MLP, VOCABULARY = 256, 6, 704, 4096
RATE, KL_COEF, WARM_UP = 1e-4, 0.05, 2

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
    from trl.experimental.ppo import PPOConfig, PPOTrainer

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

    arguments = PPOConfig(
        output_dir=str(out), total_episodes=steps * BATCH, per_device_train_batch_size=micro,
        gradient_accumulation_steps=BATCH // micro, local_rollout_forward_batch_size=rollout, response_length=ANSWER,
        temperature=1.0, learning_rate=RATE, lr_scheduler_type="constant", adam_epsilon=1e-5, weight_decay=0.0,
        num_ppo_epochs=1, num_mini_batches=1, kl_coef=KL_COEF, cliprange=0.2, cliprange_value=0.2, vf_coef=0.1,
        gamma=1.0, lam=0.95, missing_eos_penalty=1.0, stop_token="eos", whiten_rewards=False, seed=seed,
        num_sample_generations=0, bf16=False, gradient_checkpointing=False, use_cpu=True,
        save_strategy="no", logging_steps=1, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    assert tokenizer.eos_token_id == told["stop"]
    trainer = PPOTrainer(
        args=arguments, processing_class=tokenizer, model=policy, ref_model=reference,
        reward_model=closing(reward, told["stop"]), value_model=critic,
        train_dataset=Dataset.from_dict({"input_ids": told["prompts"]}), callbacks=[Clock()],
    )  # fmt: skip
    # Without its cache: that is only dropped at the end of the outermost context, and weights move in this one.
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast, cache_enabled=False):
        trainer.train()


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


# ---- the sides against each other ----


class Side:
    """A side's process."""

    def __init__(self, name: str, python: Path, folder: Path, steps: int, seed: int, threads: int) -> None:
        self.name, self.errors = name, folder / f"{name}.log"
        command = [str(python), __file__, "--side", name, str(folder), str(steps), str(seed), str(threads)]
        quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "USE_HUB_KERNELS": "NO"}
        environment = os.environ | quiet | {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "1000"}
        with self.errors.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )
        self.steps: list[dict[str, float]] = []
        self.told = self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended:\n{self.errors.read_text()[-3000:]}")
        found: dict[str, Any] = json.loads(line)
        return found

    def step(self) -> None:
        """Have it take one."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.steps.append(self._read())

    def end(self) -> None:
        """It has done its steps."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def timed(self, what: str) -> list[float]:
        """`seconds` or `cpu` of the steps after the warm-up."""
        return [step[what] for step in self.steps[WARM_UP:]]


@contextlib.contextmanager
def sides(names: list[str], env: Path, folder: Path, steps: int, seed: int, threads: int) -> Iterator[list[Side]]:
    """The processes of these sides, which have taken all their steps in turns."""
    found = []
    for name in names:
        python = env / "bin" / "python" if name in TRL_SIDES else Path(sys.executable)
        found.append(Side(name, python, folder, steps, seed, threads))
    for number in range(steps):
        for side in found if number % 2 else reversed(found):
            side.step()
    yield found
    for side in found:
        side.end()


def ratios(other: Side, side: Side, what: str) -> list[float]:
    """How many times as much of it `other` takes, step by step, in order."""
    return sorted(theirs / own for theirs, own in zip(other.timed(what), side.timed(what), strict=True))


def show(side: Side, against: Side) -> None:
    """One line: speed, and what it is of the other's."""
    seconds, cpu = statistics.median(side.timed("seconds")), statistics.median(side.timed("cpu"))
    ratio = statistics.median(ratios(side, against, "seconds"))
    print(
        f"{side.name:<34} {BATCH / seconds:6.2f} episodes/s, {cpu:5.1f} s of CPU a step, {ratio:.2f} × the time of "
        f"{against.name}; {side.told['dtype']}, {side.told['threads']} threads"
        f"{', compiled' if side.told['compiled'] else ''}",
        flush=True,
    )


def variants(env: Path, folder: Path, steps: int, threads: int) -> str:
    """Part 1; the name of TRL's fastest."""
    medians = {}
    for name in [*TRL_SIDES, *list(OUR_SIDES)[1:]]:
        with sides([name, "llmpipe"], env, folder, steps, 0, threads) as (side, own):
            show(side, own)
            if name in TRL_SIDES:
                medians[name] = statistics.median(ratios(side, own, "seconds"))
    return min(medians, key=lambda name: medians[name])


def compare(fastest: str, env: Path, folder: Path, steps: int, seeds: int, threads: int) -> None:
    """Part 2."""
    of_time, of_cpu, runs = [], [], []
    for seed in range(seeds):
        with sides([fastest, "llmpipe"], env, folder, steps, seed, threads) as (side, own):
            show(side, own)
            show(own, side)
            of_time += ratios(side, own, "seconds")
            of_cpu += ratios(side, own, "cpu")
            runs.append((side.steps, own.steps))
            parts = {name: statistics.median(step[name] for step in own.steps) for name in own.steps[0] if "_" in name}
            print("    " + ", ".join(f"{name.removeprefix('seconds_')} {value:.2f} s" for name, value in parts.items()))
    for name, found in (("episodes/s", sorted(of_time)), ("episodes a second of CPU", sorted(of_cpu))):
        quarter = len(found) // 4
        print(
            f"llmpipe / {fastest}, {name}: {statistics.median(found):.2f} "
            f"(half of the {len(found)} pairs of steps within {found[quarter]:.2f} and {found[-1 - quarter]:.2f})"
        )
    curves(runs)


def curves(runs: list[tuple[list[dict[str, float]], list[dict[str, float]]]]) -> None:
    """Scores and KL of both sides, mean over the seeds with its standard error, and how far they are apart."""
    for what in ("score", "kl"):
        print(f"{what}: step, trl, llmpipe (mean ± standard error of {len(runs)} seeds)")
        apart = []
        for step in range(len(runs[0][0])):
            theirs, own = ([run[side][step][what] for run in runs] for side in (0, 1))
            error = math.hypot(standard_error(theirs), standard_error(own))
            apart.append((statistics.mean(own) - statistics.mean(theirs)) / error if error else 0.0)
            print(
                f"  {step + 1:3} {statistics.mean(theirs):8.3f} ± {standard_error(theirs):.3f} "
                f"{statistics.mean(own):8.3f} ± {standard_error(own):.3f}"
            )
        means = [[statistics.mean(step[what] for step in run[side]) for run in runs] for side in (0, 1)]
        difference = statistics.mean(means[1]) - statistics.mean(means[0])
        error = math.hypot(*(standard_error(each) for each in means))
        print(
            f"  mean of all steps: llmpipe - trl = {difference:+.4f} ± {error:.4f}; of {len(apart)} steps "
            f"{sum(abs(each) > 2 for each in apart)} are more than two standard errors apart"
        )


def standard_error(values: list[float]) -> float:
    """Of their mean; 0 for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


# ---- the command ----


def environment(folder: Path) -> None:
    """Makes the peer's environment, unless it is there."""
    if (folder / "ready").exists():
        return
    print(f"installing trl {TRL} into {folder}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    lines = (Path(__file__).parent.parent / "constraints.txt").read_text().splitlines()
    (folder / "constraints.txt").write_text("\n".join(line for line in lines if not line.startswith("trl==")))
    install = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "-c", str(folder / "constraints.txt")]
    subprocess.run([*install, "torch", f"transformers=={TRANSFORMERS}", f"trl=={TRL}"], check=True, stdout=sys.stderr)
    (folder / "ready").touch()


def main() -> None:
    """Runs one side (`--side`), or all of them."""
    if sys.argv[1:2] == ["--side"]:
        name, folder, steps, seed, threads = sys.argv[2:]
        run, settings = (trl, TRL_SIDES[name]) if name in TRL_SIDES else (ours, OUR_SIDES[name])
        with tempfile.TemporaryDirectory() as out:
            run(Path(folder), Path(out), int(steps), int(seed), int(threads), **settings)  # type: ignore[operator]
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    parser = argparse.ArgumentParser()
    parser.add_argument("--env", type=Path, default=cache / "llmpipe-bench" / f"trl-{TRL}")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--variant-steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--against", choices=list(TRL_SIDES), help="skip part 1")
    asked = parser.parse_args()
    environment(asked.env)
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        fastest = asked.against or variants(asked.env, Path(name), asked.variant_steps, asked.threads)
        compare(fastest, asked.env, Path(name), asked.steps, asked.seeds, asked.threads)


if __name__ == "__main__":
    main()
