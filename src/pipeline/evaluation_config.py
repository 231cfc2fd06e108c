"""What a recipe says of an evaluation's tasks, and what it requires of their figures. Needs nothing heavy.

A task is built in, the user's own (a folder with a YAML and a JSONL, or a file), or one of lm-eval's. What a folder's
YAML says is read into the same section that the recipe could have written.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, model_validator

from pipeline.errors import MissingInputError, RecipeError
from pipeline.hashes import digest, sha256
from pipeline.reading import meant, read_yaml, validate
from pipeline.recipe import File, Section, field

BUILT_IN = (
    *("bits_per_byte", "multiple_choice", "reward_accuracy", "reward_bench", "preference_accuracy"),
    *("exact_match", "greedy", "sampled", "win_rate"),
)
ALL = "all"
LM_EVAL = "lm_eval:"
YAML = (".yaml", ".yml")
FILES = (*YAML, ".jsonl", ".ndjson", ".json", ".parquet", ".txt", ".text", ".md", ".rst", ".gz", ".zst")
ROWS = tuple(kind for kind in FILES if kind not in (*YAML, ".md", ".rst"))
"""What a task's folder may hold one of, so that `data` can be left out; a README is none."""
OF_LM_EVAL = ("task", "data", "content", "num_fewshot", "limit", "apply_chat_template")
"""Fields that a task of lm-eval takes."""


class Task(Section):
    """One task of an evaluation. A lone name or path stands for a mapping that holds only `task`."""

    task: str = field("", "a built-in task, `all` of them that apply, ./folder or ./file of your own, or lm_eval:NAME")
    kind: Literal["multiple_choice", "generate", "perplexity", "win_rate"] | None = field(
        None, "what is done with the rows; by their fields unless set"
    )
    data: File | None = field(None, "the rows: jsonl, json or parquet; of perplexity any text too")
    num_fewshot: int = field(0, "examples before each question", unit="rows", ge=0)
    fewshot_data: File | None = field(
        None, "rows the examples are taken from, the first ones; of `data`, which then does not ask them, unless set"
    )
    description: str = field("", "text before the examples; `{subject}` stands for the row's")
    limit: int | None = field(None, "take only the first rows", unit="rows", gt=0)
    apply_chat_template: bool | None = field(None, "ask in the chat template; chat models are unless set")
    letters: bool | None = field(
        None, "multiple choice: the choices are listed and a letter is the answer; by the layout unless set"
    )
    match: Literal["exact", "number"] | None = field(
        None, "generate: right by the text, or by the last number; number for GSM8K's rows unless set"
    )
    chain_of_thought: bool = field(True, "generate: the examples show the whole answer, not only what is behind ####")
    samples: int = field(1, "generate: answers to a question; of several the most frequent one counts too", gt=0)
    temperature: float = field(0.7, "generate: where there are several samples; a lone one is greedy", gt=0)
    max_new_tokens: int | None = field(None, "generate, win_rate: longest answer; eval's unless set", gt=0)
    until: tuple[str, ...] | None = field(None, "generate: an answer ends before these")
    content: str = field("", "set by llmpipe: the hash of the files beside a YAML of lm-eval's")

    @property
    def name(self) -> str:
        """What results call it."""
        if self.task.startswith(LM_EVAL):
            inner = self.task.removeprefix(LM_EVAL)
            return LM_EVAL + (_stem(inner) if is_path(inner) else inner)
        return _stem(self.task) if is_path(self.task) or not self.task else self.task

    @property
    def is_lm_eval(self) -> bool:
        """Whether lm-eval measures it."""
        return self.task.startswith(LM_EVAL)

    @property
    def is_own(self) -> bool:
        """Whether it is on files of the user's."""
        return not self.is_lm_eval and self.task not in (*BUILT_IN, ALL)

    @model_validator(mode="after")
    def _is_one_thing(self) -> Task:
        given = [name for name in type(self).model_fields if name in self.model_fields_set and name != "task"]
        if not self.task and self.data is None:
            raise ValueError("a task needs `task`: a name, ./folder or ./file; or `data`")
        if not self.task:
            object.__setattr__(self, "task", _stem(str(self.data)))
        if self.task in (*BUILT_IN, ALL) and given:
            raise ValueError(f"`{self.task}` is built in and takes no `{given[0]}`; it is told by eval's own fields")
        if self.is_lm_eval:
            wrong = [name for name in given if name not in OF_LM_EVAL]
            if wrong:
                raise ValueError(f"a task of lm-eval takes no `{wrong[0]}`, but {', '.join(OF_LM_EVAL[3:])}")
        elif self.is_own and not is_path(self.task) and self.data is None:
            known = meant(self.task, (*BUILT_IN, ALL))
            raise ValueError(f"no task `{self.task}`{known} (./{self.task} for a folder of your own)")
        return self


def is_path(text: str) -> bool:
    """Whether a task's name is the path of a folder or file."""
    return text.startswith(("./", "../", "/", "~")) or text.endswith(FILES)


def _stem(path: str) -> str:
    name = Path(path).name
    while name.endswith(FILES):
        name = name.rpartition(".")[0]
    return name


def _as_tasks(value: Any) -> Any:
    items = value if isinstance(value, list | tuple) else [value]
    return tuple({"task": item} if isinstance(item, str) else item for item in items)


def _distinct(tasks: tuple[Task, ...]) -> tuple[Task, ...]:
    names = [task.name for task in tasks]
    twice = [name for name in names if names.count(name) > 1 or (name in BUILT_IN and _is_shadow(tasks, name))]
    if twice:
        raise ValueError(f"two tasks are called `{twice[0]}`; give one a name: {{task: NAME, data: ./FILE}}")
    return tasks


def _is_shadow(tasks: tuple[Task, ...], name: str) -> bool:
    return any(task.name == name and task.task != name for task in tasks)


Tasks = Annotated[
    tuple[Task, ...],
    BeforeValidator(_as_tasks, json_schema_input_type=str | Task | tuple[str | Task, ...]),
    AfterValidator(_distinct),
]
"""A list of tasks; a lone string or mapping is a list of one."""


def with_files(task: Task, base: Path, where: str) -> Task:
    """The task with what its folder's YAML says (what the recipe sets stands) and absolute paths from `base`.

    Raises MissingInputError where nothing is there, RecipeError for a YAML that says what can't be.
    """
    if task.is_lm_eval:
        return _lm_eval_files(task, base, where)
    if not task.is_own:
        return task
    own = {name: getattr(task, name) for name in task.model_fields_set if name != "task"}
    own |= {name: _file(base, own[name], name, where) for name in ("data", "fewshot_data") if own.get(name)}
    path = (base / Path(task.task).expanduser()).resolve()
    if not is_path(task.task):
        return task.model_copy(update=own)
    if not path.exists():
        raise MissingInputError(f"no file or folder {path}", where=where)
    if path.is_dir() or path.suffix in YAML:
        return _of_folder(task.name, path, own)
    return task.model_copy(update={"task": task.name, "data": path} | own)


def check_names(tasks: Sequence[Task], where: str) -> None:
    """RecipeError where the YAMLs of two tasks give them one name; what the recipe says was looked at before."""
    names = [task.name for task in tasks]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise RecipeError(
            f"two tasks are called `{twice[0]}`", where=where, mend="another `task:` in one of their YAMLs"
        )


def _of_folder(name: str, path: Path, own: dict[str, Any]) -> Task:
    """The task that a folder's YAML, or a lone YAML, describes; `own`: what the recipe says over it."""
    folder = path if path.is_dir() else path.parent
    found = sorted(each for each in folder.iterdir() if each.suffix in YAML) if path.is_dir() else [path]
    found = [each for each in found if each.stem == "task"] or found
    if len(found) != 1:
        mend = "task.yaml is the one that counts"
        raise MissingInputError(f"a task's folder holds one YAML, this one {len(found)}", where=str(folder), mend=mend)
    document = read_yaml(found[0])
    values = {"task": name, **document.values}
    if values.get("data") is None:
        shown = Path(str(values.get("fewshot_data") or "")).name
        rows = [each.name for each in sorted(folder.iterdir()) if each.name.endswith(ROWS) and each.name != shown]
        rows = [each for each in rows if not each.startswith(".")]
        if len(rows) != 1:
            what = f"no `data`, and the folder holds {len(rows)} files that could be it"
            raise MissingInputError(what, where=document.name, mend="data: questions.jsonl")
        values["data"] = rows[0]
    task = validate(Task, values, document, ())
    if not task.is_own or is_path(task.task):
        raise RecipeError(f"`{task.task}` is no name for a task of your own", where=document.place("task"))
    paths = {
        field: _file(folder, getattr(task, field), field, document.place(field))
        for field in ("data", "fewshot_data")
        if getattr(task, field)
    }
    return task.model_copy(update=paths | own)


def _lm_eval_files(task: Task, base: Path, where: str) -> Task:
    inner = task.task.removeprefix(LM_EVAL)
    if task.data is not None:
        return task.model_copy(update={"data": _file(base, task.data, "data", where)})
    if not is_path(inner):
        return task
    file = _file(base, Path(inner), "task", where)
    named = re.search(r"^task:\s*['\"]?([\w.-]+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    if named is None:
        raise RecipeError("no `task:` with a name in this YAML of lm-eval's", where=str(file))
    beside = sorted(each for each in file.parent.iterdir() if each.is_file() and not each.name.startswith("."))
    content = digest([[each.name, sha256(each)] for each in beside])
    return task.model_copy(update={"task": LM_EVAL + named[1], "data": file, "content": content})


def _file(base: Path, file: Path, name: str, where: str) -> Path:
    path = (base / file.expanduser()).resolve()
    if not path.is_file():
        raise MissingInputError(f"`{name}`: no file {path}", where=where)
    return path


SIGNS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
BOUND = re.compile(r"\s*(>=|<=|>|<)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")


@dataclass(frozen=True)
class Bound:
    """`>= 0.5`: what a figure must be."""

    sign: str
    number: float

    def holds(self, value: float) -> bool:
        """Whether `value` is what it must be; NaN never is."""
        return SIGNS[self.sign](value, self.number)

    def __str__(self) -> str:
        return f"{self.sign} {self.number:g}"


def read_bound(text: str) -> Bound:
    """`>= 0.5` as a bound; ValueError for what is none."""
    found = BOUND.fullmatch(text)
    if found is None:
        raise ValueError(f'{text!r} is no bound: write ">= 0.5", with one of {", ".join(SIGNS)}')
    return Bound(found[1], float(found[2]))


def _bounds(require: dict[str, str]) -> dict[str, str]:
    for text in require.values():
        read_bound(text)
    return require


Require = Annotated[dict[str, str], AfterValidator(_bounds)]
"""Figure (`MODEL.TASK.METRIC`, or `MODEL.TASK` for the task's first one) -> what it must be."""

FIRST = {
    "bits_per_byte": "bits_per_byte",
    "multiple_choice": "pmi",
    "reward_accuracy": "accuracy",
    "reward_bench": "score",
    "preference_accuracy": "accuracy",
    "exact_match": "accuracy",
    "greedy": "gold",
    "sampled": "reward",
    "win_rate": "win_rate",
    "choices": "acc",
    "generate": "accuracy",
    "perplexity": "bits_per_byte",
}
"""Task, or kind of a task of one's own (`choices`: multiple choice) -> the figure that stands for it."""

_WRITTEN = ("reward", "length", "ended", "gold", "reward_sd", "gold_win_rate", "gold_difference")
METRICS: dict[str, tuple[str, ...]] = {
    "bits_per_byte": ("bits_per_byte",),
    "multiple_choice": ("acc", "acc_norm", "pmi", "pmi_swapped", "pmi_difference"),
    "choices": ("acc", "acc_norm", "pmi", "acc_centred", "acc_difference", "acc_norm_difference", "pmi_difference"),
    "reward_bench": ("accuracy", "section", "score"),
    "preference_accuracy": ("accuracy", "length_only"),
    "exact_match": ("accuracy", "length", "ended", "difference"),
    "greedy": _WRITTEN,
    "sampled": (*_WRITTEN, "kl"),
    "win_rate": ("win_rate", "swayed", "unread"),
    "generate": ("accuracy", "majority", "length", "ended", "difference", "majority_difference"),
    "perplexity": ("bits_per_byte", "byte_perplexity", "word_perplexity"),
}  # fmt: skip
"""Likewise -> its figures, of those whose figures are known beforehand."""


def figure_named(name: str, models: Sequence[str], tasks: Sequence[str]) -> tuple[str, str, str]:
    """(model, task, metric or "") that `MODEL.TASK[.METRIC]` names; ValueError where the model or task is unknown."""
    model = max((each for each in models if name.startswith(f"{each}.")), key=len, default="")
    if not model:
        first = name.partition(".")[0]
        raise ValueError(f"`{name}`: no model `{first}` is measured{meant(first, models)}")
    rest = name.removeprefix(f"{model}.")
    task = max((each for each in tasks if rest == each or rest.startswith(f"{each}.")), key=len, default="")
    if not task:
        first = rest.partition(".")[0]
        raise ValueError(f"`{name}`: no task `{first}` is measured{meant(first, tasks)}")
    return model, task, rest.removeprefix(task).removeprefix(".")
