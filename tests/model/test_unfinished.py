"""A model out of a stage's working folder is the one the stage goes on to save."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.artifacts import Store
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import ArtifactError, MismatchError
from pipeline.model.build import load_causal_lm, save_without_weights
from pipeline.model.unfinished import load_unfinished
from pipeline.runtime import Runtime
from stages import pretrain


def run_to_its_end(made: Path, out: Path, architecture: str = "llama") -> Path:
    """A pretrain that has run to its end, as it lay before it was published."""
    tokens = Store(made / "artifacts").artifact("tiny", "tokenize")
    config = pretrain.PretrainConfig(
        model=pretrain.ModelConfig(architecture=architecture, depth=2, hidden_size=32, num_attention_heads=2),
        context_length=32,
        max_steps=4,
        save_steps=2,
        eval_documents=2,
        bf16=False,
    )
    runtime = Runtime.start(out, seed=0, threads=1, quiet=True)
    pretrain.run(config, {"tokens": tokens, "init": None}, out, runtime)
    return out


@pytest.fixture
def partial(made: Path, tmp_path: Path) -> Path:
    return run_to_its_end(made, tmp_path)


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


def test_a_class_of_the_users_own_comes_from_its_checkpoint(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it lies while the stage is at work: the folder that is written as it begins, and a checkpoint."""
    text = (Path(__file__).parents[2] / "docs" / "pretrain.md").read_text()
    (tmp_path / "gpt.py").write_text(text.rpartition("```python\n")[2].partition("```")[0])
    began = tmp_path / "began"

    def copy_as_it_begins(*given: Any) -> None:
        save_without_weights(*given)
        shutil.copytree(given[1], began)

    monkeypatch.setattr("pipeline.model.build.save_without_weights", copy_as_it_begins)
    partial = run_to_its_end(made, tmp_path / ".pretrain.0123.partial", f"{tmp_path}/gpt.py:GPT")
    final = load_file(partial / "model" / "model.safetensors")
    shutil.rmtree(partial / "model")
    shutil.copytree(began, partial / "model")
    model, folder, step = load_unfinished(partial, torch.float32)
    assert (type(model).__name__, step) == ("GPT", 4)
    assert len(load_tokenizer(folder)) == model.config.vocab_size
    assert {name for name, value in model.state_dict().items() if torch.equal(value, final[name])} == final.keys()
    brought = shutil.copytree(partial, tmp_path / "brought")
    with pytest.raises(MismatchError, match="needs code that its folder brings along, which is not run"):
        load_unfinished(brought, torch.float32)


def test_without_a_whole_checkpoint_or_its_folder_it_is_refused(partial: Path) -> None:
    shutil.rmtree(partial / "model")
    with pytest.raises(ArtifactError, match="not a whole model"):
        load_unfinished(partial, torch.float32)
    shutil.rmtree(partial / "checkpoints")
    with pytest.raises(ArtifactError, match="no whole checkpoint yet"):
        load_unfinished(partial, torch.float32)
