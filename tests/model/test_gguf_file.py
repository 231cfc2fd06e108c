"""GGUF files against transformers' own reader of them, which is nobody's here."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.data.tokenizers import load_tokenizer, split_pattern, train_bpe
from pipeline.errors import ConfigError, MismatchError
from pipeline.model.build import initialise, save_model
from pipeline.model.gguf_file import PROBES, greedy, paired, read_back, stop_of, tensors, write_gguf
from pipeline.model.presets import Shape, build_config

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")

SAME = "read back: the same greedy tokens on 3 texts"
TEXTS = ["Hello, world! 1234 été naïve", "def f(x):\n    return x + 1"] * 30


def made(
    folder: Path, architecture: str, *, tied: bool = True, kv_heads: int = 2, fields: Any = None, digits: int = 1
) -> Path:
    """A random model of two layers whose logits differ well, with a ChatML tokenizer of 320 tokens."""
    tokenizer = train_bpe(iter(TEXTS), 320, pattern=split_pattern(digits))
    tokenizer.save_pretrained(folder / "tokenizer")
    shape = Shape(2, 64, 4, kv_heads, 96, 64, len(tokenizer), tied)
    config = build_config(architecture, shape, fields or {})
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(1)
    initialise(model, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    save_model(model, folder / "model", folder / "tokenizer", [tokenizer.eos_token_id], tokenizer.pad_token_id)
    return folder / "model"


QWEN2 = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tied": False, "kv_heads": 4}),
    ("mistral", {"kv_heads": 1}),
    ("qwen2", {"fields": QWEN2}),
    ("qwen3", {"fields": {"head_dim": 128}}),  # the width that transformers' reader takes for granted
]


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "options"), MODELS)
def test_what_is_read_back_says_the_same(tmp_path: Path, architecture: str, options: dict[str, Any]):
    folder = made(tmp_path, architecture, **options)
    write_gguf(folder, tmp_path / "m.gguf", "f32", "m")
    assert read_back(folder, tmp_path / "m.gguf", "f32") == [SAME]
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    assert read.config.model_type == ("llama" if architecture == "mistral" else architecture)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([[5, 90, 200, 7, 11]])
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "options"), [*MODELS, ("qwen3", {}), ("llama", {"digits": 3})])
def test_llama_cpp_says_the_same(tmp_path: Path, architecture: str, options: dict[str, Any]):
    """Tokens of texts, what the chat template writes, and greedy tokens within a window of 32; all in float32."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    folder = made(tmp_path, architecture, **options)
    write_gguf(folder, tmp_path / "m.gguf", "f32", "m")
    tokenizer = load_tokenizer(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=64, n_threads=1, type_k=0, type_v=0, verbose=False)
    for text in (*PROBES, "  two  spaces\tand\r\n\r\nlines 3.14159 it's WE'LL"):
        ids = tokenizer(text).input_ids
        assert theirs.tokenize(text.encode(), special=False) == ids
        with torch.no_grad():
            ours = greedy(plain, ids[:8], 20)[len(ids[:8]) :]
        theirs.reset()
        said = theirs.generate(ids[:8], temp=0.0, top_k=1, repeat_penalty=1.0)
        assert [token for token, _ in zip(said, ours, strict=False)] == ours
    messages = [{"role": "user", "content": "Name a colour."}]
    told = theirs.metadata["tokenizer.chat_template"]
    written = Jinja2ChatFormatter(template=told, eos_token="<|im_end|>", bos_token="")(messages=messages).prompt
    assert written == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert theirs.token_eos() == tokenizer.eos_token_id


@pytest.mark.slow
def test_a_qwen3_of_other_heads_says_how_it_is_read(tmp_path: Path):
    folder = made(tmp_path, "qwen3")
    write_gguf(folder, tmp_path / "m.gguf", "f32", "m")
    same, note = read_back(folder, tmp_path / "m.gguf", "f32")
    assert same == SAME
    assert "head_dim=16" in note
    assert gguf.GGUFReader(tmp_path / "m.gguf").fields["qwen3.attention.key_length"].contents() == 16


def test_rows_of_a_head_are_paired():
    """Two heads of four channels: 0 1 2 3 becomes 0 2 1 3."""
    rows = np.arange(8, dtype=np.float32)[:, None]
    assert paired(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.slow
def test_a_file_of_other_weights_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = made(tmp_path, "llama")
    monkeypatch.setattr("pipeline.model.gguf_file.paired", lambda rows, heads: rows)
    write_gguf(folder, tmp_path / "m.gguf", "f32", "m")
    with pytest.raises(MismatchError, match="greedy tokens differ"):
        read_back(folder, tmp_path / "m.gguf", "f32")


@pytest.mark.slow
def test_types_round_and_the_file_shrinks(tmp_path: Path):
    folder = made(tmp_path, "llama")
    sizes = {}
    for dtype in ("f32", "f16", "q8_0"):
        file = tmp_path / f"{dtype}.gguf"
        write_gguf(folder, file, dtype, "m")
        sizes[dtype] = sum(tensor.n_bytes for tensor in gguf.GGUFReader(file).tensors)
        assert all(note.startswith("read back") or dtype in note for note in read_back(folder, file, dtype))
    norms = 4 * 64 * 5
    whole = sizes["f32"] - norms
    assert sizes["f16"] == norms + whole // 2
    assert sizes["q8_0"] == norms + whole * 34 // 128  # 32 values are 34 bytes


def test_the_metadata(tmp_path: Path):
    folder = made(tmp_path, "mistral", kv_heads=2)
    write_gguf(folder, tmp_path / "m.gguf", "f32", "m")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    said = {name: field.contents() for name, field in fields.items() if "tokens" not in name}
    assert said["general.architecture"] == "llama"
    assert said["llama.context_length"] == 32  # the window, half of the reach
    assert said["tokenizer.ggml.eos_token_id"] == 1
    assert said["tokenizer.ggml.padding_token_id"] == 3
    assert said["tokenizer.ggml.pre"] == "qwen2"
    assert said["tokenizer.ggml.add_bos_token"] is False
    assert "<|im_start|>" in said["tokenizer.chat_template"]
    assert "generation -%" not in said["tokenizer.chat_template"]


def test_what_cannot_be_written_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="gpt2 is none of llama, mistral, qwen2, qwen3"):
        write_gguf(made(tmp_path / "a", "gpt2"), tmp_path / "a.gguf", "f32", "m")
    scaled = {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}}
    with pytest.raises(ConfigError, match="rotary positions of type linear"):
        write_gguf(made(tmp_path / "b", "llama", fields=scaled), tmp_path / "b.gguf", "f32", "m")
    with pytest.raises(ConfigError, match="no such type"):
        write_gguf(tmp_path, tmp_path / "c.gguf", "q4", "m")


def test_greedy_takes_the_largest(tmp_path: Path):
    folder = made(tmp_path, "llama")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    expected = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert greedy(model, [5, 6, 7], 5) == expected[0].tolist()
    assert stop_of(model) == 1
    assert "output.weight" not in dict(tensors(model, "llama"))
