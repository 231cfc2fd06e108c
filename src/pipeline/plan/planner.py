"""Estimates for the stages of a recipe, and which settings would make one fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.artifacts import Artifact, Store
from pipeline.errors import PipelineError
from pipeline.graph import Node, Recipe
from pipeline.hardware import Device
from pipeline.lineage import Standing
from pipeline.plan import answering, evaluating, training
from pipeline.plan.site import Estimate, Site
from pipeline.plan.speed import Probe, usual_share
from pipeline.recipe import PeftConfig

GIB = 2**30
FILLED = 0.9
"""Share of the memory that a stage may take: the rest is for the driver, and for what allocation leaves unused."""
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


@dataclass(frozen=True)
class Way:
    """Fields of a stage changed so that it takes less memory, and whether its model is in shards as well."""

    changed: Mapping[str, Any]
    shards: bool = False

    def words(self, node: Node) -> str:
        """What to add to the command."""
        values = {name: "{}" if name == "peft" else str(value).lower() for name, value in self.changed.items()}
        said = [f"--set {node.name}.{name}={value}" for name, value in values.items()]
        return " ".join(["would fit with", *said, *(["--strategy fsdp"] if self.shards else [])])


class Planner:
    """Estimates for the stages of one recipe.

    shards: pretrain keeps its model in shards over the processes. probe: what measures speeds here; a share of the
    product stands for them without one. bytes_a_token: of the recipe's text, where it has been measured.
    """

    def __init__(
        self,
        recipe: Recipe,
        store: Store,
        device: Device,
        processes: int,
        shards: bool = False,
        probe: Probe | None = None,
        bytes_a_token: float | None = None,
    ) -> None:
        self.site = Site(recipe, store, device, processes, processes if shards else 1, bytes_a_token)
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
        shares = [usual_share(self.site.device, work.how, work.is_compiled) for work in found.work]
        rates = [rate or share * product for rate, share in zip(measured, shares, strict=True)]
        seconds = sum(work.flops / rate for work, rate in zip(found.work, rates, strict=True)) / processes
        is_compiled = any(work.is_compiled for work in found.work)
        source = self.rate(kind, 0.0, is_compiled)[1]
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
            and _ran_on(artifact.manifest["device"], device)
            and (cost is None or _are_like(cost, artifact.manifest["flops"] / max(1, artifact.manifest["tokens"])))
        ]

    def rate(self, kind: str, cost: float | None = None, is_compiled: bool = False) -> tuple[float, str]:
        """(FLOP/s of a stage of this kind in one process, where it is from); `cost`: its FLOPs a token, which the
        finished ones that count are like."""
        device = self.site.device
        reached = self._reached(kind, cost)
        if reached:
            rate = sorted(reached)[len(reached) // 2]
            share = rate / device.flops_per_second
            return rate, f"at the speed of {len(reached)} {kind} here before ({share:.0%} of the measured product)"
        share = usual_share(device, "train", is_compiled)
        of = f"measured product: no {kind} ran here yet" if device.is_here else "maker's peak"
        compiled = " with compiled blocks" if is_compiled and device.kind == "cuda" else ""
        guess = f" (assumed{compiled}, nothing was measured)" if device.kind != "cpu" else ""
        return share * device.flops_per_second, f"at {share:.0%} of the {of}{guess}"

    def _advice(self, node: Node, found: Estimate) -> tuple[str, ...]:
        """Which settings would make a stage fit that does not, the least costly first."""
        if found.peak <= FILLED * self.site.device.memory:
            return ()
        way = next((way for way in self._ways(node) if self._fits(node, way)), None)
        what = "no setting of this stage makes it fit: a smaller model, or a device with more memory"
        return (f"does not fit in {self.site.device.memory / GIB:.0f} GiB", way.words(node) if way else what)

    def _ways(self, node: Node) -> Iterator[Way]:
        """What takes less memory and leaves the global batch as it is, the least costly first."""
        config: Any = node.config
        fields, smaller = type(config).model_fields, list(_smaller(config))
        may_shard = node.stage.shards and self.site.processes > self.site.shards and _goes_in_shards(config)
        is_cut = [False, True] if may_shard else [False]
        last = smaller[-1] if smaller else {}
        again = {"gradient_checkpointing": True} if "gradient_checkpointing" in fields else {}
        yield from (Way({**each, **more}, cut) for more in ({}, again) for cut in is_cut for each in ({}, *smaller))
        on_gpu = self.site.device.kind == "cuda"
        if "offload" in fields and on_gpu:
            yield Way({**last, "offload": True})
        if "peft" in fields and node.inputs.get("init") and self.site.shards == 1:
            adapted = {**last, **again, **({} if config.peft else {"peft": PeftConfig()})}
            four = {"load_in_4bit": True} if "load_in_4bit" in fields and on_gpu else {}
            for more in ({}, {"shared_trunk": True}, {"dtype": "bfloat16"}, four, {"shared_trunk": True, **four}):
                if more.keys() <= fields.keys():
                    yield Way({**adapted, **more})

    def _fits(self, node: Node, way: Way) -> bool:
        try:
            config = type(node.config).model_validate({**node.config.model_dump(), **way.changed})
            other = replace(node, config=config)
            recipe = replace(self.site.recipe, nodes={**self.site.recipe.nodes, node.name: other})
            site = replace(self.site, recipe=recipe, shards=self.site.processes if way.shards else self.site.shards)
            return ESTIMATES[node.stage.type](site, other, Estimate(node.name, "")).peak <= FILLED * site.device.memory
        except (PipelineError, ValidationError):  # settings that do not go together, or rows that cannot be shared
            return False


def _ran_on(name: str, device: Device) -> bool:
    """Whether a manifest's `device` is this one: a GPU is named there as its driver does, others by their kind."""
    return name == device.name if device.kind == "cuda" else name.startswith(device.kind)


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


def _smaller(config: Any) -> Iterator[dict[str, Any]]:
    """Ever smaller micro-steps of the same batch; of ppo, whose batch is another field, smaller ones alone."""
    fields = type(config).model_fields
    rows, times = config.per_device_train_batch_size if "per_device_train_batch_size" in fields else 1, 1
    while rows % 2 == 0:
        rows, times = rows // 2, 2 * times
        found = {"per_device_train_batch_size": rows}
        if "gradient_accumulation_steps" in fields:
            found["gradient_accumulation_steps"] = config.gradient_accumulation_steps * times
        yield found
