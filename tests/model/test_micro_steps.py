"""A batch in micro-steps: one gradient however it is split, smaller micro-steps where the memory ends."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from pipeline.data.packing import Windows
from pipeline.errors import MachineError
from pipeline.model.micro_steps import MicroSteps
from pipeline.model.next_token import NextToken
from pipeline.model.presets import build_model, shape_of

LENGTH, BATCH = 16, 24


@pytest.fixture
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    given = {"depth": 2, "hidden_size": 32, "num_attention_heads": 2}
    return build_model("llama", shape_of(given, LENGTH, 64), {})


def split(model: PreTrainedModel, rows: int, **settings: Any) -> MicroSteps:
    stream = np.random.default_rng(0).integers(0, 64, 2000)
    given: dict[str, Any] = {
        "steps": 3,
        "batch": BATCH,
        "length": LENGTH,
        "rows": rows,
        "count": BATCH // rows,
        "is_split": False,
        "rank": 0,
        "world_size": 1,
        "device": torch.device("cpu"),
        "autocast": lambda: torch.autocast("cpu", enabled=False),
        "halves_on_out_of_memory": False,
        "say": lambda text: None,
    }
    return MicroSteps(NextToken(model), Windows(stream, LENGTH, 0), **{**given, **settings})


def gradients(steps: MicroSteps, step: int = 1) -> tuple[float, dict[str, torch.Tensor]]:
    model = steps.losses.model
    model.zero_grad()
    loss = float(steps.gradients(step))
    steps.close()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-6)


def test_the_gradient_is_that_of_the_mean_loss_of_the_batch(model: PreTrainedModel) -> None:
    steps = split(model, 8)
    loss, found = gradients(steps)
    rows = torch.from_numpy(steps.samples.take(range(BATCH, 2 * BATCH)).rows_BT)
    model.zero_grad()
    logits = model(rows[:, :-1]).logits
    naive = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    naive.backward()
    assert loss == pytest.approx(naive.item(), rel=1e-5)
    assert_same(found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize(("rows", "is_split"), [(12, False), (6, True), (12, True)])
def test_the_parts_of_two_ranks_sum_to_it(model: PreTrainedModel, rows: int, is_split: bool) -> None:
    loss, whole = gradients(split(model, 24))
    parts = [
        gradients(split(model, rows, count=12 // rows, is_split=is_split, rank=rank, world_size=2)) for rank in (0, 1)
    ]
    assert sum(part for part, _ in parts) == pytest.approx(loss, rel=1e-5)
    assert_same({name: parts[0][1][name] + parts[1][1][name] for name in whole}, whole)


def out_of_memory_above(monkeypatch: pytest.MonkeyPatch, rows: int, message: str) -> list[int]:
    """The losses hold no more than so many rows; returns the rows of each try."""
    plain, tried = NextToken.loss_sum, []

    def loss_sum(self: NextToken, inputs_BT: torch.Tensor, *rest: Any) -> Any:
        tried.append(len(inputs_BT))
        if len(inputs_BT) > rows:
            raise RuntimeError(message)
        return plain(self, inputs_BT, *rest)

    monkeypatch.setattr(NextToken, "loss_sum", loss_sum)
    return tried


MESSAGES = [
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB",
    "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.",
]


@pytest.mark.parametrize("message", MESSAGES)
def test_out_of_memory_makes_micro_steps_smaller_and_the_gradient_stays(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    loss, whole = gradients(split(model, 24))
    said: list[str] = []
    tried = out_of_memory_above(monkeypatch, 3, message)
    steps = split(model, 24, halves_on_out_of_memory=True, say=said.append)
    model.zero_grad()
    assert float(steps.gradients(1)) == pytest.approx(loss, rel=1e-5)
    assert_same({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, whole)
    assert tried == [24, 12, 6, *[3] * 8]
    assert said[-1] == "out of memory: 8 micro-steps of 3 rows from here, the same batch"
    model.zero_grad()
    steps.gradients(2)
    assert tried[11:] == [3] * 8  # it is not tried again
    steps.close()


@pytest.mark.parametrize(("rows", "is_split"), [(12, False), (6, True)])
def test_a_rank_whose_memory_ends_keeps_its_own_samples(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, rows: int, is_split: bool
) -> None:
    """The other rank's micro-steps stay whole: no sample twice, none left out."""
    loss, whole = gradients(split(model, 24))
    given = {"count": 12 // rows, "is_split": is_split, "world_size": 2}
    one, found = gradients(split(model, rows, rank=0, **given))
    out_of_memory_above(monkeypatch, 3, MESSAGES[0])
    steps = split(model, rows, rank=1, halves_on_out_of_memory=True, **given)
    model.zero_grad()
    other = float(steps.gradients(1))
    steps.close()
    assert one + other == pytest.approx(loss, rel=1e-5)
    assert_same({n: found[n] + p.grad for n, p in model.named_parameters() if p.grad is not None}, whole)


def test_odd_rows_are_divided_too(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = out_of_memory_above(monkeypatch, 1, MESSAGES[0])
    steps = split(model, 3, halves_on_out_of_memory=True)
    steps.gradients(0)
    assert tried == [3, *[1] * 24]
    steps.close()


@pytest.mark.parametrize(("rows", "halves"), [(24, False), (1, True)])
def test_out_of_memory_says_what_mends_it(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, rows: int, halves: bool
) -> None:
    out_of_memory_above(monkeypatch, 0, MESSAGES[0])
    steps = split(model, rows, halves_on_out_of_memory=halves)
    with pytest.raises(MachineError, match="out of memory: CUDA") as caught:
        steps.gradients(1)
    assert caught.value.where == "step 2"
    assert "auto_find_batch_size" in str(caught.value)
    steps.close()


def test_other_faults_are_left_alone(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    out_of_memory_above(monkeypatch, 0, "mat1 and mat2 shapes cannot be multiplied")
    steps = split(model, 24, halves_on_out_of_memory=True)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        steps.gradients(0)
    steps.close()
