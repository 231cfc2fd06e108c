"""eval: any set of models on held-out data, every figure with an interval.

Bits per byte, multiple choice by pointwise mutual information (Holtzman et al. 2021), accuracy of the reward model and
of a policy's implicit reward (Rafailov et al. 2023) beside a scorer that knows only lengths, and answers to held-out
prompts: reward, KL from the baseline, and a gold rule that nothing was trained on. Percentile bootstrap (Efron and
Tibshirani 1993), paired where models are compared. The tasks are in pipeline/evals, one file each; docs/eval.md
defines every figure.

Departures: the gold rule is ROUGE-L F1 to the reference answer (Lin 2004), not a judge; KL is estimated on samples of
the policy and summed over the answer, not averaged over tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from pipeline.errors import ConfigError
from pipeline.evaluation_config import ALL, Require, Tasks
from pipeline.recipe import Data, DataEntry, File, Ref, StageConfig, field

if TYPE_CHECKING:
    from pipeline.artifacts import Artifact
    from pipeline.evals.planned import JudgeSpec, Model, Plan
    from pipeline.runtime import Runtime

PYDOCS = (DataEntry(source="pydocs"),)


class EvalConfig(StageConfig):
    """What eval can be told."""

    models: tuple[Ref, ...] = field(..., "the models to measure")
    tokens: Ref | None = field("tokenize", "whose held-out text bits per byte are measured on; null for none")
    reward: Ref | None = field("reward", "the reward model, measured and measured with; null for none")
    baseline: Ref | None = field("sft", "what the others are compared with and KL is taken from; null for none")
    data: Data | None = field(PYDOCS, "rows with held-out prompts and reference answers; null for none")
    preferences: Data | None = field(PYDOCS, "rows with held-out preferences; null for none")
    reward_bench: Data | None = field(
        None, "RewardBench's rows (prompt, chosen, rejected, subset), none of them trained on; null for none"
    )
    match: Literal["exact", "number"] | None = field(
        None, "exact_match: an answer is right by its text, or by its last number; not measured unless set"
    )
    matched_by: Literal["kl", "flops"] | None = field(
        None,
        "compare each variant of a stage with another stage's that is nearest in KL from the baseline or in all FLOPs",
    )
    judge: Ref | None = field(None, "win_rate: a language model that compares answers by `constitution`")
    judge_url: str | None = field(None, "likewise, behind an OpenAI-compatible address: http://127.0.0.1:8000/v1")
    judge_model: str | None = field(None, "judge_url: the model's name there")
    constitution: File | None = field(None, "judge, judge_url: a text file with the rules to compare by")
    tasks: Tasks | None = field(
        None,
        "what to measure: built-in tasks, ./folders and ./files of your own, lm_eval:NAME; `all` that are built "
        "in and apply unless set",
    )
    require: Require = field(
        {},
        'what figures must be, `{sft.exact_match: ">= 0.5"}`; the run fails (exit 1) where one is not',
        run_only=True,
    )
    held_out: float = field(0.05, "share of rows of files that is held out: as the stages that trained on them", gt=0)
    documents: int = field(200, "for bits per byte", unit="documents", gt=0)
    questions: int = field(1200, "multiple choice, where `data` holds pydocs", unit="questions", gt=0)
    swapped_questions: int = field(300, "of those, asked with another function's name too", unit="questions", ge=0)
    prompts: int = field(256, "answered greedily, for exact_match too, and once more sampled", unit="prompts", gt=0)
    preference_rows: int = field(512, "for the two accuracies", unit="rows", gt=0)
    max_length: int = field(1024, "longest row; a model of shorter reach lowers it", unit="tokens", gt=1)
    max_new_tokens: int = field(96, "longest answer", unit="tokens", gt=0)
    bf16: bool | None = field(None, "run the models in bf16; where the hardware gains by it unless set")
    token_budget: int = field(4096, "tokens of a batch, padding included", unit="tokens", run_only=True, gt=0)

    @model_validator(mode="after")
    def _judges_are_whole(self) -> EvalConfig:
        if self.judge is not None and self.judge_url is not None:
            raise ValueError("judge and judge_url: one of them compares")
        if (self.judge is None and self.judge_url is None) != (self.constitution is None):
            raise ValueError("a judge and a constitution go together")
        if (self.judge_url is None) != (self.judge_model is None):
            raise ValueError("judge_url and judge_model go together")
        return self


INPUTS = {
    "models": "causal-lm",
    "tokens": "tokens",
    "reward": "reward-model",
    "baseline": "causal-lm",
    "judge": "causal-lm",
}
KIND = "evaluation"
RESULT_VERSION = 1


def run(config: EvalConfig, inputs: dict[str, Any], out: Path, runtime: Runtime) -> dict[str, float]:
    """Measure every model; returns each figure as `MODEL.TASK.METRIC`."""
    import math
    from dataclasses import asdict

    from pipeline.evals.contamination import note
    from pipeline.evals.export import lines_of, write_csv, write_latex
    from pipeline.evals.results import write_jsonl
    from pipeline.evals.runner import evaluate
    from pipeline.evals.spent import spent_on
    from pipeline.evals.variants import compare, variants

    # 1. what is measured, and on what
    plan = _plan(config, inputs, runtime)

    asked = list(plan.own.values()) if runtime.is_main else []
    noted = note(asked, [model.artifact for model in plan.models], runtime.say)

    # 2. every task over every model, a resumable unit each
    results, items, per_item = evaluate(plan, runtime.checkpoints.folder / "units", runtime)

    # 3. variants of one stage: over their seeds, and against each other
    spent = {model.name: spent_on(model.artifact) for model in plan.models}
    every = {name: each.cumulative for name, each in spent.items()}
    comparisons = compare(config.models, per_item, every, config.matched_by, config.seed)

    # 4. the figures, and the items behind them
    if runtime.is_main:
        lines = lines_of(results, comparisons, variants(config.models), spent)
        write_csv(out / "table.csv", lines)
        write_latex(out / "table.tex", lines)
        write_jsonl(out / "results.jsonl", map(asdict, results))
        write_jsonl(out / "samples.jsonl", items)
        if noted:
            write_jsonl(out / "contamination.jsonl", noted)
    figures = {f"{row.model}.{row.task}.{row.metric}": row.value for row in results}
    runtime.metrics.log(len(items), None, **figures)
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def _plan(config: EvalConfig, inputs: dict[str, Any], runtime: Runtime) -> Plan:
    """Read the data of the tasks that apply; ConfigError for a task that was asked for and can't."""
    from pipeline.data.formats import read_rows
    from pipeline.data.pydocs import questions
    from pipeline.evals.bits_per_byte import held_out_texts
    from pipeline.evals.own_tasks import read_own
    from pipeline.evals.planned import Plan

    tasks = _tasks(config, inputs)
    own = {task.name: read_own(task, runtime.say) for task in config.tasks or () if task.is_own or task.is_lm_eval}
    if any(each.kind == "win_rate" for each in own.values()):
        _need(_lacks(config.model_copy(update={"data": PYDOCS}), inputs), "win_rate")  # it has rows of its own

    prompts: list[dict[str, Any]] = []
    ranked: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    if {"exact_match", "greedy", "sampled", "win_rate"} & set(tasks):
        assert config.data is not None
        rows = read_rows(config.data, "prompt", split="held_out", held_out=config.held_out, say=runtime.say)
        rows = _shuffled([row for row in rows if row["reference"]], config.seed, "prompts")
        prompts = rows[: config.prompts]
        if not prompts:
            what, mend = "no held-out row has an answer to compare with", "a larger held_out, or other data"
            raise ConfigError(what, where="eval.data", mend=mend)
    if {"reward_accuracy", "preference_accuracy"} & set(tasks):
        assert config.preferences is not None
        rows = read_rows(config.preferences, "ranked", split="held_out", held_out=config.held_out)
        rows = _shuffled(rows, config.seed, "preferences")
        ranked, others = rows[: config.preference_rows], _pairs(rows[config.preference_rows :])
        if len(others) < len(_pairs(ranked)):  # too few to learn from what lengths tell
            others = _pairs(read_rows(config.preferences, "ranked", split="train", held_out=config.held_out))
    bench: list[dict[str, Any]] = []
    if "reward_bench" in tasks:
        assert config.reward_bench is not None
        bench = read_rows(config.reward_bench, "preference", split="all", say=runtime.say)
    asked = questions("held_out", config.questions) if "multiple_choice" in tasks else []
    return Plan(
        models=tuple(_named(config.models, inputs["models"])),
        baseline=_one(config.baseline, inputs["baseline"]),
        reward=_one(config.reward, inputs["reward"]),
        judge=_judge(config, inputs),
        tasks=tasks,
        own=own,
        texts=held_out_texts(inputs["tokens"].path, config.documents) if "bits_per_byte" in tasks else [],
        questions=asked,
        swapped=config.swapped_questions,
        prompts=prompts,
        match=config.match,
        ranked=ranked,
        preferences=_pairs(ranked),
        reward_bench=bench,
        lengths=(_lengths(others, "chosen"), _lengths(others, "rejected")),
        seed=config.seed,
        max_length=config.max_length,
        max_new_tokens=config.max_new_tokens,
        token_budget=config.token_budget,
        bf16=runtime.bf16 if config.bf16 is None else config.bf16,
    )


def _shuffled(rows: list[dict[str, Any]], seed: int, purpose: str) -> list[dict[str, Any]]:
    """The rows in an order that `seed` and `purpose` decide."""
    import numpy as np

    from pipeline.runtime import derive_seed

    return [rows[int(place)] for place in np.random.default_rng(derive_seed(seed, purpose)).permutation(len(rows))]


def _pairs(lists: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pairs of all lists, each with the place of its list; a tie has no right answer and makes none."""
    from pipeline.data.ranked import as_pairs

    return [pair | {"row": place} for place, row in enumerate(lists) for pair in as_pairs(row)]


def _lengths(rows: list[dict[str, Any]], side: str) -> list[int]:
    """Characters of each row's answer."""
    from pipeline.data.messages import words

    return [len(words(row[side][-1])) for row in rows]


def _lacks(config: EvalConfig, inputs: dict[str, Any]) -> dict[str, str]:
    """Built-in task -> the field it needs and has not; "" where there is something to measure with."""
    judged = inputs.get("judge") or config.judge_url
    return {
        "bits_per_byte": "" if inputs["tokens"] else "tokens",
        "multiple_choice": "" if any(entry.source == "pydocs" for entry in config.data or ()) else "data: pydocs",
        "reward_accuracy": ("" if inputs["reward"] else "reward") or ("" if config.preferences else "preferences"),
        "reward_bench": ("" if inputs["reward"] else "reward") or ("" if config.reward_bench else "reward_bench"),
        "preference_accuracy": ("" if inputs["baseline"] else "baseline")
        or ("" if config.preferences else "preferences"),
        "exact_match": ("" if config.match else "match") or ("" if config.data else "data"),
        "greedy": "" if config.data else "data",
        "sampled": "" if config.data else "data",
        "win_rate": ("" if inputs["baseline"] else "baseline")
        or ("" if judged or inputs["reward"] else "judge")
        or ("" if config.data else "data"),
    }


def _tasks(config: EvalConfig, inputs: dict[str, Any]) -> tuple[str, ...]:
    """The built-in tasks there is something to measure with; ConfigError for one asked for by name and there is not.

    A win rate is measured where it is asked for: it takes a second look at answers that `greedy` has priced.
    """
    from pipeline.evals.planned import TASKS

    lacks = _lacks(config, inputs)
    named = [task.task for task in config.tasks or () if not (task.is_own or task.is_lm_eval)]
    applies = [task for task in TASKS if not lacks[task] and (task != "win_rate" or config.judge or config.judge_url)]
    if config.tasks is None or ALL in named:
        asked = [task for task in TASKS if task in applies or task in named]
    else:
        asked = named
    if config.matched_by == "kl" and ("sampled" not in asked or lacks["sampled"] or not inputs["baseline"]):
        mend = "add them, or match by flops"
        raise ConfigError("matched_by: kl needs the task sampled and a baseline", where="eval", mend=mend)
    for task in named:
        if task != ALL:
            _need(lacks, task)
    return tuple(task for task in asked if not lacks[task])


def _need(lacks: dict[str, str], task: str) -> None:
    if lacks[task]:
        raise ConfigError(f"the task {task} needs `{lacks[task]}`", where="eval", mend="set it, or leave it out")


def _judge(config: EvalConfig, inputs: dict[str, Any]) -> JudgeSpec | None:
    """Who compares answers; None where the reward model does."""
    from pipeline.evals.planned import JudgeSpec

    if config.judge is None and config.judge_url is None:
        return None
    return JudgeSpec(inputs.get("judge"), config.judge_url, config.judge_model, config.constitution)


def _named(names: tuple[str, ...], artifacts: list[Artifact]) -> list[Model]:
    from pipeline.evals.planned import Model

    return [Model(name, artifact) for name, artifact in zip(names, artifacts, strict=True)]


def _one(name: str | None, artifact: Artifact | None) -> Model | None:
    return None if name is None or artifact is None else _named((name,), [artifact])[0]
