"""The model card (README.md) of an exported model, from manifests and results alone.

What the card says was measured is what an evaluation of the same run measured on this very fingerprint. Local data are
named by their files' names, never by where they lie.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.artifacts import Artifact, Store
from pipeline.data.hub_rows import HUB
from pipeline.data.sources import BUILT_IN, short_name
from pipeline.errors import PipelineError
from pipeline.evals.table import has_interval
from pipeline.progress import clock

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

TRAINED = {
    "pretrain": "pretrained from scratch on text",
    "sft": "fine-tuned on conversations (supervised)",
    "reward": "trained to score answers on preferences",
    "ppo": "optimised by reinforcement learning",
    "dpo": "optimised on preferences directly",
}
SHOWN_RESULTS = 40
USE = """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH")
ids = IDS
print(tokenizer.decode(model.generate(**ids, max_new_tokens=64)[0]))
```"""
ASK = """tokenizer.apply_chat_template(
    [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)"""
CONTINUE = 'tokenizer("Once", return_tensors="pt")'


@dataclass(frozen=True)
class Step:
    """One artifact that a model came from."""

    role: str
    reference: str
    fingerprint: str
    artifact: Artifact | None
    """None where it is no longer in the store as it was."""


def card(store: Store, artifact: Artifact, name: str) -> str:
    """The whole README.md: a YAML header as the hub reads it, and what there is to know."""
    from huggingface_hub import ModelCardData

    steps = lineage(store, artifact)
    results = measured(artifact)
    is_reward = artifact.kind == "reward-model"
    bases = [step.reference.removeprefix(HUB).partition("@")[0] for step in steps if step.reference.startswith(HUB)]
    data = data_of(steps)
    header = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-classification" if is_reward else "text-generation",
        license="other",
        license_name="not-yet-chosen",
        base_model=bases or None,
        datasets=sorted({source.removeprefix(HUB).partition("@")[0] for source in data if source.startswith(HUB)})
        or None,
        tags=["llmpipe", artifact.stage] if artifact.stage else ["llmpipe"],
        model_name=name,
        eval_results=_eval_results(results, is_reward),
    )
    parts = [f"---\n{header.to_yaml()}\n---", f"# {name}", *_body(artifact, steps, results, data)]
    return "\n\n".join(parts) + "\n"


def lineage(store: Store, artifact: Artifact) -> list[Step]:
    """The artifact and all it came from, itself first, each once."""
    found = {artifact.fingerprint: Step("", artifact.reference, artifact.fingerprint, artifact)}
    waiting = [artifact]
    while waiting:
        manifest = waiting.pop(0).manifest
        for role, parents in manifest.get("inputs", {}).items():
            for parent in parents:
                if parent["fingerprint"] in found:
                    continue
                there = _as_it_was(store, parent)
                found[parent["fingerprint"]] = Step(role, parent["reference"], parent["fingerprint"], there)
                waiting += [there] if there is not None and there.manifest else []
    return list(found.values())


def _as_it_was(store: Store, parent: dict[str, str]) -> Artifact | None:
    if parent["reference"].startswith(HUB):
        return None
    try:
        found = store.resolve(parent["reference"])
    except PipelineError:
        return None
    return found if found.fingerprint == parent["fingerprint"] else None


def data_of(steps: list[Step]) -> dict[str, list[str]]:
    """Source -> the stages that read it; of local files the name alone."""
    found: dict[str, list[str]] = {}
    for step in steps:
        for field, value in (step.artifact.manifest.get("config", {}) if step.artifact else {}).items():
            for entry in value if isinstance(value, list) else []:
                if isinstance(entry, dict) and "source" in entry:
                    source = entry["source"]
                    named = source if source in BUILT_IN or source.startswith(HUB) else short_name(source)
                    where = f"{step.reference.rpartition('/')[2]}{'' if field == 'data' else f'.{field}'}"
                    found.setdefault(named, []).append(where)
    return found


def measured(artifact: Artifact) -> list[dict[str, Any]]:
    """Lines of results.jsonl of the run's evaluations that are of this fingerprint."""
    found = []
    for manifest in sorted(artifact.path.parent.glob("*/manifest.json")) if artifact.manifest else []:
        results = manifest.with_name("results.jsonl")
        if results.exists() and json.loads(manifest.read_text(encoding="utf-8"))["kind"] == "evaluation":
            rows = map(json.loads, results.read_bytes().splitlines())
            of_it = [row for row in rows if row["fingerprint"] == artifact.fingerprint and _is_number(row)]
            found += [row | {"by": manifest.parent.name} for row in of_it]
    return found


def _is_number(row: dict[str, Any]) -> bool:
    """Whether there is a value; a figure that nothing could be said of has none."""
    return row["value"] is not None and math.isfinite(row["value"])


def _eval_results(results: list[dict[str, Any]], is_reward: bool) -> list[EvalResult] | None:
    """The header's figures, a data set a task: the hub groups them by the data set's type and configuration, and names
    a group as the first in it."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-classification" if is_reward else "text-generation",
            dataset_type="llmpipe",
            dataset_config=f"{row['by']}/{row['task']}",
            dataset_name=f"held out ({row['by']}, {row['task']})",
            metric_type=row["metric"],
            metric_value=row["value"],
            metric_name=f"{row['task']} {row['metric']}"
            + (f", 95 % interval {_interval(row)}" if has_interval(row) else ""),
        )
        for row in results
    ] or None


def _interval(row: dict[str, Any]) -> str:
    return f"{row['low']:.4g} to {row['high']:.4g}" if has_interval(row) else "–"


def _body(
    artifact: Artifact, steps: list[Step], results: list[dict[str, Any]], data: dict[str, list[str]]
) -> Iterator[str]:
    does = TRAINED.get(artifact.stage, "")
    if artifact.stage == "pretrain" and artifact.manifest["inputs"].get("init"):
        does = "trained further on text"
    yield f"{'A reward model' if artifact.kind == 'reward-model' else 'A language model'}{f', {does}' if does else ''}."
    yield "> **License: not yet chosen.** Set `license` above before others may use this, and check the data's own."
    if artifact.kind == "causal-lm":
        yield USE.replace("IDS", ASK if artifact.stage != "pretrain" and artifact.template_hash else CONTINUE)
    yield "## How it was made\n\n" + "\n".join(_made(steps))
    if data:
        lines = [f"- `{source}` ({', '.join(dict.fromkeys(stages))})" for source, stages in data.items()]
        yield "## Data\n\n" + "\n".join(lines)
    yield "## Measured\n\n" + "\n".join(_table(results))
    yield "## Limits\n\n" + "\n".join(_limits(artifact, results))
    if artifact.manifest:
        versions = ", ".join(f"{name} {version}" for name, version in artifact.manifest["versions"].items())
        commit = artifact.manifest.get("git_commit") or "none"
        yield f"## Versions\n\n{versions}; git commit {commit}; fingerprint `{artifact.fingerprint}`."


def _made(steps: list[Step]) -> Iterator[str]:
    """A line an artifact, the first first."""
    yield "| artifact | for | stage | tokens | FLOPs | time | device |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for step in reversed(steps):
        manifest = step.artifact.manifest if step.artifact else {}
        if not manifest:
            name = step.reference if step.reference.startswith(HUB) else step.reference.rpartition("/")[2]
            yield f"| `{name}` | {step.role} | from outside, `{step.fingerprint[:12]}` | | | | |"
            continue
        flops = f"{manifest['flops']:.3g}" if manifest.get("flops") else ""
        tokens = f"{manifest['tokens']:,}" if manifest.get("tokens") else ""
        cells = (manifest["stage"], tokens, flops, clock(manifest["seconds"]), manifest["device"])
        yield f"| `{step.reference.rpartition('/')[2]}` | {step.role} | {' | '.join(cells)} |"


def _table(results: list[dict[str, Any]]) -> Iterator[str]:
    if not results:
        yield "Nothing: no evaluation of its run has measured this model."
        return
    yield "On held-out data, with 95 % intervals; n items."
    yield ""
    yield "| task | metric | value | interval | n |"
    yield "| --- | --- | --- | --- | --- |"
    for row in results[:SHOWN_RESULTS]:
        yield f"| {row['task']} | {row['metric']} | {row['value']:.4g} | {_interval(row)} | {row['n']:,} |"
    if len(results) > SHOWN_RESULTS:
        yield f"\n{len(results) - SHOWN_RESULTS} more are in the header."


def _limits(artifact: Artifact, results: list[dict[str, Any]]) -> Iterator[str]:
    config = json.loads((artifact.model / "config.json").read_text(encoding="utf-8"))
    reach = config.get("max_position_embeddings")
    if reach:
        yield f"- It reads {reach:,} tokens at most."
    yield "- It knows what its data say and no more; it can be wrong with confidence."
    yield "- It has not been tested for safety, bias or the leaking of its data."
    if results:
        yield "- The intervals are of the noise of the items; another training seed is another model."
    if artifact.kind == "reward-model":
        yield "- Its scores are of this tokenizer and chat template; a policy can learn to please it and no one else."
