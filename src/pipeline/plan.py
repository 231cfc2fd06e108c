"""What a recipe will take before it runs: parameters, tokens, FLOPs, memory, disk and time, a stage at a time.

Parameters come from the very model that would be built, on torch's meta device. FLOPs a token: 6 N + attention to train
(PaLM, appendix B), a third of it forward only. Time: FLOPs over what the stages of this store reached on this device,
else over a share of a measured product of matrices. What a user's own stage takes is not known, and so it is said.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pipeline.artifacts import Artifact, Store, runs_code_of
from pipeline.data.extend import add_specials
from pipeline.data.formats import read_rows
from pipeline.data.sources import local_files
from pipeline.data.tokenizers import SMALLEST_VOCAB, SPECIALS, complete, load_tokenizer
from pipeline.errors import MissingInputError, PipelineError
from pipeline.graph import Node, Recipe
from pipeline.hardware import Device
from pipeline.lineage import Standing
from pipeline.model.build import count_parameters, flops_per_token
from pipeline.model.losses import CHUNK, CPU_CHUNK
from pipeline.model.memory import Load, adapter_parameters, memory_of
from pipeline.model.presets import build_model, shape_of
from pipeline.model.scaling import CHINCHILLA
from pipeline.roles import TOKENIZER, input_of

GIB = 2**30
BUILT_IN_BYTES = {"pydocs": 30e6, "arithmetic": 1.1e6}
BYTES_A_TOKEN = 3.5
"""Of text, under a vocabulary of some thousand, until a tokenize stage stands and says better."""
UTILISATION = {"cpu": 0.3, "cuda": 0.4}
"""Share of the matrix product's FLOP/s that training reaches, until a stage of the kind has run here."""
SAMPLED_ROWS = 2000
SIDES = ("chosen", "rejected", "completion")
"""Fields of a row with an answer."""


@dataclass(frozen=True)
class Estimate:
    """What one stage will take. None where it cannot be told."""

    stage: str
    state: str
    parameters: int | None = None
    tokens: float | None = None
    flops: float | None = None
    seconds: float | None = None
    memory: Mapping[str, float] = field(default_factory=dict)
    """Part -> bytes a process."""
    disk: float | None = None
    loss: float | None = None
    """Nats a token by the Chinchilla law, where the model is within its range."""
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> float:
        """Bytes a process needs."""
        return sum(self.memory.values())


def model_of(recipe: Recipe, store: Store, ref: str) -> PreTrainedModel | None:
    """The model that `ref` is or will be, without weights; None where it cannot be told."""
    if ref not in recipe.nodes:
        return empty_model(store.resolve(ref).model)
    node = recipe.nodes[ref]
    if node.stage.type == "pretrain" and not node.inputs.get("init"):
        given = node.config.model  # type: ignore[attr-defined]
        vocab = _vocabulary(recipe, store, node)
        shape = shape_of(given.model_dump(exclude={"architecture", "config"}), _context(node), vocab)
        with torch.device("meta"):
            return build_model(given.architecture, shape, given.config)
    above = node.inputs.get("init")
    return model_of(recipe, store, above[0]) if above else None


def empty_model(folder: Path) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=runs_code_of(folder))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=runs_code_of(folder))
    assert isinstance(model, PreTrainedModel)
    return model


def _vocabulary(recipe: Recipe, store: Store, node: Node) -> int:
    ref = node.inputs["tokens"][0]
    if ref not in recipe.nodes:
        return int(store.resolve(ref).manifest["metrics"]["vocab_size"])
    return _tokenizer_size(recipe, store, ref, ())


def _tokenizer_size(recipe: Recipe, store: Store, ref: str, added: tuple[str, ...]) -> int:
    """Tokens of the tokenizer that `ref` is or will hold, once the special tokens `added` are added to it."""
    if ref not in recipe.nodes:
        tokenizer = load_tokenizer(input_of(store, ref, TOKENIZER).model)
        complete(tokenizer)
        add_specials(tokenizer, added)
        return len(tokenizer)
    node = recipe.nodes[ref]
    config: Any = node.config
    if {"vocab_size", "added_merges", "added_tokens"} <= set(type(config).model_fields):  # `tokenize` or a copy of it
        given = node.inputs["tokenizer"]
        added = (*config.added_tokens, *added)
        trained = SMALLEST_VOCAB if config.algorithm == "bytes" else int(config.vocab_size)
        size = trained + len({*added} - {*SPECIALS})
        return int(config.added_merges) + (_tokenizer_size(recipe, store, given[0], added) if given else size)
    above = node.inputs.get("tokens") or node.inputs.get("init")
    if not above:
        raise MissingInputError(f"the tokenizer of `{ref}` cannot be told before it is made")
    return _tokenizer_size(recipe, store, above[0], added)


def _context(node: Node) -> int:
    return int(node.config.context_length)  # type: ignore[attr-defined]


class Planner:
    """Estimates for the stages of one recipe; `shards`: pretrain keeps its model in shards over the processes."""

    def __init__(self, recipe: Recipe, store: Store, device: Device, processes: int, shards: bool = False) -> None:
        self.recipe, self.store, self.device, self.processes = recipe, store, device, processes
        self.shards = processes if shards else 1

    def estimate(self, standing: Standing) -> Estimate:
        """What the stage takes, whether it stands or not."""
        node = standing.node
        found = Estimate(node.name, standing.state)
        make = {
            "tokenize": self._tokenize,
            "pretrain": self._pretrain,
            "sft": self._rows,
            "reward": self._rows,
            "dpo": self._rows,
            "ppo": self._ppo,
            "sample": self._sample,
        }.get(node.stage.type)
        if make is None:
            what = (
                "a stage of your own" if "/" in node.stage.type else f"{node.stage.type} hangs on its models' answers"
            )
            return replace(found, notes=(f"not estimated: {what}",))
        unwritten = [writer for source, writer in node.rows.items() if not Path(source).exists()]
        if unwritten:
            return replace(found, notes=(f"not estimated: its rows are written by {unwritten[0]}, which has not run",))
        try:
            found = make(node, found)
        except (PipelineError, OSError) as error:
            return replace(found, notes=(f"not estimated: {error}",))
        if found.flops is not None:
            rate, source = self.rate(node.stage.type)
            found = replace(found, seconds=found.flops / rate / self.processes, notes=(*found.notes, source))
        return replace(found, notes=(*found.notes, *self._advice(node, found)))

    def rate(self, kind: str) -> tuple[float, str]:
        """(FLOP/s of training in one process, where it is from)."""
        reached = [
            artifact.manifest["flops"] / artifact.manifest["seconds"] / artifact.manifest["processes"]
            for artifact in artifacts_of(self.store)
            if self.device.is_here
            and artifact.stage == kind
            and artifact.manifest.get("flops")
            and artifact.manifest["seconds"] > 10  # a tiny run is all start and end
            and artifact.manifest["device"].startswith(self.device.kind)
        ]
        if reached:
            rate = sorted(reached)[len(reached) // 2]
            share = rate / self.device.flops_per_second
            return rate, f"at the speed of {len(reached)} {kind} here before ({share:.0%} of the measured product)"
        share = UTILISATION[self.device.kind]
        of = f"measured product: no {kind} ran here yet" if self.device.is_here else "maker's peak"
        return share * self.device.flops_per_second, f"at {share:.0%} of the {of}"

    def _tokenize(self, node: Node, found: Estimate) -> Estimate:
        size = 0.0
        for entry in node.config.data:  # type: ignore[attr-defined]
            if entry.source in BUILT_IN_BYTES:
                size += BUILT_IN_BYTES[entry.source]
            elif entry.source.startswith("hub:"):
                return replace(found, notes=("not estimated: the size of a hub dataset is known once it is here",))
            else:
                size += sum(path.stat().st_size for path in local_files(entry))
        return replace(found, tokens=size / BYTES_A_TOKEN, seconds=size / 3e6, disk=2.2 * size / BYTES_A_TOKEN)

    def _pretrain(self, node: Node, found: Estimate) -> Estimate:
        config: Any = node.config
        model = model_of(self.recipe, self.store, node.name)
        assert model is not None
        total, counted = count_parameters(model)
        batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
        tokens = float(config.max_steps * batch * config.context_length)
        rows = max(1, config.per_device_train_batch_size // self.processes)
        moments = 4.0 if config.optimizer == "muon" else 8.0
        bf16 = self.device.bf16 if config.bf16 is None else config.bf16
        chunk = CPU_CHUNK if self.device.kind == "cpu" else CHUNK
        logits = min(chunk, rows * config.context_length)
        trained = adapter_parameters(model, config.peft.r) if config.peft else total
        trained_share = 2 / 3 if config.peft else 1.0  # no products for the gradients of frozen weights
        teacher = self._size_of(node.inputs.get("teacher"))
        load = Load(
            rows,
            config.context_length,
            trained,
            moments,
            bf16,
            config.gradient_checkpointing,
            logits,
            others=teacher / 2 if bf16 else teacher,  # held in two bytes each then
            shards=self.shards,
        )
        notes = []
        best = CHINCHILLA.best_split(6 * counted * tokens)
        notes.append(
            f"{tokens / counted:.1f} tokens a parameter; the best of these FLOPs has {best[1] / best[0]:.0f} "
            f"({si(best[0])} parameters, {si(best[1])} tokens)"
        )
        have = self._tokens_there(node)
        if have is not None:
            notes.append(f"{tokens / have:.2f} epochs of {si(have)} tokens")
        in_range = counted >= 40e6  # smaller ones lie outside of what the law was fitted to
        return replace(
            found,
            parameters=total,
            tokens=tokens,
            flops=tokens * (flops_per_token(model, config.context_length) * trained_share + 2 * teacher),
            memory=memory_of(model, load),
            disk=4 * total + 3 * (4 + moments) * trained,
            loss=CHINCHILLA.loss(counted, tokens) if in_range else None,
            notes=tuple(notes),
        )

    def _size_of(self, refs: Sequence[str] | None) -> float:
        """Parameters of a model that is taken beside the one that is trained; 0 without one."""
        model = model_of(self.recipe, self.store, refs[0]) if refs else None
        return float(count_parameters(model)[0]) if model is not None else 0.0

    def _is_adapter_on(self, reward: str, init: str) -> bool:
        """Whether a reward model of this recipe is trained by adapters on that model."""
        node = self.recipe.nodes.get(reward)
        return node is not None and getattr(node.config, "peft", None) is not None and node.inputs["init"] == (init,)

    def _tokens_there(self, node: Node) -> float | None:
        ref = node.inputs["tokens"][0]
        artifact = self.store.find(self.recipe.run, ref) if ref in self.recipe.nodes else self.store.resolve(ref)
        return float(artifact.manifest["metrics"]["train_tokens"]) if artifact else None

    def _rows(self, node: Node, found: Estimate) -> Estimate:
        """sft, reward and dpo: rows of about the mean length of the data's first ones."""
        config: Any = node.config
        model = model_of(self.recipe, self.store, node.inputs["init"][0])
        if model is None:
            return replace(found, notes=("not estimated: what it starts from is not known",))
        is_reward = node.stage.type == "reward"
        objective = config.objective if node.stage.type == "dpo" else ""
        layout = {"sft": "messages", "reward": "ranked"}.get(node.stage.type, "preference")
        rows = read_rows(config.data, "unpaired" if objective == "kto" else layout, held_out=config.held_out)
        members = config.ensemble if is_reward else 1
        length = min(config.max_length, mean_length(rows[:SAMPLED_ROWS], self._bytes_a_token()))
        batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
        steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * len(rows) / batch)
        sides: float = 2 if layout == "preference" and objective != "kto" else 1
        if is_reward:
            sides = sum(len(row["answers"]) for row in rows) / len(rows)
        tokens = members * steps * batch * sides * length
        total, _ = count_parameters(model)
        trained = adapter_parameters(model, config.peft.r) if config.peft else float(total)
        once = min(1.0, len(rows) / (steps * batch))  # the reference reads a row once, however many the epochs
        beside = {"dpo": once / 3, "kto": 1.0}.get(
            objective, 0.0
        )  # its forward; kto: of each pair, and mismatched ones
        factor = (2 / 3 if config.peft else 1.0) + beside
        on_device = max(1, config.per_device_train_batch_size // self.processes) * math.ceil(sides)
        longest = min(config.max_length, round(2 * length))
        bf16 = self.device.bf16 if config.bf16 is None else config.bf16
        moments = 4.0 if config.optimizer == "muon" else 8.0
        logits = 0.0 if node.stage.type == "reward" else on_device * longest
        teacher = self._size_of(node.inputs.get("teacher"))
        others = teacher / 2 if bf16 else teacher  # held in two bytes each then
        load = Load(on_device, longest, trained, moments, bf16, config.gradient_checkpointing, logits, others=others)
        return replace(
            found,
            parameters=total,
            tokens=tokens,
            flops=tokens * (flops_per_token(model, round(length)) * factor + 2 * teacher),
            memory=memory_of(model, load),
            disk=members * 4 * total + 3 * (4 + moments) * trained,
            notes=(f"{len(rows):,} rows of about {length * sides:.0f} tokens, {steps * batch / len(rows):.2f} epochs",),
        )

    def _members(self, ref: str) -> int:
        """Reward models that a reference stands for: several for a stage of the recipe that trains an ensemble."""
        node = self.recipe.nodes.get(ref)
        config: Any = node.config if node is not None and node.stage.type == "reward" else None
        return config.ensemble if config is not None else 1

    def _ppo(self, node: Node, found: Estimate) -> Estimate:
        """Generation, the forwards that score and compare, and the training of policy and, where there is one, critic,
        on prompts and full-length responses."""
        config: Any = node.config
        model = model_of(self.recipe, self.store, node.inputs["init"][0])
        if model is None:
            return replace(found, notes=("not estimated: what it starts from is not known",))
        rows = read_rows(config.data, "prompt", held_out=config.held_out)
        prompt = mean_length(rows[:SAMPLED_ROWS], self._bytes_a_token())
        episodes = config.total_episodes or round(config.num_train_epochs * len(rows) * config.num_generations)
        length = prompt + config.response_length
        tokens = episodes * length
        total, _ = count_parameters(model)
        roles = [role for role, kind in node.stage.inputs.items() if kind == "reward-model" and role[:4] != "gold"]
        named = [ref for role in roles for ref in node.inputs.get(role, ())]
        scoring = [ref for ref in named for _ in range(self._members(ref))]
        rewards = len(scoring)
        judges = sum(self._size_of([ref]) for ref in node.inputs.get("reward.judge", ()))
        critics = int(config.advantage_estimator == "gae")
        # Forwards: decode, policy, reference, critic, what scores. Frozen weights have no gradients to work out.
        forwards = 3 + critics + rewards + judges / total
        updates = (1 + critics) * config.num_ppo_epochs * (2 / 3 if config.peft else 1.0)
        on_device = max(1, config.per_device_train_batch_size // self.processes)
        bf16 = self.device.bf16 if config.bf16 is None else config.bf16
        trained = (1 + critics) * (adapter_parameters(model, config.peft.r) if config.peft else float(total))
        copies = critics + 1 + rewards  # beside the policy: critic, reference, reward models
        if config.peft:  # the reference is the policy without adapters, the reward model the critic without its own
            apart = [ref for ref in scoring if not self._is_adapter_on(ref, node.inputs["init"][0])]
            copies = len(apart) if config.shared_trunk else max(critics, rewards)
        elif config.offload and self.device.kind != "cpu":  # one of the frozen at a time
            copies = critics + max(1, rewards)
        others = total * copies + judges
        logits = on_device * config.response_length
        load = Load(on_device, round(length), trained, 8.0, bf16, False, logits, others)
        return replace(
            found,
            parameters=total,
            tokens=tokens,
            flops=tokens * flops_per_token(model, round(length)) * (forwards / 3 + updates),
            memory=memory_of(model, load),
            disk=4 * total + 3 * 12 * trained,
            notes=(f"{episodes:,} responses of up to {config.response_length} tokens",),
        )

    def _sample(self, node: Node, found: Estimate) -> Estimate:
        """Forwards alone: each prompt once, full-length answers, and both again through every model that scores. The
        cache is that of a model whose heads share no keys."""
        config: Any = node.config
        model = model_of(self.recipe, self.store, node.inputs["init"][0])
        if model is None:
            return replace(found, notes=("not estimated: what answers is not known",))
        rows = read_rows(config.data, "prompt", split=config.split, held_out=config.held_out)
        prompt = mean_length(rows[:SAMPLED_ROWS], self._bytes_a_token())
        prompts, samples = min(config.prompts or len(rows), len(rows)), config.num_generations
        tokens = prompts * (prompt + samples * config.response_length)
        total, _ = count_parameters(model)
        refs_of = node.inputs.items()
        rewards = sum(len(refs) for role, refs in refs_of if node.stage.inputs[role] == "reward-model")
        judges = sum(self._size_of([ref]) for ref in node.inputs.get("reward.judge", ()))
        length = round(prompt + config.response_length)
        scored = prompts * samples * length * (rewards + judges / total)
        on_device = max(config.batch_size, samples)
        shape = model.config.get_text_config()
        return replace(
            found,
            parameters=total,
            tokens=tokens,
            flops=(tokens + scored) * flops_per_token(model, length) / 3,
            memory={
                "weights": 4 * (total * (1 + rewards) + judges),
                "cache": 8.0 * on_device * length * shape.num_hidden_layers * shape.hidden_size,
                "logits": 8.0 * on_device * shape.vocab_size,
            },
            disk=prompts * samples * config.response_length * 2 * self._bytes_a_token(),
            notes=(f"{prompts:,} prompts, {samples} answers of up to {config.response_length} tokens to each",),
        )

    def _bytes_a_token(self) -> float:
        for node in self.recipe.nodes.values():
            artifact = self.store.find(self.recipe.run, node.name) if node.stage.kind == "tokens" else None
            if artifact is not None:
                metrics = artifact.manifest["metrics"]
                return float(metrics["train_bytes"] / metrics["train_tokens"])
        return BYTES_A_TOKEN

    def _advice(self, node: Node, found: Estimate) -> tuple[str, ...]:
        """Which settings would make a stage fit that does not, the least costly first."""
        if found.peak <= self.device.memory:
            return ()
        return (f"does not fit in {self.device.memory / GIB:.0f} GiB", *self._what_fits(node, found))

    def _what_fits(self, node: Node, found: Estimate) -> Iterable[str]:
        config: Any = node.config
        tried: dict[str, Any] = {}
        if "gradient_accumulation_steps" in type(config).model_fields:
            rows, steps = config.per_device_train_batch_size, config.gradient_accumulation_steps
            while rows > 1 and rows % 2 == 0:
                rows, steps = rows // 2, steps * 2
                tried = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps}
                if self._fits(node, tried):
                    return [_settings(node, tried)]
        may_shard = node.stage.shards and self.processes > self.shards and _goes_in_shards(config)
        if may_shard and self._fits(node, {}, shards=True):
            return ["would fit with --strategy fsdp"]
        if "gradient_checkpointing" in type(config).model_fields and not config.gradient_checkpointing:
            tried = {**tried, "gradient_checkpointing": True}
            if self._fits(node, tried):
                return [_settings(node, tried)]
        if may_shard and self._fits(node, tried, shards=True):
            return [f"{_settings(node, tried)} --strategy fsdp"]
        if "peft" in type(config).model_fields and config.peft is None and node.inputs.get("init") and self.shards == 1:
            from pipeline.recipe import PeftConfig

            tried = {**tried, "peft": PeftConfig()}
            if self._fits(node, tried):
                return [_settings(node, tried)]
        return ["no setting of this stage makes it fit: a smaller model, or a device with more memory"]

    def _fits(self, node: Node, changed: Mapping[str, Any], shards: bool = False) -> bool:
        other = replace(node, config=node.config.model_copy(update=dict(changed)))
        recipe = replace(self.recipe, nodes={**self.recipe.nodes, node.name: other})
        planner = Planner(recipe, self.store, self.device, self.processes, shards or self.shards > 1)
        make = planner._pretrain if node.stage.type == "pretrain" else planner._rows
        return make(other, Estimate(node.name, "")).peak <= self.device.memory


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


def mean_length(rows: Iterable[Mapping[str, Any]], bytes_a_token: float) -> float:
    """Tokens of a row by its UTF-8 bytes, eight more a message for the template; of answers to one prompt the mean."""
    lengths = []
    for row in rows:
        sides = row.get("answers") or [row.get(name) for name in ("messages", *SIDES)]
        for side in [each for each in sides if each is not None] or [[]]:
            messages = [*row.get("prompt", []), *side]
            lengths.append(sum(len(each["content"].encode()) / bytes_a_token + 8 for each in messages))
    return sum(lengths) / len(lengths)


def _settings(node: Node, changed: Mapping[str, Any]) -> str:
    values = {name: "{}" if name == "peft" else str(value).lower() for name, value in changed.items()}
    return "would fit with " + " ".join(f"--set {node.name}.{name}={value}" for name, value in values.items())


def si(value: float) -> str:
    """`1.24 B`, `942 k`: three digits and the power's letter."""
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"
