"""What a stage declares of itself and what a recipe says of it: frozen, strict, documented fields.

A stage's config subclasses `StageConfig`; its fields are made by `field`, which takes the unit and says whether
the value changes the result (hashed into the fingerprint) or only the running of it (`run_only`).
Reading a recipe file is in `reading.py`, the graph of its stages in `graph.py`. Nothing here needs torch.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict

from pipeline.errors import ConfigError

KINDS = ("tokens", "causal-lm", "reward-model", "rows", "evaluation")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Of a run, and of a stage as a user writes it."""
LONGEST_NAME = 200  # of 255 bytes that a file's name may have: `.NAME.FINGERPRINT.partial` is one too
STAGE_NAME = re.compile(rf"(?=.{{1,{LONGEST_NAME}}}\Z){NAME.pattern}(@[A-Za-z0-9._=+-]+)*")
"""Of a stage as it is kept: `repeat:` and `matrix:` add what follows an `@`."""
USER_CODE = re.compile(r"(\./|/).*\.py:[A-Za-z_]\w*")
"""A function or class in a user's file: `./rewards.py:exact`, `./gpt.py:GPT`."""

Scalar = str | int | float | bool | None


def field(
    default: Any,
    doc: str,
    *,
    unit: str = "",
    run_only: bool = False,
    preset: bool = False,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> Any:
    """A documented field of a stage's config.

    `default` of `...` makes it required. `unit` is printed beside the value. `run_only` says that the value
    changes only the running (how often to save, how often to log) and never the result. `preset` says that the value
    names a set of values for other fields, which the config fills in where they are not set.
    """
    extra: dict[str, Any] = {"unit": unit, "run_only": run_only, "preset": preset}
    return Field(default, description=doc, json_schema_extra=extra, ge=ge, gt=gt, le=le, lt=lt)


class Section(BaseModel):
    """A frozen mapping inside a recipe: unknown keys and wrong types are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class StageConfig(Section):
    """What every stage can be told."""

    seed: int = field(0, "seed of everything random in the stage; the recipe's `seed` unless set", ge=0)


RowFormat = Literal[
    "messages",
    "prompt_completion",
    "question_answer",
    "alpaca",
    "sharegpt",
    "preference",
    "sharegpt_preference",
    "ranked",
    "unpaired",
]
"""The layouts of rows that llmpipe reads; `pipeline.data.formats` says what each looks like."""


class DataEntry(Section):
    """One source of documents or rows."""

    source: str = field(..., "a path, a glob, `pydocs`, `arithmetic`, or `hub:org/name`")
    split: str | None = field(None, "split of a hub dataset, such as `train`")
    name: str | None = field(None, "configuration of a hub dataset")
    revision: str | None = field(None, "revision of a hub dataset")
    data_files: str | tuple[str, ...] | None = field(
        None, "paths or globs of the files of a hub dataset that are taken"
    )
    streaming: bool = field(False, "read a hub dataset file by file from the hub, and keep none of it on disk")
    format: Literal[RowFormat, "text"] | None = field(
        None, "layout of the rows; recognised by their keys where unset; `text`: any file as one document"
    )
    text_field: str = field("text", "field that holds the text of a document in jsonl and parquet")
    label: str | None = field(None, "tokenize: its name in mixtures and tables; short for `source` unless set")
    weight: float = field(1.0, "how often its rows are drawn, relative to the other sources", gt=0)
    limit: int | None = field(None, "take only the first rows", unit="rows", gt=0)
    max_bad_rows: int = field(
        0, "rows that can't be read or don't fit are left out, so many at most", unit="rows", ge=0
    )
    deduplicate: Literal["exact", "near"] | None = field(
        None, "rows to train on that an earlier row equals, or nearly equals, are left out; of rows, not of documents"
    )


def _as_entries(value: Any) -> Any:
    items = value if isinstance(value, list | tuple) else [value]
    return tuple({"source": item} if isinstance(item, str) else item for item in items)


Data = Annotated[
    tuple[DataEntry, ...],
    BeforeValidator(_as_entries, json_schema_input_type=str | DataEntry | tuple[str | DataEntry, ...]),
]
"""A list of sources; a lone string or mapping is a list of one."""


Ref = Annotated[str, "a reference: a stage of the recipe, run/stage, ./folder or hub:org/name"]

File = Annotated[Path, Strict(False)]
"""A file of the user's that is read as it is (`./constitution.md`): it counts by its content, not by where it lies."""


class PeftConfig(Section):
    """LoRA adapters; names and defaults are peft's `LoraConfig`'s."""

    r: int = field(16, "rank of the update", gt=0)
    lora_alpha: int = field(32, "the update is scaled by lora_alpha / r", gt=0)
    lora_dropout: float = field(0.0, "dropout on the adapter's input", ge=0, lt=1)
    target_modules: str | tuple[str, ...] = field("all-linear", "modules that get an adapter")
    use_rslora: bool = field(False, "scale by lora_alpha / sqrt(r)")
    use_dora: bool = field(False, "train the length of each row of a weight apart from its direction (DoRA)")


ConfigClass = type[StageConfig]


@dataclass(frozen=True)
class Stage:
    """A stage's module, as the table of stages hands it over."""

    type: str
    """Its name in the table (`ppo`), or the path of the user's file as the recipe wrote it."""
    file: Path
    config: ConfigClass
    inputs: Mapping[str, str]
    """Role -> kind. A field of the config by the role's name holds the reference or a list of them.

    `reward.model` is the field `model` of each section in the list `reward`: one list of artifacts, in their order.
    """
    kind: str
    result_version: int
    defaults: Mapping[str, str]
    """Field -> what the data of the nearest stage along `init` must be for (`demonstrations`)."""
    trains_on: str
    run: Callable[..., dict[str, float]]
    preview: Callable[..., list[Any]] | None = None
    """(config, inputs, how many) -> rows as `llmpipe preview` shows them; optional."""
    shards: bool = False
    """Whether it keeps its model in shards where the runtime asks for it (`--strategy fsdp`)."""

    @classmethod
    def of(cls, module: ModuleType, type_name: str) -> Stage:
        """Read the stage's contract off its module; ConfigError says what is missing."""
        members = vars(module)
        where = str(module.__file__)
        configs = [
            value
            for value in members.values()
            if inspect.isclass(value) and issubclass(value, StageConfig) and value.__module__ == module.__name__
        ]
        if len(configs) != 1:
            raise ConfigError(
                f"a stage's file defines one subclass of StageConfig, this one {len(configs)}",
                where=where,
                mend="`llmpipe eject ppo` writes a stage file to start from",
            )
        missing = [name for name in ("INPUTS", "KIND", "run") if name not in members]
        if missing or members["KIND"] not in KINDS:
            what = f"no {', '.join(missing)}" if missing else f"KIND is none of {', '.join(KINDS)}"
            raise ConfigError(f"not a whole stage: {what}", where=where, mend="see docs/stages.md")
        for role in members["INPUTS"]:
            if not _has_field(configs[0], role):
                raise ConfigError(f"INPUTS names `{role}`, and {configs[0].__name__} has no such field", where=where)
        return cls(
            type=type_name,
            file=Path(where),
            config=configs[0],
            inputs=members["INPUTS"],
            kind=members["KIND"],
            result_version=members.get("RESULT_VERSION", 1),
            defaults=members.get("DEFAULTS", {}),
            trains_on=members.get("TRAINS_ON", ""),
            run=members["run"],
            preview=members.get("preview"),
            shards=members.get("SHARDS", False),
        )


def _has_field(config: type[BaseModel], path: str) -> bool:
    """Whether there is a field by this name; of `outer.inner`, in a section that the field `outer` holds."""
    outer, _, inner = path.partition(".")
    if outer not in config.model_fields or not inner:
        return not inner and outer in config.model_fields
    return any(_has_field(section, inner) for section in models_in(config.model_fields[outer].annotation))


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field of this type can hold, alone or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    arguments = getattr(annotation, "__args__", ())
    return [found for argument in arguments for found in models_in(argument)]


def is_section_list(value: Any) -> bool:
    """Whether the value of a field is a list of sections, each a mapping in the recipe."""
    return isinstance(value, tuple) and bool(value) and all(isinstance(item, Section) for item in value)


def is_run_only(config: type[BaseModel], name: str) -> bool:
    """Whether the field changes only the running of the stage, not its result."""
    extra = config.model_fields[name].json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("run_only"))


def preset_of(config: BaseModel) -> str:
    """`field: value` of the field that names a preset; empty where the config has none."""
    for name, info in type(config).model_fields.items():
        extra = info.json_schema_extra
        if isinstance(extra, dict) and extra.get("preset"):
            return f"{name}: {getattr(config, name)}"
    return ""


def unit_of(config: type[BaseModel], name: str) -> str:
    """The field's unit, empty where it has none."""
    extra = config.model_fields[name].json_schema_extra
    return str(extra.get("unit", "")) if isinstance(extra, dict) else ""


def is_user_code(value: Any) -> bool:
    """Whether the value names a function or class in a user's file."""
    return isinstance(value, str) and USER_CODE.fullmatch(value) is not None


def is_data(config: type[BaseModel], name: str) -> bool:
    """Whether the field holds data entries."""
    return "DataEntry" in str(config.model_fields[name].annotation)
