"""pretrain: a causal language model from scratch (or further from a base) on token shards.

The own loop: the trunk runs once, head and loss go in chunks (Wijmans et al. 2024 call the idea cut cross-entropy), one
host sync a logging interval. The model is a preset, any causal language model of transformers, or a class of the
user's own. Sample order is a pure function of (seed, position), so that a checkpoint is weights, moments and a step.

Departures: the projections into the residual stream start at zero; embeddings have a learning rate of their own; the
final model is saved before it is evaluated.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

from pydantic import Field

from pipeline.errors import ConfigError, Halt, MismatchError, TrainingError
from pipeline.recipe import PeftConfig, Section, StageConfig, field

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from pipeline.data.infilling import Order
    from pipeline.data.samples import RunSamples
    from pipeline.data.shards import TokenFile
    from pipeline.data.shown import ShownRow
    from pipeline.model.continued import Start
    from pipeline.model.distillation import Teacher
    from pipeline.model.held_out import HeldOut
    from pipeline.model.next_token import NextToken
    from pipeline.model.optimizer_steps import OptimizerSteps
    from pipeline.runtime import Runtime


ShareOfTokens = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Times = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ModelConfig(Section):
    """The model to build; sizes left out follow from the depth."""

    architecture: str = field(
        "llama", "gpt2, llama, mistral, qwen3, gemma3, qwen3_moe, another model_type of transformers, or ./gpt.py:GPT"
    )
    size: str | None = field(None, "depth and widths by name: 10m, 30m, 60m, 124m, 350m, 774m, 1b, 3b, 8b")
    depth: int | None = field(None, "transformer blocks; the one dial; 4 without a `size`", gt=0)
    hidden_size: int | None = field(None, "width; 64 × depth unless set", gt=0)
    intermediate_size: int | None = field(None, "width of the MLP; 8/3 × hidden_size, to a multiple of 32", gt=0)
    num_attention_heads: int | None = field(None, "heads of 64 channels unless set", gt=0)
    num_key_value_heads: int | None = field(None, "heads of keys and values; as many as heads unless set", gt=0)
    tie_word_embeddings: bool | None = field(None, "one matrix for embedding and head; so unless the size is 8b")
    config: dict[str, Any] = field({}, "further fields of transformers' config of the architecture, over all these")


class Anneal(Section):
    """The end of a run, on other text: the best there is, or what the model is for."""

    share: float = field(0.1, "last share of the steps", gt=0, lt=1)
    mixture: dict[str, ShareOfTokens] = field(..., "source of the shards -> its share of the tokens there")


class PretrainConfig(StageConfig):
    """What pretrain can be told."""

    tokens: str = field("tokenize", "the token shards")
    init: str | None = field(None, "a base model to go on from; a new one is built unless set")
    model: ModelConfig = field(ModelConfig(), "the model to build; ignored with `init`")
    context_length: int = field(256, "tokens of a sample", unit="tokens", gt=1)
    packing: Literal["chunk", "best_fit", "document"] = field(
        "chunk", "documents end to end and cut; whole ones beside each other; or one a sample"
    )
    document_mask: bool = field(False, "documents of a sample do not see each other")
    mixture: dict[str, ShareOfTokens] | None = field(
        None, "source of the shards -> its share of the tokens; by size times the data's weights unless set"
    )
    max_epochs: Times | dict[str, Times] | None = field(
        None, "times a source is read at most, or source -> that; the others make up for it"
    )
    anneal: Anneal | None = field(None, "another mixture for the last share of the steps")
    fim_rate: float = field(0.0, "share of the documents told as fill-in-the-middle", ge=0, le=1)
    fim_spm_rate: float = field(0.5, "share of those in the order suffix, prefix, middle", ge=0, le=1)
    teacher: str | None = field(None, "a model of the same tokens to learn from beside the text")
    distill_alpha: float = field(0.5, "share of the teacher's part of the loss", gt=0, le=1)
    distill_temperature: float = field(1.0, "temperature of both sides in that part", gt=0)
    peft: PeftConfig | None = field(None, "with `init`: train LoRA adapters (and the rows of new tokens) alone")
    per_device_train_batch_size: int = field(8, "samples a micro-step; several processes share them", gt=0)
    gradient_accumulation_steps: int = field(1, "micro-steps an optimiser step", gt=0)
    max_steps: int = field(1000, "optimiser steps", unit="steps", gt=0)
    optimizer: Literal["adamw", "muon"] = field("adamw", "muon: Muon on the blocks' matrices, AdamW on the rest")
    learning_rate: float | None = field(
        None, "peak rate of matrices and norms; by width and batch unless set, a tenth of that with `init`", gt=0
    )
    embedding_learning_rate: float | None = field(
        None, "peak rate of the embedding; learning_rate unless set, muon: ten times, peft: a tenth", gt=0
    )
    lr_scheduler_type: Literal["cosine", "linear", "wsd", "constant"] = field("cosine", "shape after the warmup")
    warmup_steps: float = field(0.02, "steps of warmup, or their share when below 1", ge=0)
    decay_share: float = field(0.3, "wsd: share of the steps in which the rate falls", gt=0, le=1)
    min_lr_share: float = field(0.0, "the last rate, as a share of the peak", ge=0, le=1)
    adam_beta1: float = field(0.9, "AdamW's decay of the mean", ge=0, lt=1)
    adam_beta2: float = field(0.95, "AdamW's decay of the square", ge=0, lt=1)
    adam_epsilon: float = field(1e-8, "AdamW's epsilon", gt=0)
    weight_decay: float = field(0.1, "on matrices only, never on embeddings and norms", ge=0)
    max_grad_norm: float = field(1.0, "clip the gradient's norm to this", gt=0)
    bf16: bool | None = field(None, "autocast to bf16; where the hardware gains by it unless set")
    attn_implementation: str = field(
        "auto", "sdpa, eager, flash_attention_2, flex_attention, …; auto: what runs here and pays"
    )
    torch_compile: bool | None = field(
        None, "compile the repeated blocks; where that pays, and a trial succeeds, unless set"
    )
    use_liger_kernel: bool = field(False, "head and loss by Liger's fused kernel: on CUDA, with the extra `gpu`")
    skip_nonfinite: int = field(
        0,
        "step over so many steps whose loss or gradient is not finite; the next one ends the run",
        unit="steps",
        ge=0,
        run_only=True,
    )
    auto_find_batch_size: bool = field(
        False, "out of memory: smaller micro-steps, more of them, the same batch", run_only=True
    )
    gradient_checkpointing: bool = field(False, "recompute activations in the backward pass: less memory, slower")
    eval_documents: int = field(400, "held-out documents of the bits per byte", unit="documents", gt=0)
    eval_steps: int = field(500, "optimiser steps between evaluations", unit="steps", gt=0, run_only=True)
    sample_prompts: tuple[str, ...] | None = field(
        None, "texts continued at every evaluation; the beginnings of two held-out documents unless set", run_only=True
    )
    sample_tokens: int = field(40, "tokens of a continuation; 0: none", unit="tokens", ge=0, run_only=True)
    logging_steps: int = field(20, "optimiser steps between lines of metrics", unit="steps", gt=0, run_only=True)
    save_steps: int = field(200, "optimiser steps between checkpoints", unit="steps", gt=0, run_only=True)


INPUTS = {"tokens": "tokens", "init": "causal-lm", "teacher": "causal-lm"}
KIND = "causal-lm"
SHARDS = True
RESULT_VERSION = 3


def run(config: PretrainConfig, inputs: dict[str, Any], out: Path, runtime: Runtime) -> dict[str, float]:
    """Train to `max_steps`; returns held-out bits per byte and what it took."""
    from pipeline.data.shards import TokenFile
    from pipeline.data.tokenizers import load_tokenizer
    from pipeline.model.build import save_model, save_without_weights
    from pipeline.model.next_token import NextToken, has_plain_head
    from pipeline.model.sharding import first_finds, whole_state

    # 1. data
    _check(config, runtime)
    tokens = inputs["tokens"]
    train, valid = TokenFile(tokens.path / "train.ds"), TokenFile(tokens.path / "valid.ds")
    samples = _samples(config, train)
    order = _order(config, samples, tokens.model, train.metadata.separator_id)
    tokenizer = load_tokenizer(tokens.model)

    # 2. model and optimizers, from the checkpoint if there is one
    start = _start(config, inputs, tokenizer, valid, runtime)
    model = start.model
    if not runtime.shards:  # shards go there one by one
        model.to(runtime.device)
    losses = NextToken(
        model,
        _teacher(config, inputs, runtime),
        is_fused=config.use_liger_kernel,
        is_chunked=first_finds(lambda: has_plain_head(model), runtime.device) if runtime.shards else None,
    )
    ends = ([train.metadata.separator_id], tokenizer.pad_token_id)
    if runtime.is_main:
        save_without_weights(model, out / "model", tokens.model, *ends)
    steps = _steps(config, losses, order, runtime)
    step = steps.resume()
    if runtime.is_main:
        steps.need_disk(out, math.ceil(config.max_steps / config.save_steps))
    if step == 0 and start.known:
        runtime.metrics.log(0, 0, **start.known)

    # 3. train
    held_out = _held_out(config, losses, valid, tokenizer, runtime)
    flops = _compile(config, start, steps, samples, runtime)
    _train(config, steps, step, held_out, runtime)

    # 4. save, then evaluate
    if start.adapted is not None:
        start.adapted.merge_and_unload()
    state = whole_state(model, runtime.is_main)
    if runtime.is_main:
        save_model(model, out / "model", tokens.model, *ends, state)
    runtime.barrier()
    base_metrics = out / "metrics.jsonl" if inputs.get("init") else None
    return {
        **_evaluate(config, held_out, base_metrics, runtime),
        "parameters": float(sum(p.numel() for p in model.parameters())),
        "flops": flops,
        **samples.figures(config.max_steps * _batch(config)),
    }


def _check(config: PretrainConfig, runtime: Runtime) -> None:
    """ConfigError for fields that do not go together, before anything is loaded; MachineError for what is not here."""
    from pipeline.model.liger import check_liger

    if config.use_liger_kernel:
        check_liger(runtime.device)
    refused = {
        "peft": (config.peft and not config.init, "adapters need a base model", "set pretrain.init, or leave it out"),
        "fim_rate": (
            config.fim_rate > 0 and config.packing != "chunk",
            "fill-in-the-middle lengthens documents, which then fit no row",
            "packing: chunk",
        ),
    }
    if runtime.shards:
        mend = "leave it out, or --strategy ddp"
        refused |= {
            "peft": (config.peft is not None, "adapters are not trained in shards", mend),
            "auto_find_batch_size": (
                config.auto_find_batch_size,
                "ranks that share a model in shards run out of memory together or wait for one another",
                mend,
            ),
            "attn_implementation": (
                config.attn_implementation != "auto",
                "attention is not tried for a model in shards",
                mend,
            ),
        }
    for name, (is_so, problem, mend) in refused.items():
        if is_so:
            raise ConfigError(problem, where=f"pretrain.{name}", mend=mend)


def _samples(config: PretrainConfig, train: TokenFile) -> RunSamples:
    """The samples of the whole run, a pure function of the shards and the config."""
    from pipeline.data.samples import Packed, Shares, run_samples

    late = config.anneal
    shares = Shares(config.mixture, config.max_epochs, late.share if late else 0.0, late.mixture if late else None)
    packed = Packed(config.context_length, config.packing, config.document_mask)
    return run_samples(train, packed, shares, config.max_steps, _batch(config), config.seed)


def _order(config: PretrainConfig, samples: RunSamples, folder: Path, separator: int) -> Order:
    """The samples in order, some of their documents told as fill-in-the-middle where that is asked for. `folder` has
    the tokenizer."""
    from pipeline.data.infilling import infill
    from pipeline.data.packing import hash_of

    if config.fim_rate == 0:
        return samples.order
    seed, apart = hash_of(config.seed, 2), config.document_mask
    return infill(samples.order, config.fim_rate, config.fim_spm_rate, folder, separator, seed, apart)


def preview(config: PretrainConfig, inputs: dict[str, Any], count: int) -> list[ShownRow]:
    """The first samples of the run, in its order: every token but the first is a target, padding apart."""
    import numpy as np

    from pipeline.data.shards import TokenFile
    from pipeline.data.shown import ShownRow

    tokens = inputs["tokens"]
    train = TokenFile(tokens.path / "train.ds")
    order = _order(config, _samples(config, train), tokens.model, train.metadata.separator_id)
    batch = order.take(range(min(count, config.max_steps * _batch(config))))
    is_target_BT = np.ones_like(batch.rows_BT[:, 1:], dtype=bool) if batch.is_target_BT is None else batch.is_target_BT
    rows = zip(batch.rows_BT.tolist(), is_target_BT.tolist(), strict=True)
    return [ShownRow(f"sample {place}", ids, [False, *is_target]) for place, (ids, is_target) in enumerate(rows, 1)]


def _start(
    config: PretrainConfig,
    inputs: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    valid: TokenFile,
    runtime: Runtime,
) -> Start:
    """The base model to go on from with what it knows, or a new one with weights drawn from the seed."""
    from pipeline.model.continued import Start, start_from_base
    from pipeline.model.presets import draw_model, shape_of
    from pipeline.runtime import derive_seed

    if inputs.get("init") is None:
        given = config.model
        shape = shape_of(given.model_dump(exclude={"architecture", "config"}), config.context_length, len(tokenizer))
        on_meta = runtime.shards and not runtime.is_main  # rank 0 deals its weights out
        seed = derive_seed(config.seed, "model")
        pad_id = tokenizer.pad_token_id
        return Start(draw_model(given.architecture, shape, given.config, seed, pad_id=pad_id, on_meta=on_meta))
    return start_from_base(
        inputs["init"].model,
        tokenizer,
        valid,
        config.peft,
        length=config.context_length,
        documents=config.eval_documents,
        seed=derive_seed(config.seed, "adapters"),
        autocast=lambda: _autocast(config, runtime),
        runtime=runtime,
    )


def _teacher(config: PretrainConfig, inputs: dict[str, Any], runtime: Runtime) -> Teacher | None:
    """The model to learn from beside the text, in the precision of the products. It has to speak the same tokens."""
    import torch

    from pipeline.model.distillation import load_teacher

    given = inputs.get("teacher")
    if given is None:
        return None
    if given.tokenizer_hash != inputs["tokens"].tokenizer_hash:
        raise MismatchError(
            f"the shards are of another tokenizer than {given.reference}",
            where="pretrain.teacher",
            mend=f"tokenize with the teacher's: --set tokenize.tokenizer={given.model}",
        )
    dtype = torch.bfloat16 if _is_bf16(config, runtime) else torch.float32
    alpha, temperature = config.distill_alpha, config.distill_temperature
    return load_teacher(given.model, dtype, runtime.device, config.context_length, alpha, temperature)


def _steps(config: PretrainConfig, losses: NextToken, order: Order, runtime: Runtime) -> OptimizerSteps:
    """The steps of the run, from the first: the model placed, its micro-steps, optimizers, schedule and verdicts."""
    from pipeline.model.build import count_experts
    from pipeline.model.loss_watch import Verdicts
    from pipeline.model.micro_steps import MicroSteps
    from pipeline.model.optim import learning_rate_share, warmup_steps
    from pipeline.model.optimizer_steps import OptimizerSteps
    from pipeline.model.placement import place
    from pipeline.runtime import share_batch

    place(
        losses,
        length=config.context_length,
        bf16=_is_bf16(config, runtime),
        attention=config.attn_implementation,
        apart=config.document_mask,
        recomputes=config.gradient_checkpointing,
        runtime=runtime,
    )
    whole, world_size = config.per_device_train_batch_size, runtime.world_size
    if count_experts(losses.config) > 1 and not losses.has_experts:
        runtime.say("the experts are not balanced: this family's config has no router_aux_loss_coef, or 0")
    where = "pretrain.per_device_train_batch_size"
    rows, count = share_batch(whole, config.gradient_accumulation_steps, world_size, where)
    batch, warmup = _batch(config), warmup_steps(config.warmup_steps, config.max_steps)
    micro_steps = MicroSteps(
        losses,
        order,
        steps=config.max_steps,
        batch=batch,
        length=config.context_length,
        rows=rows,
        count=count,
        is_split=rows < whole,
        rank=runtime.rank,
        world_size=world_size,
        device=runtime.device,
        autocast=lambda: _autocast(config, runtime),
        halves_on_out_of_memory=config.auto_find_batch_size,
        say=runtime.say,
    )
    return OptimizerSteps(
        micro_steps,
        _optimizers(config, losses.model, runtime),
        Verdicts(
            lambda step: order.documents(range(step * batch, (step + 1) * batch)),
            world_size,
            config.skip_nonfinite,
            runtime.say,
        ),
        lambda step: learning_rate_share(
            step, config.max_steps, warmup, config.lr_scheduler_type, config.decay_share, config.min_lr_share
        ),
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        runtime=runtime,
    )


def _optimizers(config: PretrainConfig, model: PreTrainedModel, runtime: Runtime) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon beside it, at the peak rates that are set or follow from the model."""
    from pipeline.model.optim import build_optimizers, peak_rates
    from pipeline.model.scaling import large_batch

    tokens_a_step = _batch(config) * config.context_length
    rate, embedding_rate = peak_rates(
        model,
        config.optimizer,
        tokens_a_step,
        rate=config.learning_rate,
        embedding_rate=config.embedding_learning_rate,
        has_base=config.init is not None,
        is_adapted=config.peft is not None,
    )
    if config.learning_rate is None:
        runtime.say(f"learning rate {rate:.1e}, embedding {embedding_rate:.1e}, by the model's width and the batch")
    large = "" if config.init else large_batch(tokens_a_step, config.max_steps * tokens_a_step)
    if large:
        runtime.say(large)
    return build_optimizers(
        model,
        kind=config.optimizer,
        learning_rate=rate,
        embedding_rate=embedding_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )


def _held_out(
    config: PretrainConfig, losses: NextToken, valid: TokenFile, tokenizer: PreTrainedTokenizerFast, runtime: Runtime
) -> HeldOut:
    """What the model is measured by while it is trained, shared over the ranks."""
    from pipeline.model.held_out import HeldOut, Ranks

    return HeldOut(
        losses,
        valid,
        tokenizer,
        lambda: _autocast(config, runtime),
        Ranks(runtime.rank, runtime.world_size),
        length=config.context_length,
        documents=config.eval_documents,
        prompts=config.sample_prompts,
        sample_tokens=config.sample_tokens,
        heed=runtime.heed,
        check_stop=runtime.check_stop,
    )


def _compile(
    config: PretrainConfig, start: Start, steps: OptimizerSteps, samples: RunSamples, runtime: Runtime
) -> float:
    """Say what will be trained on what, and compile where that pays; the run's FLOPs."""
    import torch

    from pipeline.hardware import peak_flops
    from pipeline.model.build import flops_per_token
    from pipeline.model.compiling import compile_blocks
    from pipeline.model.losses import terms_of
    from pipeline.model.sharding import any_finds

    batch, model = _batch(config), start.model
    drawn = config.max_steps * batch
    runtime.say(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {config.max_steps:,} steps of "
        f"{batch} × {config.context_length} tokens ({samples.epochs(drawn):.2f} epochs), "
        f"{'bf16' if _is_bf16(config, runtime) else 'fp32'}"
    )
    for line in samples.described(drawn):
        runtime.say(line)
    flops = flops_per_token(model, config.context_length) * config.max_steps * batch * config.context_length
    flops *= 2 / 3 if start.adapted else 1

    def agreed(reason: str) -> str:
        fails_somewhere = any_finds(bool(reason), runtime.device)  # all ask, whatever they have found
        return reason or ("another process finds that it does not work" if fails_somewhere else "")

    def also(on: bool) -> None:
        if runtime.device.type != "cpu":  # there a run's bits stay what they were
            steps.losses.terms = torch.compile(terms_of, dynamic=False) if on else None

    runtime.say(
        compile_blocks(
            model,
            config.torch_compile,
            steps.micro_steps.rehearse,
            flops=flops,
            peak=runtime.world_size * peak_flops(runtime.device.type, _is_bf16(config, runtime)),
            bf16=_is_bf16(config, runtime),
            agreed=agreed,
            also=also,
        )
    )
    return flops


def _batch(config: PretrainConfig) -> int:
    """Samples of an optimiser step, over all processes."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps


def _is_bf16(config: PretrainConfig, runtime: Runtime) -> bool:
    return runtime.bf16 if config.bf16 is None else config.bf16


def _autocast(config: PretrainConfig, runtime: Runtime) -> torch.autocast:
    """bf16 products with fp32 weights, or nothing. (Kept, its copies of gathered shards would be a whole model.)"""
    import torch

    enabled, cached = _is_bf16(config, runtime), not runtime.shards
    return torch.autocast(runtime.device.type, dtype=torch.bfloat16, enabled=enabled, cache_enabled=cached)


def _train(config: PretrainConfig, steps: OptimizerSteps, step: int, held_out: HeldOut, runtime: Runtime) -> None:
    """Optimiser steps from `step` to the end; whatever ends them, what was saved is whole."""
    runtime.checkpoints.behind = True
    try:
        _loop(config, steps, step, held_out, runtime)
    except TrainingError:  # of all ranks: the first to leave ends the others
        runtime.checkpoints.wait()
        runtime.barrier()
        raise
    finally:
        steps.micro_steps.close()
        runtime.checkpoints.wait()


def _loop(config: PretrainConfig, steps: OptimizerSteps, step: int, held_out: HeldOut, runtime: Runtime) -> None:
    """Steps, with metrics, evaluations, checkpoints and an ear for signals."""
    from pipeline.hardware import peak_flops
    from pipeline.model.build import flops_per_token
    from pipeline.model.compiling import is_compiled, telling_of_new_graphs

    tokens_a_step = _batch(config) * config.context_length
    flops = flops_per_token(steps.model, config.context_length) * (1 if config.peft is None else 2 / 3)
    peak = runtime.world_size * peak_flops(runtime.device.type, _is_bf16(config, runtime))
    rule = "6 N and attention" if config.peft is None else "4 N and attention"
    runtime.say(f"{flops / 1e6:,.1f} MFLOP a token ({rule}); mfu is of {peak / 1e12:,.2f} TFLOP/s")
    began, first, watches = time.monotonic(), step, is_compiled(steps.model)
    with runtime.progress("pretrain", config.max_steps) as bar:
        bar.start_at(step)
        while step < config.max_steps:
            if step and step % config.eval_steps == 0:  # after its checkpoint, and again when resumed from it
                looked = time.monotonic()
                try:
                    bits, samples = held_out.look()
                except Halt:  # on all ranks
                    _stop(steps, step, runtime)
                began += time.monotonic() - looked  # a rate is that of steps
                runtime.metrics.log(step, step * tokens_a_step, bits_per_byte=bits, **samples)
                runtime.say(f"step {step:,}: {bits:.3f} bits per byte, held out")
                for text in samples.values():
                    runtime.say(f"  {text!r}")
            with telling_of_new_graphs(runtime.say, f"step {step + 1:,}") if watches else nullcontext():
                steps.step(step)
            step += 1
            if step % config.logging_steps == 0 or step == config.max_steps:
                figures = steps.figures()
                speed = (step - first) * tokens_a_step / (time.monotonic() - began)
                rates = {"tokens_per_second": speed, "flops_per_second": speed * flops, "mfu": speed * flops / peak}
                shown = {"loss": figures["loss"], "lr": figures["learning_rate"], "tok/s": speed, "mfu": rates["mfu"]}
                runtime.metrics.log(step, step * tokens_a_step, **figures, **rates)
                bar.advance(step - bar.done, **shown)
            stopping = runtime.stop_requested()
            if step % config.save_steps == 0 or step == config.max_steps:
                steps.save(step)
            if stopping and step < config.max_steps:
                _stop(steps, step, runtime)


def _stop(steps: OptimizerSteps, step: int, runtime: Runtime) -> NoReturn:
    """Leave with a checkpoint of `step`."""
    if steps.verdicts.saved_at != step:
        steps.save(step)
    runtime.checkpoints.wait()
    runtime.barrier()  # rank 0 has written it: the others' leaving may end it
    runtime.stop(step)


def _evaluate(
    config: PretrainConfig, held_out: HeldOut, base_metrics: Path | None, runtime: Runtime
) -> dict[str, float]:
    """Held-out figures of the model as it was saved, logged; with a base, a table of before and after: `base_metrics`
    begin with what that knew."""
    from pipeline.model.continued import forgetting, read_known

    bits, samples = held_out.look()
    by_source = held_out.by_source() if base_metrics or len(held_out.valid.metadata.sources) > 1 else {}
    before = read_known(base_metrics) if base_metrics else {}
    for line in forgetting(before, by_source):
        runtime.say(line)
    seen = config.max_steps * _batch(config) * config.context_length
    runtime.metrics.log(config.max_steps, seen, bits_per_byte=bits, **by_source, **samples)
    return {"bits_per_byte": bits, **by_source, **{f"before/{name}": value for name, value in before.items()}}
