"""What is trained where only the last blocks are."""

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pipeline.errors import ConfigError
from pipeline.model.freezing import train_last


def llama(*, tied: bool) -> PreTrainedModel:
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=1, tie_word_embeddings=tied))


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=3, n_head=1))


@pytest.mark.parametrize(
    ("model", "prefixes"),
    [
        (llama(tied=False), ("model.layers.1.", "model.layers.2.", "model.norm.", "lm_head.")),
        (llama(tied=True), ("model.layers.1.", "model.layers.2.", "model.norm.")),
        (gpt2(), ("transformer.h.1.", "transformer.h.2.", "transformer.ln_f.")),
    ],
    ids=("llama", "llama, tied", "gpt2, tied"),
)
def test_the_last_blocks_the_norm_and_a_head_of_its_own_are_trained(
    model: PreTrainedModel, prefixes: tuple[str, ...]
) -> None:
    train_last(model, 2, "sft.train_last_layers")
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == name.startswith(prefixes), name
    for prefix in prefixes:
        assert any(name.startswith(prefix) for name, _ in model.named_parameters()), prefix


def test_more_blocks_than_there_are_is_an_error() -> None:
    with pytest.raises(ConfigError, match="4 of 3 blocks") as caught:
        train_last(llama(tied=True), 4, "sft.train_last_layers")
    assert caught.value.where == "sft.train_last_layers"
    bare = llama(tied=True)
    bare._no_split_modules = []
    with pytest.raises(ConfigError, match="names no repeated block"):
        train_last(bare, 1, "sft.train_last_layers")
