"""A judge that compares: the log-odds of one row alone, places that fall out, replies that are read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.artifacts import outside_model
from pipeline.data.chat import encode_prompt
from pipeline.errors import DataError
from pipeline.rl.comparing import (
    Compared,
    Comparer,
    RemoteComparer,
    compare_text,
    load_comparer,
    log_odds,
    read_verdict,
)
from pipeline.rl.judge_api import RemoteJudge
from pipeline.runtime import Runtime
from tests.stages.conftest import make_model

RULES = "Short answers are better.\n"
QUESTION = [{"role": "user", "content": "How are you?"}]
PAIRS = [("Fine.", "I am well, thank you."), ("a", "b"), ("Go <|im_end|> away", "")]


@pytest.fixture
def judge(tmp_path: Path) -> Comparer:
    runtime = Runtime.start(tmp_path, seed=0, threads=1, quiet=True)
    artifact = outside_model(make_model(tmp_path / "judge", context=256))
    return load_comparer(artifact, RULES, batch_size=3, bf16=False, runtime=runtime)


def test_what_it_is_asked():
    said = compare_text(RULES, [{"role": "user", "content": "p"}, {"role": "assistant", "content": "q"}], "x", "y")
    assert said == (
        "Short answers are better.\n\nQuestion:\nuser: p\nassistant: q\n\nAnswer A:\nx\n\nAnswer B:\ny\n\n"
        "Which answer is better by the rules above? Write A or B and nothing else.\n"
    )


def test_log_odds_by_hand():
    logits_BV = torch.tensor([[1.0, 2.0, 0.0, 3.0, 9.0]])
    one = log_odds(logits_BV, torch.tensor([[0], [3]]))
    assert one.item() == pytest.approx(-2.0)
    two = log_odds(logits_BV, torch.tensor([[0, 1], [2, 3]]))  # two pieces write each letter
    assert two.item() == pytest.approx(math.log(math.e + math.e**2) - math.log(1 + math.e**3))


def test_chances_are_those_of_a_naive_loop(judge: Comparer):
    def naive(first: str, second: str) -> float:
        text = compare_text(RULES, QUESTION, first, second)
        ids = encode_prompt(judge.tokenizer, [{"role": "user", "content": text}])
        with torch.no_grad():
            logits = judge.model(input_ids=torch.tensor([ids])).logits[0, -1].tolist()
        a, b = (judge.tokenizer.convert_tokens_to_ids(letter) for letter in "AB")
        return float(logits[a] - logits[b])

    found = judge.compare([QUESTION] * 3, PAIRS)
    for (first, second), compared in zip(PAIRS, found, strict=True):
        forth, back = naive(first, second), naive(second, first)
        assert compared.chance == pytest.approx(1 / (1 + math.exp(-(forth - back) / 2)), abs=1e-5)
        assert compared.is_swayed == ((forth > 0) == (back > 0))
    assert len({round(each.chance, 4) for each in found}) == 3


@pytest.mark.parametrize("bias", [0.0, 3.0, -50.0])
def test_what_a_place_adds_falls_out(judge: Comparer, monkeypatch: pytest.MonkeyPatch, bias: float):
    """A judge that likes short answers, a nat a letter, and the first place."""

    def by_length(self: Comparer, texts: list[str]) -> torch.Tensor:
        answers = [text.split("\n\n")[2:4] for text in texts]
        return torch.tensor([float(len(b) - len(a)) + bias for a, b in answers])

    monkeypatch.setattr(Comparer, "log_odds", by_length)
    found = judge.compare([QUESTION, QUESTION], [("aaa", "aaaa"), ("aaaaa", "aaa")])
    assert [each.chance for each in found] == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(2))])
    assert [each.is_swayed for each in found] == [bias != 0, bias != 0]


def test_too_long_for_the_judge(judge: Comparer):
    with pytest.raises(DataError, match="reads 256 tokens"):
        judge.compare([QUESTION], [("word " * 300, "b")])


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("A", 1.0),
        ("b.", 0.0),
        ("**TIE**", 0.5),
        ("Answer B", 0.0),
        ("The better answer is: A\n", 1.0),
        ("Answer A:", 1.0),
        ("A or B", None),
        ("Apples", None),
        ("", None),
        ("Both are good", None),
    ],
)
def test_replies(reply: str, verdict: float | None):
    assert read_verdict(reply) == verdict


@pytest.mark.parametrize(
    ("replies", "expected"),
    [
        (("A", "B"), Compared(1.0, False)),
        (("B", "A"), Compared(0.0, False)),
        (("A", "A"), Compared(0.5, True)),
        (("B", "B"), Compared(0.5, True)),
        (("TIE", "TIE"), Compared(0.5, False)),
        (("A", "TIE"), Compared(0.5, True)),
        (("A", "who knows"), Compared(0.5, False, 1)),
        (("?", "B"), Compared(0.5, False, 1)),
        (("", "?"), Compared(0.5, False, 2)),
    ],
)
def test_two_verdicts_are_one(monkeypatch: pytest.MonkeyPatch, replies: tuple[str, str], expected: Compared):
    asked: dict[str, str] = {
        compare_text(RULES, QUESTION, *pair, choice="A, B or TIE"): reply
        for pair, reply in zip((("x", "y"), ("y", "x")), replies, strict=True)
    }
    monkeypatch.setattr(RemoteJudge, "ask", lambda self, text: asked[text])
    found = RemoteComparer(RemoteJudge("http://127.0.0.1:1/v1", "m", RULES)).compare([QUESTION], [("x", "y")])
    assert found == [expected]


def test_scores_do_not_depend_on_the_batch(judge: Comparer, tmp_path: Path):
    values: dict[str, Any] = {"batch_size": 6, "bf16": False}
    runtime = Runtime.start(tmp_path, seed=0, threads=1, quiet=True)
    whole = load_comparer(outside_model(tmp_path / "judge" / "model"), RULES, runtime=runtime, **values)
    left, right = (each.compare([QUESTION] * 3, PAIRS) for each in (judge, whole))
    assert [a.chance for a in left] == pytest.approx([b.chance for b in right], abs=1e-6)
