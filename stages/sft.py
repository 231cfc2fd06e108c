"""sft: supervised fine-tuning of a language model on conversations, by TRL's SFTTrainer.

Instruction tuning as in Ouyang et al. 2022 (InstructGPT, step 1): next-token loss on what the assistant says. Rows are
tokens and labels before TRL sees them, so that the loss falls on the assistant's words and its stop token and nothing
else, whatever the tokenizer's pad token is.

With a teacher (Hinton et al. 2015) the loss of a token is (1 − α) · −log p[token] + α τ² · KL(teacher ‖ student), both
at temperature τ in the second part. Adapters are LoRA (Hu et al. 2021), DoRA (Liu et al. 2024), or LoRA on weights in
four bits (QLoRA, Dettmers et al. 2023).

Departures: the loss is a mean over the trained tokens of the whole step (not of each row); batches are of rows about
equally long; adapters are merged into the saved model, so that every stage leaves a plain Hugging Face folder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from pipeline.errors import DataError, MismatchError
from pipeline.recipe import Data, Ref, field
from pipeline.trainer_config import TrainerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from pipeline.data.chat import Encoded
    from pipeline.data.messages import Message
    from pipeline.data.shown import ShownRow
    from pipeline.evals.likelihood import Request
    from pipeline.model.distillation import Teacher
    from pipeline.runtime import Runtime
    from pipeline.schedule import Row, Schedule


class SFTConfig(TrainerConfig):
    """What sft can be told."""

    TRL = "SFTConfig"

    init: Ref = field("pretrain", "the model to start from")
    data: Data = field(..., "conversations: messages, prompt/completion, alpaca or sharegpt rows")
    packing: bool = field(False, "several rows behind one another up to max_length, each seeing only itself")
    chat_template: str | None = field(
        None, "template for a tokenizer that has none: `chatml`, or the template's own text (Jinja)"
    )
    train_on_turns: Literal["all", "last"] = field(
        "all", "the assistant's turns that are trained: every one, or a row's last; never one of `weight: 0`"
    )
    teacher: Ref | None = field(None, "a model of the same tokens to learn from beside the rows' answers")
    distill_alpha: float = field(0.5, "share of the teacher's part of the loss", gt=0, le=1)
    distill_temperature: float = field(1.0, "of both sides in the teacher's part", gt=0)
    train_last_layers: int | None = field(
        None, "train the last so many blocks, final norm and untied head; all unless set", gt=0
    )
    load_in_4bit: bool = field(False, "peft: the frozen weights in four bits (QLoRA; bitsandbytes, CUDA)")

    @model_validator(mode="after")
    def _fits_together(self) -> SFTConfig:
        """What is trained is said once."""
        if self.load_in_4bit and self.peft is None:
            raise ValueError("load_in_4bit is of what adapters stand on: add peft: {}")
        if self.train_last_layers and self.peft is not None:
            raise ValueError("train_last_layers and peft exclude each other: peft.target_modules names where")
        if self.teacher and self.trainer.get("loss_type", "nll") != "nll":
            raise ValueError("with a teacher the loss is its own: no trainer.loss_type")
        if self.teacher and self.trainer.get("label_smoothing_factor"):
            raise ValueError("with a teacher the loss is its own: no trainer.label_smoothing_factor")
        if self.chat_template not in (None, "chatml") and "{" not in str(self.chat_template):
            raise ValueError(
                f"chat_template is `chatml` or a template's own text, and {self.chat_template!r} is neither: a file's "
                "text stands in the recipe, indented behind `chat_template: |-`"
            )
        return self


INPUTS = {"init": "causal-lm", "teacher": "causal-lm"}
KIND = "causal-lm"
TRAINS_ON = "demonstrations"
RESULT_VERSION = 2


def run(config: SFTConfig, inputs: dict[str, Any], out: Path, runtime: Runtime) -> dict[str, float]:
    """Train on the rows' answers; returns the held-out loss before and after, in nats a trained token."""
    from pipeline import trainer as adapter
    from pipeline.data.chat import stop_token_id
    from pipeline.model.build import check_vocabulary, save_model
    from pipeline.schedule import schedule

    adapter.quieten()
    checkpoint = runtime.checkpoints.latest()
    init = inputs["init"]

    # 1. rows as tokens
    tokenizer = _tokenizer(config, init)
    stop_id = stop_token_id(tokenizer)
    length = adapter.longest_row(init.model, config.max_length, runtime)
    encoded = _encode(config, tokenizer, "train", runtime)
    rows = _fit(encoded, stop_id, length, runtime.say)
    held_out = _requests(_encode(config, tokenizer, "held_out", runtime) if config.held_out else [], length)
    if config.packing:
        rows = _pack(rows, length)

    # 2. model
    model = _model(config, init, runtime)
    check_vocabulary(model, len(tokenizer), "sft.init")
    before = checkpoint.state["before"] if checkpoint else _held_out_loss(model, held_out, config, runtime)
    teacher = _teacher(config, inputs, length, len(tokenizer), runtime)

    # 3. train
    plan = schedule([len(row["input_ids"]) for row in rows], config, runtime)
    trainer = _trainer(config, model, teacher, rows, tokenizer, plan, out, runtime)
    adapter.fit_attention(trainer, max(len(row["input_ids"]) for row in rows))
    runtime.say(adapter.describe(trainer, plan, len(rows)))
    shown = {"loss": "loss", "acc": "mean_token_accuracy", "lr": "learning_rate"}
    more = (lambda: teacher.look(runtime.world_size)) if teacher else dict
    state = {"before": before}
    adapter.train(trainer, config, rows, plan, runtime, checkpoint, phase="sft", shown=shown, state=state, more=more)

    # 4. save, then evaluate
    flops = adapter.forward_flops(teacher.model, plan) if teacher else 0.0
    plain = adapter.load_policy(init.model, config, runtime) if config.load_in_4bit else None
    flops += adapter.training_flops(trainer, plan, plain)
    model = adapter.trained_model(trainer, plain)
    if runtime.is_main:
        save_model(model, out / "model", init.model, [stop_id], tokenizer.pad_token_id)
        if config.chat_template is not None:
            (out / "model" / "chat_template.jinja").write_text(str(tokenizer.chat_template), encoding="utf-8")
    runtime.barrier()
    after = _held_out_loss(model, held_out, config, runtime)
    figures = {"held_out_loss_before": before, "held_out_loss": after} if held_out else {}
    runtime.metrics.log(plan.steps, int(plan.tokens[-1]), **figures)
    return {**figures, "rows": float(len(encoded)), "epochs": len(plan.order) / len(rows), "flops": flops}


def preview(config: SFTConfig, inputs: dict[str, Any], count: int) -> list[ShownRow]:
    """The first rows (packed ones with `packing`), their targets marked."""
    from pipeline.data.chat import encode_messages, stop_token_id
    from pipeline.data.formats import read_rows
    from pipeline.data.shown import ShownRow

    tokenizer = _tokenizer(config, inputs["init"])
    rows = read_rows(config.data, "messages", held_out=config.held_out)
    rows = rows if config.packing else rows[:count]
    encoded = [encode_messages(tokenizer, _turns(config, row["messages"])) for row in rows[: 100 * count]]
    fitted = _fit(encoded, stop_token_id(tokenizer), config.max_length)
    fitted = _pack(fitted, config.max_length) if config.packing else fitted
    return [
        ShownRow(f"row {place}", row["input_ids"], [label != -100 for label in row["labels"]])
        for place, row in enumerate(fitted[:count], 1)
    ]


def _tokenizer(config: SFTConfig, init: Any) -> PreTrainedTokenizerFast:
    """The init's tokenizer, with the recipe's chat template where it names one."""
    from pipeline import trainer as adapter
    from pipeline.data.tokenizers import CHATML

    tokenizer = adapter.load_padded_tokenizer(init.model)
    if config.chat_template is not None:
        tokenizer.chat_template = CHATML if config.chat_template == "chatml" else config.chat_template
    if not tokenizer.chat_template:
        raise MismatchError(
            f"{init.reference} has no chat template, and `chat_template` names none",
            where="sft.init",
            mend="chat_template: chatml (for a tokenizer with <|im_start|> and <|im_end|>), or the text of a template",
        )
    return tokenizer


def _encode(
    config: SFTConfig, tokenizer: PreTrainedTokenizerFast, split: Literal["train", "held_out"], runtime: Runtime
) -> list[Encoded]:
    """The rows of one side of the split as ids and masks."""
    from pipeline.data.chat import encode_messages
    from pipeline.data.formats import read_rows

    say = runtime.say if split == "train" else lambda text: None
    rows = read_rows(config.data, "messages", split=split, held_out=config.held_out, say=say)
    rows = rows[: config.eval_rows] if split == "held_out" else rows
    encoded = []
    with runtime.progress(f"encode {split.replace('_', '-')}", len(rows), "rows") as bar:
        for row in rows:
            encoded.append(encode_messages(tokenizer, _turns(config, row["messages"])))
            bar.advance()
            runtime.check_stop()
    return encoded


def _turns(config: SFTConfig, messages: list[Message]) -> list[Message]:
    """The messages, all of the assistant's but the last trained one taken out of the loss where that is asked."""
    if config.train_on_turns == "all":
        return messages
    from pipeline.data.chat import counts

    last = max(place for place, message in enumerate(messages) if counts(message))
    return [{**message, **({} if place == last else {"weight": "0"})} for place, message in enumerate(messages)]


def _model(config: SFTConfig, init: Any, runtime: Runtime) -> PreTrainedModel:
    """What is trained: whole, its last blocks, or as what adapters will stand on, in four bits if asked."""
    from pipeline import trainer as adapter
    from pipeline.model.four_bit import check_four_bit, load_four_bit
    from pipeline.model.freezing import train_last

    if config.load_in_4bit:
        check_four_bit(runtime.device, "sft.load_in_4bit")
        model = load_four_bit(init.model, runtime.device, bf16=adapter.is_bf16(config, runtime))
        adapter.no_dropout(model)
        return model.eval()
    model = adapter.load_policy(init.model, config, runtime)
    if config.train_last_layers is not None:
        train_last(model, config.train_last_layers, "sft.train_last_layers")
    return model


def _teacher(
    config: SFTConfig, inputs: dict[str, Any], length: int, vocabulary: int, runtime: Runtime
) -> Teacher | None:
    """The model to learn from, in the precision of the products. It has to speak the same tokens, turns alike."""
    import torch

    from pipeline import trainer as adapter
    from pipeline.model.build import check_vocabulary
    from pipeline.model.distillation import load_teacher

    given, init = inputs.get("teacher"), inputs["init"]
    if given is None:
        return None
    if given.tokenizer_hash != init.tokenizer_hash:
        raise MismatchError(
            f"{given.reference} has another tokenizer than {init.reference}",
            where="sft.teacher",
            mend="a teacher and an init of one tokenizer",
        )
    if given.template_hash and given.template_hash != init.template_hash:
        runtime.say(f"{given.reference} has another chat template than {init.reference}, whose rows it is shown")
    dtype = torch.bfloat16 if adapter.is_bf16(config, runtime) else torch.float32
    alpha, temperature = config.distill_alpha, config.distill_temperature
    teacher = load_teacher(given.model, dtype, runtime.device, length, alpha, temperature, "sft.max_length")
    check_vocabulary(teacher.model, vocabulary, "sft.teacher")
    return teacher


def _trainer(
    config: SFTConfig,
    model: PreTrainedModel,
    teacher: Teacher | None,
    rows: list[Row],
    tokenizer: PreTrainedTokenizerFast,
    plan: Schedule,
    out: Path,
    runtime: Runtime,
) -> Any:
    """TRL's trainer of this config, its loss the labels' alone or the teacher's too."""
    from datasets import Dataset
    from trl import SFTConfig as Arguments
    from trl import SFTTrainer

    from pipeline import trainer as adapter
    from pipeline.model.taught import teach
    from pipeline.model.trained_positions import trim_head

    own = {"packing": config.packing, "dataset_kwargs": {"skip_prepare_dataset": True}}
    with adapter.building():
        trainer = SFTTrainer(
            model=model,
            args=adapter.trainer_arguments(Arguments, config, plan, out, runtime, own),
            train_dataset=Dataset.from_list(rows[:1]),
            processing_class=tokenizer,
            peft_config=adapter.lora(config.peft, "CAUSAL_LM"),
        )
    if teacher is None:
        trim_head(trainer.model)
    else:
        teach(trainer.model, teacher, "sft.teacher")
    return trainer


def _fit(
    encoded: list[Encoded], stop_id: int, length: int, say: Callable[[str], None] = lambda text: None
) -> list[Row]:
    """Rows of at most `length` tokens with labels (-100 where not trained).

    A row that is too long is cut back to the last turn of the assistant that ends in time, so that what is cut is whole
    turns and never the stop token; one whose first answer does not end in time is left out. Raises DataError where
    nothing is left, or no stop token or nothing at all would be trained.
    """
    rows: list[Row] = []
    cut = dropped = stops = 0
    for row in encoded:
        ids, trained = row.input_ids, row.is_trained
        if len(ids) > length:
            ends = [i + 1 for i in range(length) if ids[i] == stop_id and trained[i]]
            if not ends:
                dropped += 1
                continue
            cut += 1
            ids, trained = ids[: ends[-1]], trained[: ends[-1]]
        labels = [token if is_trained else -100 for token, is_trained in zip(ids, trained, strict=True)]
        assert any(trained[1:]), "a row that ends with an assistant's turn and trains nothing"
        stops += labels.count(stop_id)
        rows.append({"input_ids": ids, "labels": labels})
    if cut or dropped:
        say(f"longer than {length:,} tokens: {cut:,} rows cut after an earlier answer, {dropped:,} left out")
    if not rows:
        raise DataError(f"every row is longer than {length:,} tokens", where="sft.data", mend="a larger max_length")
    if not stops:
        raise MismatchError(
            "no row trains the stop token, so the model would never learn to end its turn",
            where="sft.data",
            mend="a chat template that ends the assistant's turn with a special token",
        )
    return rows


def _pack(rows: list[Row], length: int) -> list[Row]:
    """Rows behind one another, best fit first, at most `length` tokens; `seq_lengths` keeps them apart."""
    from datasets import Dataset
    from trl import pack_dataset

    packed = pack_dataset(Dataset.from_list(rows), length, "bfd", {"batch_size": 10_000})
    return [dict(row) for row in packed]


def _requests(encoded: list[Encoded], length: int) -> list[Request]:
    """Each answer of the rows that fit, its stop token included, after all that stands before it."""
    from itertools import groupby

    from pipeline.evals.likelihood import Request

    requests = []
    for row in encoded:
        start = 0
        for is_answer, run in groupby(row.is_trained):
            end = start + len(list(run))
            if is_answer and start and len(row.input_ids) <= length:
                requests.append(Request(tuple(row.input_ids[:start]), tuple(row.input_ids[start:end])))
            start = end
    return requests


def _held_out_loss(model: PreTrainedModel, requests: list[Request], config: SFTConfig, runtime: Runtime) -> float:
    """Mean nats a trained token over the held-out answers; 0 where there are none."""
    from pipeline import trainer as adapter
    from pipeline.evals.likelihood import log_likelihoods

    if not requests:
        return 0.0
    with adapter.autocast(config, runtime):
        nats = -log_likelihoods(model.eval(), requests, tick=runtime.check_stop).sum()
    return float(nats / sum(len(request.completion) for request in requests))
