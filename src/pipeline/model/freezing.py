"""Training the last blocks of a model alone: what stands below is not changed."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from pipeline.errors import ConfigError
from pipeline.model.compiling import blocks_of


def train_last(model: PreTrainedModel, layers: int, where: str) -> None:
    """Freezes, in place, all but the last `layers` blocks, the final norm and the output head; a head that is the
    embedding too stays frozen, as tokens would be read otherwise by the blocks below. ConfigError where the model has
    fewer blocks, or names none.
    """
    blocks = blocks_of(model)
    if layers > len(blocks):
        problem = f"{layers} of {len(blocks)} blocks" if blocks else f"{type(model).__name__} names no repeated block"
        raise ConfigError(problem, where=where, mend=f"at most {len(blocks)}" if blocks else "leave it out")
    model.requires_grad_(False)
    for block in blocks[-layers:]:
        block.requires_grad_(True)
    for norm in _behind(model, blocks[-1]):
        norm.requires_grad_(True)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    if head is not None and head.weight is not embedding:
        head.requires_grad_(True)


def _behind(model: PreTrainedModel, last_block: torch.nn.Module) -> list[torch.nn.Module]:
    """What the family declares behind its list of blocks: the final norm. (OPT declares it before; there it stays.)"""
    for module in model.base_model.modules():
        children = list(module.children())
        for place, child in enumerate(children):
            if any(each is last_block for each in child.children()):
                return [each for each in children[place + 1 :] if any(True for _ in each.parameters())]
    return []
