"""The sizes in a recipe of `llmpipe init`: model, batches, lengths, steps.

What a stage costs is what `llmpipe plan` says of it with some steps; its share of the hours over that are its steps.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from pipeline.artifacts import Store
from pipeline.cli import sizes
from pipeline.cli.init_recipe import Asked, Found, Stages
from pipeline.cli.session import open_stages
from pipeline.errors import DataError, MachineError
from pipeline.launch import Launch

if TYPE_CHECKING:
    from pipeline.plan.site import Estimate
    from pipeline.plan.speed import Probe

TRIED_STEPS = 100
LARGE = 300e6
"""Parameters of a base from which on adapters are trained."""
FILLED = 0.9
"""Share of the memory that a plan may fill."""
LONGEST_ROW = 2048
LORA = {"r": 16}


def size(stages: Stages, asked: Asked, found: Found) -> Probe:
    """Give every stage its sizes; what was measured for it. MachineError where nothing makes one fit the memory."""
    from pipeline.hardware import measure_device
    from pipeline.plan.speed import Probe

    probe = Probe(measure_device(processes=Launch().processes()))
    seconds = sizes.seconds_of(list(stages.values), asked.hours)
    if found.text is not None:
        stages_of_text(stages, asked, found, probe, seconds["pretrain"])
    parameters, context = _model(stages, found)
    for name in [name for name in ("sft", "reward", "dpo", "ppo") if name in stages.values]:
        _row_stage(stages, name, found, parameters, context)
        tried = _fitted(stages, name, asked, found, probe)
        _steps(stages, name, found, _paid(seconds[name], tried))
    _evaluation(stages, asked, found, probe)
    return probe


def _paid(seconds: float, tried: Estimate) -> float:
    """How many times the tried steps these seconds pay for, once the stage's beginning is paid."""
    assert tried.seconds is not None, tried.notes
    return max(0.0, seconds - tried.beginning) / (tried.seconds - tried.beginning)


def _evaluation(stages: Stages, asked: Asked, found: Found, probe: Probe) -> None:
    """Fewer prompts, rows and documents for eval, halved until they fit into its share of the hours."""
    usual = {"prompts": 256, "preference_rows": 512, "documents": 200}
    why = "fewer than usual: what the hours pay for"
    for times in (1, 2, 4, 8):
        if times > 1:
            for name, count in usual.items():
                stages.set("eval", name, count // times, why)
        tried = _estimate(stages, "eval", asked, found, probe)
        if tried.seconds is None or tried.seconds <= sizes.EVALUATION * asked.hours * 3600:
            return


def stages_of_text(stages: Stages, asked: Asked, found: Found, probe: Probe, seconds: float) -> None:
    """tokenize's vocabulary and pretrain's model, batch and steps."""
    assert found.text is not None
    tokens = 0.95 * found.text.bytes / found.bytes_a_token
    processes = Launch().processes()
    flops = seconds * _rate(stages, asked, probe) * processes
    if found.base is not None:
        _continued(stages, asked, found, probe, tokens, seconds)
        return
    from pipeline.model.scaling import CHINCHILLA

    stages.set("tokenize", "vocab_size", found.vocab, f"for {found.text.bytes / 1e6:,.3g} MB")
    rows = [[min(LONGEST_ROW, length) for length in kind] for kind in found.row_lengths]
    cost = functools.partial(_cost, found.vocab)
    plan = sizes.pretraining(flops, tokens, rows, CHINCHILLA.best_split, cost, processes)
    _check_text(asked, tokens, plan.context)
    _set_pretrain(stages, found, plan, tokens)
    tried = _estimate(stages, "pretrain", asked, found, probe)
    assert tried.seconds is not None, tried.notes
    assert tried.flops is not None
    rate = tried.flops / (tried.seconds - tried.beginning)  # of this very model: small ones are slower
    flops = max(0.0, seconds - tried.beginning) * rate
    plan = sizes.pretraining(flops, tokens, rows, CHINCHILLA.best_split, cost, processes)
    _set_pretrain(stages, found, plan, tokens)
    _fitted(stages, "pretrain", asked, found, probe)


def _check_text(asked: Asked, tokens: float, context: int) -> None:
    if 0.9 * tokens <= context:
        what = f"about {tokens:.0f} tokens of text, and a sample has {context}"
        raise DataError(what, where=f"--data {asked.data}", mend="more text, or a --base without --data")


def _set_pretrain(stages: Stages, found: Found, plan: sizes.Pretraining, tokens: float) -> None:
    """The model, the batch and the steps; `tokens` of the text."""
    seen = plan.steps * plan.batch * plan.context
    stages.set("pretrain", "model", {"depth": plan.depth}, "blocks; 64 channels wide for each")
    fitting = [sum(length <= plan.context for length in kind) / len(kind) for kind in found.row_lengths]
    why = f"tokens; holds about {min(fitting):.0%} of the rows, longer ones are left out" if fitting else "tokens"
    stages.set("pretrain", "context_length", plan.context, why)
    stages.set("pretrain", "per_device_train_batch_size", plan.batch, "small batches, many steps")
    end = f"the text {seen / tokens:.2g} times"
    if plan.is_short_of_text:
        end += ": more text would serve better than more time"
    stages.set("pretrain", "max_steps", plan.steps, end)
    stages.set("pretrain", "optimizer", "muon", "its learning rate follows from the width and the batch")


def _rate(stages: Stages, asked: Asked, probe: Probe) -> float:
    """FLOP/s that pretrain reaches in a process here."""
    from pipeline.plan.planner import Planner

    session = open_stages(
        {"tokenize": stages.values["tokenize"]}, run=asked.run, store=Store(asked.artifacts), named=asked.run
    )
    return Planner(session.recipe, session.store, probe.device, 1).rate("pretrain")[0]


@functools.cache
def _cost(vocab: int, depth: int, context: int) -> tuple[float, float]:
    """(parameters that count, FLOPs a token to train) of the model that would be built."""
    import torch

    from pipeline.model.build import count_parameters, flops_per_token
    from pipeline.model.presets import build_model, shape_of

    with torch.device("meta"):
        model = build_model("llama", shape_of({"depth": depth}, context, vocab), {})
    return float(count_parameters(model)[1]), float(flops_per_token(model, context))


def _continued(stages: Stages, asked: Asked, found: Found, probe: Probe, tokens: float, seconds: float) -> None:
    """pretrain on a base: one pass over the text at most."""
    from pipeline.model.build import count_parameters, reach_of
    from pipeline.plan.models import empty_model

    assert found.base is not None
    base = empty_model(found.base.model)
    context, batch = min(reach_of(base.config) or 1024, 1024), sizes.shared(8, Launch().processes())
    _check_text(asked, tokens, context)
    stages.set("pretrain", "context_length", context)
    stages.set("pretrain", "per_device_train_batch_size", batch)
    stages.set("pretrain", "max_steps", TRIED_STEPS)
    if count_parameters(base)[0] >= LARGE:
        stages.set("pretrain", "peft", LORA, "adapters: the base is large")
    tried = _fitted(stages, "pretrain", asked, found, probe)
    paid = TRIED_STEPS * _paid(seconds, tried)
    steps = max(2, round(min(paid, tokens / batch / context)))
    stages.set("pretrain", "max_steps", steps, f"{steps * batch * context / tokens:.2g} of the text")


def _model(stages: Stages, found: Found) -> tuple[float, int]:
    """(parameters, tokens it reaches) of the model that the rows are taught to."""
    from pipeline.model.build import count_parameters, reach_of
    from pipeline.plan.models import empty_model

    if found.base is not None:
        model = empty_model(found.base.model)
        return float(count_parameters(model)[0]), reach_of(model.config) or LONGEST_ROW
    fields = stages.values["pretrain"]
    return _cost(found.vocab, fields["model"]["depth"], 256)[0], int(fields["context_length"])


def _row_stage(stages: Stages, name: str, found: Found, parameters: float, context: int) -> None:
    """Batch, lengths and rate of sft, reward, dpo or ppo, and as many steps as are tried."""
    is_adapter = found.base is not None and parameters >= LARGE
    if is_adapter:
        stages.set(name, "peft", LORA, "adapters: the base is large")
    rate = sizes.learning_rate(parameters, is_adapter)
    share = {"sft": 1.0, "reward": 0.5, "dpo": 0.1, "ppo": 0.05 if found.base else 0.1}[name]
    stages.set(name, "learning_rate", float(f"{rate * share:.0e}"))
    if name == "ppo":
        _ppo(stages, found, context)
        return
    rows = found.chats if name == "sft" else found.preferences
    assert rows is not None
    most, processes = 32 if parameters < 2e7 else 16, Launch().processes()
    stages.set(name, "per_device_train_batch_size", sizes.rows_a_step(rows.count, most, processes))
    stages.set(name, "max_length", min(context, LONGEST_ROW))
    stages.set(name, "max_steps", TRIED_STEPS)


def _ppo(stages: Stages, found: Found, context: int) -> None:
    assert found.chats is not None
    batch = sizes.shared(max(8, min(64, sizes.power_of_two(found.chats.count / 4))), Launch().processes())
    answer = sizes.quantile(found.chats.answers, 0.9) / found.bytes_a_token
    length = min(max(16, sizes.power_of_two(answer, up=True)), context // 2, 256)
    stages.set("ppo", "batch_size", batch)
    stages.set("ppo", "per_device_train_batch_size", batch)
    stages.set("ppo", "response_length", length, "tokens; nine of ten answers in the chats are shorter")
    stages.set("ppo", "max_prompt_length", context - length)
    stages.set("ppo", "total_episodes", TRIED_STEPS * batch)


def _steps(stages: Stages, name: str, found: Found, paid: float) -> None:
    """The steps that `paid` times the tried ones come to, as epochs where they can go round."""
    fields = stages.values[name]
    if name == "ppo":
        assert found.chats is not None
        episodes = min(paid * TRIED_STEPS * fields["batch_size"], 4 * found.chats.count)
        batch = sizes.fewer_a_step(episodes, fields["batch_size"], max(16, Launch().processes()))
        stages.set("ppo", "batch_size", batch)
        stages.set("ppo", "per_device_train_batch_size", min(batch, fields["per_device_train_batch_size"]))
        stages.set("ppo", "total_episodes", batch * max(2, round(episodes / batch)), "answers to learn from")
        return
    rows = found.chats if name == "sft" else found.preferences
    assert rows is not None
    steps = fields.get("gradient_accumulation_steps", 1)
    seen = paid * TRIED_STEPS * fields["per_device_train_batch_size"] * steps
    most = 3 if name == "sft" else 1
    if seen >= most * rows.count:
        del fields["max_steps"]
        stages.set(name, "num_train_epochs", float(most))
        return
    batch = sizes.fewer_a_step(seen, fields["per_device_train_batch_size"] * steps, max(4, Launch().processes()))
    at_once = min(batch, fields["per_device_train_batch_size"])
    stages.set(name, "per_device_train_batch_size", at_once)
    if steps > 1:
        stages.set(name, "gradient_accumulation_steps", batch // at_once)
    why = f"{seen / rows.count:.2g} epochs: what the hours pay for"
    stages.set(name, "max_steps", max(2, int(seen / batch)), why)


def _fitted(stages: Stages, name: str, asked: Asked, found: Found, probe: Probe) -> Estimate:
    """The stage's estimate, after what makes it fit the memory: smaller micro-steps, recomputation, adapters."""
    while True:
        tried = _estimate(stages, name, asked, found, probe)
        if tried.peak <= FILLED * probe.device.memory:
            return tried
        fields = stages.values[name]
        rows = fields["per_device_train_batch_size"]
        why = f"for {probe.device.memory / 2**30:.0f} GiB"
        if rows > Launch().processes():
            stages.set(name, "per_device_train_batch_size", rows // 2, why)
            if name != "ppo":  # there it is a forward's share of the batch
                steps = fields.get("gradient_accumulation_steps", 1)
                stages.set(name, "gradient_accumulation_steps", 2 * steps, "the same batch in smaller parts")
        elif name != "ppo" and "gradient_checkpointing" not in fields:
            stages.set(name, "gradient_checkpointing", True, why)
        elif asked.base is not None and "peft" not in fields:
            stages.set(name, "peft", LORA, f"adapters {why}")
        else:
            what = f"{name} takes {tried.peak / 2**30:.1f} GiB, and there are {probe.device.memory / 2**30:.1f}"
            raise MachineError(what, mend="a smaller --base, fewer --hours, or a machine with more memory")


def _estimate(stages: Stages, name: str, asked: Asked, found: Found, probe: Probe) -> Estimate:
    from pipeline.lineage import survey
    from pipeline.plan.planner import Planner

    is_left = name != "eval"
    values = {key: fields for key, fields in stages.values.items() if not (is_left and key == "eval")}
    session = open_stages(values, run=asked.run, store=Store(asked.artifacts), named=asked.run)
    standing = survey(session.recipe, session.store)[name]
    processes, told = Launch().processes(), found.bytes_a_token
    planner = Planner(session.recipe, session.store, probe.device, processes, probe=probe, bytes_a_token=told)
    return planner.estimate(standing)
