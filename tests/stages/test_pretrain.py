"""pretrain: the same bits whatever disturbs it, the same figures however it is split, and a model that loads."""

import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.artifacts import Artifact, Store
from pipeline.checkpoint import newest_checkpoint
from pipeline.data.shards import TokenFile
from pipeline.errors import ConfigError, MachineError, MismatchError, Stopped, TrainingError
from pipeline.model import held_out
from pipeline.model.decoding import Decoder
from pipeline.model.held_out import bits_per_byte, choose_documents
from pipeline.model.next_token import NextToken
from pipeline.model.optim import learning_rate_share
from pipeline.model.presets import PRESETS
from pipeline.recipe import is_run_only
from pipeline.runtime import Runtime
from stages.pretrain import ModelConfig, PretrainConfig


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in metrics(out) if "loss" in line]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Relative, over all weights."""
    assert one.keys() == other.keys()
    apart = sum((one[name] - other[name]).square().sum() for name in one)
    return float((apart / sum(value.square().sum() for value in one.values())).sqrt())


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "artifacts" / "tiny" / "pretrain" / "manifest.json").read_text())
    return found


def final(folder: Path) -> str:
    return sha(folder / "artifacts" / "tiny" / "pretrain" / "model" / "model.safetensors")


# What it can make.

TINY_LAYERS = {"hidden_size": 32, "num_hidden_layers": 2}
ANY = {
    "gpt2": {},
    "llama": {},
    "mistral": {},
    "qwen3": {},
    "gemma3": {},
    "qwen3_moe": {},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "deepseek_v3": {
        **TINY_LAYERS, "intermediate_size": 64, "moe_intermediate_size": 16, "num_attention_heads": 2,
        "num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
        "first_k_dense_replace": 1, "max_position_embeddings": 32,
    },
    "mamba2": {**TINY_LAYERS, "head_dim": 16, "num_heads": 4, "state_size": 8, "n_groups": 1, "chunk_size": 16},
    "xglm": {  # counts its positions from behind the pad token, which is the tokenizer's when it is loaded too
        "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 2, "max_position_embeddings": 64,
    },
    "qwen3_next": {
        **TINY_LAYERS, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
        "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    },
}  # fmt: skip
"""Every preset, and five families by their own fields with no code of ours."""


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ANY)
def test_any_causal_model_of_transformers_trains_and_loads(
    train: Any, architecture: str, tokens: Artifact, tmp_path: Path
):
    """The loss falls; the folder loads and has the run's figure; a resumed run has the same bits."""
    sizes = {"depth": 2, "hidden_size": 32, "num_attention_heads": 2} if architecture in PRESETS else {}
    model = ModelConfig(architecture=architecture, config=ANY[architecture], **sizes)
    settings = {"model": model, "max_steps": 6, "optimizer": "muon", "save_steps": 3}
    found = train(tokens, tmp_path / "whole", **settings)
    lines = [line for line in metrics(tmp_path / "whole") if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"]
    folder = tmp_path / "whole" / "model"
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert loaded.config.vocab_size == 512
    valid = TokenFile(tokens.path / "valid.ds")
    assert bits_per_byte(NextToken(loaded), valid, 32, 20) == pytest.approx(found["bits_per_byte"], rel=1e-4)
    if architecture in ("qwen3_moe", "qwen3_next"):
        assert all(0.9 < line["balance_loss"] / 2 < 4 and 1 <= line["busiest_expert"] <= 4 for line in lines)

    stopped = tmp_path / "stopped"
    shutil.copytree(tmp_path / "whole", stopped)
    for late in ("model", "checkpoints/step-00000006"):
        shutil.rmtree(stopped / late)
    train(tokens, stopped, **settings)
    assert sha(stopped / "model" / "model.safetensors") == sha(folder / "model.safetensors")


OWN = """\
run: own
stages:
  tokenize: {data: corpus.jsonl, vocab_size: 512}
  pretrain:
    model: {architecture: "./gpt.py:GPT", depth: 3, hidden_size: 32, num_attention_heads: 2}
    context_length: 32
    max_steps: 10
    eval_documents: 5
  sft: {data: rows.jsonl, max_steps: 2, max_length: 32}
  dpo: {init: sft, data: pairs.jsonl, max_steps: 2, max_length: 32, eval_rows: 8}
  ppo:
    init: sft
    data: rows.jsonl
    algorithm: rloo
    reward: [{length: 20}]
    total_episodes: 8
    batch_size: 4
    per_device_train_batch_size: 4
    response_length: 6
  eval: {models: [pretrain, sft, dpo, ppo], data: rows.jsonl, documents: 5, prompts: 4, max_new_tokens: 6}
"""


@pytest.fixture
def own(tiny: Path, tmp_path: Path) -> Path:
    """A recipe with the model of docs/pretrain.md, in the test's folder."""
    text = (Path(__file__).parents[2] / "docs" / "pretrain.md").read_text()
    (tmp_path / "gpt.py").write_text(text.rpartition("```python\n")[2].partition("```")[0])
    rows = [{"prompt": f"ka {index}", "completion": "lo mi"} for index in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{**row, "chosen": "lo mi", "rejected": "mi"} for row in rows]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (tmp_path / "own.yaml").write_text(OWN)
    return tmp_path / "own.yaml"


@pytest.mark.slow
def test_a_class_of_the_users_own_goes_through_the_later_stages_and_loads_by_itself(own: Path, warm: Any):
    ran = warm("run", own)
    assert ran.code == 0, ran.stderr
    for stage in ("pretrain", "sft", "dpo", "ppo"):
        folder = own.parent / "artifacts" / "own" / stage / "model"
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert (type(model).__name__, len(model.model.blocks)) == ("GPT", 3)
        assert sorted(path.name for path in folder.glob("*.py")) == ["gpt.py"]
    file = own.parent / "gpt.py"
    file.write_text(file.read_text().replace("nn.GELU()", "nn.ReLU()"))
    status = warm("status", own)
    assert "code: gpt.py" in status.stdout

    shutil.copytree(own.parent / "artifacts" / "own" / "pretrain" / "model", own.parent / "brought")
    refused = warm("run", own, "--set", "sft.init=./brought", "--keep", "pretrain")
    assert refused.code == 1
    assert "needs code that its folder brings along, which is not run" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("PreTrainedModel, GenerationMixin)", "PreTrainedModel)", "subclass of transformers' PreTrainedModel and Gen"),
        ("embed_tokens", "words", "transformers does not find its input embedding"),
        ("./gpt.py:GPT", "./gpt.py:Trunk", "subclass of transformers' PreTrainedModel and GenerationMixin"),
        ("./gpt.py:GPT", "./gone.py:GPT", r"`architecture`: no file .*gone\.py"),
        ("./gpt.py:GPT", "./gpt.py:BERT", "defines no `BERT`"),
        ("depth: 3", "depth: 3, config: {layers: 3}", "GPTConfig has no field `layers`"),
    ],
)
def test_a_class_that_is_no_causal_model_is_refused(own: Path, warm: Any, old: str, new: str, message: str):
    for file in (own, own.parent / "gpt.py"):
        file.write_text(file.read_text().replace(old, new))
    refused = warm("run", own, "--until", "pretrain")
    assert refused.code == 2
    assert re.search(message, refused.stderr), refused.stderr


# What it makes.


def test_it_learns_and_its_figure_is_that_of_the_model_it_leaves(made: Path, tokens: Artifact):
    """The manifest's bits per byte are those of the saved folder under transformers' own loss."""
    folder = made / "artifacts" / "tiny" / "pretrain" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    valid = TokenFile(tokens.path / "valid.ds")
    nats, size = 0.0, 0
    for index in choose_documents(valid, 20):
        ids = [valid.metadata.separator_id, *valid.document(index)[:-1].tolist()]
        for start in range(0, len(ids) - 1, 32):
            row = torch.tensor([ids[start : start + 33]])
            with torch.no_grad():
                nats += model(input_ids=row, labels=row).loss.item() * (row.shape[1] - 1)
        size += int(valid.document_bytes[index])
    found = manifest(made)["metrics"]["bits_per_byte"]
    tolerance = 1e-4 if not Runtime.start(made, seed=0, threads=1).bf16 else 1e-2
    assert found == pytest.approx(nats / math.log(2) / size, rel=tolerance)
    uniform = math.log2(512) * (len(valid) - valid.metadata.documents) / valid.metadata.text_bytes
    assert found < 0.85 * uniform


def test_the_folder_loads_with_tokenizer_and_template(made: Path, tokens: Artifact):
    folder = made / "artifacts" / "tiny" / "pretrain" / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert len(tokenizer) == model.config.vocab_size == 512
    assert model.generation_config.eos_token_id == tokenizer.bos_token_id  # the separator ends a document
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id != model.generation_config.eos_token_id
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tokens.model).chat_template
    ids = tokenizer("ka lo", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=5, do_sample=False).shape[1] > ids.shape[1]


def test_metrics_tell_the_schedule_and_the_tokens(made: Path):
    lines = [line for line in metrics(made / "artifacts" / "tiny" / "pretrain") if "loss" in line]
    assert [line["step"] for line in lines] == [5, 10, 15, 20, 25, 30]
    assert [line["tokens"] for line in lines] == [step * 4 * 32 for step in (5, 10, 15, 20, 25, 30)]
    for line in lines:
        share = learning_rate_share(line["step"] - 1, 30, 1, "cosine", 0.3, 0.0)
        assert line["learning_rate"] == pytest.approx(0.01 * share)
        assert line["tokens_per_second"] > 0
        assert line["mfu"] > 0
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5


def test_the_first_loss_is_that_of_a_model_that_knows_nothing(train: Any, tokens: Artifact, tmp_path: Path):
    train(tokens, tmp_path / "out", max_steps=1)
    assert losses(tmp_path / "out")[0] == pytest.approx(math.log(512), rel=0.01)


# The same, however it is split.


@pytest.mark.slow
def test_accumulated_micro_steps_are_one_batch(train: Any, tokens: Artifact, tmp_path: Path):
    same = {"max_steps": 12, "adam_epsilon": 1e-3}  # Adam without it makes steps of noise
    train(tokens, tmp_path / "1x8", per_device_train_batch_size=8, gradient_accumulation_steps=1, **same)
    train(tokens, tmp_path / "8x1", per_device_train_batch_size=1, gradient_accumulation_steps=8, **same)
    assert losses(tmp_path / "1x8") == pytest.approx(losses(tmp_path / "8x1"), rel=1e-5)
    assert distance(weights(tmp_path / "1x8"), weights(tmp_path / "8x1")) < 1e-4
    assert metrics(tmp_path / "1x8")[-1]["tokens"] == metrics(tmp_path / "8x1")[-1]["tokens"] == 12 * 8 * 32
    train(tokens, tmp_path / "8x1'", per_device_train_batch_size=4, gradient_accumulation_steps=1, **same)
    assert distance(weights(tmp_path / "1x8"), weights(tmp_path / "8x1'")) > 1e-2  # half the batch is another run


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_recomputed_activations_change_no_bit(train: Any, architecture: str, tokens: Artifact, tmp_path: Path):
    model = ModelConfig(architecture=architecture, depth=2, hidden_size=32, num_attention_heads=2)
    plain, recomputed = tmp_path / "plain", tmp_path / "recomputed"
    train(tokens, plain, model=model, max_steps=4)
    calls: list[int] = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: calls.append(1) if "MLP" in type(module).__name__ else None
    )
    try:
        train(tokens, recomputed, model=model, max_steps=4, gradient_checkpointing=True, eval_documents=1)
    finally:
        hook.remove()
    assert len(calls) > 2 * 2 * 4, "each of two blocks ran forward twice in each of four steps"
    assert distance(weights(plain), weights(recomputed)) == 0


def test_samples_stand_beside_every_evaluation(train: Any, tokens: Artifact, tmp_path: Path):
    train(tokens, tmp_path / "out", max_steps=4, eval_steps=2, sample_prompts=("ka lo",), sample_tokens=5)
    lines = [line for line in metrics(tmp_path / "out") if "bits_per_byte" in line]
    assert [line["step"] for line in lines] == [2, 4]
    assert all(line["sample_1"].startswith("ka lo") and len(line["sample_1"]) > 5 for line in lines)


# The same bits, whatever disturbs it.


EXPERTS = ModelConfig(architecture="qwen3_moe", depth=2, hidden_size=32, num_attention_heads=2)


class Died(BaseException):
    """Stands for SIGKILL."""


def die_after(monkeypatch: pytest.MonkeyPatch, saves: int) -> None:
    """Let the process die right after so many checkpoints."""
    from pipeline.checkpoint import Checkpoints

    original, count = Checkpoints.save, 0

    def save(self: Checkpoints, *arguments: Any) -> None:
        nonlocal count
        original(self, *arguments)
        count += 1
        if count == saves:
            raise Died

    monkeypatch.setattr(Checkpoints, "save", save)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        *(
            pytest.param(fields, marks=pytest.mark.slow)
            for fields in (
                {"optimizer": "muon", "lr_scheduler_type": "wsd", "embedding_learning_rate": 0.02},
                {"gradient_accumulation_steps": 3},
                {"bf16": True, "model": ModelConfig(depth=1, hidden_size=32, tie_word_embeddings=False)},
            )
        ),
        # the corpus ends, and begins anew, between the two
        pytest.param({"per_device_train_batch_size": 100}, marks=pytest.mark.slow),
        # what a line of metrics is the mean of begins before the checkpoint and ends after it
        {"logging_steps": 7},
        pytest.param({"logging_steps": 7, "model": EXPERTS}, marks=pytest.mark.slow),
        pytest.param({"logging_steps": 7, "is_taught": True}, marks=pytest.mark.slow),
    ],
    ids=["adamw", "muon", "accumulation", "bf16", "epochs", "interval", "experts", "teacher"],
)
def test_a_resumed_run_is_the_undisturbed_one(
    train: Any,
    tokens: Artifact,
    base: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
):
    taught = {"teacher": base} if fields.get("is_taught") else {}
    fields = {name: value for name, value in fields.items() if name != "is_taught"} | taught
    fields = {"per_device_train_batch_size": 4, "max_steps": 20, "save_steps": 4, "eval_steps": 8, **fields}
    straight = train(tokens, tmp_path / "straight", **fields)
    with monkeypatch.context() as patch:
        die_after(patch, 2)  # at step 8, before what is measured there
        with pytest.raises(Died):
            train(tokens, tmp_path / "cut", **fields)
    assert not (tmp_path / "cut" / "model" / "model.safetensors").exists()
    with monkeypatch.context() as patch:
        die_after(patch, 2)  # at step 16
        with pytest.raises(Died):
            train(tokens, tmp_path / "cut", **fields)
    resumed = train(tokens, tmp_path / "cut", **fields)
    assert sha(tmp_path / "cut" / "model" / "model.safetensors") == sha(
        tmp_path / "straight" / "model" / "model.safetensors"
    )
    assert resumed == straight
    timeless = [
        [
            {k: v for k, v in line.items() if k not in ("time", "mfu") and not k.endswith("_per_second")}
            for line in metrics(out)
        ]
        for out in (tmp_path / "cut", tmp_path / "straight")
    ]
    assert timeless[0] == timeless[1]
    assert [line["step"] for line in timeless[0] if "bits_per_byte" in line] == [8, 16, 20]


def test_what_a_class_of_ones_own_counts_in_its_buffers_goes_on_too(
    train: Any, tokens: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The model of docs/pretrain.md with a running mean of its embeddings, which it takes off: forwards change it."""
    text = (Path(__file__).parents[2] / "docs" / "pretrain.md").read_text().rpartition("```python\n")[2]
    text = text.partition("```")[0]
    running = """\
        self.register_buffer("running", torch.zeros(config.hidden_size))

    def forward(self, input_ids, attention_mask=None, **kwargs):
        embedded = self.embed_tokens(input_ids)
        if self.training:
            self.running.lerp_(embedded.detach().mean(dim=(0, 1)), 0.1)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        return BaseModelOutput(self.blocks(embedded - self.running + self.places(places)))
"""
    before = text.index("\n    def forward(self, input_ids")
    after = text.index("class GPT(")
    (tmp_path / "gpt.py").write_text(text[:before] + running + "\n\n" + text[after:])
    model = ModelConfig(architecture=f"{tmp_path}/gpt.py:GPT", depth=2, hidden_size=32, num_attention_heads=2)
    fields = {"model": model, "max_steps": 6, "save_steps": 3}
    train(tokens, tmp_path / "straight", **fields)
    with monkeypatch.context() as patch:
        die_after(patch, 1)
        with pytest.raises(Died):
            train(tokens, tmp_path / "cut", **fields)
    train(tokens, tmp_path / "cut", **fields)
    assert weights(tmp_path / "straight")["model.running"].abs().max() > 1e-3
    assert distance(weights(tmp_path / "cut"), weights(tmp_path / "straight")) == 0


def checkpoints(folder: Path) -> list[Path]:
    return list((folder / "artifacts" / "tiny").glob(".pretrain.*.partial/checkpoints/*"))


def newest(folder: Path) -> int:
    """The step of the newest whole checkpoint."""
    return max([int(path.name[5:]) for path in checkpoints(folder) if (path / "whole.json").exists()], default=0)


def is_saving(folder: Path) -> bool:
    """A checkpoint is being written: its folder is there and its marker is not."""
    return any(not (path / "whole.json").exists() for path in checkpoints(folder))


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["at random", "while saving"])
def test_killed_again_and_again_it_ends_with_the_same_bits(warm: Any, tokenized: Path, made: Path, moment: str):
    """SIGKILL to the whole group: at any time of its life, or as soon as a checkpoint is seen half-written."""
    draw = random.Random(moment)
    command = ("run", "tiny.yaml", "--set", "pretrain.save_steps=1")
    killed = half_written = 0
    for attempt in range(8):
        is_early = moment == "at random" and attempt % 3 == 2
        target = newest(warm.folder) + (0 if is_early else draw.randint(1, 4))
        at_work = warm.start(*command)
        while newest(warm.folder) < target and at_work.poll() is None:
            time.sleep(0.002)
        if moment == "at random":
            time.sleep(draw.uniform(0, 0.4 if is_early else 0.03))
        while moment == "while saving" and at_work.poll() is None:
            if is_saving(warm.folder):
                at_work.signal(signal.SIGSTOP, group=True)
                time.sleep(0.01)
                if is_saving(warm.folder):
                    break  # held in the middle of a save: killed there
                at_work.signal(signal.SIGCONT, group=True)
        if at_work.poll() is not None:
            break
        at_work.signal(signal.SIGKILL, group=True)
        at_work.wait()
        killed += 1
        time.sleep(0.05)  # the group's other process dies as well
        half_written += is_saving(warm.folder)
    done = at_work.wait() if at_work.poll() == 0 else warm(*command)  # the last one may have come to the end
    assert done.code == 0, done.stderr
    assert killed >= 2
    assert final(warm.folder) == final(made)
    if moment == "while saving":
        assert half_written >= 1
    assert manifest(warm.folder)["resumed_from"] > 0
    assert "resumed at step" in done.stderr
    steps = [line["step"] for line in metrics(warm.folder / "artifacts" / "tiny" / "pretrain") if "loss" in line]
    assert steps == [5, 10, 15, 20, 25, 30]


@pytest.mark.parametrize(
    "group", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["the command alone", "its whole group"]
)
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_ends_the_step_saves_and_is_gone_on_from(
    warm: Any, tokenized: Path, made: Path, number: int, code: int, group: bool
):
    command = ("run", "tiny.yaml", "--set", "pretrain.save_steps=1")
    at_work = warm.start(*command)
    at_work.wait_for(lambda: newest(warm.folder) > 0)
    at_work.signal(number, group=group)
    stopped = at_work.wait()
    assert stopped.code == code, stopped.stderr
    assert "error" not in stopped.stderr
    step = int(stopped.stderr.partition("stopped at step ")[2].partition(" and saved")[0])
    assert 0 < step < 30
    assert "mend: run the same command again to go on from there" in stopped.stderr
    done = warm(*command)
    assert done.code == 0, done.stderr
    assert "pretrain  runs from where it stopped" in done.stderr
    assert f"resumed at step {step}" in done.stderr
    assert manifest(warm.folder)["resumed_from"] == step
    assert final(warm.folder) == final(made)


# What it refuses.


def test_a_loss_that_is_not_finite_ends_it_with_the_step(train: Any, tokens: Artifact, tmp_path: Path):
    with pytest.raises(TrainingError) as caught:
        train(tokens, tmp_path / "out", max_steps=50, learning_rate=1e30, warmup_steps=0, logging_steps=3)
    assert (
        caught.value.what == "the gradient's norm is nan; there is no checkpoint yet"
    )  # the loss was finite once more
    assert re.fullmatch(r"step 2 \(documents \d+(, \d+)*( and \d+ more)? of train\.ds\)", caught.value.where)
    assert "learning_rate" in caught.value.mend
    assert caught.value.exit_code == 1


@pytest.mark.slow
def test_a_loss_that_is_not_finite_at_the_command_line(warm: Any, tokenized: Path):
    done = warm("run", "tiny.yaml", "--set", "pretrain.learning_rate=1e30", "--set", "pretrain.warmup_steps=0")
    assert done.code == 1
    told = r"error: step 2 \(documents [\d, ]+of train\.ds\): the gradient's norm is nan; there is no checkpoint yet"
    assert re.search(told, done.stderr), done.stderr
    assert not (warm.folder / "artifacts" / "tiny" / "pretrain").exists()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`poisoned({3, 7})`: the loss of the third and the seventh micro-step of a run is nan."""
    plain = NextToken.loss_sum

    def poison(places: set[int]) -> None:
        count = 0

        def loss_sum(self: NextToken, *batch: Any) -> Any:
            nonlocal count
            count += 1
            nats, routing = plain(self, *batch)
            return (nats * math.nan if count in places else nats), routing

        monkeypatch.setattr(NextToken, "loss_sum", loss_sum)

    return poison


@pytest.mark.slow
def test_steps_that_are_not_finite_are_stepped_over_as_many_as_allowed(
    train: Any, tokens: Artifact, tmp_path: Path, poisoned: Any, capsys: pytest.CaptureFixture[str]
):
    """The steps around are trained as ever: weights stay finite, and what was stepped over is said and counted."""
    poisoned({3, 5})
    with pytest.raises(TrainingError, match=r"the loss is nan") as caught:
        train(tokens, tmp_path / "one", max_steps=8, skip_nonfinite=1, logging_steps=4, save_steps=4)
    assert caught.value.where.startswith("step 5 (documents ")
    assert caught.value.what == "the loss is nan; the last checkpoint is of step 4"
    assert [path.name for path in (tmp_path / "one" / "checkpoints").glob("step-*")] == ["step-00000004"]
    poisoned({3, 5})
    train(tokens, tmp_path / "two", max_steps=8, skip_nonfinite=2, logging_steps=4)
    poisoned({1})  # the first step after step 4, where the run that was allowed one goes on with two
    train(tokens, tmp_path / "one", max_steps=8, skip_nonfinite=2, logging_steps=4)
    assert distance(weights(tmp_path / "one"), weights(tmp_path / "two")) == 0
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    assert is_run_only(PretrainConfig, "skip_nonfinite"), "so it is the same run, which a new value goes on with"
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "two").values())
    lines = [line for line in metrics(tmp_path / "two") if "loss" in line]
    assert [line["skipped_steps"] for line in lines] == [1, 2]
    assert all(math.isfinite(line["loss"]) for line in lines)


def test_a_gradient_that_is_not_finite_is_never_saved(
    train: Any, tokens: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    with pytest.raises(TrainingError, match="the gradient's norm is inf"):
        train(tokens, tmp_path / "out", max_steps=4, logging_steps=100, save_steps=2)
    assert not list((tmp_path / "out" / "checkpoints").glob("step-*"))


def test_it_goes_on_from_a_base_model(train: Any, tokens: Artifact, base: Artifact, tmp_path: Path):
    figures = train(tokens, tmp_path / "out", base, max_steps=5, learning_rate=1e-9)
    assert figures["bits_per_byte"] == pytest.approx(base.manifest["metrics"]["bits_per_byte"], rel=1e-2)
    assert distance(weights(tmp_path / "out"), weights(base.path)) < 1e-5


def test_shards_of_another_tokenizer_than_the_bases_are_refused(
    train: Any, tokens: Artifact, base: Artifact, tmp_path: Path
):
    shutil.copytree(base.model, tmp_path / "other")
    content = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    content["model"]["merges"][0], content["model"]["merges"][1] = content["model"]["merges"][1::-1]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(content))
    other = Store(tmp_path).resolve(str(tmp_path / "other"))
    with pytest.raises(MismatchError, match="neither the base's own nor an extension of it"):
        train(tokens, tmp_path / "out", other, max_steps=1)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"context_length": 60_000}, "the corpus has 50,080 tokens, fewer than one sample of 60,001"),
        ({"model": ModelConfig(hidden_size=33, num_attention_heads=2)}, "hidden_size 33 over 2 heads"),
    ],
)
def test_sizes_that_cannot_be_are_refused(
    train: Any, tokens: Artifact, tmp_path: Path, fields: dict[str, Any], what: str
):
    with pytest.raises(ConfigError, match=what):
        train(tokens, tmp_path / "out", **fields)


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "moments"), [("adamw", 2.0), ("muon", None)])
def test_a_disk_that_will_be_full_is_told_ahead(
    train: Any, tokens: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, moments: float | None
):
    """The model, and three checkpoints of weights and moments, the third while two are kept; of one save, one."""
    free = 10**12
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=free))
    out = tmp_path / "out"
    parameters = int(train(tokens, out, max_steps=6, save_steps=2, optimizer=optimizer)["parameters"])
    saved = sum(t.numel() for t in load_file(out / "checkpoints" / "step-00000006" / "state.safetensors").values())
    assert moments is None or saved // parameters == 1 + moments
    for saves, save_steps in ((3, 1), (1, 6)):
        shutil.rmtree(out)
        needed = 4 * (parameters + saves * saved)
        free = needed - 4 * 100  # the steps' counts, which are left out
        with pytest.raises(MachineError, match=f"saving and checkpoints needs {needed / 1e6:.0f} MB of disk"):
            train(tokens, out, max_steps=6, save_steps=save_steps, optimizer=optimizer)
        free = needed
        train(tokens, out, max_steps=6, save_steps=save_steps, optimizer=optimizer)
        free = 4 * parameters + 4 * max(0, saves - 2) * saved  # what is there is counted
        train(tokens, out, max_steps=6, save_steps=save_steps, optimizer=optimizer)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, where it runs")
def test_ligers_kernel_is_refused_without_a_gpu(train: Any, tokens: Artifact, tmp_path: Path):
    with pytest.raises(MachineError, match="need a CUDA device, and this one is cpu"):
        train(tokens, tmp_path / "out", use_liger_kernel=True)


def test_a_context_longer_than_the_bases_is_refused(train: Any, tokens: Artifact, base: Artifact, tmp_path: Path):
    with pytest.raises(ConfigError, match="64 is more than the base's context of 32"):
        train(tokens, tmp_path / "out", base, context_length=64)


def test_sizes_follow_from_the_depth(train: Any, tokens: Artifact, tmp_path: Path):
    train(tokens, tmp_path / "out", model=ModelConfig(depth=1), max_steps=1, eval_documents=1)
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "tie_word_embeddings")
    assert [config[name] for name in sizes] == [1, 64, 1, 192, True]
    assert config["max_position_embeddings"] == 32
    assert os.stat(tmp_path / "out" / "model" / "model.safetensors").st_size > 0


@pytest.mark.slow
@pytest.mark.parametrize("where", ["nats", "token", "end"])
def test_a_stop_in_an_evaluation_leaves_at_once_and_measures_anew(
    train: Any, tokens: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
):
    """Asked in a batch of held-out rows, at a token of a sample, in a batch of the last evaluation: nothing follows it;
    a checkpoint of that step is there, though `save_steps` has none at it; and the end is the undisturbed run's."""
    monkeypatch.setattr(held_out, "TOKENS_A_BATCH", 256)
    settings = {"max_steps": 6, "eval_steps": 3, "save_steps": 4, "sample_tokens": 6}
    train(tokens, tmp_path / "calm", **settings)

    here: list[Runtime] = []
    start, nats, decode_one = Runtime.start, NextToken.nats, Decoder.decode_one
    after: list[str] = []

    def started(*given: Any, **named: Any) -> Runtime:
        here.append(start(*given, **named))
        return here[-1]

    def meets(what: str) -> None:
        is_end = (tmp_path / "stopped" / "model" / "model.safetensors").exists()
        if here[-1].halt.asked is not None or (is_end if where == "end" else what == where):
            here[-1].halt.asked = Stopped
            after.append(what)

    def met_nats(losses: NextToken, *batch: Any) -> torch.Tensor:
        meets("nats")
        return nats(losses, *batch)

    def met_token(decoder: Decoder, ids: torch.Tensor) -> None:
        meets("token")
        decode_one(decoder, ids)

    with monkeypatch.context() as patched:
        patched.setattr(Runtime, "start", started)
        patched.setattr(NextToken, "nats", met_nats)
        patched.setattr(Decoder, "decode_one", met_token)
        with pytest.raises(Stopped, match="while it measured" if where == "end" else "stopped at step 3 and saved"):
            train(tokens, tmp_path / "stopped", **settings)
    assert after == ["token" if where == "token" else "nats"]
    kept = newest_checkpoint(tmp_path / "stopped" / "checkpoints")
    assert kept is not None
    assert kept.step == (6 if where == "end" else 3)

    train(tokens, tmp_path / "stopped", **settings)
    assert sha(tmp_path / "stopped/model/model.safetensors") == sha(tmp_path / "calm/model/model.safetensors")
    timed = ("tokens_per_second", "flops_per_second", "mfu", "seconds", "time")
    calm, gone_on = (
        [{name: value for name, value in line.items() if name not in timed} for line in metrics(tmp_path / out)]
        for out in ("calm", "stopped")
    )
    assert gone_on == calm
    assert [line["step"] for line in calm if "bits_per_byte" in line] == [3, 6]
