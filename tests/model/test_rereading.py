"""Models that keep no cache write what they would write read anew at every token, whatever stands beside them."""

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pipeline.model.attention import keeps_documents_apart, reach_of_masks
from pipeline.model.generation import Sampling, draw_uniforms, generate, stream
from pipeline.model.heard import Heard
from pipeline.model.presets import Shape, build_model
from pipeline.model.rereading import cache_of, in_doubt

VOCAB = 48
FAMILIES: dict[str, dict[str, Any]] = {
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
    "xlstm": {
        "hidden_size": 32, "num_blocks": 2, "num_heads": 2, "num_hidden_layers": 2, "embedding_dim": 32,
        "mode": "inference",
    },
    "qwen3_next": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 0,
        "layer_types": ["linear_attention", "linear_attention"],
    },
    "gpt_neo": {
        "hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]],
        "window_size": 8, "max_position_embeddings": 64,
    },
    "bart": {
        "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "encoder_layers": 1,
        "max_position_embeddings": 64,
    },
    "roberta": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "is_decoder": True, "max_position_embeddings": 64, "pad_token_id": 1,
    },
    "./gpt.py:GPT": {},
}  # fmt: skip


TINY_LAYERS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def tiny(family: str, folder: Path, fields: dict[str, Any] | None = None) -> PreTrainedModel:
    torch.manual_seed(0)
    if not family.startswith("."):
        given = FAMILIES[family] if fields is None else fields
        config = AutoConfig.for_model(family, vocab_size=VOCAB, initializer_range=0.3, **given)
        model = AutoModelForCausalLM.from_config(config, dtype="float32")
    else:
        text = (Path(__file__).parents[2] / "docs" / "pretrain.md").read_text()
        (folder / "gpt.py").write_text(text.rpartition("```python\n")[2].partition("```")[0])
        model = build_model(f"{folder}/gpt.py:GPT", Shape(2, 32, 2, 2, None, 64, VOCAB, tied=False), {})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    return model.eval()


def greedy(model: PreTrainedModel, prompt: list[int], new: int) -> list[int]:
    row = list(prompt)
    with torch.no_grad():
        for _ in range(new):
            row.append(int(model(torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
    return row[len(prompt) :]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_any_length_side_by_side_are_those_alone(family: str, tmp_path: Path) -> None:
    model = tiny(family, tmp_path)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in (3, 9, 1, 6, 6)]
    expected = [greedy(model, prompt, 10) for prompt in prompts]
    assert generate(model, prompts, max_new_tokens=10, stop_ids=[], pad_id=0).responses() == expected
    assert [list(stream(model, prompt, max_new_tokens=10, stop_ids=[])) for prompt in prompts] == expected
    assert len({token for answer in expected for token in answer}) > 3

    begun = [[7, 8, *prompt] for prompt in prompts]
    shared = generate(model, begun, max_new_tokens=5, stop_ids=[], pad_id=0, shared=2)
    assert shared.responses() == [greedy(model, prompt, 5) for prompt in begun]

    stop = expected[0][2]  # ended rows leave
    ended = [answer[: answer.index(stop) + 1] if stop in answer else answer for answer in expected]
    assert generate(model, prompts, max_new_tokens=10, stop_ids=[stop], pad_id=0).responses() == ended


def test_the_cache_of_a_family_in_doubt_is_found_out_by_trying(tmp_path: Path) -> None:
    """GPT-Neo takes empty columns for tokens; BART's kin are told no positions, RoBERTa's count from another place than
    they are told. GPT-2 has a table of positions too, and is what it says."""
    more = {"gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2}, "llama": {**TINY_LAYERS, "num_attention_heads": 2}}
    for family, (is_doubted, cache) in {
        "gpt_neo": (True, "tight"),
        "bart": (True, "none"),
        "roberta": (True, "none"),
        "gpt2": (True, "roomy"),
        "llama": (False, "roomy"),
    }.items():
        model = tiny(family, tmp_path, more.get(family))
        assert (in_doubt(model), cache_of(model)) == (is_doubted, cache), family
        assert (reach_of_masks(model) > 0) == (cache == "roomy"), family


def test_documents_of_a_model_that_counts_from_elsewhere_are_not_taken_for_apart(tmp_path: Path) -> None:
    assert not keeps_documents_apart(tiny("roberta", tmp_path))


def test_what_fails_in_a_model_of_keys_alone_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading every row again would hide it, and be slow."""
    model = build_model("llama", Shape(1, 32, 2, 2, None, 64, VOCAB, tied=True), {}).eval()

    forward = model.forward

    @functools.wraps(forward)
    def fails_with_a_cache(*args: Any, **given: Any) -> Any:
        if given.get("past_key_values") is not None:
            raise ValueError("in the middle of a forward")
        return forward(*args, **given)

    monkeypatch.setattr(model, "forward", fails_with_a_cache)
    with pytest.raises(ValueError, match="in the middle of a forward"):
        generate(model, [[3, 4]], max_new_tokens=2, stop_ids=[], pad_id=0)


def test_samples_of_one_prompt_and_a_conversation_gone_on_with(tmp_path: Path) -> None:
    model, prompt = tiny("rwkv", tmp_path), [5, 9, 30, 7]
    given: dict[str, Any] = {
        "max_new_tokens": 6, "stop_ids": [], "pad_id": 0, "sampling": Sampling(0.9),
        "uniforms_BT": draw_uniforms(4, 6, torch.Generator().manual_seed(3)),
    }  # fmt: skip
    apart, shared = (generate(model, [prompt] * 4, **given, samples_per_prompt=count) for count in (1, 4))
    assert shared.responses() == apart.responses()
    torch.testing.assert_close(shared.logprobs_BT, apart.logprobs_BT)
    assert math.isfinite(float(apart.logprobs_BT.sum()))

    heard = Heard()
    first = list(stream(model, prompt, max_new_tokens=5, stop_ids=[], heard=heard))
    longer = [*prompt, *first, 11]
    assert list(stream(model, longer, max_new_tokens=5, stop_ids=[], heard=heard)) == greedy(model, longer, 5)
