"""Tokens a second of `llmpipe pretrain` against transformers' Trainer, and the held-out loss after equal tokens.

    llmpipe tokenize demo && python benchmarks/pretrain_vs_trainer.py artifacts/demo/tokenize [steps]

One Llama (256 wide, 6 layers, vocabulary 4,096: 5.5 M), the same samples in the same order (32 × 256 tokens a step),
AdamW and the same schedule on every side, each in a process of its own, taking turns step by step; a ratio is the
median of pairs of steps after the first WARM_UP, in which blocks are compiled. (CLOCK=processor: for a busy machine.)

- trainer: TrainingArguments' defaults (fp32); and with torch_compile, with bf16 and with both: the fastest of the four
  is its best. (Where the processor has no bf16 products it takes several times as long with them, and is spared it.)
- llmpipe: the recipe's defaults and `torch_compile: true`; and with `optimizer: muon`, which the Trainer has not.

The last line is what the step's products of matrices alone would take at the rate that a large one reaches here.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from turns import CLOCK, Turns, ratios, spread, timed

CONTEXT, BATCH, DEPTH, WIDTH, MLP = 256, 32, 6, 256, 704
RATE, WARM_UP = 2e-3, 3
TRAINER = {
    "trainer": {},
    "trainer, compiled": {"torch_compile": True},
    "trainer, bf16": {"bf16": True},
    "trainer, bf16, compiled": {"bf16": True, "torch_compile": True},
}
OURS = {"llmpipe": "adamw", "llmpipe, muon": "muon"}


def model_and_data(folder: Path) -> tuple[Any, Any, Any]:
    """(model, the run's samples, held-out token file)."""
    import torch

    from pipeline.data.packing import Windows
    from pipeline.data.shards import TokenFile
    from pipeline.model.build import initialise
    from pipeline.model.presets import build_model, shape_of

    train, valid = TokenFile(folder / "train.ds"), TokenFile(folder / "valid.ds")
    shape = shape_of(
        {"depth": DEPTH, "hidden_size": WIDTH, "intermediate_size": MLP}, CONTEXT, train.metadata.vocab_size
    )
    model = build_model("llama", shape, {})
    initialise(model, torch.Generator().manual_seed(0))
    return model, Windows(train.tokens, CONTEXT, 0), valid


def trainer(folder: Path, steps: int, options: dict[str, bool], turns: Turns) -> dict[str, Any]:
    """One side with transformers' Trainer."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from pipeline.model.held_out import bits_per_byte
    from pipeline.model.next_token import NextToken

    model, windows, valid = model_and_data(folder)

    class Samples(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return steps * BATCH

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            ids = torch.from_numpy(windows.batch(range(index, index + 1)))[0]
            return {"input_ids": ids[:-1], "labels": ids[:-1]}

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.take()

    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            output_dir=out, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=RATE, use_cpu=True,
            lr_scheduler_type="cosine", warmup_steps=0.02, weight_decay=0.1, adam_beta2=0.95, report_to="none",
            save_strategy="no", logging_strategy="no", train_sampling_strategy="sequential", disable_tqdm=True,
            **options,
        )  # fmt: skip
        plain = model_and_data(folder)[0]
        Trainer(model=model, args=arguments, train_dataset=Samples(), callbacks=[Clock()]).train()
    plain.load_state_dict({name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()})
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled="bf16" in options):
        bits = bits_per_byte(NextToken(plain.eval()), valid, CONTEXT, 200)
    return {"bits_per_byte": bits, "dtype": "bf16" if "bf16" in options else "fp32"}


def ours(folder: Path, steps: int, optimizer: str, turns: Turns) -> dict[str, Any]:
    """One side with the stage itself."""
    import torch

    from pipeline.artifacts import outside_model
    from pipeline.runtime import Runtime
    from stages import pretrain

    config = pretrain.PretrainConfig(
        model=pretrain.ModelConfig(depth=DEPTH, hidden_size=WIDTH, intermediate_size=MLP), context_length=CONTEXT,
        per_device_train_batch_size=BATCH, max_steps=steps, learning_rate=RATE, optimizer=optimizer, eval_documents=200,
        torch_compile=True, save_steps=10 * steps, eval_steps=10 * steps, sample_tokens=0,
        embedding_learning_rate=1e-2 if optimizer == "muon" else None,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as out:
        runtime = Runtime.start(Path(out), seed=0, threads=torch.get_num_threads(), quiet=True)
        asked = runtime.stop_requested

        def stop_requested() -> bool:
            turns.take()
            return asked()

        runtime.stop_requested = stop_requested  # type: ignore[method-assign]  # asked after every step
        found = pretrain.run(config, {"tokens": outside_model(folder), "init": None}, Path(out), runtime)
    return {"bits_per_byte": found["bits_per_byte"], "dtype": "bf16" if runtime.bf16 else "fp32"}


def side(name: str, folder: Path, steps: int) -> None:
    """One side, in a process of its own."""
    turns = Turns()
    if name in TRAINER:
        turns.end(trainer(folder, steps, TRAINER[name], turns))
    else:
        turns.end(ours(folder, steps, OURS[name], turns))


def products(folder: Path, bf16: bool) -> tuple[float, float]:
    """(tokens a second of the products of matrices alone, the FLOP/s of a large one)."""
    import torch

    from pipeline.hardware import product_rate
    from pipeline.model.build import flops_per_token

    rate = product_rate(torch.device("cpu"), 2048, bf16, 2.0)
    return rate / flops_per_token(model_and_data(folder)[0], CONTEXT), rate


def main() -> None:
    """Runs every side and prints the table and the ratios."""
    folder, steps = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 20
    if len(sys.argv) > 3:
        side(sys.argv[3], folder, steps)
        return
    import torch

    from pipeline.runtime import cpu_multiplies_bf16

    bf16 = cpu_multiplies_bf16()
    names = [name for name in (*TRAINER, *OURS) if bf16 or "bf16" not in name]
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {steps} steps of {BATCH} × {CONTEXT}, "
        f"{CLOCK} time",
        flush=True,
    )
    commands = {name: [sys.executable, __file__, str(folder), str(steps), name] for name in names}
    found, ends = timed(commands, steps, WARM_UP, to_the_end=True)
    for name, seconds in found.items():
        print(
            f"{name:<24} {BATCH * CONTEXT / statistics.median(seconds):>7,.0f} tokens/s  "
            f"{ends[name]['bits_per_byte']:.3f} bits per byte  {ends[name]['dtype']}"
        )
    best = min((name for name in names if name in TRAINER), key=lambda name: statistics.median(found[name]))
    for other, what in (("trainer", "trainer"), (best, f"its best ({best})")):
        pairs = ratios(found[other], found["llmpipe"])
        middle, low, high = spread(pairs)
        print(f"llmpipe / {what}: {middle:.2f} (half of the {len(pairs)} pairs within {low:.2f} and {high:.2f})")
    speed, rate = products(folder, bf16)
    print(f"the products alone, at {rate / 1e9:,.0f} GFLOP/s: {speed:,.0f} tokens/s")


if __name__ == "__main__":
    main()
