"""Compiled blocks give what plain ones give; the trial before them finds out where they don't, and says so."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.model.build import evaluating, initialise
from pipeline.model.compiling import (
    USED,
    WORTH,
    WORTH_ON_GPUS,
    blocks_of,
    can_compile,
    compile_blocks,
    is_compiled,
    telling_of_new_graphs,
    try_compiled,
    uncompile,
)
from pipeline.model.next_token import NextToken
from pipeline.model.presets import Shape, build_model

needs_compiler = pytest.mark.skipif(
    not can_compile(), reason="no C++ compiler, or no Python headers: nothing can be compiled here"
)


def model(architecture: str = "llama", depth: int = 2, **fields: Any) -> Any:
    made = build_model(architecture, Shape(depth, 32, 2, 2, None, 16, 64, tied=True), fields)
    initialise(made, torch.Generator().manual_seed(0))
    return made


def micro_step(made: Any, rows: int = 4) -> Callable[[], Tensor]:
    ids = torch.randint(0, 64, (rows, 17), generator=torch.Generator().manual_seed(3))
    losses = NextToken(made)

    def run() -> Tensor:
        nats, _ = losses.loss_sum(ids[:, :-1], ids[:, 1:])
        nats.backward()
        return nats.detach()

    return run


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Takes the place of torch's compiler: by a backend of one's own, each graph of which is counted as by torch's."""

    def take(backend: Callable[[Any, Any], Any]) -> None:
        plain = torch.compile
        monkeypatch.setattr(torch, "compile", lambda it, dynamic: plain(it, dynamic=dynamic, backend=backend))

    torch._dynamo.reset()
    yield take
    torch._dynamo.reset()


def as_it_is(graph: Any, inputs: Any) -> Any:
    return graph


def halved(graph: Any, inputs: Any) -> Any:
    """A compiler whose attention and MLP come out at half their size."""
    for node in graph.graph.nodes:
        if node.target is torch.nn.functional.linear or node.target is torch._C._nn.linear:
            with graph.graph.inserting_after(node):
                half = graph.graph.call_function(torch.mul, (node, 0.5))
                node.replace_all_uses_with(half, delete_user_cb=lambda user, half=half: user is not half)
    graph.recompile()
    return graph


def broken(graph: Any, inputs: Any) -> Any:
    raise AssertionError("ptxas is not there\nand much more")


@needs_compiler
@pytest.mark.slow
def test_loss_and_gradients_are_those_of_plain_blocks() -> None:
    """By torch's own compiler, fp32, to 1e-5; in evaluation the blocks are plain again, and compiled after it. The
    trial leaves the weights, zero ones too, as they were."""
    ids = torch.randint(0, 64, (4, 17), generator=torch.Generator().manual_seed(3))
    plain, compiled = model(), model()
    before = {name: tensor.clone() for name, tensor in compiled.state_dict().items()}
    said = compile_blocks(compiled, True, micro_step(compiled), flops=0.0, peak=1.0, bf16=False)
    assert said == "compiled: 2 blocks of one static shape"
    assert all(torch.equal(before[name], tensor) for name, tensor in compiled.state_dict().items())
    assert all(parameter.grad is None for parameter in compiled.parameters())
    for each in (plain, compiled):
        with torch.no_grad():
            for parameter in each.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)
    found, told = [], list[str]()
    for each in (plain, compiled):
        with telling_of_new_graphs(told.append, "step 1"):
            nats, _ = NextToken(each, is_chunked=True).loss_sum(ids[:, :-1], ids[:, 1:])
            nats.backward()
        found.append((nats.detach(), [parameter.grad for parameter in each.parameters()]))
    assert told == []  # what the trial compiled is what the run uses
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    block = blocks_of(compiled)[0]
    with evaluating(compiled):
        assert block._compiled_call_impl is None
    assert block._compiled_call_impl is not None


@pytest.mark.slow
def test_what_works_is_taken_and_new_graphs_are_told(compiler: Any) -> None:
    compiler(as_it_is)
    made = model(depth=3)
    trial = try_compiled(made, micro_step(made), bf16=False)
    assert trial.reason == ""
    assert is_compiled(made)
    told: list[str] = []
    with telling_of_new_graphs(told.append, "step 7"):
        micro_step(made)()
    assert told == []
    with telling_of_new_graphs(told.append, "step 8"):
        micro_step(made, rows=2)()
    assert told == ["step 8: the blocks were compiled anew, for another shape or mode"]


@pytest.mark.slow
def test_wrong_results_are_found_though_new_blocks_do_nothing_yet(compiler: Any) -> None:
    compiler(halved)
    made = model()
    said = compile_blocks(made, None, micro_step(made), flops=2 * WORTH, peak=1.0, bf16=False)
    assert said.startswith("not compiled: loss or gradients differ by ")
    assert not is_compiled(made)


@pytest.mark.slow
def test_what_fails_leaves_plain_blocks_and_says_why(compiler: Any) -> None:
    """Unset it goes on plainly; asked for, it is refused."""
    compiler(broken)
    made = model()
    said = compile_blocks(made, None, micro_step(made), flops=2 * WORTH, peak=1.0, bf16=False)
    assert said.startswith("not compiled: ")
    assert "ptxas is not there" in said
    assert not is_compiled(made)
    plain = micro_step(model())()
    assert torch.equal(micro_step(made)(), plain)
    with pytest.raises(ConfigError, match="ptxas is not there") as caught:
        compile_blocks(made, True, micro_step(made), flops=0.0, peak=1.0, bf16=False)
    assert caught.value.where == "pretrain.torch_compile"


@pytest.mark.slow
def test_what_is_compiled_at_every_step_is_not_taken(compiler: Any) -> None:
    compiler(as_it_is)
    made = model()
    rows = iter(range(1, 100))
    assert try_compiled(made, lambda: micro_step(made, next(rows))(), bf16=False).reason != ""
    same = micro_step(made)

    def anew() -> Tensor:
        torch._dynamo.reset()
        return same()

    assert try_compiled(made, anew, bf16=False).reason == "it compiles anew at every step"


@pytest.mark.slow
def test_dropout_does_not_pass_for_wrong_results(compiler: Any) -> None:
    compiler(as_it_is)
    made = model("gpt2", resid_pdrop=0.5, attn_pdrop=0.5).train()
    assert try_compiled(made, micro_step(made), bf16=False).reason == ""


@pytest.mark.slow
def test_one_rank_that_cannot_keeps_all_plain(compiler: Any) -> None:
    compiler(as_it_is)
    made = model()
    told: list[str] = []

    def agreed(reason: str) -> str:
        told.append(reason)
        return "another process finds that it does not work"

    said = compile_blocks(made, None, micro_step(made), flops=2 * WORTH, peak=1.0, bf16=False, agreed=agreed)
    assert said == "not compiled: another process finds that it does not work"
    assert told == [""]
    assert not is_compiled(made)


@pytest.mark.slow
def test_on_a_gpu_what_is_slower_is_not_taken(compiler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of the test's own: a plain micro-step takes two seconds there, a compiled one what is said."""
    compiler(as_it_is)
    made = model()
    real = micro_step(made)
    monkeypatch.setattr(type(made), "device", torch.device("cuda"))
    for seconds, wanted, said in [
        (1.6, None, "compiled: 2 blocks of one static shape; a micro-step is 1.25 times as fast"),
        (2.5, None, "not compiled: a micro-step is 0.80 times as fast with it"),
        (2.5, True, "compiled: 2 blocks of one static shape; a micro-step is 0.80 times as fast"),
    ]:
        uncompile(made)
        passed = [0.0]

        def work(passed: list[float] = passed, seconds: float = seconds) -> Tensor:
            passed[0] += seconds if is_compiled(made) else 2.0
            return real()

        monkeypatch.setattr("pipeline.model.compiling._clock", lambda device, passed=passed: lambda: passed[0])
        assert compile_blocks(made, wanted, work, flops=1e30, peak=1.0, bf16=False) == said


def test_why_there_is_no_compiling_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(made: Any, wanted: bool | None, flops: float, peak: float = 1.0) -> str:
        def none() -> Tensor:
            raise AssertionError("a trial")

        return compile_blocks(made, wanted, none, flops=flops, peak=peak, bf16=False)

    made = model()
    assert "torch_compile is false" in said(made, False, 1e30)
    if can_compile():
        assert "too short to gain" in said(made, None, WORTH / 2)
    with monkeypatch.context() as patched:
        patched.setattr(type(made), "device", torch.device("cuda"))
        patched.setattr("pipeline.model.compiling._clock", lambda device: lambda: 0.0)
        enough = WORTH_ON_GPUS * USED * 8e15  # of eight GPUs
        assert "too short to gain" in said(made, None, 0.99 * enough, 8e15)
        assert said(made, None, 1.01 * enough, 8e15) == "not compiled: a trial"
        patched.setattr(type(made), "device", torch.device("mps"))
        assert "not measured on mps" in said(made, None, 1e30)
    made._no_split_modules = []
    assert "names no repeated block" in said(made, True, 0.0)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler" in said(model(), True, 0.0)
    assert not is_compiled(model())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral", "qwen3", "gemma3", "qwen3_moe"])
def test_every_preset_names_its_blocks(architecture: str) -> None:
    assert len(blocks_of(model(architecture))) == 2
