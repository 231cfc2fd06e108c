"""What stages are tested with in this process: a tiny chat model and rows for it, and pretrain on a tiny corpus."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from pipeline.artifacts import Artifact, Store, outside_model
from pipeline.data.tokenizers import train_bpe
from pipeline.model.build import initialise, save_model
from pipeline.model.presets import Shape, build_config
from pipeline.runtime import Runtime
from stages import pretrain
from stages.pretrain import ModelConfig, PretrainConfig
from tests.stages.ppo_runs import Parts, make_parts

ANIMALS = ("cat", "dog", "owl", "fox", "hen", "cow", "bee", "ant")
SOUNDS = ("meow", "woof", "hoot", "yap", "cluck", "moo", "buzz", "click")


def demonstration(index: int) -> dict[str, Any]:
    """Every third row has two turns, so that rows differ in length."""
    animal, sound = ANIMALS[index % 8], SOUNDS[index % 8]
    messages = [
        {"role": "user", "content": f"What does the {animal} number {index} say?"},
        {"role": "assistant", "content": f"The {animal} says {sound}."},
    ]
    if index % 3 == 0:
        messages += [{"role": "user", "content": "Again?"}, {"role": "assistant", "content": sound}]
    return {"messages": messages}


def preference(index: int) -> dict[str, Any]:
    """The right sound over the wrong one, or over the right one said in full caps."""
    animal, sound = ANIMALS[index % 8], SOUNDS[index % 8]
    is_other = index % 2 == 0
    return {
        "prompt": [{"role": "user", "content": f"What does the {animal} number {index} say?"}],
        "chosen": [{"role": "assistant", "content": f"The {animal} says {sound}."}],
        "rejected": [
            {"role": "assistant", "content": f"Some {SOUNDS[(index + 3) % 8]}." if is_other else f"{sound.upper()}"}
        ],
        "kind": "other" if is_other else "caps",
    }


def ranked(index: int) -> dict[str, Any]:
    """Two to four answers, from right to worse; in every fifth list the last two are equally bad."""
    animal, sound = ANIMALS[index % 8], SOUNDS[index % 8]
    answers = [f"The {animal} says {sound}.", f"{sound}", f"Some {SOUNDS[(index + 3) % 8]}.", "Who knows?"]
    answers = answers[: 2 + index % 3]
    row: dict[str, Any] = {"prompt": f"What does the {animal} number {index} say?", "answers": answers}
    return row | ({"ranks": [*range(len(answers) - 1), len(answers) - 2]} if index % 5 == 0 and index % 3 else {})


def make_model(folder: Path, *, seed: int = 0, context: int = 96) -> Path:
    """A Llama of 2 layers, 32 wide, and a ChatML tokenizer of 400 tokens, as a Hugging Face folder."""
    texts = [message["content"] for index in range(200) for message in demonstration(index)["messages"]]
    tokenizer = train_bpe(iter(texts), 400)
    tokenizer.save_pretrained(folder / "tokenizer")
    model = LlamaForCausalLM(
        build_config(
            "llama",
            Shape(
                depth=2, width=32, heads=2, kv_heads=2, mlp_width=64, context=context, vocab=len(tokenizer), tied=True
            ),
            {},
        )
    )
    generator = torch.Generator().manual_seed(seed)
    initialise(model, generator)
    with torch.no_grad():  # no zero projections: every parameter gets a gradient from the first step on
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    save_model(model, folder / "model", folder / "tokenizer", [tokenizer.bos_token_id], tokenizer.pad_token_id)
    return folder / "model"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="session")
def init(model_folder: Path) -> Artifact:
    return outside_model(model_folder)


@pytest.fixture(scope="session")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 conversations, jsonl."""
    path = tmp_path_factory.mktemp("rows") / "demonstrations.jsonl"
    path.write_text("".join(json.dumps(demonstration(index)) + "\n" for index in range(80)))
    return path


@pytest.fixture(scope="session")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 pairs, jsonl."""
    path = tmp_path_factory.mktemp("pairs") / "preferences.jsonl"
    path.write_text("".join(json.dumps(preference(index)) + "\n" for index in range(200)))
    return path


@pytest.fixture(scope="session")
def lists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 ranked rows, jsonl."""
    path = tmp_path_factory.mktemp("lists") / "lists.jsonl"
    path.write_text("".join(json.dumps(ranked(index)) + "\n" for index in range(120)))
    return path


@pytest.fixture
def runtime(tmp_path: Path) -> Callable[[str], tuple[Path, Runtime]]:
    """A new `out` folder by name, and a quiet runtime in it; the same name again is a resumed run."""

    def make(name: str) -> tuple[Path, Runtime]:
        out = tmp_path / name
        out.mkdir(exist_ok=True)
        return out, Runtime.start(out, seed=0, threads=1, quiet=True)

    return make


@pytest.fixture(scope="session")
def lines() -> Callable[[Path], list[dict[str, Any]]]:
    """The objects of a run's metrics.jsonl."""
    return lambda out: [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def small_run() -> dict[str, Any]:
    """Fields of a run of a few steps of four rows in fp32, saved and logged often, a tenth held out."""
    return {
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "bf16": False,
        "logging_steps": 1,
        "save_steps": 2,
        "held_out": 0.1,
    }


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """What the runs of ppo take."""
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="session")
def tokens(made: Path) -> Artifact:
    """The shards of the tiny run."""
    return Store(made / "artifacts").artifact("tiny", "tokenize")


@pytest.fixture(scope="session")
def base(made: Path) -> Artifact:
    """The model of the tiny run."""
    return Store(made / "artifacts").artifact("tiny", "pretrain")


@pytest.fixture
def small() -> dict[str, Any]:
    """A module's own fields for `train`."""
    return {}


@pytest.fixture
def train(small: dict[str, Any]) -> Callable[..., dict[str, float]]:
    """pretrain on two layers of 32 channels in this process; `out` as left by an earlier try is gone on from."""
    given = {
        "model": ModelConfig(depth=2, hidden_size=32, num_attention_heads=2),
        "context_length": 32,
        "learning_rate": 0.01,
        "eval_documents": 20,
        "logging_steps": 1,
        "bf16": False,
        **small,
    }

    def run(tokens: Artifact, out: Path, init: Any = None, *, teacher: Any = None, **fields: Any) -> dict[str, float]:
        config = PretrainConfig(**{**given, "init": "its name" if init else None, **fields})
        out.mkdir(exist_ok=True)
        runtime = Runtime.start(out, seed=config.seed, threads=1)
        return pretrain.run(config, {"tokens": tokens, "init": init, "teacher": teacher}, out, runtime)

    return run
