"""Models by name: their sizes, what sets a family apart, how they begin, what is refused."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.errors import ConfigError
from pipeline.model.build import count_parameters, flops_per_token, initialise
from pipeline.model.presets import PRESETS, SIZES, Shape, build_config, build_model, draw_model, shape_of

VOCABULARY = {"10m": 16_384, "30m": 32_768, "60m": 32_768, "124m": 50_304, "350m": 50_304, "774m": 50_304}


def small(architecture: str, seed: int = 0, *, depth: int = 2, context: int = 32, **fields: Any) -> Any:
    shape = Shape(depth, 32, 2, 2, None, context, 64, tied=True)
    torch.manual_seed(seed)
    model = build_model(architecture, shape, fields)
    initialise(model, torch.Generator().manual_seed(seed))
    return model.eval()


def stir(model: Any) -> Any:
    """No projection is zero any more."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.3)
    return model


@pytest.mark.parametrize("size", SIZES)
def test_a_size_has_the_parameters_it_is_named_by(size: str) -> None:
    shape = shape_of({"size": size}, 2048, VOCABULARY.get(size, 128_256))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(build_config("llama", shape, {}))
    named = float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]]
    found = sum(parameter.numel() for parameter in model.parameters())
    assert found == pytest.approx(named, rel=0.25 if size == "1b" else 0.08)  # Llama 3.2's 1B has 1.24


@pytest.mark.parametrize("architecture", PRESETS)
def test_a_preset_begins_as_the_identity_from_its_seed_alone(architecture: str) -> None:
    model, again, other = small(architecture), small(architecture), small(architecture, seed=1)
    for (name, one), two in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two), name
    assert not torch.equal(model.get_input_embeddings().weight, other.get_input_embeddings().weight)
    ids = torch.arange(10)[None]
    states = model.base_model(ids, use_cache=False, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[1], states[0])  # after the first block what went into it


@pytest.mark.parametrize(
    ("architecture", "fields"), [("llama", {}), ("bloom", {"hidden_size": 16, "n_layer": 1, "n_head": 2})]
)
def test_a_drawn_model_is_a_function_of_its_seed(architecture: str, fields: dict[str, Any]) -> None:
    """Whatever torch's own state is, which stays what it was."""
    shape = Shape(depth=1, width=16, heads=2, kv_heads=2, mlp_width=32, context=8, vocab=32, tied=True)
    found = []
    for seed in (7, 7, 8):
        torch.manual_seed(len(found))
        found.append(torch.nn.utils.parameters_to_vector(draw_model(architecture, shape, fields, seed).parameters()))
        assert torch.initial_seed() == len(found) - 1
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("architecture", PRESETS)
def test_the_spread_of_the_weights(architecture: str) -> None:
    for name, parameter in small(architecture).named_parameters():
        if any(part in name for part in ("o_proj", "down_proj", "c_proj")) and parameter.dim() > 1:
            assert not parameter.any(), name
        elif parameter.dim() > 1:
            is_table = any(part in name for part in ("embed_tokens", "wte", "wpe"))
            std = 0.02 if is_table else 32**-0.5  # every other matrix reads 32 channels
            assert parameter.std().item() == pytest.approx(std, rel=0.15), name


def sees(model: Any, length: int) -> list[int]:
    """Which places' tokens move the logits of the last place."""
    ids = torch.arange(length)[None] % 64
    with torch.no_grad():
        before = model(ids, use_cache=False).logits[0, -1]
        moved = []
        for place in range(length):
            changed = ids.clone()
            changed[0, place] = 63 - changed[0, place]
            if not torch.equal(model(changed, use_cache=False).logits[0, -1], before):
                moved.append(place)
    return moved


def test_mistrals_window_is_half_of_the_context() -> None:
    assert sees(stir(small("mistral", depth=1)), 32) == list(range(16, 32))
    assert sees(stir(small("llama", depth=1)), 32) == list(range(32))


def test_gemma3_is_local_but_for_every_sixth_layer_and_the_last() -> None:
    kinds = small("gemma3", depth=8).config.layer_types
    assert [kind == "full_attention" for kind in kinds] == [False] * 5 + [True, False, True]
    assert sees(stir(small("gemma3", depth=2, layer_types=["sliding_attention"] * 2)), 32)[0] > 0
    assert sees(stir(small("gemma3", depth=2)), 32)[0] == 0


def test_qwen3_normalises_queries_and_keys() -> None:
    names = dict(small("qwen3").named_parameters())
    assert names["model.layers.0.self_attn.q_norm.weight"].shape == (16,)


def test_of_experts_a_tokens_share_counts() -> None:
    """8 experts of which a token passes 2: total and counted parameters by hand."""
    model = small("qwen3_moe", depth=1)
    expert = 3 * 32 * 64  # gate, up, down; half of 96, to a multiple of 32
    rest = 64 * 32 + 4 * 32 * 32 + 8 * 32 + 2 * 16 + 3 * 32  # embedding, attention, router, head norms, norms
    assert count_parameters(model) == (rest + 8 * expert, rest + 2 * expert)
    assert flops_per_token(model, 10) == 6 * (rest + 2 * expert) + 12 * 1 * 2 * 16 * 10


@pytest.mark.parametrize(("architecture", "layers"), [("gpt2", 2), ("llama", 2), ("gemma3", 2)])
def test_attention_is_counted_in_every_family(architecture: str, layers: int) -> None:
    model = small(architecture)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert count_parameters(model) == (counted, counted)
    assert flops_per_token(model, 100) == 6 * counted + 12 * layers * 2 * 16 * 100


def test_attention_of_layers_that_differ_is_counted_layer_by_layer() -> None:
    """Gemma 4: heads of 16 channels where a layer looks back on a window, of 512 where it sees all."""
    fields = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "hidden_size_per_layer_input": 0,
        "layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0,
    }  # fmt: skip
    model = build_model("gemma4_text", Shape(1, 32, 2, 2, None, 64, 64, tied=True), fields)
    assert flops_per_token(model, 10) == 6 * count_parameters(model)[1] + 12 * (2 * 16 + 2 * 512) * 10


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": "125m"}, "no size `125m`; did you mean `124m`"),
        ({"size": "10m", "depth": 3}, "`size` and `depth` both"),
        ({"depth": 1, "hidden_size": 30, "num_attention_heads": 4}, "hidden_size 30 over 4 heads"),
        ({"depth": 1, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 3}, r"\(3 for keys"),
        ({"depth": 1, "hidden_size": 12, "num_attention_heads": 4}, "does not come out even"),
    ],
)
def test_a_shape_that_does_not_come_out_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shape_of(given, 32, 64)


@pytest.mark.parametrize("name", ["size", "depth", "hidden_size", "tie_word_embeddings"])
def test_a_size_of_what_is_no_preset_is_refused(name: str) -> None:
    """It would be lost: transformers' own size would be built, 7 B of it for a Mixtral."""
    given = {"size": "10m", "depth": 2, "hidden_size": 64, "tie_word_embeddings": True}[name]
    with pytest.raises(ConfigError, match=f"`{name}` sizes presets, and `bloom` is none"):
        build_config("bloom", shape_of({name: given}, 32, 64), {})
    assert build_config("bloom", shape_of({}, 32, 64), {"n_layer": 3}).num_hidden_layers == 3


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [("opt", {"max_position_embeddings": 16}), ("llama", {"max_position_embeddings": 16})],
)
def test_positions_that_do_not_reach_the_context_are_refused(architecture: str, fields: dict[str, Any]) -> None:
    """OPT's table of positions would end in the middle of a sample, with an IndexError."""
    with torch.device("meta"), pytest.raises(ConfigError, match="32 is more than the model's context of 16"):
        build_model(architecture, Shape(1, 32, 2, 2, None, 32, 64, tied=True), fields)


def test_a_model_that_sees_what_it_is_to_predict_is_refused() -> None:
    """transformers lists BERT among its causal models; it is one as a decoder only."""
    fields = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
        "max_position_embeddings": 32,
    }  # fmt: skip
    shape = Shape(1, 32, 2, 2, None, 32, 64, tied=True)
    with pytest.raises(ConfigError, match="BertLMHeadModel sees the tokens that it is to predict"):
        draw_model("bert", shape, fields, 0)
    assert sees(draw_model("bert", shape, {**fields, "is_decoder": True}, 0).eval(), 6) == list(range(6))


def test_what_looks_like_padding_hides_nothing() -> None:
    """XLM is told no mask: it counts the tokens that are not its pad, and leaves out so many of the last ones."""
    fields = {"emb_dim": 32, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 32}
    shape = Shape(1, 32, 2, 2, None, 32, 64, tied=True)
    with pytest.raises(ConfigError, match="XLMWithLMHeadModel sees the tokens that it is to predict"):
        draw_model("xlm", shape, fields, 0, pad_id=2)


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("gpt_neo", {"num_layers": 2}, "transformers refuses this gpt_neo: .*attention_types.*ValidationError"),
        (
            "codegen",
            {"n_embd": 32, "n_head": 2, "n_layer": 1, "rotary_dim": 8},
            r"refuses this codegen: shape .*Runtime",
        ),
        ("lfm2_moe", {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}, "lfm2_moe: .*TypeError"),
        ("musicgen", {}, r"refuses this musicgen: .*\(AttributeError\)"),
        (
            "emu3",
            {"text_config": {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}},
            "none that it lo",
        ),
        ("llama", {"pad_token_id": 5}, "the tokenizer sets `pad_token_id`"),
    ],
)
def test_what_fails_in_a_familys_own_code_is_said(architecture: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        draw_model(architecture, Shape(2, 32, 2, 2, None, 32, 64, tied=True), fields, 0)


def test_the_pad_token_is_the_tokenizers() -> None:
    """A family's own would be some token of the text, of which the embedding is then never trained; or none at all."""
    shape = Shape(1, 32, 2, 2, None, 32, 64, tied=True)
    found = [build_config(name, shape, {}, 5).pad_token_id for name in ("gemma3", "opt", "glm", "llama")]
    assert found == [5, 5, 5, None]
    untied = draw_model("gemma3", shape, {"tie_word_embeddings": False}, 0, pad_id=5)
    untied(torch.arange(8)[None], use_cache=False).logits.square().sum().backward()
    gradient = untied.get_input_embeddings().weight.grad
    assert gradient.any(dim=1).nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 6, 7]
    fields = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    of_text = build_config("fuyu", shape, {"text_config": fields}, 5).get_text_config()
    assert (of_text.vocab_size, of_text.pad_token_id, of_text.hidden_size) == (64, 5, 32)


def test_fields_stand_over_the_sizes_and_the_depth() -> None:
    shape = shape_of({"size": "10m", "num_attention_heads": 8, "hidden_size": None}, 64, 100)
    assert (shape.depth, shape.width, shape.heads, shape.kv_heads) == (8, 256, 8, 4)
    assert shape.asked == ("size", "num_attention_heads")
    assert shape_of({}, 64, 100) == Shape(4, 256, 4, 4, None, 64, 100, tied=True)
    assert shape_of({"size": "8b"}, 64, 100).tied is False


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("lama", {}, "no causal language model `lama`; did you mean"),
        ("bert_japanese", {}, "no causal language model"),
        ("llama", {"rope_thetas": 1.0}, "LlamaConfig has no field `rope_thetas`"),
        ("llama", {"vocab_size": 5}, "the tokenizer sets `vocab_size`"),
        ("bloom", {"n_layers": 2}, "BloomConfig has no field `n_layers`; did you mean `n_layer`"),
    ],
)
def test_a_config_that_is_not_one_is_refused(architecture: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(architecture, Shape(2, 32, 2, 2, None, 32, 64, tied=True), fields)
