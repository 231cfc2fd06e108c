"""Episodes a second of `llmpipe ppo` against TRL's PPOTrainer, and whether both learn alike, in one run.

    python benchmarks/ppo_vs_trl.py [--steps 20] [--seeds 4] [--variant-steps 6] [--against NAME] [--threads N]

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ppo_sides import BATCH, OUR_SIDES, TRL_SIDES, prepare

TRL, TRANSFORMERS, WARM_UP = "1.12.0", "5.23.0", 2

# ---- the sides against each other ----


class Ended(Exception):
    """A side's process ended before its steps were done; with the end of what it said."""


class Side:
    """A side's process."""

    def __init__(self, name: str, python: Path, folder: Path, steps: int, seed: int, threads: int) -> None:
        self.name, self.errors = name, folder / f"{name}.log"
        command = [
            str(python),
            str(Path(__file__).with_name("ppo_sides.py")),
            name,
            str(folder),
            str(steps),
            str(seed),
            str(threads),
        ]
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
            raise Ended(f"{self.name} ended:\n{self.errors.read_text()[-3000:]}")
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
    found: list[Side] = []
    try:
        for name in names:
            python = env / "bin" / "python" if name in TRL_SIDES else Path(sys.executable)
            found.append(Side(name, python, folder, steps, seed, threads))
        for number in range(steps):
            for side in found if number % 2 else reversed(found):
                side.step()
        yield found
    finally:
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
        try:
            with sides([name, "llmpipe"], env, folder, steps, 0, threads) as (side, own):
                show(side, own)
                if name in TRL_SIDES:
                    medians[name] = statistics.median(ratios(side, own, "seconds"))
        except Ended as error:
            print(f"{name} does not run: {str(error).strip().splitlines()[-1]}", flush=True)
    return min(medians, key=lambda name: medians[name])


def compare(fastest: str, env: Path, folder: Path, steps: int, seeds: range, threads: int, record: Path | None) -> None:
    """Part 2. What every step was goes into `record` as well."""
    of_time, of_cpu, runs = [], [], []
    for seed in seeds:
        with sides([fastest, "llmpipe"], env, folder, steps, seed, threads) as (side, own):
            show(side, own)
            show(own, side)
            of_time += ratios(side, own, "seconds")
            of_cpu += ratios(side, own, "cpu")
            runs.append((side.steps, own.steps))
            if record is not None:
                with record.open("a") as file:
                    file.write(json.dumps({"seed": seed, side.name: side.steps, own.name: own.steps}) + "\n")
            parts = {name: statistics.median(step[name] for step in own.steps) for name in own.steps[0] if "_" in name}
            print(
                "    " + ", ".join(f"{name.removeprefix('seconds_')} {value:.2f} s" for name, value in parts.items()),
                flush=True,
            )
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
        if len(runs) == 1:
            print("  (one seed: nothing says how large noise is)")
            continue
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
    """Runs both parts and prints them."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    parser = argparse.ArgumentParser()
    parser.add_argument("--env", type=Path, default=cache / "llmpipe-bench" / f"trl-{TRL}")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--variant-steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--against", choices=list(TRL_SIDES), help="skip part 1")
    parser.add_argument("--record", type=Path, help="a jsonl file that gets every step of part 2")
    asked = parser.parse_args()
    seeds = range(asked.first_seed, asked.first_seed + asked.seeds)
    if min(asked.steps, asked.variant_steps) <= WARM_UP:
        parser.error(f"the first {WARM_UP} steps are not timed: more are needed")
    environment(asked.env)
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        fastest = asked.against or variants(asked.env, Path(name), asked.variant_steps, asked.threads)
        compare(fastest, asked.env, Path(name), asked.steps, seeds, asked.threads, asked.record)


if __name__ == "__main__":
    main()
