from pathlib import Path

import pytest

from tests.report.written_run import write_demo


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The artifacts of a run `demo` whose every number is known."""
    root = tmp_path / "artifacts"
    write_demo(root)
    return root
