"""One model over several processes: gradients summed (ddp), or the model itself in shards (FSDP2; Zhao et al. 2023).

In shards every rank keeps its rows of each weight, of its gradient and of its moments; a block is gathered whole for
its forward and its backward, and let go. `fully_shard` is called here, since accelerate's plugin silently gives DDP on
a CPU. Losses are divided by the whole batch's tokens before their backward: gradients are summed, never averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from pipeline.tensor_file import Piece


def shard(root: nn.Module, blocks: Sequence[nn.Module], device: torch.device, world_size: int, evaluates: str) -> str:
    """Cut the parameters of `root` (on any device) into shards on `device`, in place; says what was done. They are rank
    0's: the others, which may have theirs on the meta device, get them block by block.

    Each of `blocks` is gathered by itself; what no block owns (embeddings, last norm, head) as one for the forward of
    `root`, and for its method `evaluates`. Gradients are reduced at every backward, also of a micro-step: one that
    waited for the last would be whole on every rank meanwhile.
    """
    mesh = init_device_mesh(device.type, (world_size,))
    for module in [*reversed(blocks), root]:  # those inside another first
        take_from_first(module, device)
        sharded = fully_shard(module, mesh=mesh)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # a factor of one's own is else a product that gloo lacks
        if hasattr(sharded, "set_reduce_scatter_unused_params"):  # an older torch may lack it
            sharded.set_reduce_scatter_unused_params(True)  # else a rank's expert is summed with another's other one
    register_fsdp_forward_method(root, evaluates)
    if not blocks:
        return f"in {world_size} shards, gathered whole at every step: the model names no repeated block"
    return f"in {world_size} shards, {len(blocks)} blocks gathered one by one"


@torch.no_grad()
def take_from_first(module: nn.Module, device: torch.device) -> None:
    """Every parameter and buffer of `module` as rank 0 has it, on `device`, in place; tied ones stay one, those already
    in shards as they are. A collective."""
    taken: dict[int, tuple[Tensor, Tensor]] = {}  # the old beside the new, so that no id comes twice
    for part in module.modules():
        for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            if isinstance(tensor, DTensor):
                continue
            if id(tensor) not in taken:
                given = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.detach().to(device)
                torch.distributed.broadcast(given, src=0)
                is_weight = isinstance(tensor, nn.Parameter)
                taken[id(tensor)] = (tensor, nn.Parameter(given, tensor.requires_grad) if is_weight else given)
            setattr(part, name, taken[id(tensor)][1])


def first_finds(find: Callable[[], bool], device: torch.device) -> bool:
    """What `find` gives on rank 0, on every rank: for what only a model with weights can tell. A collective."""
    found = torch.tensor(float(find()) if torch.distributed.get_rank() == 0 else 0.0, device=device)
    torch.distributed.broadcast(found, src=0)
    return bool(found)


def any_finds(found: bool, device: torch.device) -> bool:
    """Whether any rank has found something, on every rank. A collective; of one process nothing but its own word."""
    if not torch.distributed.is_initialized():
        return found
    over_all = torch.tensor(float(found), device=device)
    torch.distributed.all_reduce(over_all)
    return bool(over_all)


def is_sharded(root: nn.Module) -> bool:
    """Whether `shard` has cut it."""
    return isinstance(root, FSDPModule)


@contextmanager
def gathered(root: nn.Module) -> Iterator[None]:
    """What no block owns whole on every rank for a while, so that the model inside `root` can be called by itself.

    Its blocks gather themselves at every call: all ranks call it equally often. Nothing where `root` is not sharded.
    """
    if not isinstance(root, FSDPModule):
        yield
        return
    root.unshard()
    try:
        yield
    finally:
        root.reshard()


def whole(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The tensors gathered from their shards, on the CPU; a collective, whose result only ranks that `keep` hold (the
    others {}). Where nothing is sharded, the tensors as they are."""
    found = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            found[name] = full.cpu() if isinstance(tensor, DTensor) else tensor
    return found


def has_shards(tensors: Iterable[Tensor]) -> bool:
    """Whether any of them is cut over the ranks: the same on all."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def own_pieces(tensors: Mapping[str, Tensor], is_main: bool) -> Iterator[Piece]:
    """What this rank writes of the tensors, so that all ranks together write each once: its own rows of those in
    shards, and on rank 0 the others."""
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            assert tensor.placements == (Shard(0),), "fully_shard cuts rows"
            most = -(-tensor.shape[0] // tensor.device_mesh.size())  # rows of a rank, but of the last ones
            first = min(tensor.device_mesh.get_local_rank() * most, tensor.shape[0])
            yield Piece(name, tensor.to_local(), first * (tensor.numel() // max(1, tensor.shape[0])))
        elif is_main:
            yield Piece(name, tensor)


def whole_state(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """`model.state_dict()` as by `whole`; tied weights stay one tensor under their names."""
    state = model.state_dict(keep_vars=True)
    once = whole({str(id(tensor)): tensor.detach() for tensor in state.values()}, keep)
    return {name: once[str(id(tensor))] for name, tensor in state.items()} if keep else {}


def cut_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This rank's shard of the whole `tensor` (a weight, a moment) where `parameter` is sharded; else the tensor
    itself, as one of another shape (a count of steps). No collective: every rank has read the tensor."""
    if isinstance(parameter, DTensor) and tensor.shape == parameter.shape:
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return tensor


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients down to the norm `max_norm` over all of them; their norm before, whole on every rank."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sum the gradients of unsharded parameters over the ranks. What had none on this rank (an expert that none of its
    tokens went to) takes the others'; what had none on any stays without."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    has_none = [parameter.grad is None for parameter in trained]
    parts = [torch.zeros_like(each) if each.grad is None else each.grad for each in trained]
    had = torch.tensor([float(not each) for each in has_none])
    flags = had.to(parts[0].device, non_blocking=True)  # made there, it would wait for the backward
    torch.distributed.all_reduce(flags)
    for bucket in _buckets(parts):
        flat = torch.cat([part.flatten() for part in bucket])
        torch.distributed.all_reduce(flat)
        for part, summed in zip(bucket, torch.split(flat, [part.numel() for part in bucket]), strict=True):
            part.copy_(summed.view_as(part))
    ranks_with = flags.tolist() if any(has_none) else None  # asks the device only where it matters
    for place, (parameter, part) in enumerate(zip(trained, parts, strict=True)):
        if ranks_with is None or ranks_with[place] > 0:
            parameter.grad = part


BUCKET = 2**26
"""Numbers of the gradients that are summed at a time: 256 MB are held twice, and not the whole gradient."""


def _buckets(parts: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, as many at a time as BUCKET holds; a larger one alone."""
    bucket: list[Tensor] = []
    for part in parts:
        if bucket and sum(each.numel() for each in bucket) + part.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(part)
    if bucket:
        yield bucket
