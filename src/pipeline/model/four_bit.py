"""A frozen language model in four bits (NF4; Dettmers et al. 2023, "QLoRA") for adapters to stand on: by bitsandbytes,
an extra, on CUDA.

Not on a CPU, though bitsandbytes has a kernel there: in eval mode, which RL trains in, it packs the weights into a form
that has no backward, and gradients are wrong with no more than a warning (0.50.2).
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from pipeline.artifacts import runs_code_of
from pipeline.errors import MachineError


def check_four_bit(device: torch.device, where: str) -> None:
    """MachineError unless models in four bits can be trained on here."""
    if device.type != "cuda":
        problem = f"bitsandbytes' four bits need a CUDA device, and this one is {device.type}"
        raise MachineError(problem, where=where, mend="leave it out; the weights are in full precision without it")
    if find_spec("bitsandbytes") is None:
        raise MachineError("bitsandbytes is not installed", where=where, mend='pip install "llmpipe[gpu]"')


def load_four_bit(folder: Path, device: torch.device, *, bf16: bool) -> PreTrainedModel:
    """The model in a Hugging Face folder, on the device: matrices of the blocks in four bits, which are multiplied in
    bf16 or fp32; embedding, head and norms in fp32."""
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=quantised,
        dtype=torch.float32,
        device_map={"": device},
        trust_remote_code=runs_code_of(folder),
    )
    assert isinstance(model, PreTrainedModel)
    del model.config.quantization_config  # what is written is no model in four bits
    return model


@torch.no_grad()
def merged_onto(plain: PreTrainedModel, adapted: PreTrainedModel) -> PreTrainedModel:
    """`plain` with the active adapters of `adapted` added in, in place; both began as one model.

    A DoRA adapter (Liu et al. 2024, equation 5) then gives each row of the sum the length it has learnt:
    W' = m · (W + ΔW) / ‖W + ΔW‖, with W the plain weight where it was trained on the one in four bits.
    """
    for name, layer in adapted.named_modules():
        if isinstance(layer, LoraLayer):
            weight = plain.get_submodule(name).weight
            for adapter in layer.active_adapters:
                weight += layer.get_delta_weight(adapter).to(weight)
                if adapter in layer.lora_magnitude_vector:
                    length = layer.lora_magnitude_vector[adapter].weight.to(weight)
                    weight *= (length / torch.linalg.norm(weight, dim=1))[:, None]
    return plain
