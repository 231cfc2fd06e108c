"""A model out of a stage's working folder is the one the stage goes on to save."""

import shutil
from pathlib import Path

import pytest
import torch

from pipeline.artifacts import Store
from pipeline.errors import ArtifactError
from pipeline.model.build import load_causal_lm
from pipeline.model.unfinished import load_unfinished
from pipeline.runtime import Runtime
from stages import pretrain


@pytest.fixture
def partial(made: Path, tmp_path: Path) -> Path:
    """A pretrain that has run to its end, as it lay before it was published."""
    tokens = Store(made / "artifacts").artifact("tiny", "tokenize")
    config = pretrain.PretrainConfig(
        model=pretrain.ModelConfig(depth=2, hidden_size=32, num_attention_heads=2),
        context_length=32,
        max_steps=4,
        save_steps=2,
        eval_documents=2,
        bf16=False,
    )
    runtime = Runtime.start(tmp_path, seed=0, threads=1, quiet=True)
    pretrain.run(config, {"tokens": tokens, "init": None}, tmp_path, runtime)
    return tmp_path


def test_the_newest_checkpoint_is_the_model(partial: Path) -> None:
    final = load_causal_lm(partial / "model")
    (partial / "model" / "model.safetensors").unlink()
    model, folder, step = load_unfinished(partial, torch.float32)
    assert (folder, step) == (partial / "model", 4)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, final.get_parameter(name)), name
    assert model.generation_config.eos_token_id == final.generation_config.eos_token_id
    shutil.rmtree(partial / "checkpoints" / "step-00000004")
    before, _, step = load_unfinished(partial, torch.bfloat16)
    assert step == 2
    assert before.dtype == torch.bfloat16
    assert not torch.equal(before.get_input_embeddings().weight.float(), final.get_input_embeddings().weight)


def test_without_a_whole_checkpoint_or_its_folder_it_is_refused(partial: Path) -> None:
    shutil.rmtree(partial / "model")
    with pytest.raises(ArtifactError, match="not a whole model"):
        load_unfinished(partial, torch.float32)
    shutil.rmtree(partial / "checkpoints")
    with pytest.raises(ArtifactError, match="no whole checkpoint yet"):
        load_unfinished(partial, torch.float32)
