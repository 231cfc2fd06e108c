"""Which peak learning rate is best at which depth and batch: held-out bits per byte after the same tokens.

    python benchmarks/learning_rates.py artifacts/demo/tokenize --optimizer adamw
    python benchmarks/learning_rates.py artifacts/demo/tokenize --optimizer muon
    python benchmarks/learning_rates.py artifacts/demo/tokenize --depths 2 --batches 2 8 32

The rule that `pretrain` takes where `learning_rate` is unset (pipeline.model.optim.default_rate) is marked.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path

from pipeline.artifacts import Artifact
from pipeline.model.optim import default_rate
from pipeline.runtime import Runtime
from stages import pretrain
from stages.pretrain import ModelConfig, PretrainConfig

BATCH, LENGTH = 8, 256


def bits_per_byte(tokens: Path, depth: int, batch: int, optimizer: str, rate: float, steps: int, threads: int) -> float:
    """Of one run of `steps` of `batch` rows."""
    config = PretrainConfig(
        model=ModelConfig(depth=depth),
        context_length=LENGTH,
        per_device_train_batch_size=batch,
        max_steps=steps,
        optimizer=optimizer,
        learning_rate=rate,
        warmup_steps=0.05,
        eval_documents=200,
        sample_tokens=0,
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        runtime = Runtime.start(out, seed=0, threads=threads, quiet=True)
        shards = Artifact("shards", tokens, "tokens", "shards", {"stage": "tokenize"})
        return pretrain.run(config, {"tokens": shards}, out, runtime)["bits_per_byte"]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw")
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 6])
    parser.add_argument(
        "--factors", type=float, nargs="+", default=[0.25, 0.5, 1.0, 2.0, 4.0], help="of the rule's rate"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[BATCH], help=f"rows of {LENGTH} tokens a step")
    parser.add_argument("--steps", type=int, default=200, help=f"of {BATCH} rows; of others as many as see its tokens")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    for depth, batch in itertools.product(given.depths, given.batches):
        rule, steps = default_rate(given.optimizer, 64 * depth, batch * LENGTH), given.steps * BATCH // batch
        for rate in [factor * rule for factor in given.factors]:
            bits = bits_per_byte(given.tokens, depth, batch, given.optimizer, rate, steps, given.threads)
            mark = "  the rule's" if rate == rule else ""
            print(f"depth {depth}  {batch:2} rows  rate {rate:.1e}  {bits:.3f} bits per byte{mark}", flush=True)


if __name__ == "__main__":
    main()
