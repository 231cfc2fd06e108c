"""Log-probs and entropies in chunks against torch's own log_softmax, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.rl.logprobs import chunk_of, logprobs_of_hidden


def plain(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    all_NV = ((hidden_ND @ weight_VD.T) / temperature).log_softmax(dim=-1)
    return all_NV.gather(1, target_N[:, None])[:, 0], -(all_NV.exp() * all_NV).sum(dim=-1)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_whole_logits(chunk: int, temperature: float):
    generator = torch.Generator().manual_seed(0)
    hidden_ND, weight_VD = torch.randn(7, 5, generator=generator), torch.randn(11, 5, generator=generator)
    target_N = torch.randint(11, (7,), generator=generator)
    of_logprob_N, of_entropy_N = torch.randn(2, 7, generator=generator)
    gradients = []
    for function in (plain, lambda *given: logprobs_of_hidden(*given, chunk)):
        inputs = [hidden_ND.clone().requires_grad_(), weight_VD.clone().requires_grad_()]
        logprobs_N, entropies_N = function(*inputs, target_N, temperature)
        (logprobs_N * of_logprob_N + entropies_N * of_entropy_N).sum().backward()
        gradients.append((logprobs_N, entropies_N, *(tensor.grad for tensor in inputs)))
    for ours, theirs in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_loss_without_entropy_has_the_gradient_of_cross_entropy():
    generator = torch.Generator().manual_seed(1)
    hidden_ND = torch.randn(6, 4, generator=generator, requires_grad=True)
    weight_VD, target_N = torch.randn(9, 4, generator=generator), torch.arange(6)
    found = []
    for has_entropy in (True, False):
        logprobs_N, entropies_N = logprobs_of_hidden(hidden_ND, weight_VD, target_N, 1.0, 2, has_entropy=has_entropy)
        assert bool(entropies_N.any()) == has_entropy
        logprobs_N.sum().backward()
        assert hidden_ND.grad is not None
        found.append(hidden_ND.grad.clone())
        hidden_ND.grad = None
    torch.nn.functional.cross_entropy(hidden_ND @ weight_VD.T, target_N, reduction="sum").neg().backward()
    torch.testing.assert_close(found, [hidden_ND.grad, hidden_ND.grad])


def test_products_are_in_the_dtype_of_autocast():
    hidden_ND, weight_VD = torch.randn(4, 64), torch.randn(8, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low_N = logprobs_of_hidden(hidden_ND, weight_VD, torch.arange(4), 1.0)[0]
        logits_NV = torch.nn.functional.linear(hidden_ND, weight_VD)
    assert low_N.dtype == torch.float32
    torch.testing.assert_close(low_N, logits_NV.float().log_softmax(-1).diagonal(), atol=1e-6, rtol=1e-6)


def test_a_chunk_holds_at_least_one_token():
    assert chunk_of(4096) == 4096
    assert chunk_of(4096, is_cached=True) == 256
    assert chunk_of(2**30) == 1
