"""The chunked cross entropy against torch's own: value, both gradients, in either precision, over chunk borders."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.model import losses
from pipeline.model.compiling import can_compile
from pipeline.model.losses import IGNORED, cross_entropy_sum, distillation_sum, terms_of, token_nats

N, D, V = 37, 16, 53


def made(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [N, D], weight [V, D] (float32, as a model's is), target [N] with some ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    weight_VD = torch.randn(V, D, generator=generator).requires_grad_()
    target_N = torch.randint(0, V, (N,), generator=generator)
    target_N[[0, 5, 6, 20, N - 1]] = IGNORED
    return hidden_ND, weight_VD, target_N


def reference(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    logits_NV = hidden_ND.double() @ weight_VD.to(hidden_ND.dtype).double().T
    return F.cross_entropy(logits_NV, target_N, reduction="sum", ignore_index=IGNORED)


def test_by_hand():
    """Two positions, three words: logits (ln 1, ln 2, ln 5) and (0, 0, 0), targets 2 and 0."""
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    weight = torch.tensor([[0.0, 0.0], [math.log(2), 0.0], [math.log(5), 0.0]], requires_grad=True)
    loss = cross_entropy_sum(hidden, weight, torch.tensor([2, 0]))
    assert loss.item() == pytest.approx(math.log(8 / 5) + math.log(3), rel=1e-6)
    loss.backward()
    # softmax − onehot: (1/8, 2/8, −3/8) and (−2/3, 1/3, 1/3)
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, torch.tensor([[1 / 8, -2 / 3], [2 / 8, 1 / 3], [-3 / 8, 1 / 3]]))
    assert hidden.grad is not None
    first = 2 / 8 * math.log(2) - 3 / 8 * math.log(5)
    second = (math.log(2) + math.log(5)) / 3
    torch.testing.assert_close(hidden.grad, torch.tensor([[first, 0.0], [second, 0.0]]))


@pytest.mark.parametrize("chunk", [1, 6, 36, 37, 38, 2048])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_value_and_gradients_are_torchs(dtype: torch.dtype, tolerance: float, chunk: int):
    hidden_ND, weight_VD, target_N = made(dtype)
    loss = cross_entropy_sum(hidden_ND, weight_VD, target_N, chunk)
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    (0.5 * loss).backward()
    own = [hidden_ND.grad, weight_VD.grad]
    hidden_ND.grad = weight_VD.grad = None
    expected = reference(hidden_ND, weight_VD, target_N)
    (0.5 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for mine, theirs, name in zip(own, [hidden_ND.grad, weight_VD.grad], ["hidden", "weight"], strict=True):
        assert mine is not None
        assert theirs is not None
        assert mine.dtype == theirs.dtype
        error = (mine.double() - theirs.double()).norm() / theirs.double().norm()
        assert error < tolerance, name


def test_autocast_gives_low_precision_products_and_float32_gradients():
    hidden_ND, weight_VD, target_N = made(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cross_entropy_sum(hidden_ND, weight_VD, target_N, 10)
    loss.backward()
    expected = reference(hidden_ND, weight_VD, target_N)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=2e-2)
    assert loss.item() != pytest.approx(expected.item(), rel=1e-6)
    assert hidden_ND.grad is not None
    assert weight_VD.grad is not None
    assert hidden_ND.grad.dtype == weight_VD.grad.dtype == torch.float32


def test_ignored_targets_count_nothing():
    hidden_ND, weight_VD, target_N = made(torch.float32)
    loss = cross_entropy_sum(hidden_ND, weight_VD, target_N, 10)
    loss.backward()
    assert hidden_ND.grad is not None
    is_ignored = target_N == IGNORED
    assert torch.equal(hidden_ND.grad[is_ignored], torch.zeros(5, D))
    assert (hidden_ND.grad[~is_ignored].abs().sum(-1) > 0).all()
    counted = cross_entropy_sum(hidden_ND[~is_ignored], weight_VD, target_N[~is_ignored])
    assert loss.item() == pytest.approx(counted.item(), rel=1e-6)
    nothing = cross_entropy_sum(hidden_ND, weight_VD, torch.full((N,), IGNORED))
    assert nothing.item() == 0


def test_large_logits_stay_finite():
    hidden_ND, weight_VD, target_N = made(torch.float32)
    loss = cross_entropy_sum(hidden_ND * 1e4, weight_VD, target_N)
    loss.backward()
    assert math.isfinite(loss.item())
    assert weight_VD.grad is not None
    assert weight_VD.grad.isfinite().all()


@pytest.mark.parametrize("chunk", [1, 10, 2048])
def test_nats_of_every_token(chunk: int):
    hidden_ND, weight_VD, target_N = made(torch.float32)
    nats_N = token_nats(hidden_ND, weight_VD, target_N, chunk)
    logits_NV = hidden_ND @ weight_VD.T
    expected_N = F.cross_entropy(logits_NV, target_N, reduction="none", ignore_index=IGNORED)
    torch.testing.assert_close(nats_N, expected_N.detach())
    assert nats_N[target_N == IGNORED].tolist() == [0.0] * 5
    assert not nats_N.requires_grad
    assert nats_N.sum().item() == pytest.approx(cross_entropy_sum(hidden_ND, weight_VD, target_N).item(), rel=1e-6)


# Distillation, against torch's own kl_div and cross_entropy over whole logits.


def distilled(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, teacher: tuple[Tensor, Tensor], alpha: float, tau: float
) -> tuple[Tensor, Tensor, Tensor]:
    logits_NV = (hidden_ND @ weight_VD.to(hidden_ND.dtype).T).double()
    teacher_NV = (teacher[0] @ teacher[1].T).double()
    hard = F.cross_entropy(logits_NV, target_N, reduction="sum", ignore_index=IGNORED)
    counted = target_N != IGNORED
    soft = tau**2 * F.kl_div(
        F.log_softmax(logits_NV[counted] / tau, -1), F.softmax(teacher_NV[counted] / tau, -1), reduction="sum"
    )
    return (1 - alpha) * hard + alpha * soft, hard, soft


@pytest.mark.parametrize("chunk", [1, 36, 2048])
@pytest.mark.parametrize(("alpha", "tau"), [(0.5, 1.0), (1.0, 2.0), (0.0, 3.0), (0.3, 0.5)])
def test_distillation_is_torchs(alpha: float, tau: float, chunk: int):
    hidden_ND, weight_VD, target_N = made(torch.float32)
    teacher = (torch.randn(N, 24, generator=torch.Generator().manual_seed(7)), torch.randn(V, 24))
    found = distillation_sum(hidden_ND, weight_VD, target_N, *teacher, alpha, tau, chunk)
    (0.5 * found[0]).backward()
    own = [hidden_ND.grad, weight_VD.grad]
    hidden_ND.grad = weight_VD.grad = None
    expected = distilled(hidden_ND, weight_VD, target_N, teacher, alpha, tau)
    (0.5 * expected[0]).backward()
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.item() == pytest.approx(theirs.item(), rel=1e-5)
    for mine, theirs in zip(own, [hidden_ND.grad, weight_VD.grad], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_student_that_is_its_teacher_learns_from_the_text_alone():
    hidden_ND, weight_VD, target_N = made(torch.float32)
    teacher = (hidden_ND.detach(), weight_VD.detach())
    loss, hard, soft = distillation_sum(hidden_ND, weight_VD, target_N, *teacher, 0.25, 2.0)
    assert float(soft) == pytest.approx(0, abs=1e-4)
    loss.backward()
    own = hidden_ND.grad
    hidden_ND.grad = None
    (0.75 * reference(hidden_ND, weight_VD, target_N)).backward()
    torch.testing.assert_close(own, hidden_ND.grad, rtol=1e-4, atol=1e-5)
    assert float(hard) == pytest.approx(float(reference(hidden_ND, weight_VD, target_N).detach()), rel=1e-5)


def passed(dtype: torch.dtype, **given: Any) -> list[Tensor]:
    """Loss and both gradients, in chunks of ten under bf16 autocast where `dtype` is that."""
    hidden_ND, weight_VD, target_N = made(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = cross_entropy_sum(hidden_ND, weight_VD, target_N, chunk=10, **given)
    loss.backward()
    assert hidden_ND.grad is not None
    assert weight_VD.grad is not None
    return [loss.detach(), hidden_ND.grad, weight_VD.grad]


class Casts(TorchDispatchMode):
    """Counts casts of something as large as the head's weight to bf16."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        is_cast = func is torch.ops.aten._to_copy.default and found.dtype == torch.bfloat16
        self.count += is_cast and sorted(found.shape) == [D, V]
        return found


def test_casting_once_gives_what_autocast_gives(monkeypatch: pytest.MonkeyPatch):
    """As off a CPU: the weight is cast once, not for each of the four chunks too; the same numbers as rounded to bf16
    in the same places, in float32."""
    with Casts() as plain:
        expected = passed(torch.bfloat16)
    monkeypatch.setattr(losses, "dtype_of_products", lambda hidden_ND: torch.bfloat16)
    with Casts() as once:
        found = passed(torch.bfloat16)
    assert plain.count > once.count == 1
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


def test_a_cpu_leaves_the_casts_to_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert losses.dtype_of_products(torch.zeros(1)) is None


def test_what_is_to_be_compiled_is_the_same_bit_for_bit():
    """The one expression, not compiled, against the loss in place."""
    for ours, theirs in zip(passed(torch.float32, terms=terms_of), passed(torch.float32), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(), reason="no C++ compiler, or no Python headers: nothing can be compiled here")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_compiled_loss_is_the_plain_one(dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch):
    """By torch's own compiler, the last chunk of another shape than the others."""
    expected = passed(dtype)
    if dtype == torch.bfloat16:
        monkeypatch.setattr(losses, "dtype_of_products", lambda hidden_ND: torch.bfloat16)
    for ours, theirs in zip(passed(dtype, terms=torch.compile(terms_of, dynamic=False)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
