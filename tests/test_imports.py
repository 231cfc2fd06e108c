"""The architecture, guarded: imports run one way, light things stay light, and nothing names a private place.

errors ← recipe, artifacts ← data, model, rl, evals ← stages ← cli
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "stages").glob("*.py")])

LAYERS = [
    {"errors"},
    {"recipe", "hub", "hashes"},
    {"artifacts", "adapted", "roles", "reading", "unroll", "usercode", "progress"}
    | {"trainer_config", "trainer_options", "reward_config", "evaluation_config"},
    {"data", "model", "rl", "evals", "checkpoint", "tensor_file", "runtime", "schedule", "hardware"}
    | {"trainer", "trainer_watch", "preference_trainer", "ranked_trainer"},
    {"stages"},
    {"graph", "paths", "fingerprint", "lineage", "launch", "forking", "plan", "report", "tracking", "failure"},
    {"cli"},
]
"""Each may import what stands in its own line and above; `stages` only itself (a stage never imports a stage), and
what stands below `stages` not the stages: the command line hands them over."""


def module_of(file: Path) -> str:
    base = ROOT if file.parent.name == "stages" else ROOT / "src"
    parts = file.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """`pipeline.rl.kl` -> `rl`, `stages.ppo` -> `stages`."""
    first, _, rest = module.partition(".")
    return "stages" if first == "stages" else rest.partition(".")[0]


def layer_of(part: str) -> int:
    found = [number for number, parts in enumerate(LAYERS) if part in parts]
    assert len(found) == 1, f"{part} has no layer: put it in LAYERS and in the drawing"
    return found[0]


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(tree: ast.AST, *, top: bool = False) -> Iterator[str]:
    """The modules imported, those under TYPE_CHECKING left out; `top`: at the top of the file alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield node.module
            if node.module in ("pipeline", "stages"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not is_for_types(node) and not (top and isinstance(node, ast.FunctionDef | ast.ClassDef)):
            yield from imports(node, top=top)


def own(names: Iterator[str]) -> set[str]:
    return {name for name in names if name.partition(".")[0] in ("pipeline", "stages")} - {"pipeline", "stages"}


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


CHECKED = [file for file in SOURCES if part_of(module_of(file)) not in ("", "__main__", "py")]


@pytest.mark.parametrize("file", CHECKED, ids=lambda file: module_of(file))
def test_imports_run_one_way(file: Path):
    module = module_of(file)
    part = part_of(module)
    for name in own(imports(parsed(file))):
        assert layer_of(part_of(name)) <= layer_of(part), f"{module} imports {name}"
        if part_of(name) == "stages":
            assert part == "cli", f"{module} imports {name}"


UNKNOWN = {"data": {"model", "rl", "evals"}, "model": {"rl", "evals"}, "rl": {"evals"}}


@pytest.mark.slow
def test_data_models_and_rl_know_nothing_of_evaluations_and_data_nothing_of_models():
    for file in CHECKED:
        module = module_of(file)
        unknown = {"data": {"model", "rl", "evals"}, "model": {"rl", "evals"}, "rl": {"evals"}}.get(
            part_of(module), set()
        )
        found = {part_of(name) for name in own(imports(parsed(file)))}
        assert not found & unknown, module


MATH = ["advantages", "kl", "losses", "masking", "rewards", "terms"]
LOSSES = ["losses", "preference_losses", "ranked_loss"]


@pytest.mark.parametrize("file", [*(f"rl/{name}.py" for name in MATH), *(f"model/{name}.py" for name in LOSSES)])
def test_the_math_knows_torch_and_nothing_of_configs(file: Path):
    known = {"__future__", "collections", "dataclasses", "math", "typing", "torch", "pipeline"}
    names = set(imports(parsed(ROOT / "src" / "pipeline" / file)))
    assert {name.partition(".")[0] for name in names} <= known
    assert all(part_of(name) == "rl" for name in own(iter(names)))


LIGHT = (
    *("pipeline.errors", "pipeline.recipe", "pipeline.reward_config", "pipeline.trainer_config"),
    "pipeline.evaluation_config",
    *("pipeline.rl.family", "pydantic"),
)


@pytest.mark.parametrize("file", sorted((ROOT / "stages").glob("[!_]*.py")), ids=lambda file: file.stem)
def test_a_stage_imports_at_its_top_only_what_is_light(file: Path):
    for name in imports(parsed(file), top=True):
        assert name in LIGHT or name.partition(".")[0] in sys.stdlib_module_names, name


HEAVY = ("torch", "transformers", "trl", "datasets", "numpy", "accelerate", "tokenizers", "pandas", "pyarrow")


def loaded_after(code: str) -> list[str]:
    code = f"import sys\n{code}\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.split()


@pytest.mark.slow
def test_configs_and_inputs_of_stages_need_nothing_heavy():
    code = """
from pathlib import Path
from pipeline.cli.stages import STAGES, load_stage
for name in STAGES:
    stage = load_stage(name, Path("."))
    assert stage.config.model_fields and stage.inputs is not None
"""
    assert loaded_after(code) == []


@pytest.mark.slow
def test_the_command_line_needs_nothing_heavy():
    modules = [module_of(file) for file in SOURCES if file.parent.name == "cli" and file.stem not in ("ranks", "chat")]
    assert loaded_after("\n".join(f"import {name}" for name in modules)) == []


@pytest.mark.slow
def test_nothing_imports_a_private_name_of_another_module():
    for file in SOURCES:
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("pipeline", "stages"):
                assert not [alias.name for alias in node.names if alias.name.startswith("_")], file


def test_every_test_mirrors_a_module_or_says_what_it_is_of():
    known = {module_of(file).split(".")[-1] for file in SOURCES}
    extra = {"imports", "recipes", "install", "packaging", "road", "smoke", "demo", "readme", "docs"}
    for file in (ROOT / "tests").glob("test_*.py"):
        assert file.stem.removeprefix("test_") in known | extra, file.name


PRIVATE = re.compile(r"(?<![\w.~])/(?:work|home|root|Users|mnt|data)/\w")


def test_nothing_names_a_private_place():
    files = [
        path
        for folder in ("src", "stages", "recipes", "tests", "docs", "benchmarks", ".ci")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".png", ".svg")
    ]
    files += [ROOT / name for name in ("README.md", "Makefile", "pyproject.toml", "CHANGELOG.md")]
    for file in files:
        found = PRIVATE.search(file.read_text(encoding="utf-8"))
        assert found is None, f"{file.relative_to(ROOT)}: {found and found.group()}"
