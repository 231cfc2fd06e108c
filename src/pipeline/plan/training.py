"""What tokenize, pretrain and the stages over rows (sft, reward, dpo) take."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from pipeline.data.encoding import processes_for
from pipeline.data.files import COMPRESSED, kind
from pipeline.data.formats import read_rows
from pipeline.data.hub_rows import HUB
from pipeline.data.looking import UNPACKED
from pipeline.data.shards import token_dtype
from pipeline.data.sources import local_files
from pipeline.graph import Node
from pipeline.model.build import count_parameters, flops_per_token
from pipeline.model.freezing import train_last
from pipeline.model.losses import CHUNK, CPU_CHUNK, SMALL
from pipeline.model.memory import Load, adapter_parameters, memory_of
from pipeline.model.micro_steps import CACHED_TOKENS
from pipeline.model.scaling import CHINCHILLA, large_batch
from pipeline.plan.lengths import answer_share, si
from pipeline.plan.site import SAMPLED_ROWS, Estimate, Site
from pipeline.plan.speed import Work, head_flops
from pipeline.recipe import DataEntry

START = 2.0
"""Seconds in which a stage is begun, measured and written."""
ENCODED = 7000
"""Rows that are made into tokens in a second."""
READ_A_PROCESS = 3e6
"""Bytes of text that a process of tokenize takes in a second."""
KEPT = (
    "; not counted is what `datasets` keeps of all of it in its cache (about 3 bytes a token as downloaded, "
    "5 unpacked), nothing with `streaming: true`"
)
MIB = 2**20
LIBRARIES = {"pretrain": 335.0 * MIB, "sft": 400.0 * MIB, "reward": 400.0 * MIB, "dpo": 400.0 * MIB}
"""Bytes of a process that has imported what the stage needs and made its first step, without model and data: the
interpreter, torch, transformers, and TRL with its data sets (measured on Linux, Python 3.11, torch 2.13)."""
TRAINED_LOGIT = 16.0
"""Bytes of a logit in TRL's losses on a CPU: itself, its log-probability, the probability, and their product."""
BUILT_IN_BYTES = {"pydocs": 30e6, "arithmetic": 1.1e6}


def tokenize(site: Site, node: Node, found: Estimate) -> Estimate:
    """Time and disk by the bytes of the data. How much a dataset of the hub holds is not known before it is here: as
    much as pretrain reads of it once is counted then, and it is said."""
    config: Any = node.config
    on_hub = [entry.source for entry in config.data if entry.source.startswith(HUB)]
    size = sum(_bytes_of(entry) for entry in config.data if entry.source not in on_hub)
    tokens, notes = size / site.bytes_a_token(), tuple[str, ...]()
    if on_hub:
        read = _read_of(site, node.name)
        if not read:
            return replace(found, notes=("not estimated: the size of a hub dataset is known once it is here",))
        tokens, size = max(tokens, read), max(size, read * site.bytes_a_token())
        kept = any(entry.source.startswith(HUB) and not entry.streaming for entry in config.data)
        notes = (f"as if {', '.join(on_hub)} held the {si(read)} tokens that pretrain reads, once" + KEPT * kept,)
    processes = config.num_proc or processes_for(int(size))
    if processes > 1:
        notes += (f"at {READ_A_PROCESS / 1e6:.0f} MB/s a process, {processes} of them (num_proc)",)
    disk = 1.1 * tokens * token_dtype(site.vocabulary(node.name)).itemsize
    return replace(found, tokens=tokens, seconds=size / READ_A_PROCESS / processes, disk=disk, notes=notes)


def _bytes_of(entry: DataEntry) -> float:
    """Text in a local or built-in source, about."""
    if entry.source in BUILT_IN_BYTES:
        return BUILT_IN_BYTES[entry.source]
    sizes = [(path, path.stat().st_size) for path in local_files(entry)]
    return float(sum(size * (UNPACKED if _is_packed(path) else 1.0) for path, size in sizes))


def _is_packed(path: Path) -> bool:
    return path.suffix in COMPRESSED or kind(path) == ".parquet"


def _read_of(site: Site, name: str) -> float:
    """Tokens of the shards `name` that a pretrain stage of the recipe reads at most."""
    nodes = [node for node in site.recipe.nodes.values() if node.inputs.get("tokens") == (name,)]
    configs: list[Any] = [node.config for node in nodes if node.stage.type == "pretrain"]
    return max((float(_steps_tokens(config)) for config in configs), default=0.0)


def _steps_tokens(config: Any) -> int:
    """Tokens of a pretrain stage's steps."""
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return int(config.max_steps * batch * config.context_length)


def pretrain(site: Site, node: Node, found: Estimate) -> Estimate:
    """The steps of the recipe; beside them what the Chinchilla law says of this split, and the epochs."""
    config: Any = node.config
    model = site.model(node.name)
    assert model is not None
    total, counted = count_parameters(model)
    tokens = float(_steps_tokens(config))
    rows = site.micro_step(node)
    on_cpu = site.device.kind == "cpu"
    while on_cpu and rows % 2 == 0 and rows * config.context_length > CACHED_TOKENS:
        rows //= 2  # as the stage does, so that they stay in the cache
    chunk = CPU_CHUNK if on_cpu else CHUNK
    trained, share = _trained(model, config)
    teacher, bf16 = site.size_of(node.inputs.get("teacher")), site.bf16(config)
    load = Load(
        rows,
        config.context_length,
        trained,
        _moments(config),
        bf16,
        config.gradient_checkpointing,
        logits=min(chunk, rows * config.context_length),
        others=teacher / 2 if bf16 else teacher,  # held in two bytes each then
        shards=site.shards,
        compiled=bool(config.torch_compile),
        on_cpu=on_cpu,
        libraries=LIBRARIES["pretrain"],
        logit=8.0 if on_cpu and not bf16 and rows * config.context_length <= chunk else None,  # no chunk before it
        accumulates=rows < config.per_device_train_batch_size * config.gradient_accumulation_steps // site.processes,
        copies=config.save_steps < config.max_steps,
    )
    best = CHINCHILLA.best_split(6 * counted * tokens)
    notes = [
        f"{tokens / counted:.1f} tokens a parameter; the best of these FLOPs has {best[1] / best[0]:.0f} "
        f"({si(best[0])} parameters, {si(best[1])} tokens)"
    ]
    have = _tokens_there(site, node)
    if have is not None:
        notes.append(f"{tokens / have:.2f} epochs of {si(have)} tokens")
    if config.init is None and (large := large_batch(tokens / config.max_steps, tokens)):
        notes.append(large)
    in_range = counted >= 40e6  # smaller ones lie outside of what the law was fitted to
    flops = tokens * (flops_per_token(model, config.context_length) * share + 2 * teacher)
    is_compiled = config.torch_compile is not False and site.device.kind == "cuda"
    work = Work("train", model, flops, rows, config.context_length, bf16, 1.0, config.optimizer, is_compiled)
    return replace(
        found,
        parameters=total,
        tokens=tokens,
        flops=flops,
        work=(work,),
        beginning=START,
        memory=memory_of(model, load),
        disk=4 * total + 3 * (4 + load.moments) * trained,
        loss=CHINCHILLA.loss(counted, tokens) if in_range else None,
        notes=tuple(notes),
    )


def rows(site: Site, node: Node, found: Estimate) -> Estimate:
    """sft, reward and dpo: rows of about the mean length of the data's first ones."""
    config: Any = node.config
    model = site.model(node.inputs["init"][0])
    if model is None:
        return replace(found, notes=("not estimated: what it starts from is not known",))
    is_reward = node.stage.type == "reward"
    objective = config.objective if node.stage.type == "dpo" else ""
    layout = {"sft": "messages", "reward": "ranked"}.get(node.stage.type, "preference")
    data = read_rows(config.data, "unpaired" if objective == "kto" else layout, held_out=config.held_out)
    members = config.ensemble if is_reward else 1
    length = min(config.max_length, site.row_length(data))
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * len(data) / batch)
    sides: float = 2 if layout == "preference" and objective != "kto" else 1
    if is_reward:
        sides = sum(len(row["answers"]) for row in data) / len(data)
    tokens = members * steps * batch * sides * length
    total, _ = count_parameters(model)
    layers = getattr(config, "train_last_layers", None)
    trained, share = _trained(model, config, layers)
    once = min(1.0, len(data) / (steps * batch))  # the reference reads a row once, however many the epochs
    beside = {"dpo": once / 3, "kto": 1.0}.get(objective, 0.0)  # its forward; kto: of each pair, and mismatched ones
    at_once = site.micro_step(node)
    on_device = at_once * math.ceil(sides)
    longest = min(config.max_length, round(2 * length))
    teacher, bf16 = site.size_of(node.inputs.get("teacher")), site.bf16(config)
    on_cpu, logits = site.device.kind == "cpu", 0.0 if is_reward else float(on_device * longest)
    if on_cpu:  # of trained positions alone there, and so many at once
        logits = min(logits * answer_share(data[:SAMPLED_ROWS]), SMALL / model.config.get_text_config().vocab_size)
    load = Load(
        on_device,
        longest,
        trained,
        _moments(config) * (0.5 if config.dtype == "bfloat16" and not config.peft else 1.0),
        bf16,
        config.gradient_checkpointing,
        logits=logits,
        others=teacher / 2 if bf16 else teacher,  # held in two bytes each then
        layers=layers,
        four_bit=getattr(config, "load_in_4bit", False),
        weight=2.0 if config.dtype == "bfloat16" else 4.0,
        on_cpu=on_cpu,
        libraries=LIBRARIES[node.stage.type],
        logit=TRAINED_LOGIT if on_cpu else None,
        accumulates=config.gradient_accumulation_steps > 1,
    )
    a_token = flops_per_token(model, round(length)) - (head_flops(model) if is_reward else 0.0)
    flops = tokens * (a_token * (share + beside) + 2 * teacher)
    head = 0.0 if is_reward else 0.5
    work = Work("train", model, flops, round(at_once * sides), max(2, round(length)), bf16, head, config.optimizer)
    return replace(
        found,
        parameters=total,
        tokens=tokens,
        flops=flops,
        work=(work,),
        beginning=START + len(data) * sides / ENCODED,
        memory=memory_of(model, load),
        disk=members * 4 * total + 3 * (4 + load.moments) * trained,
        notes=(f"{len(data):,} rows of about {length * sides:.0f} tokens, {steps * batch / len(data):.2f} epochs",),
    )


def _trained(model: PreTrainedModel, config: Any, layers: int | None = None) -> tuple[float, float]:
    """(parameters with a gradient, FLOPs a token as a share of training all): under adapters the gradients of frozen
    weights are not worked out, and below the last `layers` blocks nothing goes back."""
    total = float(count_parameters(model)[0])
    if config.peft:
        return adapter_parameters(model, config.peft.r), 2 / 3
    if layers:
        train_last(model, layers, "train_last_layers")
        trained = float(sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad))
        return trained, (1 + 2 * trained / total) / 3
    return total, 1.0


def _moments(config: Any) -> float:
    """Bytes of optimizer state a trained parameter."""
    return 4.0 if config.optimizer == "muon" else 8.0


def _tokens_there(site: Site, node: Node) -> float | None:
    ref = node.inputs["tokens"][0]
    artifact = site.store.find(site.recipe.run, ref) if ref in site.recipe.nodes else site.store.resolve(ref)
    return float(artifact.manifest["metrics"]["train_tokens"]) if artifact else None
