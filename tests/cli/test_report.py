"""`llmpipe report`: where the page is written, what is said, and what is refused; a real run's recipe made again."""

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.slow
def test_a_real_run_and_the_command_that_makes_it_again(warm: Any, trained: Path):
    done = warm("report", "tiny", "--json")
    assert done.code == 0, done.stderr
    said = json.loads(done.stdout)
    page = Path(said["path"])
    assert page == warm.folder / "artifacts" / "tiny" / "report.html"
    assert said["bytes"] == page.stat().st_size < 3_000_000
    assert (said["run"], said["unfinished"]) == ("tiny", [])
    text = page.read_text()
    manifests = [json.loads(path.read_text()) for path in warm.folder.glob("artifacts/tiny/*/manifest.json")]
    for manifest in manifests:
        assert f'data-seconds="{manifest["seconds"]}"' in text
        assert manifest["fingerprint"] in text
    block = re.findall(r'<pre id="command">(.*?)</pre>', text, flags=re.S)
    recipe = re.findall(r"<<'RECIPE'\n(.*)RECIPE", unescape(block[0]), flags=re.S)[0]
    warm.write("again.yaml", recipe)
    rows = json.loads(warm("status", "again.yaml", "--json").stdout)["stages"]
    assert {row["stage"]: row["state"] for row in rows} == {"tokenize": "stands", "pretrain": "stands"}
    assert {row["fingerprint"] for row in rows} == {manifest["fingerprint"] for manifest in manifests}


def test_the_help_names_the_defaults(warm: Any):
    """What stands in brackets in a help text would be taken for a style and not be shown."""
    shown = " ".join(warm("report", "--help").stdout.replace("│", " ").split())
    for default in ("report.html in the run's folder", "2.5 of a GPU, none of a CPU", "LLMPIPE_ARTIFACTS"):
        assert f"[default: ({default}" in shown


@pytest.mark.slow
def test_where_it_is_written(warm: Any, trained: Path):
    out = warm.folder / "pages" / "tiny.html"
    done = warm("report", "tiny", "--out", out, "--price", "7")
    assert done.code == 0, done.stderr
    assert done.stdout.startswith(f"{out}  2 stages, ")
    assert "at €7.00 an hour" in out.read_text()
    by_path = warm("report", "./artifacts/tiny", "--artifacts", warm.folder / "elsewhere", "--out", "again.html")
    assert by_path.code == 0, by_path.stderr
    assert (warm.folder / "again.html").read_text() != out.read_text()  # at another price


@pytest.mark.slow
def test_what_is_refused(warm: Any, trained: Path):
    for args, what in (
        (["tini"], "no run 'tini'; did you mean `tiny`?"),
        (["../tini"], "no run 'tini'"),
        (["tiny", "tiny"], "tiny and tiny are one run"),
        (["tiny", "--out", "artifacts"], "a folder is there"),
        (["tiny", "--price", "-1"], "--price"),
        (["tiny", "--out", "/proc/x/y.html"], "--out in a folder that is yours"),
        (["tiny", "--out", "/proc/y.html"], "--out in a folder that is yours"),
        (["tiny/pretrain"], "tiny/pretrain is a stage, and a report is of a run"),
        (["./artifacts/tiny/pretrain"], "tiny/pretrain is a stage, and a report is of a run"),
        (["tiny/pretrain"], "llmpipe report tiny\n"),
        (["./nope"], "llmpipe run, or --artifacts"),  # folders that hold no stage are no runs
    ):
        done = warm("report", *args)
        assert done.code == 2, (args, done)
        assert what in done.stderr
