"""Models built, saved and loaded again; what is counted of them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from pipeline.errors import MismatchError
from pipeline.model import build
from pipeline.model.presets import Shape, build_config

VOCAB = 512


def llama(*, tied: bool = True, kv_heads: int = 2, seed: int = 0) -> LlamaForCausalLM:
    config = build_config(
        "llama",
        Shape(depth=2, width=32, heads=4, kv_heads=kv_heads, mlp_width=64, context=16, vocab=VOCAB, tied=tied),
        {},
    )
    model = LlamaForCausalLM(config)
    build.initialise(model, torch.Generator().manual_seed(seed))
    return model


def test_weights_are_a_function_of_the_generator_alone():
    torch.manual_seed(1)
    first = llama()
    torch.manual_seed(2)
    torch.rand(10)
    second, other = llama(), llama(seed=1)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.state_dict()[name])
    assert not torch.equal(first.get_input_embeddings().weight, other.get_input_embeddings().weight)


def test_weights_have_the_spread_that_is_promised():
    for name, parameter in llama(tied=False).named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            assert not parameter.any(), name
        elif parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            std = 0.02 if "embed" in name or "lm_head" in name else parameter.shape[1] ** -0.5
            assert parameter.std().item() == pytest.approx(std, rel=0.1), name
            assert abs(parameter.mean().item()) < std / 5, name


def test_every_block_begins_as_the_identity():
    model = llama()
    ids = torch.arange(10)[None]
    hidden = model.model(ids).last_hidden_state
    torch.testing.assert_close(hidden, model.model.norm(model.get_input_embeddings()(ids)))


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_and_flops_by_hand(tied: bool):
    embedding = VOCAB * 32
    block = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 2 * 32  # q, o; k, v (half the heads); gate, up, down; norms
    trunk = 2 * block + 32
    total, counted = build.count_parameters(llama(tied=tied))
    assert total == trunk + embedding * (1 if tied else 2)
    assert counted == trunk + embedding  # with the head, without the input embedding
    assert build.flops_per_token(llama(tied=tied), 16) == 6 * counted + 12 * 2 * 4 * 8 * 16


@pytest.fixture
def saved(made: Path, tmp_path: Path) -> Path:
    tokens = made / "artifacts" / "tiny" / "tokenize" / "model"
    build.save_model(llama(), tmp_path / "model", tokens, [7], 3)
    return tmp_path / "model"


def test_a_saved_folder_loads_with_tokenizer_template_and_stop(saved: Path):
    model = AutoModelForCausalLM.from_pretrained(saved)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    for name, parameter in llama().named_parameters():
        assert torch.equal(parameter, model.state_dict()[name])
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (7, 3)
    assert model.generation_config.do_sample is False
    text = tokenizer.apply_chat_template([{"role": "user", "content": "ka lo"}], tokenize=False)
    assert text == "<|im_start|>user\nka lo<|im_end|>\n"
    assert "lm_head.weight" not in load_file(saved / "model.safetensors")  # tied: written once
    generated = model.generate(torch.arange(5)[None], max_new_tokens=3)
    assert generated.shape[1] <= 8


def test_the_tokenizers_bytes_stay_as_they_are(saved: Path, made: Path):
    source = made / "artifacts" / "tiny" / "tokenize" / "model"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (saved / name).read_bytes() == (source / name).read_bytes()


def test_several_stop_tokens_are_all_kept(made: Path, tmp_path: Path):
    build.save_model(llama(), tmp_path / "m", made / "artifacts" / "tiny" / "tokenize" / "model", [7, 0], 3)
    assert json.loads((tmp_path / "m" / "generation_config.json").read_text())["eos_token_id"] == [7, 0]


def test_a_model_loads_in_the_asked_precision(saved: Path):
    assert build.load_causal_lm(saved).dtype == torch.float32
    assert build.load_causal_lm(saved, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_vocabulary_that_does_not_fit_is_refused():
    build.check_vocabulary(llama(), VOCAB, "here")
    with pytest.raises(MismatchError, match="the tokenizer has 513 tokens and the model's embedding 512 rows"):
        build.check_vocabulary(llama(), VOCAB + 1, "here")


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_kept_once_and_put_back(tied: bool):
    first, second = llama(tied=tied), llama(tied=tied, seed=1)
    kept = build.unique_parameters(first)
    assert ("lm_head.weight" in kept) is not tied
    build.load_parameters(second, {f"model.{name}": value for name, value in kept.items()}, "model")
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value)
    assert (second.lm_head.weight is second.get_input_embeddings().weight) is tied
