"""What a step of `llmpipe sft` costs beside raw TRL: SFTTrainer on the same model, the same batches in the same order.

    CLOCK=processor OMP_NUM_THREADS=1 python benchmarks/sft_vs_trl.py [steps]

A Llama of 5.5 M (256 wide, 6 layers, vocabulary 4,096) and pydocs' question-answer rows, 8 a step, AdamW, no gradient
checkpointing, a line of metrics every 10 steps, and the precision that llmpipe takes here, on every side:

- trl: SFTTrainer as it comes, given llmpipe's rows (ids and labels) in llmpipe's order;
- llmpipe: the stage itself;
- llmpipe, trl's head and attention: the stage without the two things that it does otherwise than TRL, so that what is
  left is what the frame costs (progress, metrics, the check for a signal, the rows' order).

Each side is a process of its own and they take turns, step by step, so that a busy machine is as busy for all. Ratios
are of pairs of steps on one batch, after WARM_UP of them.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from turns import CLOCK, Turns, ratios, spread, timed

ROWS, BATCH, RATE, WARM_UP = 4000, 8, 1e-3, 5
SIDES = ("trl", "llmpipe", "llmpipe, trl's head and attention")


def prepare(folder: Path) -> None:
    """Writes the rows, the tokenizer and the model."""
    import torch

    from pipeline.data.chat import stop_token_id
    from pipeline.data.formats import read_rows
    from pipeline.data.tokenizers import train_bpe
    from pipeline.model.build import initialise, save_model
    from pipeline.model.presets import build_model, shape_of
    from pipeline.recipe import DataEntry

    rows = read_rows((DataEntry(source="pydocs", limit=ROWS),), "messages")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = train_bpe((message["content"] for row in rows for message in row["messages"]), 4096)
    tokenizer.save_pretrained(folder / "tokenizer")
    shape = shape_of({"depth": 6, "hidden_size": 256, "intermediate_size": 704}, 256, len(tokenizer))
    model = build_model("llama", shape, {})
    initialise(model, torch.Generator().manual_seed(0))
    save_model(
        model, folder / "model", folder / "tokenizer", [stop_token_id(tokenizer)], int(tokenizer.pad_token_id or 0)
    )


def side(name: str, folder: Path, out: Path, steps: int) -> None:
    """One side, in a process of its own."""
    import torch

    from pipeline import trainer as adapter
    from pipeline.artifacts import outside_model
    from pipeline.data.chat import stop_token_id
    from pipeline.model import trained_positions
    from pipeline.recipe import DataEntry
    from pipeline.runtime import Runtime
    from pipeline.schedule import schedule
    from stages import sft

    turns = Turns()
    config = sft.SFTConfig(
        data=(DataEntry(source=str(folder / "rows.jsonl")),), held_out=0.0, learning_rate=RATE, max_length=256,
        per_device_train_batch_size=BATCH, max_steps=steps, save_steps=10 * steps,
    )  # fmt: skip
    runtime = Runtime.start(out, seed=0, threads=torch.get_num_threads(), quiet=True)
    init = outside_model(folder / "model")
    if name != "trl":
        asked = runtime.stop_requested

        def stop_requested() -> bool:
            turns.take()
            return asked()

        runtime.stop_requested = stop_requested  # type: ignore[method-assign]  # asked after every step
        if name != "llmpipe":
            trained_positions.trim_head = lambda model: None  # type: ignore[assignment]
            adapter.use_plain_products = lambda *_: None  # type: ignore[assignment]
        sft.run(config, {"init": init}, out, runtime)
        return
    tokenizer = adapter.load_padded_tokenizer(init.model)
    rows = sft._fit(sft._encode(config, tokenizer, "train", runtime), stop_token_id(tokenizer), 256)
    order = schedule([len(row["input_ids"]) for row in rows], config, runtime).order
    raw(init.model, tokenizer, [rows[index] for index in order], out, steps, turns, bf16=runtime.bf16)


def raw(
    model: Path, tokenizer: Any, rows: list[dict[str, Any]], out: Path, steps: int, turns: Turns, *, bf16: bool
) -> None:
    """TRL's trainer as its users call it, on these rows."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.take()

    arguments = SFTConfig(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=RATE, use_cpu=True,
        bf16=bf16, gradient_checkpointing=False, max_length=256, warmup_steps=0.03, report_to="none",
        save_strategy="no", logging_steps=10, train_sampling_strategy="sequential", disable_tqdm=True,
    )  # fmt: skip
    SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Clock()],
    ).train()


def commands(folder: Path, steps: int) -> dict[str, list[str]]:
    """Each side's own process."""
    found = {}
    for place, name in enumerate(SIDES):
        out = folder / f"out{place}"
        out.mkdir()
        found[name] = [sys.executable, __file__, str(steps), name, str(folder), str(out)]
    return found


def main() -> None:
    """Runs the sides and prints their medians and ratios."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    if len(sys.argv) > 2:
        side(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), steps)
        return
    import torch

    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {steps} steps of {BATCH} rows, {CLOCK} time")
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        found, _ = timed(commands(Path(folder), steps), steps, WARM_UP)
    for name, values in found.items():
        pairs = ratios(values, found["trl"])
        middle, low, high = spread(pairs)
        print(
            f"{name:<34} {1000 * statistics.median(values):6.1f} ms a step, {middle:.3f} of trl's "
            f"(half of the {len(pairs)} pairs within {low:.3f} and {high:.3f})"
        )


if __name__ == "__main__":
    main()
