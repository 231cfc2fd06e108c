"""The table of stages, and the recipes that ship with llmpipe."""

from __future__ import annotations

import importlib
import importlib.resources
from pathlib import Path

import pipeline
from pipeline.errors import MissingInputError, RecipeError
from pipeline.reading import meant
from pipeline.recipe import Stage
from pipeline.usercode import load_file

STAGES = {
    "tokenize": "train a tokenizer, write the corpus as token shards",
    "pretrain": "train a causal language model on the shards",
    "sft": "fine-tune on conversations",
    "reward": "train a reward model on preferences",
    "ppo": "optimise the policy against the reward model",
    "dpo": "optimise the policy on preferences directly",
    "sample": "let a model answer, score the answers and make rows of them",
    "label": "say which of two answers is better: a reward, a judge or a person",
    "eval": "measure any set of models, with intervals",
}


def load_stage(type_name: str, base: Path) -> Stage:
    """The stage by its name in the table or by the path of a user's file; RecipeError for neither."""
    if type_name in STAGES:
        return Stage.of(importlib.import_module(f"stages.{type_name}"), type_name)
    if type_name.endswith(".py") and type_name.startswith(("./", "../", "/")):
        path = (base / type_name).resolve()
        if not path.exists():
            raise MissingInputError(f"no stage file {path}", mend="llmpipe eject STAGE writes one")
        return Stage.of(load_file(path), type_name)
    raise RecipeError(
        f"no stage `{type_name}`{meant(type_name, STAGES)}",
        mend="a stage of another name says what it is: {stage: dpo, …} or {stage: ./my_dpo.py, …}",
    )


def recipes_folder() -> Path:
    """Where the shipped recipes lie: inside the wheel, or the checkout's folder of an editable install."""
    inside = Path(str(importlib.resources.files(pipeline))) / "recipes"
    return inside if inside.exists() else Path(pipeline.__file__).parents[2] / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Name -> file."""
    return {path.stem: path for path in sorted(recipes_folder().glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file of a recipe by its bare name, where it ships with llmpipe, or by its path."""
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    path = Path(name)
    if not path.exists():
        raise MissingInputError(
            f"no recipe {name}{meant(name, shipped)}",
            where=str(Path.cwd()),
            mend="llmpipe recipes lists those that ship",
        )
    return path


def first_comment(path: Path) -> str:
    """What the recipe says of itself, what it needs and how long it takes: the first paragraph of its comments."""
    words = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# "):
            break
        words.append(line.lstrip("# ").strip())
    return " ".join(words)
