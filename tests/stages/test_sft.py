"""sft: what is trained, that it is TRL's own step, and that it survives kill -9."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from trl import SFTConfig as Arguments
from trl import SFTTrainer

from pipeline.artifacts import outside_model
from pipeline.data.chat import Encoded, encode_messages, stop_token_id
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import DataError, MismatchError, Stopped, TrainingError
from pipeline.model.build import load_causal_lm
from pipeline.recipe import DataEntry, PeftConfig
from pipeline.runtime import Runtime
from stages import sft

STOP = "<|im_end|>"


@pytest.fixture
def config(small_run: dict[str, Any], demonstrations: Path) -> Any:
    """A small run; keywords change fields."""

    def make(**changed: Any) -> sft.SFTConfig:
        values = small_run | {
            "data": (DataEntry(source=str(demonstrations)),),
            "max_steps": 6,
        }
        return sft.SFTConfig(**(values | changed))

    return make


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_causal_lm(folder).named_parameters())


def sha(folder: Path) -> str:
    return hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()


def trained_texts(tokenizer: Any, row: dict[str, Any]) -> list[str]:
    """The trained stretches of a row, decoded."""
    texts: list[list[int]] = []
    before = -100
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (-100, token)
        if label != -100:
            texts = [*texts, []] if before == -100 else texts
            texts[-1].append(label)
        before = label
    return [tokenizer.decode(text) for text in texts]


def test_assistant_text_and_stop_token_are_trained_and_nothing_else(model_folder: Path, quiet: Runtime) -> None:
    tokenizer = load_tokenizer(model_folder)
    conversation = [
        {"role": "system", "content": f"Be short. {STOP}"},
        {"role": "user", "content": "What does the cat say?"},
        {"role": "assistant", "content": "meow"},
        {"role": "user", "content": "Again?"},
        {"role": "assistant", "content": f"I type {STOP} as letters."},
    ]
    rows = sft._fit([encode_messages(tokenizer, conversation)], stop_token_id(tokenizer), 200, quiet.say)
    assert trained_texts(tokenizer, rows[0]) == [f"meow{STOP}", f"I type {STOP} as letters.{STOP}"]
    assert rows[0]["input_ids"][-1] == stop_token_id(tokenizer), "a row ends at the stop token"
    assert rows[0]["labels"].count(stop_token_id(tokenizer)) == 2, "a typed stop token is letters"


def test_a_long_row_is_cut_after_an_answer_never_before_its_stop_token(model_folder: Path, quiet: Runtime) -> None:
    tokenizer = load_tokenizer(model_folder)
    stop = stop_token_id(tokenizer)
    messages = [
        {"role": "user", "content": "What does the cat say?"},
        {"role": "assistant", "content": "meow"},
        {"role": "user", "content": "Again?"},
        {"role": "assistant", "content": "meow " * 20},
    ]
    long = encode_messages(tokenizer, messages)
    first = encode_messages(tokenizer, messages[:2])
    rows = sft._fit([long], stop, len(long.input_ids) - 1, quiet.say)
    assert rows[0]["input_ids"] == first.input_ids
    assert trained_texts(tokenizer, rows[0]) == [f"meow{STOP}"]
    kept = sft._fit([long], stop, len(long.input_ids), quiet.say)
    assert kept[0]["input_ids"] == long.input_ids
    with pytest.raises(DataError, match="every row is longer than"):
        sft._fit([long], stop, len(first.input_ids) - 1, quiet.say)


def test_refuses_a_run_that_trains_no_stop_token(quiet: Runtime) -> None:
    with pytest.raises(MismatchError, match="never learn to end its turn"):
        sft._fit([Encoded([5, 6, 7], [False, True, True])], 9, 10, quiet.say)


def test_a_files_name_is_no_chat_template(config: Any) -> None:
    with pytest.raises(ValueError, match=r"'\./hermes\.jinja' is neither: a file's text stands in the recipe"):
        config(chat_template="./hermes.jinja")


def test_refuses_a_model_without_chat_template(model_folder: Path, tmp_path: Path, runtime: Any, config: Any) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model_folder, bare)
    (bare / "chat_template.jinja").unlink()
    out, here = runtime("bare-run")
    with pytest.raises(MismatchError, match="has no chat template"):
        sft.run(config(), {"init": outside_model(bare)}, out, here)
    out, here = runtime("with-chatml")
    sft.run(config(max_steps=1, chat_template="chatml"), {"init": outside_model(bare)}, out, here)
    assert "im_start" in AutoTokenizer.from_pretrained(out / "model").chat_template


@pytest.mark.slow
def test_the_step_is_trls_and_the_equations(init: Any, runtime: Any, config: Any, lines: Any, tmp_path: Path) -> None:
    """The logged losses of three steps, against raw SFTTrainer and against a loop of ten lines."""
    settings = config(max_steps=3, held_out=0.0, warmup_steps=0.0, max_grad_norm=1e9)
    out, here = runtime("ours")
    sft.run(settings, {"init": init}, out, here)
    ours = [line["loss"] for line in lines(out) if "loss" in line]

    tokenizer = load_tokenizer(init.model)
    rows = sft._fit(sft._encode(settings, tokenizer, "train", here), stop_token_id(tokenizer), 96, here.say)
    from pipeline.schedule import schedule

    plan = schedule([len(row["input_ids"]) for row in rows], settings, here)
    batches = [[rows[i] for i in step] for step in plan.order.reshape(3, 4).tolist()]

    raw = SFTTrainer(
        model=load_causal_lm(init.model),
        args=Arguments(
            output_dir=str(tmp_path / "raw"), use_cpu=True, bf16=False, max_steps=3, learning_rate=1e-3,
            per_device_train_batch_size=4, train_sampling_strategy="sequential", report_to="none", save_strategy="no",
            logging_steps=1, gradient_checkpointing=False, max_grad_norm=1e9, disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([row for batch in batches for row in batch]),
        processing_class=tokenizer,
    )  # fmt: skip
    raw.train()
    trls = [line["loss"] for line in raw.state.log_history if "loss" in line]

    model = load_causal_lm(init.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    naive = []
    for step, batch in enumerate(batches):
        nats, count = torch.zeros(()), 0
        for row in batch:  # one at a time: no padding, so no mask either
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            labels = torch.tensor(row["labels"][1:])
            nats = nats + F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
            count += int((labels != -100).sum())
        (nats / count).backward()
        naive.append(float(nats / count))
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / 3)
        optimizer.step()
        optimizer.zero_grad()
    assert ours == pytest.approx(trls, abs=1e-6)
    assert ours == pytest.approx(naive, abs=2e-6)


@pytest.mark.slow
def test_packed_documents_do_not_see_each_other(init: Any, runtime: Any, config: Any, lines: Any) -> None:
    """One step over all rows, packed and not: the same loss, which a token seen across a border would move."""
    everything = config(max_steps=1, held_out=0.0, per_device_train_batch_size=80)
    losses = {}
    out, here = runtime("apart")
    sft.run(everything, {"init": init}, out, here)
    losses["apart"] = lines(out)[0]["loss"]
    tokenizer = load_tokenizer(init.model)
    rows = sft._fit(sft._encode(everything, tokenizer, "train", here), stop_token_id(tokenizer), 96, here.say)
    packs = sft._pack(rows, 96)
    assert sum(len(pack["input_ids"]) for pack in packs) == sum(len(row["input_ids"]) for row in rows)
    assert max(len(pack["seq_lengths"]) for pack in packs) > 1
    out, here = runtime("packed")
    packed = everything.model_copy(update={"packing": True, "per_device_train_batch_size": len(packs)})
    sft.run(packed, {"init": init}, out, here)
    losses["packed"] = lines(out)[0]["loss"]
    assert losses["packed"] == pytest.approx(losses["apart"], abs=2e-6)


@pytest.mark.slow
def test_every_parameter_moves_and_accumulation_is_a_batch(init: Any, runtime: Any, config: Any) -> None:
    before = weights(init.model)
    found = {}
    for name, rows, accumulation in (("whole", 8, 1), ("parts", 1, 8)):
        out, here = runtime(name)
        changed = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation, "max_steps": 3}
        sft.run(config(**changed), {"init": init}, out, here)
        found[name] = weights(out / "model")
    for name, parameter in found["whole"].items():
        assert not torch.equal(parameter, before[name]), f"{name} did not move"
        torch.testing.assert_close(parameter, found["parts"][name], rtol=0, atol=2e-6)


@pytest.mark.slow
def test_lora_is_merged_into_a_plain_folder(init: Any, runtime: Any, config: Any) -> None:
    out, here = runtime("lora")
    sft.run(config(peft=PeftConfig(r=4), max_steps=3), {"init": init}, out, here)
    assert not list((out / "model").glob("adapter*"))
    before, after = weights(init.model), weights(out / "model")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.endswith("proj.weight")}, "linear layers only, all of them"


@pytest.mark.slow
def test_the_folder_is_a_chat_model_and_better_on_held_out_rows(init: Any, runtime: Any, config: Any) -> None:
    out, here = runtime("whole")
    figures = sft.run(config(max_steps=60, learning_rate=1e-2, save_steps=100), {"init": init}, out, here)
    assert figures["held_out_loss"] < 0.5 * figures["held_out_loss_before"]
    assert figures["held_out_loss_before"] == pytest.approx(6.0, abs=1.0)  # ln 400 = 5.99: it knows nothing
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    stop = stop_token_id(tokenizer)
    assert GenerationConfig.from_pretrained(out / "model").eos_token_id == stop
    made = outside_model(out / "model")
    assert (made.tokenizer_hash, made.template_hash) == (init.tokenizer_hash, init.template_hash)
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What does the cow number 85 say?"}],
        add_generation_prompt=True,
        return_tensors="pt",
    )["input_ids"]
    answer = model.generate(prompt, max_new_tokens=20)[0, prompt.shape[1] :]
    assert answer[-1] == stop, "it learnt to stop"


@pytest.mark.slow
def test_pad_equal_to_eos_changes_nothing(init: Any, tmp_path: Path, runtime: Any, config: Any, lines: Any) -> None:
    same = tmp_path / "same"
    shutil.copytree(init.model, same)
    settings = json.loads((same / "tokenizer_config.json").read_text())
    assert settings["pad_token"] != settings["eos_token"] == STOP
    (same / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": STOP}))
    losses = []
    for name, start in (("own", init), ("eos", outside_model(same))):
        out, here = runtime(name)
        sft.run(config(), {"init": start}, out, here)
        losses.append([line["loss"] for line in lines(out) if "loss" in line])
    assert losses[0] == losses[1]


def test_utilisation_is_the_products_of_the_step_over_the_peak(
    init: Any, runtime: Any, config: Any, lines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """6 FLOPs a token and weight that multiplies, 12 · layers · width · length of attention (PaLM, appendix B)."""
    monkeypatch.setattr("pipeline.trainer.peak_flops", lambda kind, bf16: 1e9)
    out, here = runtime("rates")
    sft.run(config(), {"init": init}, out, here)
    trained = [line for line in lines(out) if "loss" in line]
    model = load_causal_lm(init.model)
    matrices = sum(each.weight.numel() for each in model.modules() if isinstance(each, torch.nn.Linear))
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    shape, length = model.config, trained[-1]["tokens"] // (6 * 4)
    a_token = 6 * (matrices + vectors) + 12 * shape.num_hidden_layers * shape.hidden_size * length
    assert trained
    for line in trained:
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] * a_token / 1e9)


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(init: Any, runtime: Any, config: Any) -> None:
    out, here = runtime("nan")
    wild = config(learning_rate=1e30, warmup_steps=0.0, save_steps=1, logging_steps=100, max_steps=20)
    with pytest.raises(TrainingError, match=r"step \d: the (loss|grad_norm) is (nan|inf)"):
        sft.run(wild, {"init": init}, out, here)
    for path in (out / "checkpoints").glob("checkpoint-*/whole.json"):
        assert json.loads(path.read_text())["step"] <= 2


@pytest.mark.slow
def test_stopped_it_saves_and_goes_on_to_the_same_bits(
    init: Any, runtime: Any, config: Any, lines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, here = runtime("undisturbed")
    sft.run(config(), {"init": init}, out, here)
    stopped, here = runtime("stopped")
    steps = iter(range(100))
    monkeypatch.setattr(here, "stop_requested", lambda: next(steps) == 2)
    with pytest.raises(Stopped, match="stopped at step 3"):
        sft.run(config(), {"init": init}, stopped, here)
    assert not (stopped / "model").exists()
    stopped, here = runtime("stopped")
    sft.run(config(), {"init": init}, stopped, here)
    assert here.checkpoints.resumed_from == 3
    assert sha(stopped) == sha(out)
    timeless = [
        [{k: v for k, v in line.items() if k not in ("time", "tokens_per_second", "mfu")} for line in lines(folder)]
        for folder in (out, stopped)
    ]
    assert timeless[0] == timeless[1], "metrics.jsonl is what an undisturbed run writes"


def test_the_page_names_every_field_with_its_default() -> None:
    """docs/sft.md is written by hand; its table is compared with the config."""
    page = (Path(__file__).parents[2] / "docs" / "sft.md").read_text()
    cells = [[cell.strip() for cell in line.split("|")[1:3]] for line in page.splitlines() if line.startswith("| `")]
    told = {name.strip("`"): default.strip("`") for name, default in cells}
    words = {"True": "true", "False": "false", "None": "none", "-1": "−1"}
    fields = sft.SFTConfig.model_fields
    plain = {name: "required" if info.is_required() else str(info.default) for name, info in fields.items()}
    own = {"seed": "the recipe's", "bf16": "where the hardware gains", "embedding_learning_rate": "learning_rate"}
    expected = {name: words.get(value, value) for name, value in plain.items()} | own
    assert told.keys() == expected.keys()
    for name, value in expected.items():
        is_number = isinstance(fields[name].default, float | int) and value not in (
            "true",
            "false",
            "−1",
            own.get(name),
        )
        assert float(told[name]) == float(value) if is_number else told[name] == value, name
