"""What a training step needs of memory, by part.

Weights, gradients, moments, bf16 copies; activations: about 34 bytes a layer, position and channel in bf16
(Korthikanti et al. 2022, without the attention matrix), with recomputation one layer's and 2 bytes a layer, position
channel; and the logits of a chunk in bf16, in fp32, and their gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from pipeline.model.build import count_parameters
from pipeline.model.compiling import blocks_of

FOUR_BIT = 0.516
"""Bytes a weight of NF4: 4 bits, 8 of a scale for 64 weights, 32 of a second scale for 256 of those (Dettmers et al.
2023)."""


@dataclass(frozen=True)
class Load:
    """What decides the memory of a training step in one process."""

    rows: int
    length: int
    trained: float
    """Parameters with a gradient."""
    moments: float
    """Bytes of optimizer state a trained parameter."""
    bf16: bool
    checkpointing: bool
    logits: float
    """Positions whose logits exist at one time."""
    others: float = 0.0
    """Parameters held beside the model (reference, reward model, teacher)."""
    shards: int = 1
    """Processes that share the model's weights, gradients and moments."""
    layers: int | None = None
    """The last blocks, where they alone are trained: those below keep nothing for a backward."""
    four_bit: bool = False
    """The matrices of the blocks are held in bitsandbytes' four bits."""


def memory_of(model: PreTrainedModel, load: Load) -> dict[str, float]:
    """Bytes by part of a training step of `rows` rows of `length` tokens."""
    config = model.config.get_text_config()
    total = float(count_parameters(model)[0])
    positions, width, layers = load.rows * load.length, config.hidden_size, config.num_hidden_layers
    a_layer = 34.0 * positions * width * (1 if load.bf16 else 2)
    kept = a_layer + 2.0 * positions * width * layers if load.checkpointing else a_layer * layers
    if load.layers is not None:
        kept *= load.layers / layers
    small = _in_blocks(model) if load.four_bit else 0.0
    gathered = _gathered_at_once(model, total) if load.shards > 1 else 0.0
    copied = gathered if load.shards > 1 and load.checkpointing else total  # else kept until a block's backward
    return {
        "weights": 4 * ((total - small) / load.shards + load.others) + FOUR_BIT * small,
        "gradients": 4 * load.trained / load.shards,
        "optimizer": load.moments * load.trained / load.shards,
        **({"gathered": 8 * gathered} if gathered else {}),
        "bf16 copies": 2 * copied if load.bf16 else 0.0,
        "activations": kept,
        "logits": load.logits * config.vocab_size * (10.0 if load.bf16 else 12.0),
    }


def _in_blocks(model: PreTrainedModel) -> float:
    """Parameters of the linear layers of all blocks: what four bits hold."""
    modules = [module for block in blocks_of(model) for module in block.modules()]
    return float(sum(module.weight.numel() for module in modules if isinstance(module, torch.nn.Linear)))


def _gathered_at_once(model: PreTrainedModel, total: float) -> float:
    """Parameters of a model in shards that stand whole on every process at once, with their gradients: what no block
    owns (embedding, head, last norm), and one block."""
    blocks = blocks_of(model)
    sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
    return total - sum(sizes) + max(sizes, default=0)


def adapter_parameters(model: PreTrainedModel, rank: int) -> float:
    """Parameters of LoRA on every linear layer but the head: rank × (in + out)."""
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    return float(sum(rank * (module.in_features + module.out_features) for module in linear))
