"""Estimates for the stages of a recipe, and which settings would make one fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.artifacts import Artifact, Store
from pipeline.errors import PipelineError
from pipeline.graph import Node, Recipe
from pipeline.hardware import Device
from pipeline.lineage import Standing
from pipeline.plan import answering, training
from pipeline.plan.site import Estimate, Site
from pipeline.recipe import PeftConfig

GIB = 2**30
UTILISATION = {"cpu": 0.3, "cuda": 0.4}
"""Share of the matrix product's FLOP/s that training reaches, until a stage of the kind has run here."""
ESTIMATES = {
    "tokenize": training.tokenize,
    "pretrain": training.pretrain,
    "sft": training.rows,
    "reward": training.rows,
    "dpo": training.rows,
    "ppo": answering.ppo,
    "sample": answering.sample,
    "label": answering.label,
}


class Planner:
    """Estimates for the stages of one recipe; `shards`: pretrain keeps its model in shards over the processes."""

    def __init__(self, recipe: Recipe, store: Store, device: Device, processes: int, shards: bool = False) -> None:
        self.site = Site(recipe, store, device, processes, processes if shards else 1)

    def estimate(self, standing: Standing) -> Estimate:
        """What the stage takes, whether it stands or not."""
        node = standing.node
        found = Estimate(node.name, standing.state)
        make = ESTIMATES.get(node.stage.type)
        if make is None:
            what = (
                "a stage of your own" if "/" in node.stage.type else f"{node.stage.type} hangs on its models' answers"
            )
            return replace(found, notes=(f"not estimated: {what}",))
        unwritten = [writer for source, writer in node.rows.items() if not Path(source).exists()]
        if unwritten:
            return replace(found, notes=(f"not estimated: its rows are written by {unwritten[0]}, which has not run",))
        try:
            found = make(self.site, node, found)
        except (PipelineError, OSError) as error:
            return replace(found, notes=(f"not estimated: {error}",))
        if found.flops is not None:
            rate, source = self.rate(node.stage.type)
            seconds = found.flops / rate / self.site.processes
            found = replace(found, seconds=seconds, notes=(*found.notes, source))
        return replace(found, notes=(*found.notes, *self._advice(node, found)))

    def rate(self, kind: str) -> tuple[float, str]:
        """(FLOP/s of training in one process, where it is from)."""
        device = self.site.device
        reached = [
            artifact.manifest["flops"] / artifact.manifest["seconds"] / artifact.manifest["processes"]
            for artifact in artifacts_of(self.site.store)
            if device.is_here
            and artifact.stage == kind
            and artifact.manifest.get("flops")
            and artifact.manifest["seconds"] > 10  # a tiny run is all start and end
            and artifact.manifest["device"].startswith(device.kind)
        ]
        if reached:
            rate = sorted(reached)[len(reached) // 2]
            share = rate / device.flops_per_second
            return rate, f"at the speed of {len(reached)} {kind} here before ({share:.0%} of the measured product)"
        share = UTILISATION[device.kind]
        of = f"measured product: no {kind} ran here yet" if device.is_here else "maker's peak"
        return share * device.flops_per_second, f"at {share:.0%} of the {of}"

    def _advice(self, node: Node, found: Estimate) -> tuple[str, ...]:
        """Which settings would make a stage fit that does not, the least costly first."""
        if found.peak <= self.site.device.memory:
            return ()
        return (f"does not fit in {self.site.device.memory / GIB:.0f} GiB", *self._what_fits(node))

    def _what_fits(self, node: Node) -> Iterable[str]:
        config: Any = node.config
        fields = type(config).model_fields
        tried: dict[str, Any] = {}
        if "gradient_accumulation_steps" in fields:
            rows, steps = config.per_device_train_batch_size, config.gradient_accumulation_steps
            while rows > 1 and rows % 2 == 0:
                rows, steps = rows // 2, steps * 2
                tried = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps}
                if self._fits(node, tried):
                    return [_settings(node, tried)]
        may_shard = node.stage.shards and self.site.processes > self.site.shards and _goes_in_shards(config)
        if may_shard and self._fits(node, {}, shards=True):
            return ["would fit with --strategy fsdp"]
        if "gradient_checkpointing" in fields and not config.gradient_checkpointing:
            tried = {**tried, "gradient_checkpointing": True}
            if self._fits(node, tried):
                return [_settings(node, tried)]
        if may_shard and self._fits(node, tried, shards=True):
            return [f"{_settings(node, tried)} --strategy fsdp"]
        may_adapt = "peft" in fields and config.peft is None and not getattr(config, "train_last_layers", None)
        if may_adapt and node.inputs.get("init") and self.site.shards == 1:
            tried = {**tried, "peft": PeftConfig()}
            if self._fits(node, tried):
                return [_settings(node, tried)]
        return ["no setting of this stage makes it fit: a smaller model, or a device with more memory"]

    def _fits(self, node: Node, changed: Mapping[str, Any], shards: bool = False) -> bool:
        other = replace(node, config=node.config.model_copy(update=dict(changed)))
        recipe = replace(self.site.recipe, nodes={**self.site.recipe.nodes, node.name: other})
        site = replace(self.site, recipe=recipe, shards=self.site.processes if shards else self.site.shards)
        return ESTIMATES[node.stage.type](site, other, Estimate(node.name, "")).peak <= site.device.memory


def _goes_in_shards(config: Any) -> bool:
    """Whether pretrain takes these fields together with shards."""
    return config.peft is None and not config.auto_find_batch_size and config.attn_implementation == "auto"


def artifacts_of(store: Store) -> Iterable[Artifact]:
    """Every whole artifact under the root."""
    for manifest in sorted(store.root.glob("*/*/manifest.json")):
        try:
            found = store.find(manifest.parent.parent.name, manifest.parent.name)
        except PipelineError:
            continue
        if found is not None:
            yield found


def _settings(node: Node, changed: Mapping[str, Any]) -> str:
    values = {name: "{}" if name == "peft" else str(value).lower() for name, value in changed.items()}
    return "would fit with " + " ".join(f"--set {node.name}.{name}={value}" for name, value in values.items())
