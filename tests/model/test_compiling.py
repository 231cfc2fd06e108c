"""Compiled blocks give what plain ones give, and it is said when there are none."""

from typing import Any

import pytest
import torch

from pipeline.model.build import evaluating, initialise
from pipeline.model.compiling import WORTH, blocks_of, can_compile, compile_blocks
from pipeline.model.next_token import NextToken
from pipeline.model.presets import Shape, build_model


def model(architecture: str = "llama", **fields: Any) -> Any:
    made = build_model(architecture, Shape(2, 32, 2, 2, None, 16, 64, tied=True), fields)
    initialise(made, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)
    return made


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(), reason="no C++ compiler, or no Python headers: nothing can be compiled here")
def test_loss_and_gradients_are_those_of_plain_blocks() -> None:
    """fp32, to 1e-5; in evaluation the blocks are plain again, and compiled after it."""
    ids = torch.randint(0, 64, (4, 17), generator=torch.Generator().manual_seed(3))
    plain, compiled = model(), model()
    assert compile_blocks(compiled, True, 0.0) == "compiled: 2 blocks of one static shape"
    found = []
    for each in (plain, compiled):
        nats, _ = NextToken(each).loss_sum(ids[:, :-1], ids[:, 1:])
        nats.backward()
        found.append((nats.detach(), [parameter.grad for parameter in each.parameters()]))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    block = blocks_of(compiled)[0]
    with evaluating(compiled):
        assert block._compiled_call_impl is None
    assert block._compiled_call_impl is not None


def test_why_there_is_no_compiling_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model()
    assert "torch_compile is false" in compile_blocks(made, False, 1e30)
    if can_compile():
        assert "too short to gain" in compile_blocks(made, None, WORTH / 2)
    made._no_split_modules = []
    assert "names no repeated block" in compile_blocks(made, True, 0.0)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler" in compile_blocks(model(), True, 0.0)
    assert all(block._compiled_call_impl is None for block in blocks_of(model()))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral", "qwen3", "gemma3", "qwen3_moe"])
def test_every_preset_names_its_blocks(architecture: str) -> None:
    assert len(blocks_of(model(architecture))) == 2
