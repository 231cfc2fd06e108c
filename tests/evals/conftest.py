"""A tiny tokenizer and tiny random Llamas, base and chat, made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from pipeline.data.chat import stop_token_id
from pipeline.data.tokenizers import train_bpe
from pipeline.evals.subject import Subject, load_subject
from pipeline.model.build import save_model
from pipeline.model.presets import Shape, build_config

WORDS = "return the sum of two numbers read a file and close it sort a list in place open the door naïve été 日本"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe(iter([WORDS] * 8), 320)


def _save(folder: Path, tokenizer: PreTrainedTokenizerFast, stop: int, seed: int) -> Path:
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    config = build_config(
        "llama",
        Shape(depth=2, width=32, heads=2, kv_heads=1, mlp_width=64, context=64, vocab=len(tokenizer), tied=True),
        {},
    )
    config.initializer_range = 0.3  # far from uniform, so that scores differ
    tokenizer.save_pretrained(folder / "tokenizer")
    assert tokenizer.pad_token_id is not None
    save_model(LlamaForCausalLM(config), folder / "model", folder / "tokenizer", [stop], tokenizer.pad_token_id)
    return folder / "model"


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return _save(tmp_path_factory.mktemp("chat"), tokenizer, stop_token_id(tokenizer), 0)


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return _save(tmp_path_factory.mktemp("other"), tokenizer, stop_token_id(tokenizer), 1)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    assert tokenizer.bos_token_id is not None
    return _save(tmp_path_factory.mktemp("base"), tokenizer, tokenizer.bos_token_id, 0)


def _load(folder: Path) -> Subject:
    return load_subject(
        "tiny", folder, torch.device("cpu"), max_length=64, token_budget=4096, bf16=False, tick=lambda: None
    )


@pytest.fixture(scope="session")
def chat_subject(chat_folder: Path) -> Subject:
    return _load(chat_folder)


@pytest.fixture(scope="session")
def other_subject(other_folder: Path) -> Subject:
    return _load(other_folder)


@pytest.fixture(scope="session")
def base_subject(base_folder: Path) -> Subject:
    return _load(base_folder)
