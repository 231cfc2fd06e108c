"""Recipes that a test writes: read, or refused with a line."""

from pathlib import Path

import pytest

from pipeline.artifacts import Store
from pipeline.cli.stages import load_stage
from pipeline.errors import PipelineError, RecipeError
from pipeline.graph import Recipe, build
from pipeline.reading import read_recipe
from pipeline.unroll import unroll


def recipe(folder: Path, text: str, *overrides: str) -> Recipe:
    """The recipe `text`, validated."""
    path = folder / "r.yaml"
    path.write_text(text)
    return build(unroll(read_recipe(path, overrides)), load_stage, Store(folder / "artifacts"))


def refused(folder: Path, text: str, *overrides: str, kind: type[PipelineError] = RecipeError) -> PipelineError:
    """The error that the recipe `text` gives, which is of wrong usage."""
    with pytest.raises(kind) as caught:
        recipe(folder, text, *overrides)
    assert caught.value.exit_code == 2
    return caught.value


def line(error: PipelineError) -> int:
    """The line of the recipe that an error names."""
    file, _, number = error.where.rpartition(":")
    assert file.endswith("r.yaml"), error
    return int(number)
