"""What is planned for, and what an estimate holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from pipeline.artifacts import Artifact, Store
from pipeline.data.formats import read_rows
from pipeline.graph import Node, Recipe
from pipeline.hardware import Device
from pipeline.model.build import count_parameters
from pipeline.plan.lengths import BYTES_A_TOKEN, mean_length
from pipeline.plan.models import model_of, tokenizer_size
from pipeline.plan.speed import Work
from pipeline.recipe import NAME, STAGE_NAME
from pipeline.runtime import share_batch

SAMPLED_ROWS = 2000


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
    work: tuple[Work, ...] = ()
    """What its time goes into."""
    beginning: float = 0.0
    """Seconds before and after: what no step is."""

    @property
    def peak(self) -> float:
        """Bytes a process needs."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Site:
    """A recipe over a store, on so many processes of a device."""

    recipe: Recipe
    store: Store
    device: Device
    processes: int
    shards: int = 1
    """Processes that share pretrain's model."""
    told: float | None = None
    """Bytes a token of the recipe's text, where somebody has measured them."""

    def model(self, ref: str) -> PreTrainedModel | None:
        """The model that `ref` is or will be, without weights; None where it cannot be told."""
        return model_of(self.recipe, self.store, ref)

    def vocabulary(self, ref: str) -> int:
        """Tokens of the tokenizer that a tokenize stage of the recipe makes."""
        return tokenizer_size(self.recipe, self.store, ref)

    def size_of(self, refs: Sequence[str] | None) -> float:
        """Parameters of the first of some references: a model that is held beside the trained one; 0 without one."""
        model = self.model(refs[0]) if refs else None
        return float(count_parameters(model)[0]) if model is not None else 0.0

    def micro_step(self, node: Node) -> int:
        """Rows of a process's micro-step. ConfigError where the processes cannot share the batch evenly."""
        config: Any = node.config
        rows, steps = config.per_device_train_batch_size, config.gradient_accumulation_steps
        return share_batch(rows, steps, self.processes, f"{node.name}.per_device_train_batch_size")[0]

    def of_batch(self, most: int, batch: int) -> int:
        """Responses that a process of ppo takes at once: `most`, but no more than its share of a `batch`."""
        return max(1, min(most, batch // self.processes))

    def bf16(self, config: Any) -> bool:
        """Whether a stage's products are in bf16."""
        return self.device.bf16 if config.bf16 is None else bool(config.bf16)

    def row_length(self, rows: Sequence[Mapping[str, Any]]) -> float:
        """Tokens of a row: the mean over the first ones."""
        return mean_length(rows[:SAMPLED_ROWS], self.bytes_a_token())

    def prompts(self, config: Any, longest: int, **more: Any) -> tuple[int, float, float]:
        """(rows of the stage's data, tokens of a prompt, of an answer: as long as the rows' own, `longest` without)."""
        rows = read_rows(config.data, "prompt", held_out=config.held_out, **more)
        return len(rows), self.row_length(rows), self.answer_length(rows, longest)

    def answer_length(self, rows: Sequence[Mapping[str, Any]], longest: int) -> float:
        """Tokens of an answer and its stop token: as the rows' references; `longest` where there are none."""
        sizes = [len(row["reference"].encode()) for row in rows[:SAMPLED_ROWS] if row["reference"]]
        return min(longest, sum(sizes) / len(sizes) / self.bytes_a_token() + 1) if sizes else float(longest)

    def members(self, ref: str) -> int:
        """Reward models that a reference stands for: several for a stage of the recipe that trains an ensemble."""
        node = self.recipe.nodes.get(ref)
        config: Any = node.config if node is not None and node.stage.type == "reward" else None
        return config.ensemble if config is not None else 1

    def reward_models(self, node: Node) -> list[str]:
        """References of the models that score for a stage, a member of an ensemble each; without those of `gold`."""
        roles = [role for role, kind in node.stage.inputs.items() if kind == "reward-model" and role[:4] != "gold"]
        named = [ref for role in roles for ref in node.inputs.get(role, ())]
        return [ref for ref in named for _ in range(self.members(ref))]

    def bytes_a_token(self) -> float:
        """Of text, by the tokens that the recipe makes, takes, or takes a model of, where they stand; else as `told`,
        else a usual figure."""
        for node in self.recipe.nodes.values():
            mine = [f"{self.recipe.run}/{node.name}"] if node.stage.kind == "tokens" else []
            taken = [ref for refs in node.inputs.values() for ref in refs if ref not in self.recipe.nodes]
            for artifact in (tokens_behind(self.store, ref) for ref in (*mine, *taken)):
                if artifact is not None:
                    metrics = artifact.manifest["metrics"]
                    return float(metrics["train_bytes"] / metrics["train_tokens"])
        return self.told or BYTES_A_TOKEN


def tokens_behind(store: Store, reference: str) -> Artifact | None:
    """The token shards that a finished stage is, or that its model was trained on; None for what is no `run/stage` and
    where they are not in this store any more."""
    run, _, stage = reference.partition("/")
    is_name = NAME.fullmatch(run) is not None and STAGE_NAME.fullmatch(stage) is not None
    artifact = store.find(run, stage) if is_name else None
    if artifact is None or artifact.kind == "tokens":
        return artifact
    parents = [each["reference"] for given in artifact.manifest["inputs"].values() for each in given]
    return next(filter(None, (tokens_behind(store, parent) for parent in parents)), None)
