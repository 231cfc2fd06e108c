"""Where a command may write."""

from pathlib import Path

import pytest

from pipeline.cli import outputs
from pipeline.cli.outputs import check_out, make_parent
from pipeline.errors import ConfigError


def test_what_can_be_made_is_no_error(tmp_path: Path) -> None:
    check_out(tmp_path / "new" / "file", name="page.html")
    check_out(tmp_path)
    assert not [*tmp_path.iterdir()]
    make_parent(tmp_path / "new" / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_file_on_the_way_and_a_folder_in_the_place_are_named(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a")
    with pytest.raises(ConfigError, match=r"t\.txt is a file, no folder") as caught:
        check_out(tmp_path / "t.txt" / "a" / "b")
    assert caught.value.where == f"--out {tmp_path}/t.txt/a/b"
    with pytest.raises(ConfigError, match="a folder is there") as there:
        check_out(tmp_path, name="page.html")
    assert there.value.mend == f"--out {tmp_path}/page.html"
    with pytest.raises(ConfigError, match="no folder can be made here: Not a directory"):
        make_parent(tmp_path / "t.txt" / "a" / "b")


def test_a_folder_of_someone_else_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs.os, "access", lambda path, mode: path != tmp_path)  # root may write anywhere
    with pytest.raises(ConfigError, match="is not to be written to"):
        check_out(tmp_path / "new" / "file")
