"""Liger's fused linear cross entropy (Hsu et al. 2024, "Liger Kernel"): head and loss in one, on CUDA, by an extra.

Letters of shapes: N positions, D width, V vocabulary.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from pipeline.errors import MachineError
from pipeline.model.losses import IGNORED


def check_liger(device: torch.device) -> None:
    """MachineError unless Liger's kernels can run on the device."""
    where = "pretrain.use_liger_kernel"
    if device.type != "cuda":
        problem = f"Liger's kernels need a CUDA device, and this one is {device.type}"
        raise MachineError(problem, where=where, mend="leave it out: head and loss go in chunks without it")
    if find_spec("liger_kernel") is None:
        raise MachineError("liger-kernel is not installed", where=where, mend='pip install "llmpipe[gpu]"')


def fused_cross_entropy_sum(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """`losses.cross_entropy_sum` by Liger's kernel: a sum in nats, float32, the weight's gradient summed in float32.

    Waits for the device twice, for the count of its targets and for the factor of its backward.
    """
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss: Tensor = liger_fused_linear_cross_entropy(
        hidden_ND, weight_VD, target_N, ignore_index=IGNORED, reduction="sum", accum_dtype=torch.float32
    )
    return loss
