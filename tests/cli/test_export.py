"""A plain folder of a model; adapters merged into their base."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.artifacts import Store, outside_model
from pipeline.cli.export import export
from pipeline.errors import ConfigError, MismatchError, MissingInputError
from pipeline.model.adapters import lora
from pipeline.model.build import load_causal_lm
from pipeline.recipe import PeftConfig
from tests.stages.conftest import make_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(params=[False, True], ids=["lora", "dora"])
def adapter(base: Path, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, torch.Tensor]:
    """An adapter folder as peft saves it, whose base is named by its path, and what the adapted model says."""
    adapted = get_peft_model(load_causal_lm(base), lora(PeftConfig(r=4, use_dora=request.param), "CAUSAL_LM"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=generator)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits(adapted)


def test_an_adapter_is_merged_into_the_base_that_it_names(
    adapter: tuple[Path, torch.Tensor], base: Path, tmp_path: Path
) -> None:
    folder, said = adapter
    out = tmp_path / "merged"
    export(Store(tmp_path), str(folder), to="merged", out=out, base=None)
    merged = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits(merged), said, rtol=0, atol=2e-5)
    assert float((said - logits(load_causal_lm(base))).abs().max()) > 0.1
    assert not list(out.glob("adapter*"))
    assert not (tmp_path / ".merged.partial").exists()
    made = outside_model(out)
    assert made.tokenizer_hash == outside_model(base).tokenizer_hash
    assert AutoTokenizer.from_pretrained(out).chat_template


def test_the_base_can_be_named(adapter: tuple[Path, torch.Tensor], base: Path, tmp_path: Path) -> None:
    folder, said = adapter
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "/nowhere/at/all"}))
    with pytest.raises(MissingInputError, match="'/nowhere/at/all' as its base, which is not there") as caught:
        export(Store(tmp_path), str(folder), to="merged", out=tmp_path / "merged", base=None)
    assert caught.value.mend == "--base REF"
    export(Store(tmp_path), str(folder), to="merged", out=tmp_path / "merged", base=str(base))
    torch.testing.assert_close(logits(load_causal_lm(tmp_path / "merged")), said, rtol=0, atol=2e-5)


def test_an_adapter_is_no_init_and_says_what_to_do(adapter: tuple[Path, torch.Tensor]) -> None:
    with pytest.raises(MissingInputError, match="an adapter without the model it stands on") as caught:
        outside_model(adapter[0])
    assert caught.value.mend.startswith(f"llmpipe export {adapter[0]} --to merged --out ")


def test_a_model_is_copied_byte_for_byte(base: Path, tmp_path: Path) -> None:
    export(Store(tmp_path), str(base), to="merged", out=tmp_path / "copy", base=None)
    names = sorted(path.name for path in base.iterdir())
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == names
    assert all((base / name).read_bytes() == (tmp_path / "copy" / name).read_bytes() for name in names)


def test_what_is_refused(base: Path, tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(ConfigError, match="there is something already"):
        export(store, str(base), to="merged", out=base, base=None)
    with pytest.raises(ConfigError, match="no such form: 'onnx'"):
        export(store, str(base), to="onnx", out=tmp_path / "x", base=None)
    with pytest.raises(ConfigError, match="is no adapter"):
        export(store, str(base), to="merged", out=tmp_path / "x", base=str(base))


def test_an_adapter_of_another_shape_is_refused(adapter: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 400, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2)).save_pretrained(tmp_path / "wide")
    with pytest.raises(MismatchError, match="the adapter does not go into"):
        export(Store(tmp_path), str(adapter[0]), to="merged", out=tmp_path / "x", base=str(tmp_path / "wide"))
    assert not (tmp_path / "x").exists()
