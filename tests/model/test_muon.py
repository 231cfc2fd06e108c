"""Muon against torch's, which iterates in bf16 alone, and against the iteration written out."""

import copy

import numpy as np
import pytest
import torch

from pipeline.model import muon
from pipeline.model.muon import Muon, orthogonal

SHAPES = ((6, 10), (10, 6), (8, 8), (1, 5))


def weights() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def give_gradients(parameters: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step + 1)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_in_bf16_it_is_torchs_bit_for_bit_and_goes_on_from_its_state(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(muon, "bf16_pays", lambda device: True)
    theirs, own, later = weights(), weights(), weights()
    reference = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    optimizer, resumed = Muon(own, lr=0.01, weight_decay=0.1), Muon(later, lr=0.01, weight_decay=0.1)
    for step in range(5):
        if step == 2:
            for parameter, value in zip(later, theirs, strict=True):
                parameter.data.copy_(value.data)
            resumed.load_state_dict(copy.deepcopy(reference.state_dict()))
        for parameters, each in ((theirs, reference), (own, optimizer), *([(later, resumed)] if step > 1 else [])):
            give_gradients(parameters, step)
            each.step()
    for expected, found, after in zip(theirs, own, later, strict=True):
        assert torch.equal(expected, found)
        assert torch.equal(expected, after)


@pytest.mark.parametrize("shape", SHAPES)
def test_in_float32_the_iteration_is_the_one_of_the_paper(shape: tuple[int, int]):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    x = matrix.double().numpy()
    x = x / np.linalg.norm(x)
    for _ in range(5):  # Jordan's: a X + b (X Xᵀ) X + c (X Xᵀ)² X, which does not mind the side
        square = x @ x.T
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    found = orthogonal(matrix, torch.float32)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), x, atol=2e-4)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.5
    assert values.max() < 1.25


def test_a_step_by_hand(monkeypatch: pytest.MonkeyPatch):
    """Of a row (1 × 4) orthogonal() is its direction, times what the iteration makes of 1."""
    monkeypatch.setattr(muon, "bf16_pays", lambda device: False)
    weight = torch.nn.Parameter(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    optimizer = Muon([weight], lr=0.1, weight_decay=0.5)
    weight.grad = torch.tensor([[0.0, 3.0, 0.0, 4.0]])
    optimizer.step()
    end = 1.0
    for _ in range(5):
        end = 3.4445 * end - 4.7750 * end**3 + 2.0315 * end**5
    moved = 0.1 * 0.2 * 2 * end * torch.tensor([[0.0, 0.6, 0.0, 0.8]])  # √max(1, 4) = 2; the direction of G
    torch.testing.assert_close(weight.data, 0.95 * torch.tensor([[1.0, 2.0, 3.0, 4.0]]) - moved)
    torch.testing.assert_close(optimizer.state[weight]["momentum_buffer"], 0.05 * torch.tensor([[0.0, 3.0, 0.0, 4.0]]))


def test_the_iteration_follows_the_hardware(monkeypatch: pytest.MonkeyPatch):
    asked: list[torch.dtype] = []
    monkeypatch.setattr(muon, "orthogonal", lambda matrix, dtype: asked.append(dtype) or matrix)
    for pays in (True, False):
        monkeypatch.setattr(muon, "bf16_pays", lambda device, pays=pays: pays)
        parameters = weights()[:1]
        give_gradients(parameters, 0)
        Muon(parameters, lr=0.1, weight_decay=0.0).step()
    assert asked == [torch.bfloat16, torch.float32]
