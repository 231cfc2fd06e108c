"""The error tree: its exit codes, what a message holds, and the drawing at the top of the file."""

import pickle
import re

import pytest

from pipeline import errors
from pipeline.errors import PipelineError


def tree() -> list[type[PipelineError]]:
    found, queue = [], [PipelineError]
    while queue:
        kind = queue.pop(0)
        if kind.__module__ == errors.__name__:
            found.append(kind)
        queue += kind.__subclasses__()
    return found


def test_the_drawing_is_the_tree():
    assert errors.__doc__ is not None
    drawn = re.findall(r"^ {4}[│├└─ ]*(\w+) ", errors.__doc__, re.MULTILINE)
    assert sorted(drawn) == sorted(kind.__name__ for kind in tree())


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("PipelineError", 1),
        ("ConfigError", 2),
        ("RecipeError", 2),
        ("MissingInputError", 2),
        ("DataError", 1),
        ("ArtifactError", 1),
        ("MismatchError", 1),
        ("CheckpointError", 1),
        ("TrainingError", 1),
        ("MachineError", 1),
        ("Stopped", 75),
        ("Interrupted", 130),
    ],
)
def test_exit_codes(name: str, code: int):
    assert getattr(errors, name)("x").exit_code == code


def test_a_message_says_what_where_and_the_mend():
    error = errors.DataError("no messages", where="rows.jsonl:17", mend="name the field")
    assert str(error) == "rows.jsonl:17: no messages\n  mend: name the field"
    assert str(errors.DataError("no messages")) == "no messages"
    assert str(errors.DataError("no messages", where="a:1")) == "a:1: no messages"


@pytest.mark.parametrize("kind", tree())
def test_an_error_survives_the_way_between_processes(kind: type[PipelineError]):
    error = pickle.loads(pickle.dumps(kind("what", where="here", mend="so")))
    assert type(error) is kind
    assert (error.what, error.where, error.mend) == ("what", "here", "so")
