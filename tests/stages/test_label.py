"""label: by a reward, a judge and a person, against what each says of one pair alone; refusals."""

from __future__ import annotations

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifacts import Artifact, outside_model
from pipeline.data.answers import pairs_of, read_answers
from pipeline.data.chat import encode_messages, encode_prompt
from pipeline.data.labels import append_label
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import ConfigError, DataError
from pipeline.recipe import DataEntry
from pipeline.reward_config import RewardTerm
from pipeline.rl.comparing import Comparer, load_comparer
from pipeline.runtime import Runtime
from stages import label as stage
from tests.conftest import Warm
from tests.stages.conftest import make_model
from tests.stages.ppo_runs import Parts, naive_score
from tests.stages.sample_runs import Row, rows_in

WORDS = ("names", "in place", "sorts them all", "a list", "writes")


def answered(folder: Path, prompts: int = 12, each: int = 3) -> DataEntry:
    """`each` answers to each prompt, all different."""
    rows = [
        {"prompt": f"what {place}", "completion": f"{WORDS[(place + 2 * n) % 5]} {'e' * n}{place}"}
        for place in range(prompts)
        for n in range(each)
    ]
    path = folder / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataEntry(source=str(path))


def label(parts: Parts, out: Path, data: tuple[DataEntry, ...], **values: Any) -> tuple[list[Row], dict[str, float]]:
    if values.get("reward") == "model":
        values["reward"] = "reward"
    elif "reward" in values and isinstance(values["reward"], str):
        values["reward"] = f"{parts.folder / 'rewards.py'}:{values['reward']}"
    config = stage.LabelConfig(data=data, bf16=False, **values)
    out.mkdir(parents=True, exist_ok=True)
    inputs = {"init": parts.init, "reward": parts.reward if config.reward == "reward" else None}
    figures = stage.run(config, inputs, out, Runtime.start(out, seed=0, threads=1, quiet=True))
    return rows_in(out), figures


@pytest.mark.slow
def test_by_a_reward_model_as_it_scores_one_row_alone(parts: Parts, tmp_path: Path):
    data = answered(tmp_path, prompts=5)
    rows, figures = label(parts, tmp_path / "run", (data,), reward="model", pairs="all", batch_size=4)
    assert figures == {"rows": 15, "pairs": 15, "ties": 0.0}
    tokenizer = load_tokenizer(parts.init.model)
    for row in rows:
        prompt = encode_prompt(tokenizer, row["prompt"])
        scores = []
        for side in ("chosen", "rejected"):
            said = {"role": "assistant", "content": row[side]}
            ids = encode_messages(tokenizer, [*row["prompt"], said]).input_ids
            scores.append(naive_score(parts, tmp_path, prompt, ids[len(prompt) :]))
        assert [row["score_chosen"], row["score_rejected"]] == pytest.approx(scores, abs=1e-5)
        assert scores[0] > scores[1]
        assert row["preference"] == 1.0


def test_one_pair_a_prompt_and_ties(parts: Parts, tmp_path: Path):
    data = answered(tmp_path)
    rows, figures = label(parts, tmp_path / "run", (data,), reward="vowels", tie_margin=0.15)
    assert len(rows) == figures["rows"] == figures["pairs"] == 12
    margins = [row["score_chosen"] - row["score_rejected"] for row in rows]
    ties = [abs(margin) <= 0.15 for margin in margins]
    assert 0 < sum(ties) < 12
    assert figures["ties"] == pytest.approx(sum(ties) / 12)
    assert [row["preference"] for row in rows] == [0.5 if is_tie else 1.0 for is_tie in ties]
    assert all(margin > 0 for margin, is_tie in zip(margins, ties, strict=True) if not is_tie)
    without, figures = label(parts, tmp_path / "without", (data,), reward="vowels", tie_margin=0.15, ties="leave_out")
    assert without == [row for row, is_tie in zip(rows, ties, strict=True) if not is_tie]
    assert figures["ties"] == pytest.approx(sum(ties) / 12), "of what was compared"
    with pytest.raises(DataError, match="no row is left of 12 labelled pairs"):
        label(parts, tmp_path / "none", (data,), reward="constant", ties="leave_out")


def test_labels_drawn_by_bradley_and_terry(parts: Parts, tmp_path: Path):
    data = answered(tmp_path, prompts=200)
    rows, _ = label(parts, tmp_path / "soft", (data,), reward="vowels", noise=0.2, soft=True)
    for row in rows:
        margin = row["score_chosen"] - row["score_rejected"]
        assert margin >= 0
        assert row["preference"] == pytest.approx(1 / (1 + math.exp(-margin / 0.2)), abs=1e-5)
    drawn, _ = label(parts, tmp_path / "drawn", (data,), reward="vowels", noise=0.2)
    untied = [row for row in drawn if row["preference"] == 1.0]
    wrong = sum(row["score_chosen"] < row["score_rejected"] for row in untied) / len(untied)
    expected = sum(1 - row["preference"] for row in rows if row["preference"] > 0.5) / len(untied)
    assert 0.2 < expected < 0.45
    assert wrong == pytest.approx(expected, abs=4 * math.sqrt(0.25 / len(untied)))


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return outside_model(make_model(tmp_path_factory.mktemp("judge"), context=256))


def rules(folder: Path) -> Path:
    path = folder / "rules.md"
    path.write_text("Short answers are better.\n")
    return path


@pytest.mark.slow
def test_by_a_judge_as_it_compares_one_pair_alone(parts: Parts, tmp_path: Path, judge: Artifact):
    data, constitution = answered(tmp_path), rules(tmp_path)
    values: dict[str, Any] = {"judge": judge, "constitution": constitution, "pairs": "all"}
    values |= {"soft": True, "batch_size": 8}
    rows, figures = by_judge(parts, tmp_path / "run", data, **values)
    runtime = Runtime.start(tmp_path / "run", seed=0, threads=1, quiet=True)
    alone = load_comparer(judge, constitution.read_text(), batch_size=1, bf16=False, runtime=runtime)
    swayed = 0
    for row in rows:
        (compared,) = alone.compare([row["prompt"]], [(row["chosen"], row["rejected"])])
        assert row["preference"] == pytest.approx(compared.chance, abs=1e-5)
        assert row["preference"] >= 0.5
        swayed += compared.is_swayed
    assert figures["swayed"] == pytest.approx(swayed / len(rows))
    hard, figures = by_judge(parts, tmp_path / "hard", data, **(values | {"soft": False, "tie_margin": 0.02}))
    near = [row["preference"] <= 0.52 for row in rows]
    assert [row["preference"] for row in hard] == [0.5 if is_near else 1.0 for is_near in near]
    assert figures["ties"] == sum(near) / len(near)


def by_judge(parts: Parts, out: Path, data: DataEntry, *, judge: Artifact, **values: Any) -> Any:
    config = stage.LabelConfig(data=(data,), bf16=False, judge="judge", **values)
    out.mkdir(exist_ok=True)
    inputs = {"init": None, "reward": None, "judge": judge}
    figures = stage.run(config, inputs, out, Runtime.start(out, seed=0, threads=1, quiet=True))
    return rows_in(out), figures


class Chooser(BaseHTTPRequestHandler):
    """An OpenAI-compatible judge that takes the shorter answer, and A where they are as long."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"]
        first, second = (text.split(f"Answer {letter}:\n")[1].split("\n\n")[0] for letter in "AB")
        said = "A" if len(first) <= len(second) else "B"
        payload = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.slow
def test_by_a_judge_behind_an_address(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Chooser)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        values = {"judge_url": url, "judge_model": "m", "constitution": rules(tmp_path), "pairs": "all"}
        rows, figures = label(parts, tmp_path / "run", (answered(tmp_path),), **values)
    finally:
        server.shutdown()
        server.server_close()
    lengths = [(len(row["chosen"]), len(row["rejected"])) for row in rows]
    assert all(chosen <= rejected for chosen, rejected in lengths)
    equal = [chosen == rejected for chosen, rejected in lengths]
    assert 0 < sum(equal) < len(rows)
    assert [row["preference"] for row in rows] == [0.5 if is_equal else 1.0 for is_equal in equal]
    assert figures["swayed"] == figures["ties"] == sum(equal) / len(rows)
    assert figures["unread"] == 0


def test_by_a_person(parts: Parts, tmp_path: Path):
    data, path = answered(tmp_path, prompts=4), tmp_path / "labels.jsonl"
    groups = read_answers((data,))
    shown = [(group, *pairs_of(group, number, "one", 0)[0]) for number, group in enumerate(groups)]
    for (group, a, b), said in zip(shown, ("left", "right", "tie", "skip"), strict=True):
        append_label(path, group.prompt, group.texts[a], group.texts[b], said)  # type: ignore[arg-type]
    rows, figures = label(parts, tmp_path / "run", (data,), labels=path)
    texts = [(group.texts[a], group.texts[b]) for group, a, b in shown]
    sides = [texts[0], texts[1][::-1], texts[2]]
    assert [(row["chosen"], row["rejected"], row["preference"]) for row in rows] == [
        (*pair, preference) for pair, preference in zip(sides, (1.0, 1.0, 0.5), strict=True)
    ]
    assert figures == {"rows": 3, "pairs": 3, "ties": 1 / 3}
    assert (tmp_path / "run/labels.jsonl").read_bytes() == path.read_bytes()
    append_label(path, groups[0].prompt, "never", "shown", "left")
    with pytest.raises(DataError, match="1 of 5 labels are of pairs that this data"):
        label(parts, tmp_path / "other", (data,), labels=path)


def test_two_sources_and_labels_from_before(parts: Parts, tmp_path: Path):
    """The second source says more vowels wherever both answer; of its own pairs the old labels say the reverse."""
    for name, vowels in (("left", 1), ("right", 3)):
        rows = [{"prompt": f"p{n}", "completion": f"{'a' * vowels} {name}"} for n in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = tuple(DataEntry(source=str(tmp_path / f"{name}.jsonl")) for name in ("left", "right"))
    rows, figures = label(parts, tmp_path / "run", data, reward="vowels")
    assert {row["chosen"] for row in rows} == {"aaa right"}
    assert figures["win_rate"] == 0.0
    assert label(parts, tmp_path / "back", data[::-1], reward="vowels")[1]["win_rate"] == 1.0
    pairs = [{"prompt": f"p{n}", "chosen": "a" * (n + 1), "rejected": "aaa"} for n in (0, 1, 4, 5)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    _, figures = label(parts, tmp_path / "anew", (DataEntry(source=str(tmp_path / "pairs.jsonl")),), reward="vowels")
    assert figures["agreement"] == 0.5
    assert "win_rate" not in figures


def test_the_win_rate_is_of_the_first_source_against_any_other(parts: Parts, tmp_path: Path):
    """The first one is better than the second, worse than the third; the pairs of those two don't count."""
    data = []
    for name, vowels in (("first", 2), ("second", 1), ("third", 3)):
        rows = [{"prompt": f"p{n}", "completion": f"{'a' * vowels} nn"} for n in range(4 if name == "third" else 6)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data.append(DataEntry(source=str(tmp_path / f"{name}.jsonl")))
    _, figures = label(parts, tmp_path / "run", tuple(data), reward="vowels", pairs="all")
    assert figures["pairs"] == 4 * 3 + 2
    assert figures["win_rate"] == 0.6, "6 of 6 against the second, 0 of 4 against the third"


def test_stopped_between_parts_it_goes_on(
    parts: Parts, tmp_path: Path, judge: Artifact, monkeypatch: pytest.MonkeyPatch
):
    data = answered(tmp_path)
    values: dict[str, Any] = {"judge": judge, "constitution": rules(tmp_path), "soft": True, "batch_size": 8}
    whole, _ = by_judge(parts, tmp_path / "whole", data, **values)
    plain, calls = Comparer.compare, []

    def compare(self: Comparer, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt  # as rude as a kill: nothing of this part is kept
        return plain(self, *args)

    monkeypatch.setattr(Comparer, "compare", compare)
    with pytest.raises(KeyboardInterrupt):
        by_judge(parts, tmp_path / "parts", data, **values)
    rows, _ = by_judge(parts, tmp_path / "parts", data, **values)
    assert rows == whole
    assert len(calls) == 4, "12 prompts by 4, one part twice"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "nobody labels: one of reward, judge, judge_url and labels"),
        ({"reward": "r", "judge": "j"}, "reward and judge label"),
        ({"judge": "j"}, "judge needs constitution"),
        ({"reward": "r", "constitution": Path("c.md")}, "reward takes no constitution"),
        ({"judge_url": "http://127.0.0.1/v1", "constitution": Path("c.md")}, "judge_url and judge_model go together"),
        ({"labels": Path("l.jsonl"), "noise": 0.1}, "noise is of a reward's scores"),
        ({"reward": "r", "soft": True}, "soft: a person says no chances"),
    ],
)
def test_fields_that_do_not_go_together(values: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        stage.LabelConfig(data=(DataEntry(source="x"),), **values)


def test_what_a_reward_cannot_score(parts: Parts, tmp_path: Path):
    long = [{"prompt": "what", "completion": f"names {n} " * 20} for n in range(2)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    with pytest.raises(DataError, match="the reward model reads 48"):
        label(parts, tmp_path / "a", (DataEntry(source=str(tmp_path / "long.jsonl")),), reward="model")
    with pytest.raises(DataError, match="compares with the data's answer") as caught:
        label(parts, tmp_path / "b", (answered(tmp_path),), reward=(RewardTerm(function="exact"),))
    assert caught.value.where == "label.data"
    config = stage.LabelConfig(data=(answered(tmp_path),), reward="reward", init=None)
    runtime = Runtime.start(tmp_path / "b", seed=0, threads=1, quiet=True)
    with pytest.raises(ConfigError, match="a reward reads tokens, and `init` is null"):
        stage.run(config, {"init": None, "reward": parts.reward}, tmp_path / "b", runtime)


RECIPE = """\
run: tiny
stages:
  sample: {{init: {init}, data: {data}, prompts: 9, response_length: 8, unfinished: keep, bf16: false}}
  label: {{init: {init}, reward: {reward}, data: [sample], pairs: all, batch_size: 4, bf16: false}}
"""


@pytest.mark.slow
def test_two_processes_label_as_one(parts: Parts, tmp_path: Path, warm: Warm):
    text = RECIPE.format(init=parts.init.model, reward=parts.reward.model, data=parts.data)
    (tmp_path / "rounds.yaml").write_text(text)
    for count in (1, 2):
        done = warm("run", "rounds.yaml", "--artifacts", count, "--num-processes", count)
        assert done.code == 0, done.stderr
    one, two = ((tmp_path / str(count) / "tiny/label/rows.jsonl").read_bytes() for count in (1, 2))
    assert one == two
    assert one.count(b"\n") > 20
