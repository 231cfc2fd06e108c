"""What eval takes: text that every model reads, rows that are scored, prompts that chat models answer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from pipeline.artifacts import Artifact
from pipeline.data.formats import read_rows
from pipeline.data.pydocs import questions
from pipeline.data.sources import read_documents
from pipeline.data.tokenizers import load_tokenizer
from pipeline.evals.subject import is_chat
from pipeline.evaluation_config import ALL
from pipeline.graph import Node
from pipeline.model.build import count_parameters, flops_per_token
from pipeline.plan.lengths import si
from pipeline.plan.site import Estimate, Site
from pipeline.plan.speed import Work
from pipeline.plan.training import START
from pipeline.roles import MODEL, input_of

TURN = 16
"""Tokens of the template in a question and its answer."""
PREDICTED = 0.5
"""Share of what is read that is predicted: of texts all, of questions and prompts nothing."""
ANSWERED = ("greedy", "sampled", "exact_match")
AT_ONCE = 64
"""Answers that are written side by side."""
LOOKED_AT = 200
"""Documents and questions whose mean length is taken."""


@dataclass(frozen=True)
class _Reads:
    """Texts that a model reads: how many, and tokens of one."""

    count: float = 0.0
    length: float = 1.0

    @property
    def tokens(self) -> float:
        return self.count * self.length


@dataclass(frozen=True)
class _Asked:
    """What is measured on; nothing where the task does not apply."""

    texts: _Reads = _Reads()
    questions: _Reads = _Reads()
    preferences: _Reads = _Reads()
    bench: _Reads = _Reads()
    answers: _Reads = _Reads()
    """Prompts with an answer as long as the data's own."""
    longest: int = 0
    """Tokens of an answer at most."""
    times: int = 0
    """How often a chat model answers each prompt."""
    priced: int = 0
    """How often what it answers is scored by the reward model."""
    has_kl: bool = False
    """Whether the baseline reads what another model sampled."""


def evaluate(site: Site, node: Node, found: Estimate) -> Estimate:
    """Forwards over what is scored, and answers in full length, each model for itself. Tasks of the user's own and of
    lm-eval, and win rates, are not counted, and it is said."""
    config: Any = node.config
    tasks = _tasks(node)
    asked = _asked(site, node, tasks)
    refs = list(dict.fromkeys([*node.inputs["models"], *node.inputs.get("baseline", ())]))
    models = {ref: model for ref in refs if (model := site.model(ref)) is not None}
    scorers = [model for ref in site.reward_models(node) if (model := site.model(ref)) is not None]
    work, read, written, priced = list[Work](), 0.0, 0.0, 0.0
    for ref, model in models.items():
        is_measured = ref in node.inputs["models"]
        texts = list(_read_by(site, node, asked, ref)) if is_measured else [asked.preferences]
        work += [_reading(site, config, model, each) for each in texts]
        read += sum(each.tokens for each in texts)
        if asked.times and _answers(site, ref):
            work.append(_writing(site, config, model, asked))
            written += asked.times * asked.answers.count * asked.longest
            priced += asked.priced
    for model in scorers:
        texts = [asked.preferences, asked.bench, replace(asked.answers, count=priced * asked.answers.count)]
        work += [_reading(site, config, model, each, head=0.0) for each in texts]
        read += sum(each.tokens for each in texts)
    weights = [4.0 * count_parameters(model)[0] for model in models.values()]
    return replace(
        found,
        tokens=read + written,
        flops=sum(part.flops for part in work),
        memory={"weights": sum(sorted(weights)[-2:]) + sum(4.0 * count_parameters(model)[0] for model in scorers)},
        work=tuple(part for part in work if part.flops),
        beginning=START + len(refs),
        notes=_notes(node, tasks, refs, models, read, written),
    )


def _notes(
    node: Node, tasks: set[str], refs: list[str], models: Mapping[str, Any], read: float, written: float
) -> tuple[str, ...]:
    config: Any = node.config
    left = [task.name for task in config.tasks or () if task.is_own or task.is_lm_eval]
    left += ["win_rate"] if "win_rate" in tasks else []
    left += [ref for ref in refs if ref not in models]
    said = f"{si(read)} tokens are read, up to {si(written)} written"
    return (said, *([f"not counted: {', '.join(left)}"] if left else []))


def _tasks(node: Node) -> set[str]:
    """The built-in tasks that the stage measures, by what it takes and what is asked for."""
    config: Any = node.config
    has = {role: bool(node.inputs.get(role)) for role in ("tokens", "reward", "baseline")}
    applies = {
        "bits_per_byte": has["tokens"],
        "multiple_choice": any(entry.source == "pydocs" for entry in config.data or ()),
        "reward_accuracy": has["reward"] and bool(config.preferences),
        "reward_bench": has["reward"] and bool(config.reward_bench),
        "preference_accuracy": has["baseline"] and bool(config.preferences),
        "exact_match": bool(config.match and config.data),
        "greedy": bool(config.data),
        "sampled": bool(config.data),
    }
    named = {task.task for task in config.tasks or () if not (task.is_own or task.is_lm_eval)}
    is_all = config.tasks is None or ALL in named
    won = {"win_rate"} if "win_rate" in named or (is_all and (config.judge or config.judge_url)) else set()
    return {task for task, can in applies.items() if can and (is_all or task in named)} | won


def _asked(site: Site, node: Node, tasks: set[str]) -> _Asked:
    """Counts and mean lengths of what the tasks read."""
    config: Any = node.config
    a_token = site.bytes_a_token()
    found = _Asked(longest=config.max_new_tokens)
    if "bits_per_byte" in tasks:
        found = replace(found, texts=_documents(site, node, config.documents))
    if "multiple_choice" in tasks:
        found = replace(found, questions=_questions(config.questions, config.swapped_questions, a_token))
    if {"reward_accuracy", "preference_accuracy"} & tasks:
        rows = read_rows(config.preferences, "ranked", split="held_out", held_out=config.held_out)
        sides = sum(len(row["answers"]) for row in rows) / len(rows)
        count = min(config.preference_rows, len(rows)) * sides
        found = replace(found, preferences=_Reads(count, site.row_length(rows)))
    if "reward_bench" in tasks:
        rows = read_rows(config.reward_bench, "preference", split="all")
        found = replace(found, bench=_Reads(2 * len(rows), site.row_length(rows)))
    if tasks & {*ANSWERED}:
        rows = read_rows(config.data, "prompt", split="held_out", held_out=config.held_out)
        rows = [row for row in rows if row["reference"]]
        length = site.row_length(rows) + site.answer_length(rows, config.max_new_tokens) if rows else 1.0
        answers = _Reads(min(config.prompts, len(rows)), length)
        times, priced = len(tasks & {*ANSWERED}), len(tasks & {"greedy", "sampled"})
        found = replace(found, answers=answers, times=times, priced=priced, has_kl="sampled" in tasks)
    return found


def _questions(count: int, swapped: int, a_token: float) -> _Reads:
    """Rows of a question with its choices behind it: named, nameless (the same few tokens before all of them, which are
    read once), and of some swapped; `a_token` bytes each."""
    some = questions("held_out", min(count, LOOKED_AT))
    question = sum(len(each.question.encode()) for each in some) / len(some) / a_token + TURN
    choices = sum(len(choice.encode()) for each in some for choice in each.choices) / len(some) / a_token
    rows = 2 * count + min(swapped, count)
    return _Reads(rows, choices + question * (rows - count) / rows)


def _documents(site: Site, node: Node, count: int) -> _Reads:
    """Held-out documents of the stage's tokens: the mean where they stand, else of the data's first ones, each up to
    all of it."""
    (ref,) = node.inputs["tokens"]
    writer = site.recipe.nodes.get(ref)
    if writer is None:
        artifact: Artifact | None = input_of(site.store, ref, node.stage.inputs["tokens"])
    else:
        artifact = site.store.find(site.recipe.run, ref)
    if artifact is not None:
        metrics = artifact.manifest["metrics"]
        documents = metrics["valid_documents"]
        return _Reads(min(count, documents), metrics["valid_tokens"] / max(1, documents))
    assert writer is not None, "tokens of another run stand: the recipe was checked"
    config: Any = writer.config
    texts = (document.text for entry in config.data for document in read_documents(entry))
    sizes = [len(text.encode()) for text in itertools.islice(texts, LOOKED_AT)]
    share = 1.0 if len(sizes) == LOOKED_AT else 0.1  # of few documents the last tenth of each is held out
    return _Reads(min(count, len(sizes)), share * sum(sizes) / len(sizes) / site.bytes_a_token())


def _read_by(site: Site, node: Node, asked: _Asked, ref: str) -> Iterator[_Reads]:
    """What a model that is measured reads, and for a chat model what the baseline reads of it."""
    yield asked.texts
    yield asked.questions
    if _answers(site, ref):
        yield asked.preferences
        if asked.has_kl and node.inputs.get("baseline") and ref not in node.inputs["baseline"]:
            yield asked.answers


def _answers(site: Site, ref: str) -> bool:
    """Whether the model is one that answers prompts: taught to end its turns."""
    if ref in site.recipe.nodes:
        return site.recipe.nodes[ref].stage.type != "pretrain"
    folder = input_of(site.store, ref, MODEL).model
    return is_chat(folder, load_tokenizer(folder))


def _reading(site: Site, config: Any, model: PreTrainedModel, texts: _Reads, head: float = PREDICTED) -> Work:
    length = max(2, min(config.max_length, round(texts.length)))
    flops = texts.tokens * flops_per_token(model, length) / 3
    rows = max(1, config.token_budget // length)
    return Work("read", model, flops, rows, length, site.bf16(config), head)


def _writing(site: Site, config: Any, model: PreTrainedModel, asked: _Asked) -> Work:
    length = max(2, round(asked.answers.length))
    tokens = asked.times * asked.answers.count * asked.longest
    rows = min(AT_ONCE, max(1, int(asked.answers.count)))
    return Work("write", model, tokens * flops_per_token(model, length) / 3, rows, length, site.bf16(config))
