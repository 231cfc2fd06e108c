"""Compiled blocks: the block that a model repeats is compiled once, for one static shape, where a trial on the run's
own shape shows that it runs, gives what plain blocks give and, on a GPU, is faster."""

from __future__ import annotations

import math
import os
import shutil
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from pipeline.errors import ConfigError, PipelineError
from pipeline.model.attention import drawn

WORTH = 5e14
"""FLOPs of a run on a CPU from which compiling pays: about half an hour on two cores, of which it saves a tenth, for
the half minute that it takes."""
WORTH_ON_GPUS = 300.0
"""Seconds of a run on GPUs from which it pays: others gain a sixth and more there, for a minute at most."""
USED = 0.4
"""Share of its peak that a GPU is taken to reach."""
TOLERANCE = {False: 0.01, True: 0.1}
"""By bf16: how far the gradients of compiled blocks may be from those of plain ones, as a share of their norm. What is
computed wrongly is apart by its own size."""

MicroStep = Callable[[], Tensor]
"""Forward and backward of one micro-step of the run: its loss; gradients are added to the model's."""


def blocks_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The repeated blocks, as the family names them for splitting over devices; [] where it names none. (A sharded one
    is of a class derived from the family's.)"""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if names.intersection(kind.__name__ for kind in type(module).__mro__)]


def can_compile() -> bool:
    """Whether torch's compiler finds what it needs on a CPU: g++ (or CXX) and Python's headers."""
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return shutil.which(os.environ.get("CXX", "g++")) is not None and headers.exists()


def compile_blocks(
    model: PreTrainedModel,
    wanted: bool | None,
    micro_step: MicroStep,
    *,
    flops: float,
    peak: float,
    bf16: bool,
    agreed: Callable[[str], str] = lambda reason: reason,
    also: Callable[[bool], None] = lambda on: None,
) -> str:
    """Compile the model's blocks where that is wanted, or pays, and a trial by `micro_step` succeeds; says what was
    done and why.

    `wanted` None compiles runs on a CPU above WORTH, runs on GPUs above WORTH_ON_GPUS; elsewhere it has not been
    measured. `flops` is the run's, `peak` the FLOP/s of all its devices. `agreed` makes one reason of those of all
    ranks; `also` switches what else is compiled where the blocks are. ConfigError where it was asked for and does not
    work.
    """
    reason = _why_not(model, wanted, flops, peak)
    if reason:
        return f"not compiled: {reason}"
    found = try_compiled(model, micro_step, bf16, also=also)
    is_slower = found.times_as_fast <= 1 and wanted is None and model.device.type != "cpu"
    slower = f"a micro-step is {found.times_as_fast:.2f} times as fast with it" if is_slower else ""
    reason = agreed(found.reason or slower)
    if not reason:
        speed = "" if model.device.type == "cpu" else f"; a micro-step is {found.times_as_fast:.2f} times as fast"
        return f"compiled: {len(blocks_of(model))} blocks of one static shape{speed}"
    uncompile(model)
    also(False)
    if wanted:
        raise ConfigError(f"it does not work here: {reason}", where="pretrain.torch_compile", mend="leave it out")
    return f"not compiled: {reason}"


def _why_not(model: PreTrainedModel, wanted: bool | None, flops: float, peak: float) -> str:
    """Why not even a trial is made; "" where one is."""
    kind = model.device.type
    if wanted is False:
        return "torch_compile is false"
    if not blocks_of(model):
        return f"{type(model).__name__} names no repeated block"
    if kind == "cpu" and not can_compile():
        return "there is no C++ compiler (g++), or Python's headers are missing"
    if wanted is None and kind not in ("cpu", "cuda"):
        return f"not measured on {kind} yet (torch_compile: true compiles)"
    is_short = flops < WORTH if kind == "cpu" else flops < WORTH_ON_GPUS * USED * peak
    return "the run is too short to gain by it (torch_compile: true compiles)" if wanted is None and is_short else ""


def uncompile(model: PreTrainedModel) -> None:
    """Plain blocks."""
    for block in blocks_of(model):
        block._compiled_call_impl = None


# ---- the trial ----


@dataclass(frozen=True)
class Trial:
    """What came of compiling the blocks."""

    reason: str
    """Why they are not to be used; "" where they are."""
    times_as_fast: float = 1.0
    """A micro-step, against one of plain blocks."""


def try_compiled(
    model: PreTrainedModel, micro_step: MicroStep, bf16: bool, *, also: Callable[[bool], None] = lambda on: None
) -> Trial:
    """Compile the blocks and compare micro-steps with those of plain ones: they must run, give the loss and the
    gradients to TOLERANCE (or to what two plain ones differ by, where there is dropout), and not be compiled anew each
    time. `also` as in `compile_blocks`."""
    now = _clock(model.device)
    try:
        with nullcontext() if _is_sharded(model) else drawn(model):
            expected, seconds = _passed(model, micro_step, now)
            noise, _ = _compared(expected, model, micro_step, now)
            for block in blocks_of(model):
                block.compile(dynamic=False)
            also(True)
            apart, _ = _compared(expected, model, micro_step, now)
            made = graphs()
            again, faster = _compared(expected, model, micro_step, now)
            if not max(apart, again) <= max(TOLERANCE[bf16], 2 * noise):
                return Trial(f"loss or gradients differ by {max(apart, again):.1%} from those of plain blocks")
            return Trial("it compiles anew at every step" if graphs() > made else "", seconds / faster)
    except PipelineError:
        raise
    except Exception as error:  # a compiler may fail in any way: that is what is to be found out
        return Trial(_in_a_line(error))
    finally:
        model.zero_grad(set_to_none=True)


def _in_a_line(error: Exception) -> str:
    """What an error says first; of torch's compilers also the line that this announces."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


@dataclass(frozen=True)
class _Pass:
    loss: float
    gradients: list[Tensor]


def _passed(model: PreTrainedModel, micro_step: MicroStep, now: Callable[[], float]) -> tuple[_Pass, float]:
    """What a micro-step gives, and the seconds that the faster of two took."""
    seconds = []
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        began = now()
        loss = micro_step()
        seconds.append(now() - began)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    return _Pass(float(loss), local), max(min(seconds), 1e-9)


def _compared(
    expected: _Pass, model: PreTrainedModel, micro_step: MicroStep, now: Callable[[], float]
) -> tuple[float, float]:
    """(how far another pass is from the expected one, its seconds); its gradients are let go."""
    found, seconds = _passed(model, micro_step, now)
    return _apart(found, expected), seconds


def _apart(found: _Pass, expected: _Pass) -> float:
    """The greater of the losses' distance and the gradients', as shares of what was expected."""
    if len(found.gradients) != len(expected.gradients):
        return math.inf
    pairs = list(zip(found.gradients, expected.gradients, strict=True))
    of_loss = abs(found.loss - expected.loss) / abs(expected.loss)
    squares = [((ours - theirs).square().sum(), theirs.square().sum()) for ours, theirs in pairs]
    apart, whole = torch.stack([torch.stack(each) for each in squares]).sum(dim=0).sqrt().tolist()
    return max(of_loss, float(apart / whole))


def _is_sharded(model: PreTrainedModel) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def _clock(device: torch.device) -> Callable[[], float]:
    """Seconds, when all that was asked of the device is done."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


# ---- the run ----


def graphs() -> int:
    """How many graphs torch has compiled in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def is_compiled(model: PreTrainedModel) -> bool:
    """Whether the model's blocks are compiled ones."""
    return any(block._compiled_call_impl is not None for block in blocks_of(model))


@contextmanager
def telling_of_new_graphs(say: Callable[[str], None], where: str) -> Iterator[None]:
    """Says so where compiled blocks were compiled anew inside."""
    before = graphs()
    yield
    if graphs() > before:
        say(f"{where}: the blocks were compiled anew, for another shape or mode")
