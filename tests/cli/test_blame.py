"""`llmpipe blame`: what is printed, with colours and without, and what is refused."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from pipeline.artifacts import Store
from pipeline.cli.blame import answer_in_colours, blame_answer
from pipeline.data.tokenizers import train_bpe
from pipeline.errors import ConfigError, PipelineError
from pipeline.report.blamed import blamed
from pipeline.report.records import RunRecord, StageRecord
from tests.evals.lines import Line


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = "return the sum of two numbers read a file and close it sort a list in place open the door"
    return train_bpe(iter([words] * 8), 320)


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Line:
    return Line(tmp_path_factory.mktemp("line"), tokenizer)


def run(line: Line, reference: str = "tiny/dpo", **settings: Any) -> None:
    defaults = {"prompt": "open the door", "system": None, "answer": None, "max_new_tokens": 12, "rows": 3}
    blame_answer(line.store, reference, **({"keep": False, "as_json": False} | defaults | settings))


def test_json_is_what_the_function_returns(line: Line, capsys: pytest.CaptureFixture[str]) -> None:
    run(line, as_json=True)
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads(json.dumps(line.blame()))
    assert "tiny/pretrain: scoring" in captured.err


def test_a_pipe_gets_brackets_figures_rows_and_the_caution(line: Line, capsys: pytest.CaptureFixture[str]) -> None:
    run(line)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "2[sum of<|im_end|>]" in out
    assert re.search(r"^2 +tiny/sft +\d+ +-?\d+\.\d\d +\+\d+\.\d\d$", out, re.MULTILINE)
    assert re.search(r"-5\.\d\d \(\+0\.00\) +-0\.69 \(\+\d\.\d\d\) +-0\.69 \(\+0\.00\)", out)
    assert "rows.jsonl:2, answer, shares “sum of”" in out
    assert "add → sum of" in out
    assert "Correlation, not cause" in out


def test_what_is_kept_is_in_the_report_of_the_run(line: Line, capsys: pytest.CaptureFixture[str]) -> None:
    """Once a question; in the colours of the stages, with their figures; gone when the model is made again."""
    folder = line.store.root / "tiny"
    for _ in range(2):
        run(line, keep=True, as_json=True)
    run(line, keep=True, answer="close the door")
    kept = [json.loads(row) for row in (folder / "blame.jsonl").read_text().splitlines()]
    assert [row["generated"] for row in kept] == [True, False]
    assert kept[0] == json.loads(json.dumps(line.blame()))
    first, second = blamed(RunRecord("tiny", folder, (_standing(kept[0]["fingerprint"]),)))
    assert [piece.text for piece in first.pieces] == [token["text"] for token in kept[0]["tokens"]]
    owners = [token["owner"] for token in kept[0]["tokens"]]
    assert [piece.colour for piece in first.pieces] == [0 if owner is None else owner + 1 for owner in owners]
    gain = kept[0]["tokens"][0]["gains"][1]
    assert f"tiny/sft: log p {kept[0]['tokens'][0]['logprobs'][1]:.2f} ({gain:+.2f})" in first.pieces[0].title
    assert [stage[:2] for stage in first.stages] == [("tiny/pretrain", 1), ("tiny/sft", 2), ("tiny/dpo", 3)]
    assert ("tiny/sft", "sum of") in {(stage, shared) for stage, _, shared, _ in first.rows}
    assert second.prompt == "open the door"
    assert blamed(RunRecord("tiny", folder, (_standing("another"),))) == ()
    capsys.readouterr()


def _standing(fingerprint: str) -> StageRecord:
    return StageRecord("dpo", "dpo", Path("dpo"), {"fingerprint": fingerprint}, {}, (), ())


def test_what_belongs_to_no_run_is_not_kept(line: Line, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="belongs to no run"):
        blame_answer(
            Store(tmp_path),
            str(line.store.folder("tiny", "dpo")),
            prompt="open",
            system=None,
            answer=None,
            max_new_tokens=4,
            rows=0,
            keep=True,
            as_json=False,
        )


def test_colours_or_numbers() -> None:
    pairs = [("s", 1), ("um", 1), (" file", None), ("\n", 0), ("end", 0)]
    found = {"tokens": [{"text": text, "owner": owner} for text, owner in pairs]}
    shown = answer_in_colours(found, plain=False)
    assert shown.plain == "sum file⏎\nend"
    evil = {"tokens": [{"text": "a\x1b[31m", "owner": 0}]}
    assert answer_in_colours(evil, plain=True).plain == "1[a[31m]"
    styles = [str(span.style) for span in shown.spans]
    assert styles == ["yellow", "yellow", "dim", "cyan", "cyan"]
    assert answer_in_colours(found, plain=True).plain == "2[sum]0[ file]1[⏎\nend]"


def test_no_color_at_a_terminal_is_legible(
    line: Line, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes stdout for a terminal
    run(line, rows=0)
    coloured = capsys.readouterr().out
    assert "\x1b[33m" in coloured
    assert "2[" not in re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    monkeypatch.setenv("NO_COLOR", "1")
    run(line, rows=0)
    plain = capsys.readouterr().out
    assert "\x1b[33m" not in plain
    assert "2[sum of<|im_end|>]" in plain


def test_stdin_is_the_prompt_where_it_is_no_terminal(
    line: Line, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("open the door\n"))
    run(line, prompt=None, as_json=True)
    assert json.loads(capsys.readouterr().out)["prompt"] == "open the door"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"prompt": " "}, "prompt is empty"),
        ({"reference": "tiny/tokenize"}, "tokens is no language model"),
        ({"reference": "tiny/none"}, "no artifact tiny/none"),
        ({"reference": "none"}, "'none' is no reference"),
    ],
)
def test_bad_input(line: Line, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(PipelineError, match=named):
        run(line, **settings)


def test_nothing_is_asked_at_a_terminal(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    with pytest.raises(ConfigError, match="nothing was asked"):
        run(line, prompt=None)


@pytest.mark.slow
def test_the_command_itself(line: Line, warm: Any, tmp_path: Path) -> None:
    done = warm("blame", "tiny/dpo", "-p", "open the door", "--json", "--rows", "0", "--artifacts", line.store.root)
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["answer"] == "sum of"
    assert found["nearest"] == []
    refused = warm("blame", "tiny/dpo", "-p", " ", "--artifacts", line.store.root)
    assert (refused.code, refused.stdout) == (2, "")
