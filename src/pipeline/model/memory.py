"""What a training step needs of memory, by part.

Weights, gradients, moments, bf16 copies; activations; the logits of a chunk in bf16, in fp32, and their gradient; and
the head's gradient, which is known with the loss.

What a forward keeps for its backward is counted by running the model on tensors that have shapes and no memory. (The 34
bytes a layer, position and channel of Korthikanti et al. 2022 are those of kernels that fuse what stands between
products: transformers' blocks keep 55 to 90 under autocast, whose residual stream is in fp32.)

On a CPU, whose memory the interpreter has a part of, what is counted is the moment of a step that needs most of it.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from pipeline.model.attention import use_plain_products
from pipeline.model.build import count_experts, count_parameters
from pipeline.model.compiling import blocks_of

COMPILED = {True: 2 / 3, False: 0.8}
"""By bf16: what compiled blocks keep, of what they keep as they are (measured on Llama blocks with two MLP widths)."""
HOLES = 0.5
"""Of activations on a CPU, what lies unused between blocks. torch asks for aligned ones, and glibc (2.36) puts none
into a hole of its own size: part of what one step frees the next does not take (0.2 to 0.65 in stages of 6 to 60 steps;
a bare loop of ten steps came to 0.8 to 1.1)."""
MAPPED = 32 * 2**20
"""Bytes of a block from which on it goes back to the system when it is freed, and leaves no hole."""
TRIED = 128
"""Tokens of a row in which kept bytes are counted, where they do not grow with its square."""
_FOUND: dict[tuple[object, ...], tuple[float, ...]] = {}
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
    weight: float = 4.0
    """Bytes of a weight, and of its gradient."""
    compiled: bool = False
    """The blocks are compiled."""
    on_cpu: bool = False
    libraries: float = 0.0
    """Bytes of the interpreter and what it has loaded, where they are in the same memory."""
    logit: float | None = None
    """Bytes of a logit, with all that is made of it; of the loss in chunks unless set."""
    accumulates: bool = False
    """The gradients of earlier micro-steps stand beside a forward."""
    copies: bool = False
    """A checkpoint's tensors are copied, and written from the copy."""


def memory_of(model: PreTrainedModel, load: Load) -> dict[str, float]:
    """Bytes by part of a training step of `rows` rows of `length` tokens; on a CPU at the moment that needs most."""
    config = model.config.get_text_config()
    total = float(count_parameters(model)[0])
    positions, layers, vocab = load.rows * load.length, config.num_hidden_layers, config.vocab_size
    blocks = [positions * each for each in kept_tensors(model, load.length, bf16=load.bf16, on_cpu=load.on_cpu)]
    kept = sum(blocks)
    if load.compiled:
        kept *= COMPILED[load.bf16]
    if load.checkpointing:
        kept = kept / layers + load.weight * positions * config.hidden_size * layers
    if load.layers is not None:
        kept *= load.layers / layers
    holes = HOLES * kept * sum(each for each in blocks if each < MAPPED) / sum(blocks)
    small = _in_blocks(model) if load.four_bit else 0.0
    gathered = _gathered_at_once(model, total) if load.shards > 1 else 0.0
    copied = gathered if load.shards > 1 and load.checkpointing else total - small  # else kept until its backward
    trains_head = load.logits > 0 and load.trained > total / 2
    parts = {
        "weights": load.weight * (total - small) / load.shards + 4 * load.others + FOUR_BIT * small,
        "gradients": load.weight * load.trained / load.shards,
        "optimizer": load.moments * load.trained / load.shards,
        **({"gathered": 8 * gathered} if gathered else {}),
        "bf16 copies": 2 * copied if load.bf16 and load.weight == 4 else 0.0,
        "activations": kept,
        "logits": load.logits * vocab * (load.logit or (10.0 if load.bf16 else 12.0)),
        **({"head's gradient": 4.0 * vocab * config.hidden_size} if trains_head else {}),
    }
    return _at_the_peak(parts, holes, load) if load.on_cpu else parts


def _at_the_peak(parts: dict[str, float], holes: float, load: Load) -> dict[str, float]:
    """Of a CPU's memory what stands always, a checkpoint's copy beside it (it is written while the next step begins),
    and the larger of what stands at one time: the end of a forward, the optimizer's step. Blocks of the one are taken
    from what the other has freed."""
    names = ("gathered", "bf16 copies", "activations", "logits", "head's gradient")
    forward: dict[str, float] = {name: parts[name] for name in names if parts.get(name)}
    if load.logit is None and "head's gradient" in forward:
        forward["head's gradient"] *= 2  # the sum over the chunks, and a chunk's part of it
    forward["unused heap"] = holes
    gradients = {"gradients": parts["gradients"]}
    moments: list[dict[str, float]] = [{**gradients, **forward} if load.accumulates else forward, gradients]
    always = {"libraries": load.libraries, "weights": parts["weights"], "optimizer": parts["optimizer"]}
    if load.copies:
        always["checkpoint"] = (load.weight + load.moments) * load.trained
    fullest: dict[str, float] = max(moments, key=lambda moment: sum(moment.values()))
    return {**always, **fullest}


def kept_tensors(model: PreTrainedModel, length: int, *, bf16: bool, on_cpu: bool) -> tuple[float, ...]:
    """Bytes of each tensor that the trunk's forward keeps for the backward, a position of a row of `length` tokens, the
    weights and their copies apart.

    Experts, whose work hangs on what the router says, and a model that does not run so are reckoned as a Llama whose
    MLP is as wide as all experts of a token: 34 bytes a layer and channel, 8 a layer and channel of the MLP; in fp32 44
    and 16.
    """
    config = model.config.get_text_config()
    length = length if on_cpu and bf16 and length <= 256 else TRIED  # else every position keeps the same
    key = (config.to_json_string(), length, bf16, on_cpu)
    if key not in _FOUND and count_experts(config) <= 1:
        with contextlib.suppress(RuntimeError, TypeError, ValueError):  # it looks at its numbers, which are none
            _FOUND[key] = tuple(each / length for each in _counted(model, length, bf16, on_cpu))
    if key in _FOUND:
        return _FOUND[key]
    width, top_k = config.hidden_size, getattr(config, "num_experts_per_tok", None) or 1
    mlp = top_k * (getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", 4 * width))
    each, of_width = (2.0, 17) if bf16 else (4.0, 11)  # bytes of a number, tensors of a layer
    layer = (*[each * width] * of_width, *[each * mlp] * 4)
    return layer * int(config.num_hidden_layers)


def _counted(model: PreTrainedModel, length: int, bf16: bool, on_cpu: bool) -> list[float]:
    """Bytes of each tensor that a forward keeps of a row: what two rows keep more than one. Masks are left out: a row
    that sees all before it needs none, and others share theirs."""
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[1:] != (1, length, length):
            kept[tensor.untyped_storage()._cdata] = tensor  # held, so that no other takes its place
        return tensor

    found = []
    shapes = copy.deepcopy(model).to("meta")
    with FakeTensorMode(allow_non_fake_inputs=True):
        shapes = shapes.to_empty(device="cpu").train()
        if on_cpu:
            use_plain_products(shapes, bf16, length)
        for rows in (1, 2):
            kept.clear()
            with (
                torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
                torch.autocast("cpu", torch.bfloat16, enabled=bf16),
            ):
                shapes.base_model(torch.zeros(rows, length, dtype=torch.long), use_cache=False)
            found.append([tensor.untyped_storage().nbytes() for tensor in kept.values()])
    return [float(two - one) for one, two in zip(*found, strict=True)]


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
