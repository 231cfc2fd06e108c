"""The adapter to TRL: fields through, attention, several processes, Muon."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig as Arguments

from pipeline import trainer as adapter
from pipeline.errors import ConfigError
from pipeline.model.optim import muon
from pipeline.runtime import Runtime
from pipeline.schedule import schedule
from pipeline.trainer_config import TrainerConfig
from tests.ranks import run_script


def config(**fields: Any) -> TrainerConfig:
    return TrainerConfig(**({"bf16": False} | fields))


LENGTHS = [5 + (7 * index) % 40 for index in range(100)]


def build(quiet: Runtime, tmp_path: Path, **fields: Any) -> Any:
    settings = config(**fields)
    plan = schedule(LENGTHS, settings, quiet)
    return adapter.trainer_arguments(Arguments, settings, plan, tmp_path, quiet, {"packing": False})


def test_fields_reach_trl(quiet: Runtime, tmp_path: Path) -> None:
    fields = {"learning_rate": 3e-4, "weight_decay": 0.01, "lr_scheduler_type": "cosine", "warmup_steps": 0.1}
    made = build(quiet, tmp_path, **fields, trainer={"adam_beta2": 0.95, "neftune_noise_alpha": 5.0})
    assert (made.learning_rate, made.weight_decay, made.lr_scheduler_type) == (3e-4, 0.01, "cosine")
    assert made.get_warmup_steps(1000) == 100
    assert (made.adam_beta2, made.neftune_noise_alpha) == (0.95, 5.0)
    assert (made.max_steps, made.bf16, made.use_cpu) == (13, False, not torch.cuda.is_available())
    assert (made.report_to, made.eval_strategy, made.gradient_checkpointing) == ([], "no", False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adam_beta3": 0.9}, r"`adam_beta3`: no such field of TRL's config; did you mean `adam_beta[12]`\?"),
        ({"learning_rate": 1.0}, "`learning_rate`: a field of the stage itself"),
        ({"eval_strategy": "steps"}, "`eval_strategy`: llmpipe's to decide: the stage's field is `held_out`"),
        ({"packing": True}, "`packing`: set by the stage"),
        ({"optim": "no_such_optimiser"}, "TRL refuses this"),
    ],
)
def test_a_wrong_trainer_option_is_a_config_error(
    quiet: Runtime, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(quiet, tmp_path, trainer=options)


def test_values_are_shared_out_and_come_back_in_order(quiet: Runtime) -> None:
    found = adapter.over_ranks(quiet, (5, 2), lambda own: [[i, i * i] for i in own])
    assert found.tolist() == [[0, 0], [1, 1], [2, 4], [3, 9], [4, 16]]


TWO = """
import json, sys
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from tokenizers import Tokenizer, models
from datasets import Dataset
import torch
from trl import SFTConfig, SFTTrainer
from pipeline import trainer as adapter
from pipeline.model.distillation import Teacher
from pipeline.model.taught import teach
from pipeline.model.trained_positions import trim_head
from pipeline.runtime import Runtime
from pipeline.schedule import schedule
from pipeline.trainer_config import TrainerConfig
from tests.ranks import one_and_two

def work(world, out):
    runtime = Runtime.start(out, seed=0, threads=1, world_size=world, quiet=True)
    config = TrainerConfig(bf16=False, learning_rate=1e-2, per_device_train_batch_size=4, num_train_epochs=2.0,
                           save_steps=100, logging_steps=1)
    rows = [{"input_ids": [3 + (index * k) % 60 for k in range(1, 4 + index % 9)]} for index in range(21)]
    rows = [row | {"labels": [-100, *row["input_ids"][1:]]} for row in rows]
    def drawn(seed):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                            num_attention_heads=1))

    model = drawn(0)
    vocabulary = Tokenizer(models.BPE({f"t{i}": i for i in range(64)}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="t0", eos_token="t1")
    plan = schedule([len(row["input_ids"]) for row in rows], config, runtime)
    own = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    arguments = adapter.trainer_arguments(SFTConfig, config, plan, out, runtime, own)
    sample = Dataset.from_list(rows[:1])
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=sample, processing_class=tokenizer)
    teacher = Teacher(drawn(1).eval().requires_grad_(False), 0.5, 2.0)
    if sys.argv[2] == "taught":
        teach(trainer.model, teacher, "x")
    else:
        trim_head(trainer.model)
    more = lambda: teacher.look(world)
    adapter.train(trainer, config, rows, plan, runtime, None, phase="x", shown={}, state={}, more=more)
    shared = adapter.over_ranks(runtime, (5,), lambda own: [10.0 * i for i in own])
    if runtime.is_main:
        flat = torch.cat([p.detach().flatten() for p in adapter.trained_model(trainer).parameters()])
        found = {"steps": plan.steps, "weights": flat.tolist(), "shared": shared.tolist()}
        (out / "found.json").write_text(json.dumps(found))

root = Path(sys.argv[1])

def alone_or_not(world):
    out = root / str(world)
    out.mkdir(exist_ok=True)
    work(world, out)

sys.exit(not one_and_two(alone_or_not, int(sys.argv[-1])))
"""


@pytest.mark.slow
@pytest.mark.parametrize("head", ["plain", "taught"])
def test_two_processes_give_what_one_gives(warm: Any, head: str, tmp_path: Path) -> None:
    """The same rows a step, split over two gloo ranks: weights equal to 1e-6 after 11 steps, the epoch's tail too; the
    figures of a teacher are those of all rows."""
    run_script(warm, TWO, tmp_path, head)
    one, two = (json.loads((tmp_path / world / "found.json").read_text()) for world in "12")
    assert one["steps"] == two["steps"] == 11
    assert two["shared"] == one["shared"] == [0.0, 10.0, 20.0, 30.0, 40.0]
    np.testing.assert_allclose(two["weights"], one["weights"], rtol=0, atol=1e-6)
    told = []
    for world in "12":
        lines = [json.loads(line) for line in (tmp_path / world / "metrics.jsonl").read_text().splitlines()]
        told.append([[line["loss"], line.get("teacher_kl", 0.0), line.get("cross_entropy", 0.0)] for line in lines])
    np.testing.assert_allclose(told[1], told[0], rtol=0, atol=2e-6)
    assert (told[0][0][1] > 0) == (head == "taught")


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=1))


def steps(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        ids = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_muon_and_adamw_together_are_each_on_its_own_and_resume_to_the_same_bits() -> None:
    model, whole = tiny_model(), tiny_model()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name))
    optimizer = muon(model, 1e-2, 2e-2, 0.0)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [1e-2, 2e-2]
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert len(held) == len(set(map(id, held)))
    steps(model, optimizer, 0, 3)
    assert all(not torch.equal(p, whole.get_parameter(n)) for n, p in model.named_parameters())

    steps(whole, muon(whole, 1e-2, 2e-2, 0.0), 0, 6)
    resumed = muon(model, 1e-2, 2e-2, 0.0)
    resumed.load_state_dict(optimizer.state_dict())
    for group in resumed.param_groups:
        group["lr"] *= 1.0  # the groups are the optimizers' own after a load too
    assert [id(g) for g in resumed.param_groups] == [id(g) for o in resumed.optimizers for g in o.param_groups]
    steps(model, resumed, 3, 6)
    assert all(torch.equal(p, whole.get_parameter(n)) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("padding_free", "longest", "chosen"), [(False, 100, "eager"), (True, 64, "eager"), (True, 65, "sdpa")], ids=str
)
def test_attention_is_chosen_by_what_stands_in_one_row(padding_free: bool, longest: int, chosen: str) -> None:
    """Four rows laid end to end are one of four times the length; the model that is saved is as it was loaded."""
    arguments = SimpleNamespace(bf16=True, per_device_train_batch_size=4)
    accelerator = SimpleNamespace(unwrap_model=lambda model: model)
    trainer = SimpleNamespace(model=tiny_model(), args=arguments, padding_free=padding_free, accelerator=accelerator)
    adapter.fit_attention(trainer, longest)
    assert trainer.model.config._attn_implementation == chosen
    assert adapter.trained_model(trainer).config._attn_implementation == "sdpa"
