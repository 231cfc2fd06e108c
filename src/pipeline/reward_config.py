"""What a recipe says of a reward: one model or function, or a weighted sum of terms. Needs nothing heavy.

What the terms compute is in `pipeline/rl/`: scoring.py puts them together, verifiable.py, terms.py and judge.py hold
what each of them is.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import regex
from pydantic import AfterValidator, BeforeValidator, Discriminator, Strict, Tag, model_validator

from pipeline.reading import meant
from pipeline.recipe import File, Ref, Section, field, is_user_code

FUNCTIONS = ("exact", "number", "regex", "json_schema", "rouge_l")
KINDS = ("model", "models", "function", "length", "repetition", "judge", "judge_url")
OPTIONS = {
    "combine": ("models",),
    "std_weight": ("models",),
    "ignore_case": ("exact", "regex"),
    "pattern": ("regex",),
    "schema_file": ("json_schema",),
    "constitution": ("judge", "judge_url"),
    "judge_model": ("judge_url",),
}
"""Option -> the kinds, or the functions, that it is of."""
REQUIRED = ("pattern", "schema_file", "constitution", "judge_model")
FIGURE = re.compile(r"[a-z][a-z0-9_]{0,31}")


class RewardTerm(Section):
    """One term of a weighted sum of rewards. One of the first seven fields says what it is."""

    model: Ref | None = field(None, "a reward model")
    models: Annotated[tuple[Ref, ...], Strict(False)] | None = field(
        None, "an ensemble, made one by `combine`: a stage that trained several, or several stages"
    )
    function: str | None = field(None, "exact, number, regex, json_schema or rouge_l; or your own: ./rewards.py:name")
    length: int | None = field(None, "minus the tokens of a response over this", unit="tokens", gt=0)
    repetition: int | None = field(None, "minus the share of n-grams of this length that are repeats", gt=0)
    judge: Ref | None = field(None, "a language model that grades by `constitution`")
    judge_url: str | None = field(None, "likewise, behind an OpenAI-compatible address: http://127.0.0.1:8000/v1")

    weight: float = field(1.0, "what it is multiplied by in the sum; below 0 it is a penalty")
    name: str | None = field(None, "its figure is reward_<name>; by its kind or function unless set", run_only=True)

    combine: Literal["mean_minus_std", "min"] = field("mean_minus_std", "models: how their scores become one")
    std_weight: float = field(1.0, "models: standard deviations that mean_minus_std takes off", ge=0)
    ignore_case: bool = field(False, "exact, regex: A and a are alike")
    pattern: str | None = field(None, "regex: what is searched for in the response")
    schema_file: File | None = field(None, "json_schema: a file with the JSON Schema")
    constitution: File | None = field(None, "judge, judge_url: a text file with the rules to grade by")
    judge_model: str | None = field(None, "judge_url: the model's name there")

    @property
    def kind(self) -> str:
        """Which of KINDS it is."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    @property
    def figure(self) -> str:
        """What its mean is logged as, after `reward_`."""
        if self.name is not None:
            return self.name
        if self.function is not None:
            return re.sub(r"\W", "_", self.function.rpartition(":")[2]).lower()
        return {"models": "ensemble", "judge_url": "judge"}.get(self.kind, self.kind)

    @model_validator(mode="after")
    def _is_one_thing(self) -> RewardTerm:
        kinds = [name for name in KINDS if getattr(self, name) is not None]
        if len(kinds) != 1:
            what = f"a term is one thing, this one is {' and '.join(kinds)}" if kinds else "a term needs one"
            raise ValueError(f"{what}: of {', '.join(KINDS)}")
        if self.weight == 0:
            raise ValueError("a weight of zero leaves a term out: take it away")
        if not math.isfinite(self.weight):
            raise ValueError(f"a weight of {self.weight}")
        if self.name is not None and not FIGURE.fullmatch(self.name):
            raise ValueError(f"name {self.name!r}: small letters, digits and '_', at most 32, a letter first")
        _check_target(self)
        _check_options(self)
        return self


def _check_target(term: RewardTerm) -> None:
    """ValueError where what the term's kind names can't be one."""
    if term.function is not None and term.function not in FUNCTIONS and not is_user_code(term.function):
        raise ValueError(
            "code of yours is named as ./rewards.py:name"
            if "/" in term.function or ".py" in term.function
            else f"unknown function `{term.function}`{meant(term.function, FUNCTIONS)}"
        )
    if term.model is not None and is_user_code(term.model):
        raise ValueError(f"code of yours is a function: {{function: {term.model}}}")
    if term.models is not None and (not term.models or len(set(term.models)) < len(term.models)):
        raise ValueError("an ensemble is one stage that trained several models, or several names, each named once")
    if term.judge is not None and term.judge.startswith(("http://", "https://")):
        raise ValueError(f"an address is a judge_url: {{judge_url: {term.judge}}}")
    if term.judge_url is not None:
        check_url(term.judge_url)
    if term.pattern is not None:
        try:
            regex.compile(term.pattern)
        except regex.error as error:
            raise ValueError(f"pattern {term.pattern!r} is no regular expression: {error}") from error


def check_url(url: str) -> None:
    """ValueError for what is no plain http address. What is in it goes into manifests, so no key may be."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"judge_url {url!r} is not an address such as http://127.0.0.1:8000/v1")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError("judge_url ends with its path: a key goes into the environment, as OPENAI_API_KEY")


def _check_options(term: RewardTerm) -> None:
    """ValueError for an option that is another kind's, or one that the kind requires and that is not there."""
    own = {term.kind, term.function or ""}
    for name, kinds in OPTIONS.items():
        if own & set(kinds):
            if name in REQUIRED and getattr(term, name) is None:
                raise ValueError(f"{' and '.join(sorted(own & set(kinds)))} needs `{name}`")
        elif name in term.model_fields_set:
            raise ValueError(f"`{name}` is an option of {' and '.join(kinds)}, and this is {term.figure}")


def _as_terms(value: Any) -> Any:
    items = value if isinstance(value, list | tuple) else [value]
    if any(isinstance(item, str) for item in items):
        raise ValueError("a list is a weighted sum of terms: {model: a}, {model: b}; an ensemble is {models: [a, b]}")
    return tuple(items)


def _check_terms(terms: tuple[RewardTerm, ...]) -> tuple[RewardTerm, ...]:
    if not terms:
        raise ValueError("no terms, so no reward")
    names = [term.figure for term in terms]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"two terms are called `{twice[0]}` in the figures: give each a `name` of its own")
    return terms


Terms = Annotated[
    tuple[RewardTerm, ...],
    BeforeValidator(_as_terms, json_schema_input_type=RewardTerm | tuple[RewardTerm, ...]),
    AfterValidator(_check_terms),
]

Reward = Annotated[
    Annotated[Ref, Tag("str")] | Annotated[Terms, Tag("[terms]")],
    Discriminator(lambda value: "str" if isinstance(value, str) else "[terms]"),
]
"""A reference to a reward model or a function (`./rewards.py:exact`); or terms, whose weighted sum it is."""
