"""What of a recipe stands, what is stale and why: on artifacts that a toy stage's manifest says were made."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifacts import Store, write_begun
from pipeline.cli.stages import load_stage
from pipeline.errors import ConfigError
from pipeline.graph import build
from pipeline.lineage import Standing, brief, survey
from pipeline.reading import read_recipe
from pipeline.unroll import unroll

STAGE = """
from pipeline.recipe import Data, Ref, StageConfig, field
class C(StageConfig):
    data: Data | None = field(None, "x")
    init: Ref | None = field(None, "x")
    size: int = field(1, "x")
INPUTS = {"init": "rows"}
KIND = "rows"
def run(config, inputs, out, runtime): return {}
"""
RECIPE = """\
run: toy
stages:
  first: {stage: ./make.py, data: rows.txt}
  second: {stage: ./make.py, init: first}
  third: {stage: ./make.py, init: second}
  aside: {stage: ./make.py}
"""
NAMES = ["first", "second", "third", "aside"]


class Toy:
    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, Store(folder / "artifacts")
        (folder / "make.py").write_text(STAGE)
        (folder / "rows.txt").write_text("a\n")
        (folder / "r.yaml").write_text(RECIPE)

    def survey(self, *overrides: str, keep: Collection[str] = (), **options: Any) -> dict[str, Standing]:
        document = unroll(read_recipe(self.folder / "r.yaml", overrides))
        return survey(build(document, load_stage, self.store), self.store, keep, **options)

    def states(self, *overrides: str) -> list[str]:
        return [standing.state for standing in self.survey(*overrides).values()]

    def make(self, *overrides: str, only: Collection[str] = NAMES) -> None:
        for name in NAMES:
            standing = self.survey(*overrides)[name]
            if name in only and standing.state != "stands":
                partial = self.store.partial("toy", name, standing.planned)
                (partial / "rows").write_text(name)
                manifest = {
                    "stage": standing.node.stage.type,
                    "kind": "rows",
                    "fingerprint": standing.planned,
                    "parts": standing.parts,
                }
                self.store.publish(partial, "toy", name, manifest)


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy(tmp_path)


def test_what_has_not_run_is_missing_and_what_has_stands(toy: Toy):
    assert toy.states() == ["missing"] * 4
    toy.make(only=["first", "aside"])
    assert toy.states() == ["stands", "missing", "missing", "stands"]
    toy.make()
    assert toy.states() == ["stands"] * 4


def test_what_follows_a_change_is_stale_and_says_why(toy: Toy):
    toy.make()
    found = toy.survey("second.size=2")
    assert [standing.state for standing in found.values()] == ["stands", "stale", "stale", "stands"]
    assert found["second"].reasons == ("second.size 1 → 2",)
    assert found["third"].reasons == ("input: init (second)",)


def test_an_artifact_whose_parent_was_deleted_stands(toy: Toy):
    toy.make()
    (toy.store.root / "toy" / "first").rename(toy.folder / "away")
    assert toy.states() == ["missing", "stands", "stands", "stands"]


def test_data_counts_by_bytes_and_not_by_place(toy: Toy):
    toy.make()
    (toy.folder / "rows.txt").rename(toy.folder / "moved.txt")
    (toy.folder / "r.yaml").write_text(RECIPE.replace("rows.txt", "moved.txt"))
    assert toy.states() == ["stands"] * 4
    (toy.folder / "moved.txt").write_text("b\n")
    found = toy.survey()
    assert found["first"].reasons == (f"data: data ({toy.folder}/moved.txt)",)
    assert [standing.state for standing in found.values()] == ["stale", "stale", "stale", "stands"]


def test_how_data_is_taken_counts(toy: Toy):
    toy.make()
    for option in ("limit: 1", "weight: 2.0", "text_field: body"):
        (toy.folder / "r.yaml").write_text(RECIPE.replace("rows.txt", f"{{source: rows.txt, {option}}}"))
        assert toy.states()[0] == "stale"
    (toy.folder / "r.yaml").write_text(RECIPE.replace("rows.txt", "{source: rows.txt, weight: 1.0}"))
    assert toy.states()[0] == "stands"


def test_another_stage_under_the_name_is_told_as_that(toy: Toy):
    toy.make()
    (toy.folder / "other.py").write_text(STAGE.replace("size", "length"))
    (toy.folder / "r.yaml").write_text(RECIPE.replace("aside: {stage: ./make.py}", "aside: {stage: ./other.py}"))
    assert toy.survey()["aside"].reasons == ("aside.stage ./make.py → ./other.py",)


def test_keep_blesses_on_the_record(toy: Toy):
    toy.make()
    before = toy.survey()["second"].fingerprint
    kept = toy.survey("second.size=2", keep=["second"])
    assert [standing.state for standing in kept.values()] == ["stands"] * 4
    assert toy.states("second.size=2") == ["stands"] * 4  # from now on
    assert toy.states("second.size=3")[1:3] == ["stale", "stale"]
    assert toy.states() == ["stands"] * 4
    (record,) = toy.store.artifact("toy", "second").manifest["blessed"]
    assert record["why"] == "second.size 1 → 2"
    standing = toy.survey("second.size=2")["second"]
    assert (standing.fingerprint, standing.planned) == (before, record["fingerprint"])
    assert before != record["fingerprint"]


def test_keep_without_blessing_writes_nothing(toy: Toy):
    toy.make()
    assert toy.survey("second.size=2", keep=["second"], bless=False)["second"].state == "stands"
    assert toy.survey("second.size=2")["second"].state == "stale"


def test_what_was_kept_and_is_made_again_has_the_new_fingerprint(toy: Toy):
    toy.make()
    toy.survey("second.size=2", keep=["second"])
    standing = toy.survey("second.size=2")["second"]
    partial = toy.store.partial("toy", "second", standing.planned)  # as `--force` does
    manifest = {"stage": "./make.py", "kind": "rows", "fingerprint": standing.planned, "parts": standing.parts}
    toy.store.publish(partial, "toy", "second", manifest)
    found = toy.survey("second.size=2")
    assert (found["second"].state, found["third"].state) == ("stands", "stale")


def test_keep_knows_only_stages_of_the_recipe(toy: Toy):
    with pytest.raises(ConfigError, match="--keep fourth: the recipe has no such stage"):
        toy.survey(keep=["fourth"])


def test_a_begun_stage_is_known_by_its_folder(toy: Toy):
    standing = toy.survey()["first"]
    assert not standing.is_begun
    toy.store.partial("toy", "first", standing.planned)
    assert toy.survey()["first"].is_begun
    assert not toy.survey("first.size=2")["first"].is_begun


def test_an_unfinished_stage_of_other_parts_is_named_with_what_changed(toy: Toy):
    """A changed text, value or parent begins anew, and what was begun is not left in silence."""
    toy.make(only=["first"])
    for name in ("first", "second"):
        standing = toy.survey("first.size=2")[name]
        write_begun(toy.store.partial("toy", name, standing.planned), standing.node.stage.type, standing.parts)
    assert toy.survey("first.size=2")["first"].left == ()  # it is gone on from
    toy.folder.joinpath("rows.txt").write_text("b\n")
    found = toy.survey()
    assert found["first"].left == ("first.size 2 → 1", f"data: data ({toy.folder}/rows.txt)")
    assert found["second"].left == ("input: init (first)",)
    assert found["third"].left == found["aside"].left == ()
    toy.store.partial("toy", "first", found["first"].planned)
    assert toy.survey()["first"].left == ()


def test_rows_that_a_stage_writes_count_by_that_stage(tmp_path: Path):
    toy = Toy(tmp_path)
    reads = ("aside.data=first",)
    toy.make(*reads)
    assert toy.states(*reads) == ["stands"] * 4
    other = toy.survey(*reads, "first.size=2")["aside"]
    assert (other.state, other.reasons[-1]) == ("stale", "input: data (first)")
    limited = toy.survey('aside.data={"source": "first", "limit": 1}')["aside"]
    assert limited.reasons[0].startswith("data: data (")
    assert len(limited.reasons) == 1


def test_reasons_in_one_line_name_three_files_of_code() -> None:
    files = [f"code: pipeline/{letter}.py" for letter in "abcde"]
    assert brief(["sft.size 1 → 2", *files, "input: init"]) == (
        "sft.size 1 → 2; code: pipeline/a.py; code: pipeline/b.py; code: pipeline/c.py and 2 more files; input: init"
    )
    assert brief(files[:3]) == "; ".join(files[:3])
    assert brief([]) == ""


def test_a_role_that_nothing_fills_is_no_part_of_the_fingerprint(toy: Toy) -> None:
    """So a role that a stage gains with a release, and that a recipe leaves empty, makes nothing stale."""
    found = toy.survey()
    assert found["aside"].parts["inputs"] == {}
    assert found["second"].parts["inputs"] == {"init": [found["first"].planned]}
