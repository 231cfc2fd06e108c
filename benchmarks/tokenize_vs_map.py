"""Text on disk to tokens on disk: `llmpipe tokenize` against `datasets.map` over `encode_batch`, in one run.

    python benchmarks/tokenize_vs_map.py [processes ...]        # 1 and 2 unless named

Both sides begin with pydocs as one jsonl file and one tokenizer.json (byte-level BPE, 8,192 tokens, trained on it
beforehand), and each run is a process of its own whose clock starts when its libraries are imported:

- map: load_dataset("json"), map(batched=True) over `Tokenizer.encode_batch`, save_to_disk; an empty cache every time;
- llmpipe: the tokenize stage with `tokenizer:` given, everything it does: reading, dividing, counting, checking
  tiktoken against tokenizer.json, encoding, writing train.ds and valid.ds.

The sides take turns, three times each; the medians count. `tokenizers` may start no threads of its own
(TOKENIZERS_PARALLELISM=false), so that n processes are n on either side. Special strings are read as text by both,
and both have to make the same number of tokens.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

VOCABULARY, PAIRS = 8192, 3


def prepare(folder: Path) -> float:
    """Writes corpus.jsonl and the tokenizer; returns the corpus in MB of text."""
    from pipeline.data import pydocs
    from pipeline.data.corpus import text_bytes
    from pipeline.data.tokenizers import train_bpe

    texts = [text for text in pydocs.corpus("all") if text.strip()]
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    train_bpe(iter(texts), VOCABULARY).save_pretrained(folder / "tokenizer")
    return sum(map(text_bytes, texts)) / 1e6


def with_map(folder: Path, out: Path, processes: int) -> dict[str, Any]:
    """One run of the peer."""
    import datasets
    from tokenizers import Tokenizer

    datasets.disable_progress_bars()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        tokenizer.encode_special_tokens = True  # here, since a worker's copy has forgotten it
        found = tokenizer.encode_batch(batch["text"], add_special_tokens=False)
        return {"input_ids": [encoding.ids for encoding in found]}

    many = processes if processes > 1 else None
    start = time.perf_counter()
    rows = datasets.load_dataset(
        "json", data_files=str(folder / "corpus.jsonl"), split="train", cache_dir=str(out / "cache")
    )
    rows = rows.map(encode, batched=True, num_proc=many, remove_columns=["text"])
    rows.save_to_disk(str(out / "tokens"), num_proc=many)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": sum(len(ids) for ids in rows.with_format("numpy")["input_ids"])}


def ours(folder: Path, out: Path, processes: int) -> dict[str, Any]:
    """One run of the stage."""
    import transformers

    from pipeline.artifacts import Artifact
    from pipeline.data import corpus, encoding, tokenizers
    from pipeline.runtime import Runtime
    from stages import tokenize

    assert all((transformers, corpus, encoding, tokenizers)), "imported before the clock starts"
    runtime = Runtime.start(out, seed=0, threads=1, quiet=True)
    given = Artifact("tokenizer", folder / "tokenizer", "causal-lm", "", {})
    config = tokenize.TokenizeConfig(
        data=str(folder / "corpus.jsonl"), tokenizer=str(folder / "tokenizer"), num_proc=processes
    )
    start = time.perf_counter()
    found = tokenize.run(config, {"tokenizer": given}, out, runtime)
    seconds = time.perf_counter() - start
    separators = found["train_documents"] + found["valid_documents"]
    return {"seconds": seconds, "tokens": int(found["train_tokens"] + found["valid_tokens"] - separators)}


SIDES = {"map": with_map, "llmpipe": ours}


def timed(side: str, folder: Path, processes: int) -> dict[str, Any]:
    """One run of one side in a process of its own, its output thrown away."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        command = [sys.executable, __file__, side, str(folder), out, str(processes)]
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found


def main() -> None:
    """Prints both sides' MB/s and their ratio for each number of processes."""
    if sys.argv[1:2] and sys.argv[1] in SIDES:
        side, folder, out, processes = sys.argv[1:]
        print(json.dumps(SIDES[side](Path(folder), Path(out), int(processes))))
        return
    with tempfile.TemporaryDirectory() as name:
        megabytes = prepare(Path(name))
        print(f"pydocs: {megabytes:.1f} MB, {os.cpu_count()} cores, medians of {PAIRS}", flush=True)
        for processes in [int(text) for text in sys.argv[1:]] or [1, 2]:
            runs = [{side: timed(side, Path(name), processes) for side in SIDES} for _ in range(PAIRS)]
            counts = {run[side]["tokens"] for run in runs for side in SIDES}
            assert len(counts) == 1, f"the sides made different numbers of tokens: {counts}"
            speed = {side: megabytes / statistics.median(run[side]["seconds"] for run in runs) for side in SIDES}
            print(
                f"{processes} process{'es' if processes > 1 else ''}: map {speed['map']:.2f} MB/s, "
                f"llmpipe {speed['llmpipe']:.2f} MB/s, ratio {speed['llmpipe'] / speed['map']:.2f}; "
                f"{counts.pop():,} tokens on both sides",
                flush=True,
            )


if __name__ == "__main__":
    main()
