"""Seconds until a 0.8 M model reaches 1.88 nats a character on tinyshakespeare's held-out tenth.

    python benchmarks/shakespeare.py tinyshakespeare.txt

Two sides in one run, on the machine's cores:

- the settings of nanoGPT's documented CPU command (github.com/karpathy/nanoGPT, README): GPT-2 of 4 layers, 4 heads,
  128 wide, no dropout; 12 × 64 characters a step, 2,000 steps; AdamW 1e-3 → 1e-4 by cosine, warmup 100, betas 0.9 and
  0.99, decay 0.1, clip 1; in a plain fp32 loop over transformers' GPT-2, evaluated as ours is.
- `llmpipe pretrain` on a Llama of the same size, as the recipe below; its clock is that of the stage: start, training,
  checkpoints, saving and evaluation included.

The loss is Σ nats over the held-out tenth in windows of 64 characters, over its characters (all of them one byte).
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

RECIPE = """\
run: shakespeare
stages:
  tokenize: {{data: "{file}", algorithm: characters, vocab_size: 1000}}
  pretrain:
    model: {{depth: 4, hidden_size: 128, num_attention_heads: 4, intermediate_size: 352}}
    context_length: 64
    per_device_train_batch_size: 32
    max_steps: {steps}
    optimizer: muon
    learning_rate: 1e-2
    embedding_learning_rate: 3e-2
    warmup_steps: 0.03
    lr_scheduler_type: linear
    save_steps: 10000
    logging_steps: 100
    eval_steps: 10000
"""
T, TARGET = 64, 1.88


def nats_a_character(model: GPT2LMHeadModel, valid: np.ndarray) -> float:
    """Over windows of T that share one character with their neighbours."""
    windows = [valid[start : start + T + 1] for start in range(0, len(valid) - T - 1, T)]
    rows = torch.from_numpy(np.stack(windows))
    total = 0.0
    with torch.no_grad():
        for batch in rows.split(256):
            logits = model(batch[:, :-1]).logits
            total += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return total / (len(windows) * T)


def plain(text: str) -> tuple[float, float]:
    """(seconds of training alone, held-out nats) at the first of every 250 steps that is at the target, or the last."""
    letters = {letter: index for index, letter in enumerate(sorted(set(text)))}
    ids = np.array([letters[letter] for letter in text])
    train, valid = ids[: int(0.9 * len(ids))], ids[int(0.9 * len(ids)) :]
    torch.manual_seed(1337)
    config = GPT2Config(
        vocab_size=len(letters), n_positions=T, n_embd=128, n_layer=4, n_head=4, resid_pdrop=0, embd_pdrop=0,
        attn_pdrop=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).train()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True)
    draw = np.random.default_rng(0)
    spent, loss_there = 0.0, math.inf
    for step in range(2000):
        began = time.perf_counter()
        rate = 1e-3 * (step + 1) / 101 if step < 100 else 1e-4 + 4.5e-4 * (1 + math.cos(math.pi * (step - 100) / 1900))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = draw.integers(0, len(train) - T - 1, 12)
        rows = torch.from_numpy(np.stack([train[start : start + T + 1] for start in starts]))
        loss = F.cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        spent += time.perf_counter() - began
        if (step + 1) % 250 == 0:
            loss_there = nats_a_character(model.eval(), valid)
            print(f"nanoGPT's settings, plain loop, {step + 1} steps: {loss_there:.3f} in {spent:.1f} s", flush=True)
            if loss_there <= TARGET:
                break
            model.train()
    return spent, loss_there


def ours(file: Path, steps: int) -> tuple[float, float]:
    """(seconds of the whole stage, held-out nats)."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "shakespeare.yaml"
        recipe.write_text(RECIPE.format(file=file.absolute(), steps=steps))
        command = [sys.executable, "-m", "pipeline", "run", str(recipe), "--quiet"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        manifest = json.loads((Path(folder) / "artifacts/shakespeare/pretrain/manifest.json").read_text())
    return manifest["seconds"], manifest["metrics"]["bits_per_byte"] * math.log(2)


def main() -> None:
    """Print both sides and the ratio."""
    file = Path(sys.argv[1])
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 165
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    seconds, nats = ours(file, steps)
    print(f"llmpipe pretrain, {steps} steps of 32 × {T}: {nats:.3f} nats a character in {seconds:.1f} s", flush=True)
    spent, loss = plain(file.read_text())
    if nats <= TARGET and loss <= TARGET:
        print(f"{TARGET}: {seconds:.1f} s against {spent:.1f} s: {spent / seconds:.2f} times as fast")
    elif nats <= TARGET:
        print(f"{TARGET}: {seconds:.1f} s; not reached by the plain loop in {spent:.1f} s")
    else:
        print(f"llmpipe has not reached {TARGET}: give it more steps than {steps}")


if __name__ == "__main__":
    main()
