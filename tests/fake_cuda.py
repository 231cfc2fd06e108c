"""A CUDA device of fake tensors (shapes, dtypes and devices, no numbers), where neither the machine nor torch has one.

torch looks for its devices when it is imported, so that what registers one here (`GUARD`, a few lines of C++) has to be
loaded before it: tests run their programs in a process of their own. What mixes tensors of two devices is an error
there, and so is what needs a number on the host, for which it would wait on a GPU; a copy that the host would wait for
is written down. What kernels do, and how long it takes, no fake tensor tells.
"""

from __future__ import annotations

import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

GUARD = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
using c10::Device, c10::DeviceIndex, c10::DeviceType, c10::Stream;
Device first() { return Device(DeviceType::CUDA, 0); }
Stream only() { return Stream(Stream::DEFAULT, first()); }
struct Guard : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return first(); }
  Device getDevice() const override { return first(); }
  Stream getStream(Device) const noexcept override { return only(); }
  Stream getDefaultStream(Device) const override { return only(); }
  Stream getNewStream(Device, int) const override { return only(); }
  Stream getStreamFromGlobalPool(Device, bool) const override { return only(); }
  Stream exchangeStream(Stream) const noexcept override { return only(); }
  void record(void**, const Stream&, DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
}
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, Guard) }
namespace at {
struct CUDAHooks : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}
"""


def build_guard(folder: Path) -> Path:
    """The library that registers the device, compiled against the torch that is here; needs g++."""
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch = Path(spec.origin).parent
    source, library = folder / "guard.cpp", folder / "guard.so"
    source.write_text(GUARD)
    include, lib = f"-I{torch / 'include'}", str(torch / "lib")
    linked = [f"-L{lib}", f"-Wl,-rpath,{lib}", "-lc10", "-ltorch_cpu"]
    abi = f"-I{sysconfig.get_path('include')}"
    command = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", include, abi, str(source), "-o", str(library), *linked]
    subprocess.run(command, check=True, capture_output=True)
    return library


@contextmanager
def fake_cuda(waits: list[str]) -> Iterator[Any]:
    """Tensors made inside are fake and may be on `cuda`; real ones of the host that meet them count as the host's.

    `waits` gets the `file:line` of this project's code where the host would wait for a copy.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    aten = torch.ops.aten

    class Copies(TorchDispatchMode):
        """Notes copies between the host and the device for which the host waits."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            found = func(*args, **kwargs)
            if func is aten._to_copy.default:
                there, asks = args[0].device.type, kwargs.get("non_blocking", False)
                is_pinned = there == "cuda" or id(args[0]) in PINNED
                if there != found.device.type and not (asks and is_pinned):
                    waits.append(caller())
            if func is aten.copy_.default and args[0].device.type != args[1].device.type:
                waits.append(caller())
            return found

    with patched(torch), FakeTensorMode(allow_non_fake_inputs=True) as mode, Copies():
        yield mode


PINNED: dict[int, Any] = {}
"""Tensors in page-locked memory, by their id."""


@contextmanager
def patched(torch: Any) -> Iterator[None]:
    """What asks the driver, answered: a GPU of today."""
    from unittest.mock import patch

    def pinned(tensor: Any) -> Any:
        assert tensor.is_contiguous(), "what is copied from page-locked memory is copied once more unless contiguous"
        PINNED[id(tensor)] = tensor
        return tensor

    with (
        patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        patch.object(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True),
        patch.object(torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        patch.object(torch.cuda, "set_device", set_device),
        patch.object(torch.Tensor, "pin_memory", pinned),
    ):
        yield


def set_device(device: Any) -> None:
    """torch's own check of its argument."""
    if device.index is None:
        raise ValueError(f"Expected a torch.device with a specified index or an integer, but got:{device}")


def caller() -> str:
    """`file:line` of the innermost frame that is this project's."""
    import traceback

    own = [frame for frame in traceback.extract_stack() if "/src/pipeline/" in frame.filename]
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "elsewhere"
