"""Rewards that can be checked: functions of strings that give 1.0 where a response is right and 0.0 where it is not,
or how near it is (`rouge_l`).

Strict on purpose: what a policy is paid for, it does, so each says exactly what counts. A response that cannot be read
is wrong, never an error; errors are for what the user wrote (a reference without a number, a bad schema).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import regex

from pipeline.data.pydocs import gold
from pipeline.errors import ConfigError, MachineError, TrainingError

Verifier = Callable[[str, str], float]
"""(response, reference) -> a number from 0.0 to 1.0."""

NUMBER = regex.compile(
    r"""
    (?<![A-Za-z0-9_.])                              # not the rest of a word or of another number
    (?P<sign>(?<![0-9)\]][ ]?)[-+\u2212])?          # a sign; after a number it is a minus or a dash
    [$\u20ac\u00a3]?
    (?P<whole>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)?
    (?P<decimals>\.[0-9]+)?
    (?<=[0-9])
    (?:[eE](?P<exponent>[-+]?[0-9]+))?
    (?:/(?P<below>[0-9]+(?:\.[0-9]+)?))?
    """,
    regex.VERBOSE,
)
MARK = "####"  # GSM8K writes its answer behind this
LONGEST = 100  # digits of a number; one with more is no answer
PATIENCE = 5.0  # seconds that a pattern may take on one response


def exact(response: str, reference: str, *, ignore_case: bool = False) -> float:
    """Whether both are the same text, white space around and runs of it inside aside."""
    left, right = " ".join(response.split()), " ".join(reference.split())
    return float(left.casefold() == right.casefold() if ignore_case else left == right)


def rouge_l(response: str, reference: str) -> float:
    """ROUGE-L F1 of the words of both (Lin 2004), 0.0 to 1.0: twice their longest common subsequence over all words."""
    return gold(response, reference, True)


def number(response: str, reference: str) -> float:
    """Whether the response's number equals the reference's; see `answer_number`. Exact, no tolerance."""
    found = answer_number(response)
    return float(found is not None and found == answer_number(reference))


def answer_number(text: str) -> Fraction | None:
    """The last number in `text`, or the first one after its last `####` (GSM8K's mark); None where there is none.

    Read are 42, -3, +3, 1,234,567, 0.5, .5, 1e-3, 3/4 and $5; the unit behind it, `%` too, is no part of it (50% is
    50). Digits that are joined to a word (x2, H2O) and a number of more than 100 digits are none. Values are exact:
    0.5, .50 and 1/2 are one number.
    """
    _, mark, after = text.rpartition(MARK)
    found = list(NUMBER.finditer(after))
    return _value(found[0] if mark else found[-1]) if found else None


def _value(found: regex.Match[str]) -> Fraction | None:
    whole, decimals = (found["whole"] or "0").replace(",", ""), found["decimals"] or ""
    exponent, below = found["exponent"] or "0", found["below"] or "1"
    if max(len(whole), len(decimals), len(below)) > LONGEST or len(exponent.lstrip("+-")) > 3:
        return None
    value = Fraction(f"{whole}{decimals}e{exponent}")
    divisor = Fraction(below)
    if divisor == 0:
        return None
    return (-1 if found["sign"] in ("-", "\u2212") else 1) * value / divisor


def pattern(expression: str, *, ignore_case: bool = False) -> Verifier:
    """The verifier of a regular expression: 1.0 where it is found in the response; `\\A` and `\\Z` bind it to the ends.

    Where it has a group named `answer`, what the group caught, the last time it is found, must also be `exact`ly the
    reference. Raises TrainingError where it takes more than five seconds on one response.
    """
    compiled = regex.compile(expression, regex.IGNORECASE if ignore_case else 0)

    def verify(response: str, reference: str) -> float:
        try:
            matches = list(compiled.finditer(response, timeout=PATIENCE))
        except TimeoutError as error:
            raise TrainingError(
                f"the pattern {expression!r} takes more than {PATIENCE:.0f} s on {response[:80]!r}",
                mend="write it without a repetition inside a repetition, such as (a+)+",
            ) from error
        if not matches or "answer" not in compiled.groupindex:
            return float(bool(matches))
        return exact(matches[-1]["answer"] or "", reference, ignore_case=ignore_case)

    return verify


def json_schema(file: Path) -> Verifier:
    """The verifier of the JSON Schema in `file`: 1.0 where the whole response is JSON and valid by it.

    White space around is allowed, a fence of backticks is not. NaN, Infinity and a key that comes twice are no JSON.
    The draft is what `$schema` says, 2020-12 without it; a `$ref` to another document is not fetched. Raises
    ConfigError for a file that is no schema, MachineError where the package jsonschema is not installed.
    """
    try:
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import Draft202012Validator, validator_for
        from referencing import Registry
        from referencing.exceptions import Unresolvable
    except ImportError as error:
        what = "a json_schema reward needs the package jsonschema"
        raise MachineError(what, where="ppo.reward", mend="pip install jsonschema") from error
    try:
        schema = strict_json(file.read_text(encoding="utf-8"))
        kind = validator_for(schema, default=Draft202012Validator)
        kind.check_schema(schema)
    except (ValueError, AttributeError, TypeError, SchemaError) as error:
        why = str(error).splitlines()[0]
        raise ConfigError(f"no JSON Schema: {why}", where=str(file)) from error
    validator = kind(schema, registry=Registry())

    def verify(response: str, reference: str) -> float:
        try:
            return float(validator.is_valid(strict_json(response)))
        except Unresolvable as error:
            raise ConfigError(f"a $ref to what the file does not hold: {error}", where=str(file)) from error
        except (ValueError, RecursionError):
            return 0.0

    return verify


def strict_json(text: str) -> Any:
    """JSON as its standard has it; ValueError for NaN, Infinity and keys that come twice too."""

    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is no JSON")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key comes twice")
        return dict(pairs)

    return json.loads(text, parse_constant=refuse, object_pairs_hook=once)
