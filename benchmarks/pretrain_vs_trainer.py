"""Tokens a second of `llmpipe pretrain` against transformers' Trainer, and the held-out loss after equal tokens.

    llmpipe tokenize demo && python benchmarks/pretrain_vs_trainer.py artifacts/demo/tokenize [steps]

One Llama (256 wide, 6 layers, vocabulary 4,096: 5.5 M), the same samples in the same order (32 × 256 tokens a step),
AdamW and the same schedule on every side, each in a process of its own, one after another in one run:

- trainer: TrainingArguments' defaults (fp32);
- trainer, best: bf16 autocast and torch.compile, which is its fastest here;
- llmpipe: the recipe's defaults and `torch_compile: true`; and with `optimizer: muon`, which the Trainer has not.

Speed is over the second half of the steps, so that compiling and warming up are not in it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CONTEXT, BATCH, DEPTH, WIDTH, MLP = 256, 32, 6, 256, 704
RATE = 2e-3


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


def trainer(folder: Path, steps: int, best: bool) -> dict[str, Any]:
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
        times: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            output_dir=out, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=RATE, use_cpu=True,
            lr_scheduler_type="cosine", warmup_steps=0.02, weight_decay=0.1, adam_beta2=0.95, report_to="none",
            save_strategy="no", logging_strategy="no", train_sampling_strategy="sequential", disable_tqdm=True,
            bf16=best, torch_compile=best,
        )  # fmt: skip
        clock = Clock()
        plain = model_and_data(folder)[0]
        Trainer(model=model, args=arguments, train_dataset=Samples(), callbacks=[clock]).train()
    half = len(clock.times) // 2
    speed = (len(clock.times) - 1 - half) * BATCH * CONTEXT / (clock.times[-1] - clock.times[half])
    plain.load_state_dict({name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()})
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=best):
        bits = bits_per_byte(NextToken(plain.eval()), valid, CONTEXT, 200)
    return {"tokens_per_second": speed, "bits_per_byte": bits, "dtype": "bf16" if best else "fp32", "compiled": best}


def ours(folder: Path, steps: int, optimizer: str) -> dict[str, Any]:
    """One side with the stage itself."""
    from pipeline.artifacts import outside_model
    from pipeline.runtime import Runtime
    from stages import pretrain

    config = pretrain.PretrainConfig(
        model=pretrain.ModelConfig(depth=DEPTH, hidden_size=WIDTH, intermediate_size=MLP), context_length=CONTEXT,
        per_device_train_batch_size=BATCH, max_steps=steps, learning_rate=RATE, optimizer=optimizer, eval_documents=200,
        torch_compile=True, logging_steps=1, save_steps=10 * steps, eval_steps=10 * steps, sample_tokens=0,
        embedding_learning_rate=1e-2 if optimizer == "muon" else None,
    )  # fmt: skip
    import torch

    with tempfile.TemporaryDirectory() as out:
        runtime = Runtime.start(Path(out), seed=0, threads=torch.get_num_threads(), quiet=True)
        found = pretrain.run(config, {"tokens": outside_model(folder), "init": None}, Path(out), runtime)
        lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    times = [line["time"] for line in lines if "loss" in line]
    half = len(times) // 2
    speed = (len(times) - 1 - half) * BATCH * CONTEXT / (times[-1] - times[half])
    return {
        "tokens_per_second": speed,
        "bits_per_byte": found["bits_per_byte"],
        "dtype": "bf16" if runtime.bf16 else "fp32",
        "compiled": True,
    }


SIDES = {
    "trainer": lambda folder, steps: trainer(folder, steps, best=False),
    "trainer, best": lambda folder, steps: trainer(folder, steps, best=True),
    "llmpipe": lambda folder, steps: ours(folder, steps, "adamw"),
    "llmpipe, muon": lambda folder, steps: ours(folder, steps, "muon"),
}


def main() -> None:
    """Run every side in its own process and print the table and the ratios."""
    folder, steps = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 40
    if len(sys.argv) > 3:
        print(json.dumps(SIDES[sys.argv[3]](folder, steps)))
        return
    import torch

    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {steps} steps of {BATCH} × {CONTEXT}")
    found = {}
    for name in SIDES:
        command = [sys.executable, __file__, str(folder), str(steps), name]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        each = found[name] = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{name:<14} {each['tokens_per_second']:>7,.0f} tokens/s  {each['bits_per_byte']:.3f} bits per byte  "
            f"{each['dtype']}{', compiled' if each['compiled'] else ''}",
            flush=True,
        )
    for other in ("trainer", "trainer, best"):
        ratio = found["llmpipe"]["tokens_per_second"] / found[other]["tokens_per_second"]
        print(f"llmpipe / {other}: {ratio:.2f}")


if __name__ == "__main__":
    main()
