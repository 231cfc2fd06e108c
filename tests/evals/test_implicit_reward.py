"""A policy beside its start: every figure against a loop over rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.data.chat import encode_messages, encode_prompt
from pipeline.data.preferences import as_unpaired
from pipeline.data.tokenizers import load_tokenizer
from pipeline.evals import implicit_reward, length_only
from pipeline.evals.implicit_reward import HeldOut
from pipeline.evals.subject import Subject
from pipeline.model.build import load_causal_lm
from tests.stages.conftest import make_model, preference

PAIRS = [preference(index) | {"margin": 0.0, "preference": 1.0} for index in range(10)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A start and a policy, of other weights and one tokenizer."""
    root = tmp_path_factory.mktemp("models")
    return [make_model(root / str(seed), seed=seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def subjects(folders: list[Path]) -> list[Subject]:
    tokenizer = load_tokenizer(folders[0])
    return [
        Subject("x", load_causal_lm(folder).eval(), tokenizer, True, 96, 512, lambda: None)  # no batch is all rows
        for folder in folders
    ]


def held_out(**changed: Any) -> HeldOut:
    given: dict[str, Any] = {
        "pairs": PAIRS,
        "lone": [],
        "drift_prompts": 0,
        "max_new_tokens": 12,
        "beta": 0.3,
        "seed": 0,
    }
    return HeldOut(**(given | {"length_only": length_only.fit([3, 9], [5, 2])} | changed))


def log_p(subject: Subject, prompt: Any, answer: Any) -> tuple[float, int]:
    """log p(answer | prompt) and the answer's tokens."""
    before = encode_prompt(subject.tokenizer, prompt)
    ids = encode_messages(subject.tokenizer, [*prompt, *answer]).input_ids
    with torch.no_grad():
        logits = subject.model(torch.tensor([ids])).logits[0, len(before) - 1 : -1]
    rest = ids[len(before) :]
    return -float(F.cross_entropy(logits, torch.tensor(rest), reduction="sum")), len(rest)


def ratio(subjects: list[Subject], prompt: Any, answer: Any) -> float:
    start, policy = (log_p(subject, prompt, answer)[0] for subject in subjects)
    return policy - start


def measured(subjects: list[Subject], rows: HeldOut) -> dict[str, float]:
    start, policy = subjects
    return implicit_reward.figures(policy, start.model, rows, implicit_reward.listen(start, rows))


def test_pairs(subjects: list[Subject]) -> None:
    found = measured(subjects, held_out())
    ratios = np.array([[ratio(subjects, row["prompt"], row[side]) for side in ("chosen", "rejected")] for row in PAIRS])
    tokens = [log_p(subjects[0], row["prompt"], row[side])[1] for row in PAIRS for side in ("chosen", "rejected")]
    assert found["accuracy"] == np.mean(ratios[:, 0] > ratios[:, 1])
    assert found["margin"] == pytest.approx(0.3 * (ratios[:, 0] - ratios[:, 1]).mean(), abs=1e-4)
    assert found["reward_length_correlation"] == pytest.approx(np.corrcoef(ratios.ravel(), tokens)[0, 1], abs=1e-4)
    assert {"accuracy/other", "accuracy/caps", "length_only"} <= found.keys()
    assert "separation" not in found
    assert "greedy_length" not in found


def test_kl_along_the_chosen_answers(subjects: list[Subject]) -> None:
    start, policy = subjects
    total, count = 0.0, 0
    for row in PAIRS:
        before = encode_prompt(start.tokenizer, row["prompt"])
        ids = encode_messages(start.tokenizer, [*row["prompt"], *row["chosen"]]).input_ids
        with torch.no_grad():
            p, q = (each.model(torch.tensor([ids])).logits[0].double().softmax(-1) for each in (policy, start))
        for place in range(len(before) - 1, len(ids) - 1):
            total += float((p[place] * (p[place] / q[place]).log()).sum())
            count += 1
    assert measured(subjects, held_out())["kl_per_token"] == pytest.approx(total / count, rel=1e-4)


def test_lone_answers(subjects: list[Subject]) -> None:
    lone = [row for pair in PAIRS for row in as_unpaired(pair)][:7]
    found = measured(subjects, held_out(pairs=[], lone=lone))
    ratios = [(ratio(subjects, row["prompt"], row["completion"]), row["label"]) for row in lone]
    wins = [good > bad for good, is_good in ratios if is_good for bad, is_bad in ratios if not is_bad]
    assert len(wins) == 12
    assert found["separation"] == pytest.approx(np.mean(wins))
    assert found["kl_per_token"] > 0
    assert "accuracy" not in found
    assert "separation" not in measured(subjects, held_out(pairs=[], lone=[row for row in lone if row["label"]]))


def test_greedy_answers(subjects: list[Subject], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first different prompts, answered by transformers one at a time, up to a token that they do say."""
    prompts = [torch.tensor([encode_prompt(subjects[0].tokenizer, row["prompt"])]) for row in PAIRS[:3]]
    said = [
        [
            subject.model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, pad_token_id=0,
                eos_token_id=399,
            )[0, ids.shape[1] :].tolist()
            for ids in prompts
        ]
        for subject in subjects
    ]  # fmt: skip
    stop = said[1][0][4]
    monkeypatch.setattr(implicit_reward, "stop_token_id", lambda tokenizer: stop)
    lengths = [[(answer.index(stop) + 1 if stop in answer else len(answer)) for answer in answers] for answers in said]
    assert len({*lengths[0], *lengths[1]}) > 1
    found = measured(subjects, held_out(drift_prompts=3, pairs=[PAIRS[0], *PAIRS]))
    assert found["greedy_length_start"] == pytest.approx(np.mean(lengths[0]))
    assert found["greedy_length"] == pytest.approx(np.mean(lengths[1]))
    assert found["greedy_ended"] == pytest.approx(np.mean([stop in answer for answer in said[1]]))


def test_a_model_is_nothing_beside_itself_and_no_row_no_figure(subjects: list[Subject]) -> None:
    start = subjects[0]
    same = measured([start, start], held_out(drift_prompts=2))
    assert same["kl_per_token"] == pytest.approx(0, abs=1e-9)
    assert (same["margin"], same["accuracy"]) == (0.0, 0.5)
    assert "reward_length_correlation" not in same, "a reward that is zero goes with nothing"
    assert same["greedy_length"] == same["greedy_length_start"]
    short = Subject("x", start.model, start.tokenizer, True, 8, 512, lambda: None)
    assert measured([short, short], held_out(drift_prompts=2)) == {}
