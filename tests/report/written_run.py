"""A run written by hand: manifests, configs, metrics and an evaluation whose every number is known."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "llmpipe": "0.1.0"}
PROMPT = [{"role": "user", "content": "What does `f` do?"}]

Rows = Sequence[Mapping[str, Any]]


def jsonl(rows: Rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_stage(
    root: Path,
    name: str,
    *,
    run: str = "demo",
    type_: str = "",
    kind: str = "causal-lm",
    config: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Sequence[str]] | None = None,
    metrics: Rows = (),
    more: Mapping[str, Any] | None = None,
    unfinished: bool = False,
    given: Sequence[str] = (),
    data: Sequence[str] = (),
) -> Path:
    """A stage's folder; `given`: the fields that are not at their defaults, `data`: those that hold data."""
    folder = root / run / (f".{name}.{'0' * 16}.partial" if unfinished else name)
    folder.mkdir(parents=True)
    config = {"seed": 0, **(config or {})}
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text(jsonl(metrics))
    if unfinished:
        return folder
    parents = {
        role: [{"reference": ref, "fingerprint": "f" * 64} for ref in refs] for role, refs in (inputs or {}).items()
    }
    manifest = {
        "schema_version": 1,
        "stage": type_ or name,
        "name": name,
        "run": run,
        "kind": kind,
        "fingerprint": f"{len(name):02d}" * 32,
        "parts": {
            "config": {field: config[field] for field in given},
            "data": {field: ["d" * 64] for field in data},
            "inputs": {},
            "code": {},
        },
        "config": config,
        "inputs": parents,
        "files": {},
        "metrics": {"parameters": 1234567.0},
        "tokens": 1000,
        "flops": 2e12,
        "seconds": 90.5,
        "processes": 1,
        "threads": 2,
        "device": "cpu (x86_64, 2 cores)",
        "versions": VERSIONS,
        "git_commit": "abc123",
        "created": "2026-01-02T03:04:05Z",
        **(more or {}),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def training(steps: int = 5, **figures: Callable[[int], Any]) -> list[dict[str, Any]]:
    """Lines of metrics at steps 10, 20, …; each figure a function of the line's number."""
    return [
        {"step": 10 * i, "time": 2.0 * i, "tokens": 100 * i, **{name: of(i) for name, of in figures.items()}}
        for i in range(1, steps + 1)
    ]


def result(model: str, task: str, metric: str, value: float, half: float, n: int = 100) -> dict[str, Any]:
    named = {"model": model, "fingerprint": "f" * 64, "task": task, "metric": metric}
    return named | {"value": value, "low": value - half, "high": value + half, "n": n}


def answer(model: str, item: int, text: str, gold: float, prompt: Any = PROMPT) -> dict[str, Any]:
    """An item of the greedy task."""
    return {
        "model": model, "task": "greedy", "item": item, "prompt": prompt, "reference": "It returns one.",
        "answer": text, "length": 5, "ended": True, "gold": gold,
    }  # fmt: skip


def write_evaluation(
    root: Path,
    results: Rows,
    items: Rows,
    *,
    run: str = "demo",
    name: str = "eval",
    baseline: str | None = None,
) -> None:
    models = list(dict.fromkeys(f"{run}/{row['model']}" for row in results))
    folder = write_stage(
        root,
        name,
        run=run,
        type_="eval",
        kind="evaluation",
        inputs={"models": models},
        config={"models": [model.partition("/")[2] for model in models], "baseline": baseline},
    )
    (folder / "results.jsonl").write_text(jsonl(results), encoding="utf-8")
    (folder / "samples.jsonl").write_text(jsonl(items), encoding="utf-8")


def write_demo(root: Path) -> None:
    """The artifacts of `demo`: tokenize, pretrain, sft, ppo, dpo, and an evaluation of the last three."""
    write_stage(root, "tokenize", kind="tokens", more={"flops": 0.0, "tokens": 5000, "seconds": 10.0})
    write_stage(
        root,
        "pretrain",
        inputs={"tokens": ["demo/tokenize"]},
        config={"tokens": "tokenize", "max_steps": 50, "learning_rate": 0.01},
        given=["learning_rate"],
        metrics=training(loss=lambda i: 5 - i, learning_rate=lambda i: 0.01 / i, mfu=lambda i: 0.25),
    )
    write_stage(root, "sft", inputs={"init": ["demo/pretrain"]}, metrics=training(loss=lambda i: 3 - i / 10))
    write_stage(
        root,
        "ppo",
        inputs={"init": ["demo/sft"]},
        metrics=training(
            score=lambda i: i, reward=lambda i: max(i - 1, 1) / 2, sqrt_kl=lambda i: i / 2, kl=lambda i: i * i / 4,
            seconds_generate=lambda i: 1.5, seconds_train=lambda i: 2.5, length=lambda i: 20 + i,
        ),
        more={"seconds": 3600.0, "processes": 2},
    )  # fmt: skip
    write_stage(root, "dpo", inputs={"init": ["demo/sft"]}, config={"beta": 0.1, "init": "sft"})
    results = [
        result(model, "greedy", "gold", gold, 0.05) for model, gold in (("sft", 0.2), ("ppo", 0.5), ("dpo", 0.52))
    ]
    items = [
        answer(model, i, f"{model} answers {i}", gold)
        for model, gold in (("sft", 0.2), ("ppo", 0.5), ("dpo", 0.52))
        for i in range(20)
    ]
    write_evaluation(root, results, items)
