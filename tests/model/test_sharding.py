"""A model in shards over two gloo processes: what each keeps, what is summed, what comes back whole.

A stage of the test's own works in both processes, beside the same model whole; each writes what it found.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.model import sharding
from pipeline.model.presets import PRESETS
from pipeline.model.sharding import clip_gradients, cut_like, gathered, whole, whole_state

STAGE = """
import json
import os
import torch
from torch import nn
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from pipeline.checkpoint import load_optimizer, optimizer_tensors
from pipeline.errors import MachineError
from pipeline.model import muon, sharding
from pipeline.model.build import load_parameters, unique_parameters
from pipeline.model.optim import build_optimizers
from pipeline.recipe import StageConfig, field

class ShardConfig(StageConfig):
    kind: str = field("adamw", "x")

INPUTS, KIND, SHARDS = {}, "rows", True
muon.bf16_pays = lambda device: False  # the rounding of Muon's iteration depends on how its products are cut

class Tied(nn.Module):
    # 7 rows of embedding, 5 and 6 of the matrices: over two ranks some share evenly and some do not
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6)) for _ in range(2))
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        hidden = self.embedding(ids)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(hidden)

    def total(self, ids):
        return self(ids).sum()

class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.each = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))

    def forward(self, hidden, place):
        return self.each[place](hidden)

class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Experts()])

    def forward(self, hidden, place):
        return self.blocks[0](hidden, place)

    def total(self, hidden, place):
        return self(hidden, place).sum()

def sharded(runtime):
    model = Tied()
    said = sharding.shard(model, list(model.blocks), runtime.device, runtime.world_size, evaluates="total")
    return model, said

def optimizers_of(model, kind):
    return build_optimizers(
        model, kind=kind, learning_rate=0.1, embedding_rate=0.1, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.1
    )

def backward(model, ids):
    logits = model(ids[:, :-1]).flatten(0, 1)
    (torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum") / 16).backward()

def step(model, optimizers, micro_batches):
    for ids in micro_batches:
        backward(model, ids)
    gradients = sharding.whole({name: p.grad.clone() for name, p in model.named_parameters()}, keep=True)
    norm = sharding.clip_gradients(list(model.parameters()), 0.5)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return gradients, float(norm)

def saved(runtime, tensors, folder):
    # the bytes that this rank writes; no tensor may be gathered meanwhile, and the file is that of whole tensors
    write, gather, written = os.pwrite, DTensor.full_tensor, []
    os.pwrite = lambda file, content, at: written.append(len(content)) or write(file, content, at)
    DTensor.full_tensor = None
    runtime.checkpoints.behind = True
    runtime.checkpoints.save(7, tensors, {})
    runtime.checkpoints.wait()
    os.pwrite, DTensor.full_tensor = write, gather
    torch.distributed.barrier()
    whole = sharding.whole(tensors, keep=runtime.is_main)
    if runtime.is_main:
        save_file({name: tensor.clone() for name, tensor in whole.items()}, folder / "theirs")
        assert (runtime.checkpoints.peek().path / "state.safetensors").read_bytes() == (folder / "theirs").read_bytes()
        (folder / "theirs").unlink()
    return sum(written)

def refused(runtime, tensors):
    # the last rank's disk is full: all say so, and the checkpoint before it stands
    write = os.pwrite
    def no_space(*_):
        raise OSError(28, "No space left on device")
    os.pwrite = no_space if runtime.rank == 1 else write
    runtime.checkpoints.save(8, tensors, {})
    try:
        runtime.checkpoints.wait()
    except MachineError as error:
        return [error.what, runtime.checkpoints.peek().step]
    finally:
        os.pwrite = write
        torch.distributed.barrier()

def apart(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)

def run(config, inputs, out, runtime):
    assert torch.distributed.get_world_size() == runtime.world_size == 2
    assert runtime.shards
    micro_batches = torch.randint(0, 7, (2, 2, 5), generator=torch.Generator().manual_seed(1))  # rows of 4 targets
    own = micro_batches[:, runtime.rank : runtime.rank + 1]
    plain, (model, said) = Tied(), sharded(runtime)
    ours, theirs = optimizers_of(model, config.kind), optimizers_of(plain, config.kind)
    gradients, norm = step(model, ours, own)
    expected, expected_norm = step(plain, theirs, micro_batches)
    found = {
        "said": said,
        "gradients": apart(gradients, expected),
        "norms": [norm, expected_norm],
        "is tied": model.head.weight is model.embedding.weight,
        "rows": {name: p.to_local().shape[0] for name, p in model.named_parameters()},
        "update": apart(sharding.whole(unique_parameters(model), True), unique_parameters(plain)),
    }
    step(model, ours, own)
    step(plain, theirs, micro_batches)

    tensors, states, sizes = dict(unique_parameters(model)), [], []
    for index, optimizer in enumerate(ours):
        moments, state = optimizer_tensors(optimizer, f"optimizer{index}")
        states.append(state)
        tensors |= moments
        sizes += [[v.to_local().numel(), v.numel()] for v in moments.values() if isinstance(v, DTensor)]
        assert all(isinstance(v, DTensor) or v.dim() == 0 for v in moments.values())
    found["moments"] = sizes
    parts = [t.to_local() if isinstance(t, DTensor) else t for t in tensors.values()]
    found["written"] = [saved(runtime, tensors, out), sum(part.nbytes for part in parts)]
    found["refused"] = refused(runtime, tensors)
    found["kept"] = len(sharding.whole(tensors, keep=runtime.is_main))
    tensors = {name: tensor.clone() for name, tensor in sharding.whole(tensors, keep=True).items()}  # as from a file
    found["whole"] = [isinstance(tensor, DTensor) for tensor in tensors.values()].count(False)

    again, _ = sharded(runtime)
    with torch.no_grad():
        again.embedding.weight.zero_()
    load_parameters(again, {f"model.{name}": tensor for name, tensor in tensors.items()}, "model")
    fresh = optimizers_of(again, config.kind)
    for index, optimizer in enumerate(fresh):
        load_optimizer(optimizer, f"optimizer{index}", tensors, states[index])
    step(model, ours, own)
    step(again, fresh, own)
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    found["goes on"] = all(torch.equal(one.to_local(), other.to_local()) for one, other in pairs)

    state = sharding.whole_state(again, keep=True)
    found["state"] = {name: list(tensor.shape) for name, tensor in state.items()}
    found["state is tied"] = state["head.weight"] is state["embedding.weight"]
    found["state elsewhere"] = len(sharding.whole_state(again, keep=False))
    copy = Tied()
    copy.load_state_dict(state)
    with torch.no_grad():
        expected = copy.total(own[0])
        found["evaluates"] = float(again.total(own[0]) - expected)
        with sharding.gathered(again):
            found["inside is whole"] = not isinstance(again.embedding.weight, DTensor)
            hidden = again.embedding(own[0])
            for block in again.blocks:
                hidden = hidden + block(hidden)
            found["inside"] = float(again.head(hidden).sum() - expected)
    found["afterwards"] = isinstance(again.embedding.weight, DTensor)
    experts = [nn.Parameter(torch.ones(2)) for _ in range(4)]  # whole on both: one each, one together, one for nobody
    for place in (runtime.rank, 2):
        (experts[place] * (runtime.rank + 1)).sum().backward()
    sharding.sum_gradients(experts)
    routed = Routed()
    sharding.shard(routed, list(routed.blocks), runtime.device, 2, evaluates="total")
    for _ in range(2):  # micro-steps
        routed(torch.full((1, 4), 1.0 + runtime.rank), runtime.rank).sum().backward()
    gathered = sharding.whole({name: p.grad for name, p in routed.named_parameters()}, keep=True)
    found["routed"] = [sorted(set(gradient.flatten().tolist())) for gradient in gathered.values()]
    found["summed"] = [None if expert.grad is None else expert.grad.tolist() for expert in experts]
    (out / f"rank-{runtime.rank}.json").write_text(json.dumps(found))
    return {}
"""
NAMES = ["0.weight", "0.bias", "1.weight", "1.bias"]
ROWS = [
    {"embedding.weight": 4, **{f"blocks.{b}.{name}": 3 for b in (0, 1) for name in NAMES}},
    {"embedding.weight": 3, **{f"blocks.{b}.{name}": rows for b in (0, 1) for name, rows in zip(NAMES, (2, 2, 3, 3))}},
]
"""The first dimension, 7, 5 or 6, cut into two: the first rank has the larger part."""


@pytest.mark.parametrize(("kind", "moments"), [("adamw", 18), pytest.param("muon", 14, marks=pytest.mark.slow)])
def test_two_ranks_in_shards_are_one_model(warm: Any, tmp_path: Path, kind: str, moments: int):
    """Gradients, norm, update and evaluation are those of the whole model, and every rank keeps its rows alone."""
    (tmp_path / "shards.py").write_text(STAGE)
    (tmp_path / "r.yaml").write_text(f"run: two\nstages:\n  it: {{stage: ./shards.py, kind: {kind}}}\n")
    done = warm("run", "r.yaml", "--num-processes", "2", "--strategy", "fsdp")
    assert done.code == 0, done.stderr
    ranks = [json.loads((tmp_path / f"artifacts/two/it/rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert [found["rows"] for found in ranks] == ROWS
    counts = 9 if kind == "adamw" else 5  # of steps, whole on every rank: rank 0 writes them, and the header
    assert 0 < ranks[0]["written"][0] - ranks[0]["written"][1] < 5000
    assert ranks[1]["written"][0] == ranks[1]["written"][1] - 4 * counts
    assert [found["kept"] for found in ranks] == [9 + moments + counts, 0]
    for found in ranks:
        assert found["said"] == "in 2 shards, 2 blocks gathered one by one"
        assert found["refused"] == ["the checkpoint could not be written: [Errno 28] No space left on device", 7]
        assert found["routed"] == [[2.0], [4.0], [0.0]]  # two micro-steps: rank 0's expert, rank 1's, nobody's
        assert found["summed"] == [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], None]
        assert found["gradients"] < 1e-6
        assert found["norms"][0] == pytest.approx(found["norms"][1], rel=1e-5)
        assert found["update"] < 1e-6
        assert len(found["moments"]) == moments
        assert all(0 < local < full for local, full in found["moments"])
        assert found["goes on"] is True
        assert found["is tied"] is found["state is tied"] is True
        assert found["state"]["head.weight"] == [7, 6]
        assert len(found["state"]) == 10
        assert found["state elsewhere"] == 0
        assert found["evaluates"] == pytest.approx(0, abs=1e-5)
        assert found["inside"] == pytest.approx(0, abs=1e-5)
        assert found["inside is whole"] is found["afterwards"] is True


def test_gradients_are_summed_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch):
    """By two ranks that have the same: which parameters have a gradient first, then ten numbers at most, or one large
    tensor."""
    sizes = []

    def both(tensor: torch.Tensor) -> None:
        sizes.append(tensor.numel())
        tensor.mul_(2)

    monkeypatch.setattr(torch.distributed, "all_reduce", both)
    monkeypatch.setattr(sharding, "BUCKET", 10)
    shapes = [(2, 3), (4,), (5, 5), (3,), (1,), (7,)]
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for number, parameter in enumerate(parameters):
        parameter.grad = None if number == 4 else torch.full(shapes[number], float(number + 1))
    sharding.sum_gradients(parameters)
    assert sizes == [6, 10, 25, 4, 7]
    assert parameters[4].grad is None
    for number in (0, 1, 2, 3, 5):
        grad = parameters[number].grad
        assert grad is not None
        assert torch.equal(grad, torch.full(shapes[number], 2.0 * (number + 1)))


def test_where_nothing_is_sharded_all_stays_as_it_is():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    weight = model[0].weight
    assert whole({"a": weight}, keep=True)["a"] is weight
    assert whole({"a": weight}, keep=False) == {}
    assert cut_like(torch.ones(2, 2), weight).tolist() == [[1, 1], [1, 1]]
    state = whole_state(model, keep=True)
    assert state["0.weight"].data_ptr() == state["1.weight"].data_ptr() == weight.data_ptr()
    with gathered(model):
        assert model[0].weight is weight
    weight.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert clip_gradients([weight], 1.0).item() == pytest.approx(5.0)
    assert weight.grad.norm().item() == pytest.approx(1.0, rel=1e-5)


DRAWN = """
import torch
from pipeline.model.compiling import blocks_of
from pipeline.model.next_token import NextToken, has_plain_head
from pipeline.model.presets import PRESETS, Shape, draw_model
from pipeline.model.sharding import first_finds, shard, whole_state
from pipeline.recipe import StageConfig

class DrawnConfig(StageConfig):
    pass

INPUTS, KIND, SHARDS = {}, "rows", True

def run(config, inputs, out, runtime):
    for name in PRESETS:
        for tied in (True, False):
            shape = Shape(depth=2, width=32, heads=2, kv_heads=1, mlp_width=33, context=16, vocab=51, tied=tied)
            model = draw_model(name, shape, {}, 7, on_meta=not runtime.is_main)
            on_meta = {part.is_meta for part in [*model.parameters(), *model.buffers()]}
            assert on_meta == {not runtime.is_main}, name
            is_plain = first_finds(lambda: has_plain_head(model), runtime.device)
            losses = NextToken(model, is_chunked=is_plain)
            shard(losses, blocks_of(model), runtime.device, 2, evaluates="nats")
            alone = draw_model(name, shape, {}, 7)
            assert is_plain is has_plain_head(alone), name
            state = whole_state(model, keep=True)
            assert state.keys() == alone.state_dict().keys()
            for key, tensor in alone.state_dict().items():
                assert torch.equal(state[key], tensor), (name, key)
            for (key, found), (other, buffer) in zip(model.named_buffers(), alone.named_buffers(), strict=True):
                assert key == other and torch.equal(found, buffer), (name, key)
            ids_BT = torch.arange(16)[None]
            expected = NextToken(alone).nats(ids_BT[:, :-1], ids_BT[:, 1:])
            torch.testing.assert_close(losses.nats(ids_BT[:, :-1], ids_BT[:, 1:]), expected)
            (out / f"{name}, {tied}, {runtime.rank}").write_text("")
    return {}
"""


@pytest.mark.slow
def test_what_rank_0_draws_is_dealt_out_to_ranks_without_weights(warm: Any, tmp_path: Path):
    """Of every preset, tied and not: shards, buffers and outputs have the bits of one process's draw."""
    (tmp_path / "drawn.py").write_text(DRAWN)
    (tmp_path / "r.yaml").write_text("run: two\nstages:\n  it: {stage: ./drawn.py}\n")
    done = warm("run", "r.yaml", "--num-processes", "2", "--strategy", "fsdp")
    assert done.code == 0, done.stderr
    assert len(list((tmp_path / "artifacts" / "two" / "it").glob("*, *, [01]"))) == len(PRESETS) * 2 * 2
