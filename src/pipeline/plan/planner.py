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
from pipeline.plan import answering, evaluating, training
from pipeline.plan.site import Estimate, Site
from pipeline.plan.speed import SHARES, Probe
from pipeline.recipe import PeftConfig

GIB = 2**30
LIKE = 4.0
"""A run's speed is taken for a stage whose FLOPs a token are up to so many times more or less."""
ESTIMATES = {
    "tokenize": training.tokenize,
    "pretrain": training.pretrain,
    "sft": training.rows,
    "reward": training.rows,
    "dpo": training.rows,
    "ppo": answering.ppo,
    "sample": answering.sample,
    "label": answering.label,
    "eval": evaluating.evaluate,
}


class Planner:
    """Estimates for the stages of one recipe.

    shards: pretrain keeps its model in shards over the processes. probe: what measures speeds here; a share of the
    product stands for them without one.
    """

    def __init__(
        self,
        recipe: Recipe,
        store: Store,
        device: Device,
        processes: int,
        shards: bool = False,
        probe: Probe | None = None,
    ) -> None:
        self.site = Site(recipe, store, device, processes, processes if shards else 1)
        self.probe = probe

    def estimate(self, standing: Standing) -> Estimate:
        """What the stage takes, whether it stands or not."""
        node = standing.node
        found = Estimate(node.name, standing.state)
        make = ESTIMATES.get(node.stage.type)
        if make is None:
            return replace(found, notes=("not estimated: a stage of your own",))
        unwritten = [writer for source, writer in node.rows.items() if not Path(source).exists()]
        if unwritten:
            return replace(found, notes=(f"not estimated: its rows are written by {unwritten[0]}, which has not run",))
        try:
            found = make(self.site, node, found)
        except (PipelineError, OSError) as error:
            return replace(found, notes=(f"not estimated: {error}",))
        if found.flops is not None:
            found = self._timed(node.stage.type, found)
        return replace(found, notes=(*found.notes, *self._advice(node, found)))

    def _timed(self, kind: str, found: Estimate) -> Estimate:
        """The estimate with its seconds, and a note on where the speed is from."""
        assert found.flops is not None
        cost = found.flops / found.tokens if found.tokens else None
        processes, product = self.site.processes, self.site.device.flops_per_second
        if self._reached(kind, cost):  # their seconds were those of the whole stage
            rate, source = self.rate(kind, cost)
            seconds = found.flops / rate / processes
            return replace(found, seconds=seconds, beginning=0.0, notes=(*found.notes, source))
        measured = [self.probe.rate(work) if self.probe else None for work in found.work]
        shares = SHARES[self.site.device.kind]
        rates = [rate or shares[work.how] * product for rate, work in zip(measured, found.work, strict=True)]
        seconds = sum(work.flops / rate for work, rate in zip(found.work, rates, strict=True)) / processes
        source = self.rate(kind, 0.0)[1]
        if all(measured) and seconds:
            share = sum(work.flops for work in found.work) / seconds / processes / product
            source = f"at the speed of some steps of it, measured now ({share:.0%} of the measured product)"
        return replace(found, seconds=seconds + found.beginning, notes=(*found.notes, source))

    def _reached(self, kind: str, cost: float | None) -> list[float]:
        """FLOP/s a process of the finished stages of a kind on this device whose FLOPs a token are like `cost`."""
        device = self.site.device
        return [
            artifact.manifest["flops"] / artifact.manifest["seconds"] / artifact.manifest["processes"]
            for artifact in artifacts_of(self.site.store)
            if device.is_here
            and artifact.stage == kind
            and artifact.manifest.get("flops")
            and artifact.manifest["seconds"] > 10  # a tiny run is all start and end
            and artifact.manifest["device"].startswith(device.kind)
            and (cost is None or _are_like(cost, artifact.manifest["flops"] / max(1, artifact.manifest["tokens"])))
        ]

    def rate(self, kind: str, cost: float | None = None) -> tuple[float, str]:
        """(FLOP/s of a stage of this kind in one process, where it is from); `cost`: its FLOPs a token, which the
        finished ones that count are like."""
        device = self.site.device
        reached = self._reached(kind, cost)
        if reached:
            rate = sorted(reached)[len(reached) // 2]
            share = rate / device.flops_per_second
            return rate, f"at the speed of {len(reached)} {kind} here before ({share:.0%} of the measured product)"
        share = SHARES[device.kind]["train"]
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


def _are_like(cost: float, other: float) -> bool:
    """Whether two costs of a token are within `LIKE` times of each other."""
    return 0 < cost <= LIKE * other <= LIKE * LIKE * cost


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
