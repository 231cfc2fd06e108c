"""Tasks of EleutherAI's lm-eval, measured by its own harness (extra `eval`) on the loaded model.

Every figure that is the mean of the harness's own items gets an interval from them by the bootstrap, as all others;
another one gets the harness's standard error twice, or none where that has none.
"""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from pipeline.errors import ConfigError, MachineError
from pipeline.evals import statistics
from pipeline.evals.statistics import Estimate, PerItem
from pipeline.evals.subject import Subject
from pipeline.evaluation_config import LM_EVAL, Task

Item = dict[str, Any]
WHOLE = "whole"
"""The item that holds what the harness says of all samples."""


def need_harness(task: Task) -> None:
    """MachineError where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        what = f"the task {task.name} needs lm-eval, which is not installed"
        raise MachineError(what, where="eval.tasks", mend="pip install 'llmpipe[eval]'")


def with_start(tokenizer: PreTrainedTokenizerFast, start: int) -> PreTrainedTokenizerFast:
    """The tokenizer, or a copy, that begins every text with the token `start`: what the harness asks tokenizers for,
    and what documents begin with here."""
    if tokenizer.encode("a")[:1] == [start]:
        return tokenizer
    own = copy.deepcopy(tokenizer)
    token = own.convert_ids_to_tokens(start)
    begins = TemplateProcessing(single=f"{token}:0 $A:0", pair=f"{token}:0 $A:0 $B:0", special_tokens=[(token, start)])
    own.backend_tokenizer.post_processor = begins
    return own


def score(subject: Subject, task: Task, seed: int) -> list[Item]:
    """An item a sample with its figures, and one with the harness's own."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    name = task.task.removeprefix(LM_EVAL)
    folder = str(Path(task.data).parent) if task.data is not None else None
    manager = TaskManager(include_path=folder)
    if name not in {*manager.all_tasks}:
        raise ConfigError(f"lm-eval has no task `{name}`", where="eval.tasks", mend="lm-eval ls tasks lists them")
    model = HFLM(
        pretrained=subject.model,
        tokenizer=with_start(subject.tokenizer, subject.start_token),
        backend="causal",
        batch_size=max(1, subject.token_budget // subject.max_length),
        max_length=subject.max_length,
        add_bos_token=True,
    )
    in_template = subject.is_chat if task.apply_chat_template is None else task.apply_chat_template
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=[name],
        task_manager=manager,
        num_fewshot=task.num_fewshot if "num_fewshot" in task.model_fields_set else None,
        limit=task.limit,
        apply_chat_template=in_template,
        fewshot_as_multiturn=in_template,
        bootstrap_iters=0,
        log_samples=True,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
        verbosity="ERROR",
    )
    subject.tick()
    assert found is not None, "the harness returns its results in rank 0, which this is"
    return _items(found["results"], found["samples"])


def _items(results: Mapping[str, Mapping[str, Any]], samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Item]:
    """The harness's results as items; of a group's tasks the figures are `acc/TASK`."""
    found: list[Item] = []
    for name, rows in samples.items():
        for row in rows:
            own = {key: float(row[key]) for key in row.get("metrics", ()) if _is_number(row.get(key))}
            found.append({"item": len(found), "task_of": name, "doc": row.get("doc_id"), "figures": own})
    whole: dict[str, Any] = {}
    several = len(results) > 1
    for place, (name, figures) in enumerate(results.items()):
        for key, value in figures.items():
            metric, _, chosen = key.partition(",")
            if _is_number(value) and not metric.endswith("_stderr") and metric != "sample_len":
                error = figures.get(f"{metric}_stderr,{chosen}")
                filtered = metric if chosen in ("", "none") else f"{metric}:{chosen}"
                label = filtered if not several or place == 0 else f"{filtered}/{name}"
                whole[label] = {"task_of": name, "metric": metric, "value": float(value)}
                whole[label]["error"] = float(error) if error is not None and _is_number(error) else None
    return [*found, {"item": len(found), WHOLE: whole}]


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float) and math.isfinite(value)


def figures(items: Sequence[Item], seed: int) -> dict[str, Estimate]:
    """The harness's figures under its own names."""
    found: dict[str, Estimate] = {}
    for label, each in items[-1][WHOLE].items():
        own = _samples_of(items, each)
        if own and math.isclose(sum(own) / len(own), each["value"], rel_tol=1e-9, abs_tol=1e-12):
            found[label] = statistics.mean(own, seed)
        else:
            half = math.nan if each["error"] is None else 1.96 * each["error"]
            found[label] = Estimate(each["value"], each["value"] - half, each["value"] + half, len(own))
    return found


def _samples_of(items: Sequence[Item], figure: Mapping[str, Any]) -> list[float]:
    return [
        item["figures"][figure["metric"]]
        for item in items[:-1]
        if item["task_of"] == figure["task_of"] and figure["metric"] in item["figures"]
    ]


def per_item(items: Sequence[Item]) -> PerItem:
    """Each sample's figures, of those that are a mean of the samples."""
    found: dict[str, dict[int, tuple[float, float]]] = {}
    for label, each in items[-1][WHOLE].items():
        own = {
            item["item"]: (item["figures"][each["metric"]], 1.0)
            for item in items[:-1]
            if item["task_of"] == each["task_of"] and each["metric"] in item["figures"]
        }
        values = [value for value, _ in own.values()]
        if values and math.isclose(sum(values) / len(values), each["value"], rel_tol=1e-9, abs_tol=1e-12):
            found[label] = own
    return found
