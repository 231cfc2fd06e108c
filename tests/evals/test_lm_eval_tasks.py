"""Tasks of lm-eval's: its results as ours, and its harness itself where it is installed."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, MachineError
from pipeline.evals import choices, lm_eval_tasks
from pipeline.evals.fewshot import Asker
from pipeline.evals.own_tasks import read_own
from pipeline.evals.subject import Subject
from pipeline.evaluation_config import Task, with_files

HERE = importlib.util.find_spec("lm_eval") is not None

YAML = """\
task: colours
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/rows.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices.text}}}}"
doc_to_target: "{{{{choices.label.index(answerKey)}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""


def test_the_harness_s_results_by_hand() -> None:
    """A mean of its items has their bootstrap; another figure has its standard error, or no interval."""
    results = {
        "group": {"acc,none": 0.5, "acc_stderr,none": "N/A", "alias": "group"},
        "one": {"acc,none": 0.75, "acc_stderr,none": 0.1, "word_perplexity,none": 8.0, "f1,strict": 0.4,
                "f1_stderr,strict": 0.1, "sample_len": 4},
    }  # fmt: skip
    rows = [{"doc_id": i, "metrics": ["acc", "f1"], "acc": float(i < 3), "f1": [1, 2]} for i in range(4)]
    items = lm_eval_tasks._items(results, {"one": rows})
    found = lm_eval_tasks.figures(items, 0)
    assert {name: each.value for name, each in found.items()} == {
        "acc": 0.5,
        "acc/one": 0.75,
        "word_perplexity/one": 8.0,
        "f1:strict/one": 0.4,
    }
    assert found["acc/one"].low < 0.75 < found["acc/one"].high
    assert found["acc/one"].n == 4
    assert math.isnan(found["word_perplexity/one"].low)
    assert found["f1:strict/one"].high == pytest.approx(0.4 + 1.96 * 0.1)
    assert lm_eval_tasks.per_item(items) == {"acc/one": {i: (float(i < 3), 1.0) for i in range(4)}}


def test_a_yaml_beside_its_rows_counts_by_all_of_them(tmp_path: Path) -> None:
    (tmp_path / "colours.yaml").write_text(YAML.format(folder=tmp_path))
    found = []
    for text in ("{}\n", "{}\n", "[]\n"):
        (tmp_path / "rows.jsonl").write_text(text)
        found.append(with_files(Task(task="lm_eval:./colours.yaml"), tmp_path, "r.yaml:1"))
    assert [each.name for each in found] == ["lm_eval:colours"] * 3
    assert found[0].content == found[1].content != found[2].content


@pytest.mark.skipif(HERE, reason="lm-eval is installed")
def test_where_it_is_missing_the_extra_is_named() -> None:
    with pytest.raises(MachineError, match="needs lm-eval") as found:
        read_own(Task(task="lm_eval:arc_easy"), lambda text: None)
    assert "llmpipe[eval]" in found.value.mend


@pytest.mark.slow
@pytest.mark.skipif(not HERE, reason="lm-eval is not installed (extra `eval`)")
def test_the_harness_and_we_say_the_same(
    base_subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A local task offline: every question's answer is ours, by likelihood and by likelihood a character."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    words = ["sum", "file", "list", "door", "place", "numbers"]
    rows = [
        {
            "question": f"open {words[i % 6]} {i}",
            "choices": {"text": [words[(i + j) % 6] * (1 + j % 2) for j in range(4)], "label": list("ABCD")},
            "answerKey": "ABCD"[i % 4],
        }
        for i in range(24)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "colours.yaml").write_text(YAML.format(folder=tmp_path))
    task = with_files(Task(task="lm_eval:./colours.yaml", apply_chat_template=False), tmp_path, "")
    items = lm_eval_tasks.score(base_subject, task, 0)
    own = read_own(Task(task="colours", data=tmp_path / "rows.jsonl"), lambda text: None)
    ours = choices.score(Asker(base_subject, False), own.questions, own.shown, own.letters)
    assert len(items) == len(ours) + 1
    mine, theirs = choices.per_item(ours), lm_eval_tasks.per_item(items)
    assert mine["acc"] == theirs["acc"]
    assert mine["acc_norm"] == theirs["acc_norm"]
    assert 0 < sum(hit for hit, _ in mine["acc"].values()) < 24
    with pytest.raises(ConfigError, match="no task `no_such`"):
        lm_eval_tasks.score(base_subject, Task(task="lm_eval:no_such"), 0)
