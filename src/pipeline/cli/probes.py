"""What `llmpipe doctor` runs: each probe does a small piece of real work and compares it with plain arithmetic."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

GIB = 2**30
State = Literal["ok", "slow", "missing", "broken"]
CPU_FEATURES = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "neon", "asimd")
EXTRAS = {
    "gguf": ("gguf", "llmpipe export --to gguf, and reading GGUF files"),
    "serve": ("uvicorn", "llmpipe serve"),
    "vllm": ("vllm", "rollouts and serving by vLLM"),
    "eval": ("lm_eval", "lm-eval's tasks"),
    "track": ("tensorboard", "track: of a recipe"),
}
"""Extra -> the module that shows it is there, and what it is for."""
ENOUGH_MEMORY, ENOUGH_DISK = 4 * GIB, 5 * GIB


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `broken` is of what is required; `mend` is the command or line that helps."""

    name: str
    state: State
    found: str
    mend: str = ""


def software(constraints: Path | None) -> Iterator[Check]:
    """The required packages against what llmpipe asks for, and against the versions that were tested."""
    from packaging.requirements import Requirement

    tested = _pins(constraints)
    other, count = [], 0
    for line in metadata.requires("llmpipe") or []:
        need = Requirement(line)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        count += 1
        try:
            version = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            yield Check(need.name, "broken", "not installed", f'pip install "{need.name}{need.specifier}"')
            continue
        if not need.specifier.contains(version, prereleases=True):
            what = f"{version}, and {need.specifier} is needed"
            yield Check(need.name, "broken", what, f'pip install "{need.name}{need.specifier}"')
        pin = tested.get(need.name.lower().replace("_", "-"))
        if pin is not None and version.partition("+")[0] != pin:
            other.append(f"{need.name} {version} (tested: {pin})")
    if other:
        yield Check("versions", "ok", "not the tested ones: " + ", ".join(other), "pip install -c constraints.txt -e .")
    else:
        against = "as tested" if tested else "within their ranges; no constraints.txt here to compare with"
        yield Check("versions", "ok", f"{count} required packages {against}")


def _pins(constraints: Path | None) -> dict[str, str]:
    if constraints is None or not constraints.exists():
        return {}
    lines = [line.partition("==") for line in constraints.read_text().splitlines() if "==" in line]
    return {name.lower().replace("_", "-"): version for name, _, version in lines}


def extras() -> Iterator[Check]:
    """What is not required: there or not."""
    for extra, (module, use) in EXTRAS.items():
        if find_spec(module) is None:
            yield Check(f"extra {extra}", "missing", f"for {use}", f'pip install "llmpipe[{extra}]"')
        else:
            yield Check(f"extra {extra}", "ok", f"for {use}")


def places(artifacts: Path) -> Iterator[Check]:
    """Room, writing and locks where the artifacts go."""
    there = next(path for path in (artifacts.absolute(), *artifacts.absolute().parents) if path.exists())
    disk = shutil.disk_usage(there)
    room = f"{disk.free / GIB:,.1f} GiB free at {there}"
    if not disk.total:  # /proc, /sys: nothing that could be freed would make room
        yield Check("disk", "broken", f"{there} is no disk", "--artifacts (or LLMPIPE_ARTIFACTS) with a folder on one")
    elif disk.free < ENOUGH_DISK:
        yield Check("disk", "slow", room, "llmpipe gc, or --artifacts on another disk")
    else:
        yield Check("disk", "ok", room)
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".llmpipe-doctor-") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield Check("artifacts", "ok", "can be written and locked")
    except OSError as error:
        mend = "--artifacts (or LLMPIPE_ARTIFACTS) with a folder on a local disk that is yours"
        yield Check("artifacts", "broken", f"{there}: {error.strerror or error}", mend)


def processor() -> Iterator[Check]:
    """Cores that this process may use, and what they can multiply."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    # unless it is told, torch may leave out the second threads of cores, which is no loss
    held = threads < cores and "OMP_NUM_THREADS" in os.environ
    found = f"{cores}, torch uses {threads}"
    yield Check("cores", "slow", found, "unset OMP_NUM_THREADS") if held else Check("cores", "ok", found)
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set[str]()
    there = [name for name in CPU_FEATURES if name in flags]
    yield Check("processor", "ok", ", ".join(there) or "no feature that is looked for")


def memory() -> Check:
    """What this process may have: the machine's, or its container's."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    most = min(whole, int(text)) if text.isdigit() else whole
    of = " (the container's limit)" if most < whole else ""
    if most < ENOUGH_MEMORY:
        return Check("memory", "slow", f"{most / GIB:.1f} GiB{of}: small models only", "llmpipe plan says what fits")
    return Check("memory", "ok", f"{most / GIB:.1f} GiB{of}")


def gpus() -> Iterator[Check]:
    """The GPUs that torch sees, and those that it does not."""
    import torch

    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        found = f"{card.name}, {card.total_memory / GIB:.0f} GiB, compute {card.major}.{card.minor}"
        yield Check(f"gpu {number}", "ok", found)
    if torch.cuda.is_available():
        return
    if torch.backends.mps.is_available():
        yield Check("gpu", "ok", "Apple's, by MPS: chat and single models run on it")
    elif Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        mend = "pip install torch --index-url https://download.pytorch.org/whl/cu128 (the build that fits the driver)"
        yield Check("gpu", "missing", f"there is NVIDIA's driver, and torch {torch.__version__} sees no GPU", mend)
    else:
        yield Check("gpu", "missing", "none: everything runs on the CPU")


def products(device: torch.device, seconds: float = 0.5) -> Check:
    """The rate of a product of matrices in fp32 and in bf16, in FLOP/s."""
    from pipeline.hardware import product_rate
    from pipeline.runtime import bf16_pays

    size = 8192 if device.type == "cuda" else 1024
    plain, half = (product_rate(device, size, bf16, seconds) for bf16 in (False, True))
    found = f"fp32 {plain / 1e9:,.0f}, bf16 {half / 1e9:,.0f} GFLOP/s: × {half / plain:.1f}"
    used = "bf16 is used" if bf16_pays(device) else "fp32 is used"
    return Check("products", "ok" if half > plain else "slow", f"{found}; {used}")


def kernels(device: torch.device) -> Iterator[Check]:
    """Attention by torch's kernels and flash-attn, the compiler, Liger, bitsandbytes: each run, not looked up."""
    yield run("sdpa", lambda: _attention(device), "broken", "pip install --force-reinstall torch")
    yield run("sdpa, flash", lambda: _flash(device), "slow", "sdpa's other kernels are used")
    yield run("torch.compile", lambda: _compiled(device), "missing", "apt-get install g++ python3-dev")
    gpu = '; on a GPU: pip install "llmpipe[gpu]"' if device.type != "cuda" else 'pip install "llmpipe[gpu]"'
    for name, module, probe in (
        ("flash-attn", "flash_attn", _flash_attn),
        ("liger", "liger_kernel", _liger),
        ("bitsandbytes", "bitsandbytes", _four_bit),
    ):
        if device.type != "cuda":
            yield Check(name, "missing", "of use on CUDA alone")
        elif find_spec(module) is None:
            mend = "pip install flash-attn --no-build-isolation" if module == "flash_attn" else gpu
            yield Check(name, "missing", "not installed", mend)
        else:
            yield run(name, probe, "missing", f"pip install --force-reinstall {name}")


def run(name: str, probe: Callable[[], str], otherwise: State, mend: str) -> Check:
    """What the probe says, or its error's first line. A probe may fail in any way a library can: that is its answer."""
    began = time.monotonic()
    try:
        found = probe()
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Check(name, otherwise, reason, mend)
    return Check(name, "ok", f"{found} ({time.monotonic() - began:.1f} s)")


def _rows(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys, values [2, 4, 64, 64] and plain causal attention over them in fp32."""
    import torch

    numbers = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 64, 64, generator=numbers).to(device, dtype) for _ in range(3))
    scores = q.float() @ k.float().transpose(-1, -2) / 8
    hidden = torch.ones(64, 64, dtype=torch.bool, device=device).triu(1)
    return q, k, v, scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v.float()


def _near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    error = float((found.detach().float() - expected.detach().float()).abs().max())
    if not error <= tolerance:
        raise ArithmeticError(f"it runs, and its numbers are off by {error:.2g}")


def _attention(device: torch.device) -> str:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v, expected = _rows(device, torch.float32)
    q.requires_grad_()
    found = scaled_dot_product_attention(q, k, v, is_causal=True)
    _near(found, expected, 1e-2 if device.type == "cuda" else 1e-4)  # TF32 on a GPU
    found.sum().backward()  # type: ignore[no-untyped-call]
    return "forward and backward are right"


def _flash(device: torch.device) -> str:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v, expected = _rows(device, torch.bfloat16)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        _near(scaled_dot_product_attention(q, k, v, is_causal=True), expected, 5e-2)
    return "torch's own, bf16"


def _compiled(device: torch.device) -> str:
    import torch

    from pipeline.model.compiling import can_compile

    if device.type == "cpu" and not can_compile():
        raise RuntimeError("no C++ compiler (g++), or Python's headers are missing")

    def smooth(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x) * x.sin()

    x = torch.linspace(-3, 3, 4096, device=device)
    _near(torch.compile(smooth)(x), smooth(x), 1e-4)
    return "compiles and is right"


def _flash_attn() -> str:
    import torch
    from flash_attn import flash_attn_func

    q, k, v, expected = _rows(torch.device("cuda"), torch.bfloat16)
    found = flash_attn_func(*(part.transpose(1, 2) for part in (q, k, v)), causal=True)
    _near(found.transpose(1, 2), expected, 5e-2)
    return "runs and is right"


def _liger() -> str:
    import torch

    from pipeline.model.liger import fused_cross_entropy_sum

    numbers = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 64, generator=numbers).cuda() for rows in (32, 512))
    target = torch.arange(32, device="cuda")
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, target, reduction="sum")
    _near(fused_cross_entropy_sum(hidden, weight, target) / expected, torch.ones((), device="cuda"), 1e-2)
    return "head and loss in one, right"


def _four_bit() -> str:
    import torch
    from bitsandbytes.nn import Linear4bit

    plain = torch.nn.Linear(256, 256, bias=False)
    layer = Linear4bit(256, 256, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    _near(layer.cuda()(x.cuda().bfloat16()).cpu(), plain(x), 0.5)
    return "a layer in four bits"
