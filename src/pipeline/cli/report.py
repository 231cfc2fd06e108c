"""`llmpipe report`: a run, or two beside each other, as one HTML page."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.artifacts import Store
from pipeline.cli.outputs import check_out, make_parent
from pipeline.errors import ConfigError


def write_report(
    root: Path, run: str, other: str | None, *, out: Path | None, price: float | None, as_json: bool
) -> None:
    """Write the page and say where it is. `root`: of the artifacts; a run of another root is named by its path.

    price: euros an hour and device; None for a GPU's usual one, and none of a CPU.
    """
    from pipeline.report.compare import comparison_of
    from pipeline.report.page import page_of
    from pipeline.report.records import read_run

    if out is not None:
        check_out(out, name="report.html")
    store, name = _placed(root, run)
    ours = read_run(store, name)
    if other is None:
        page, file = page_of(ours, price), "report.html"
    else:
        theirs = read_run(*_placed(root, other))
        if theirs == ours:
            raise ConfigError(f"{run} and {other} are one run", mend=f"llmpipe report {run}")
        page, file = comparison_of(ours, theirs, price), f"report-{theirs.name}.html"
    path = out or store.root / name / file
    make_parent(path)
    _write(path, page)
    unfinished = [each.name for each in ours.stages if not each.is_done]
    if as_json:
        print(json.dumps({"run": name, "path": str(path), "bytes": path.stat().st_size, "unfinished": unfinished}))
        return
    left = f", unfinished: {', '.join(unfinished)}" if unfinished else ""
    print(f"{path}  {len(ours.stages)} stage{'s' * (len(ours.stages) != 1)}{left}, {path.stat().st_size / 1e6:.2f} MB")


def _write(path: Path, page: str) -> None:
    """At once; ConfigError where the system lets nothing be written."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        what = f"the page can't be written here: {error.strerror or error}"
        raise ConfigError(what, where=str(path), mend="--out in a folder that is yours") from error


def _placed(root: Path, run: str) -> tuple[Store, str]:
    """The store and the run's name; a path (`./other/demo`) brings its own store."""
    if run.startswith(("./", "../", "/")):
        path = Path(run).absolute()
        return Store(path.parent), path.name
    return Store(root), run
