"""The language model of a stage that has not finished, from its newest whole checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from pipeline.artifacts import runs_code_of
from pipeline.checkpoint import newest_checkpoint
from pipeline.errors import ArtifactError
from pipeline.model.build import load_buffers, load_causal_lm, load_parameters

ROLES = ("model", "average", "policy")
"""What pretrain and ppo call their language model in a checkpoint; ppo writes its average where it has one."""


def load_unfinished(partial: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, Path, int]:
    """(model, the folder of its tokenizer, the step it was saved at) from a stage's working folder.

    pretrain and ppo keep tensors by name, beside the model's folder without weights that they write as they begin;
    TRL's trainers keep a Hugging Face folder. Raises ArtifactError without a whole checkpoint, or for one of adapters.
    """
    newest = newest_checkpoint(partial / "checkpoints")
    if newest is None:
        raise ArtifactError("no whole checkpoint yet", where=str(partial), mend="wait for the first, or for the stage")
    if (newest.path / "config.json").exists():
        return load_causal_lm(newest.path, dtype=dtype), newest.path, newest.step
    folder = partial / "model"
    if not (newest.path / "state.safetensors").exists() or not (folder / "config.json").exists():
        raise ArtifactError("its checkpoint is not a whole model", where=str(newest.path), mend="wait for the stage")
    tensors = newest.tensors()
    role = next((role for role in ROLES if any(name.startswith(f"{role}.") for name in tensors)), None)
    if role is None:
        raise ArtifactError("its checkpoint holds no language model", where=str(newest.path))
    if any(".lora_A." in name for name in tensors):
        raise ArtifactError("its checkpoint holds adapters alone", where=str(newest.path), mend="wait for the stage")
    runs_code = runs_code_of(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=runs_code)
    model = AutoModelForCausalLM.from_config(config, dtype="float32", trust_remote_code=runs_code)
    assert isinstance(model, PreTrainedModel)
    load_parameters(model, tensors, role)
    if role == "model":  # pretrain's, which keeps buffers too
        load_buffers(model, tensors, "buffer")
    model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.to(dtype), folder, newest.step
