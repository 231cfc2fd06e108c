"""What the stages take in which models answer and score: ppo, sample, label."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pipeline.data.answers import pairs_of, read_answers
from pipeline.data.messages import letters
from pipeline.graph import Node
from pipeline.model.build import count_parameters, flops_per_token
from pipeline.model.memory import Load, adapter_parameters, memory_of
from pipeline.plan.site import Estimate, Site
from pipeline.plan.speed import Work
from pipeline.plan.training import LIBRARIES, START
from pipeline.rl.logprobs import chunk_of
from pipeline.rl.revising import principles_in
from pipeline.rl.scoring import text_in
from pipeline.runtime import check_batch


def ppo(site: Site, node: Node, found: Estimate) -> Estimate:
    """Generation, the forwards that score and compare, and the training of policy and, where there is one, critic, on
    prompts and full-length responses."""
    config: Any = node.config
    model = site.model(node.inputs["init"][0])
    if model is None:
        return replace(found, notes=("not estimated: what it starts from is not known",))
    batch, group = config.batch_size, config.num_generations
    check_batch(batch, config.num_mini_batches, group, site.processes, f"{node.name}.batch_size")
    rows, prompt, answer = site.prompts(config, config.response_length)
    episodes = config.total_episodes or round(config.num_train_epochs * rows * group)
    length = prompt + answer
    longest = round(prompt + config.response_length)
    tokens = episodes * length
    total, _ = count_parameters(model)
    scoring = site.reward_models(node)
    rewards = len(scoring)
    judges = sum(site.size_of([ref]) for ref in node.inputs.get("reward.judge", ()))
    critics = int(config.advantage_estimator == "gae")
    # Forwards: decode, policy, reference, critic, what scores. Frozen weights have no gradients to work out.
    forwards = 3 + critics + rewards + judges / total
    updates = (1 + critics) * config.num_ppo_epochs * (2 / 3 if config.peft else 1.0)
    trained = (1 + critics) * (adapter_parameters(model, config.peft.r) if config.peft else float(total))
    on_device = site.of_batch(config.per_device_train_batch_size, batch // config.num_mini_batches)
    load = Load(
        on_device,
        longest,
        trained,
        moments=8.0,
        bf16=site.bf16(config),
        checkpointing=False,
        logits=min(chunk_of(model.config.get_text_config().vocab_size), on_device * config.response_length),
        others=total * _copies(site, node, scoring, critics) + judges,
        four_bit=config.load_in_4bit,
        on_cpu=site.device.kind == "cpu",
        libraries=LIBRARIES["pretrain"],  # no TRL either
        accumulates=True,  # policy and critic, some rows at a time
    )
    a_token, at_once = flops_per_token(model, round(length)), max(2, round(length))
    written = episodes * config.response_length * a_token / 3  # a step is as long as its longest row
    read, bf16 = a_token / 3 * (tokens * (forwards - 1) + episodes * prompt), site.bf16(config)
    head = answer / length
    return replace(
        found,
        parameters=total,
        tokens=tokens,
        flops=tokens * a_token * (forwards / 3 + updates),
        memory=memory_of(model, load),
        disk=4 * total + 3 * 12 * trained,
        notes=(
            f"{episodes:,} responses of up to {config.response_length} tokens, of about {answer:.0f} as in the rows",
        ),
        work=(
            Work("write", model, written, on_device, at_once, bf16),
            Work("read", model, read, on_device, at_once, bf16, head),
            Work("train", model, tokens * a_token * updates, on_device, at_once, bf16, head),
        ),
        beginning=START,
    )


def _copies(site: Site, node: Node, scoring: list[str], critics: int) -> int:
    """Whole models on the device beside the policy: critic, reference, and the reward models `scoring`."""
    config: Any = node.config
    if config.peft:  # the reference is the policy without adapters, the reward model the critic without its own
        apart = [ref for ref in scoring if not _is_adapter_on(site, ref, node.inputs["init"][0])]
        return len(apart) if config.shared_trunk else max(critics, len(scoring))
    if config.offload and site.device.kind != "cpu":  # one of the frozen at a time
        return critics + max(1, len(scoring))
    return critics + 1 + len(scoring)


def _is_adapter_on(site: Site, reward: str, init: str) -> bool:
    """Whether a reward model of this recipe is trained by adapters on that model."""
    node = site.recipe.nodes.get(reward)
    return node is not None and getattr(node.config, "peft", None) is not None and node.inputs["init"] == (init,)


def sample(site: Site, node: Node, found: Estimate) -> Estimate:
    """Forwards alone: each prompt once, full-length answers, and both again through every model that scores. The
    cache is that of a model whose heads share no keys."""
    config: Any = node.config
    model = site.model(node.inputs["init"][0])
    if model is None:
        return replace(found, notes=("not estimated: what answers is not known",))
    rows, prompt, _ = site.prompts(config, config.response_length, split=config.split)
    prompts, samples = min(config.prompts or rows, rows), config.num_generations
    tokens = prompts * (prompt + samples * config.response_length)
    total, _ = count_parameters(model)
    rewards = len(site.reward_models(node))
    judges = sum(site.size_of([ref]) for ref in node.inputs.get("reward.judge", ()))
    length = round(prompt + config.response_length)
    scored = prompts * samples * length * (rewards + judges / total)
    on_device = max(config.batch_size, samples)
    shape = model.config.get_text_config()
    a_token, bf16 = flops_per_token(model, length) / 3, site.bf16(config)
    written = prompts * samples * config.response_length * a_token
    more = _revisions(site, node, prompts * samples, prompt, on_device)
    return replace(
        found,
        parameters=total,
        tokens=tokens + more.tokens,
        flops=(tokens + scored) * a_token + more.flops,
        work=(
            Work("write", model, written, on_device, length, bf16),
            Work("read", model, (tokens + scored) * a_token - written, on_device, length, bf16),
            *more.work,
        ),
        beginning=START,
        memory={
            "weights": 4 * (total * (1 + rewards) + judges),
            "cache": 8.0 * on_device * length * shape.num_hidden_layers * shape.hidden_size,
            "logits": 8.0 * on_device * shape.vocab_size,
        },
        disk=prompts * samples * config.response_length * 2 * site.bytes_a_token(),
        notes=(
            f"{prompts:,} prompts, {samples} answers of up to {config.response_length} tokens to each",
            *more.notes,
        ),
    )


@dataclass(frozen=True)
class _More:
    """What revisions add."""

    tokens: float = 0.0
    flops: float = 0.0
    work: tuple[Work, ...] = ()
    notes: tuple[str, ...] = ()


def _revisions(site: Site, node: Node, answers: int, prompt: float, on_device: int) -> _More:
    """Each round reads prompt and answer twice, a principle and a critique beside them, and writes a critique and an
    answer in full length."""
    config: Any = node.config
    if not config.revisions:
        return _More()
    if config.judge_url is not None:
        return _More(notes=("without its revisions, which another machine writes",))
    refs = node.inputs.get("judge") or node.inputs["init"]
    model = site.model(refs[0])
    if model is None:
        return _More(notes=("without its revisions: the model that writes them is not known",))
    rules = principles_in(text_in(config.constitution), str(config.constitution))
    rule = sum(len(each.encode()) for each in rules) / len(rules) / site.bytes_a_token()
    written = answers * config.revisions * (config.critique_length + config.response_length)
    read = answers * config.revisions * (2 * (prompt + config.response_length) + rule + config.critique_length)
    length = round(prompt + config.response_length + config.critique_length + rule)
    a_token, bf16 = flops_per_token(model, length) / 3, site.bf16(config)
    parts = (
        Work("write", model, written * a_token, on_device, length, bf16),
        Work("read", model, read * a_token, on_device, length, bf16),
    )
    rounds = "round" if config.revisions == 1 else "rounds"
    note = f"{config.revisions} {rounds} of critique and revision of every answer, in full length"
    return _More(written + read, sum(part.flops for part in parts), parts, (note,))


def label(site: Site, node: Node, found: Estimate) -> Estimate:
    """Forwards alone: every compared answer through what scores it; a judge reads a pair in both orders, with its
    constitution, and a person takes no model."""
    config: Any = node.config
    groups = read_answers(config.data, lambda text: None)
    pairs = [pairs_of(group, number, config.pairs, config.seed) for number, group in enumerate(groups)]
    count = sum(map(len, pairs))
    compared = f"{count:,} pairs of answers to {sum(map(bool, pairs)):,} prompts"
    judge = node.inputs.get("judge", ())
    refs = [*judge, *site.reward_models(node), *node.inputs.get("reward.judge", ())]
    models = [model for ref in refs if (model := site.model(ref)) is not None]
    if not models:
        return replace(found, notes=(f"not estimated: no model of ours labels the {compared}",))
    prompts = [sum(len(letters(message).encode()) for message in group.prompt) for group in groups]
    texts = [[len(text.encode()) for text in group.texts] for group in groups]
    if judge:  # one text a pair and order: the prompt, both answers and the rules
        rules = len(config.constitution.read_bytes())
        size = 2 * sum(
            prompt + rules + sum(sizes[side] for side in pair)
            for prompt, sizes, of in zip(prompts, texts, pairs)
            for pair in of
        )
    else:
        sides = [{side for pair in of for side in pair} for of in pairs]
        size = sum(prompt + sizes[side] for prompt, sizes, of in zip(prompts, texts, sides) for side in of)
    read, bf16 = size / site.bytes_a_token(), site.bf16(config)
    a_text = max(1, round(read / max(1, 2 * count)))
    return replace(
        found,
        tokens=read,
        flops=sum(read * flops_per_token(model, a_text) / 3 for model in models),
        memory={"weights": sum(4.0 * count_parameters(model)[0] for model in models)},
        work=tuple(
            Work("read", model, read * flops_per_token(model, a_text) / 3, config.batch_size, max(2, a_text), bf16)
            for model in models
        ),
        beginning=START,
        disk=float(size),
        notes=(compared,),
    )
