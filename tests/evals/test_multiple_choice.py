"""Multiple choice: log-probabilities against a naive loop, accuracies by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.data.chat import encode_messages, encode_prompt
from pipeline.data.pydocs import Question
from pipeline.data.tokenizers import encode_text
from pipeline.evals import multiple_choice
from pipeline.evals.subject import Subject

SENTENCES = ("Return the sum.", "Read a file.", "Sort a list in place.", "Open the door.")
QUESTIONS = [
    Question(
        name=f"m.f{i}",
        question=f"What does `m.f{i}` do?",
        nameless="What does this do?",
        swapped=f"What does `n.g{i}` do?",
        choices=tuple(np.roll(SENTENCES, i).tolist()),
        answer=i,
    )
    for i in range(3)
]


def row_logprob(subject: Subject, before: list[int], row: list[int]) -> float:
    assert row[: len(before)] == before
    with torch.inference_mode():
        logprobs = subject.model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
    return sum(float(logprobs[i - 1, row[i]]) for i in range(len(before), len(row)))


def chat_logprob(subject: Subject, question: str, choice: str) -> float:
    prompt = [{"role": "user", "content": question}]
    row = encode_messages(subject.tokenizer, [*prompt, {"role": "assistant", "content": choice}]).input_ids
    return row_logprob(subject, encode_prompt(subject.tokenizer, prompt), row)


def test_chat_model_against_a_naive_loop(chat_subject: Subject) -> None:
    items = multiple_choice.score(chat_subject, QUESTIONS, swapped=2)
    for question, item in zip(QUESTIONS, items, strict=True):
        for key, text in (("named", question.question), ("nameless", question.nameless), ("swapped", question.swapped)):
            if key in item:
                expected = [chat_logprob(chat_subject, text, choice) for choice in question.choices]
                assert item[key] == pytest.approx(expected, rel=1e-5, abs=1e-4)
    assert ["swapped" in item for item in items] == [True, True, False]
    assert items[0]["bytes"] == [15, 12, 21, 14]


def test_base_model_is_given_the_layout_of_the_corpus(base_subject: Subject) -> None:
    item = multiple_choice.score(base_subject, QUESTIONS[:1], swapped=1)[0]
    tokenizer = base_subject.tokenizer
    for key, name in (("named", "m.f0"), ("nameless", "function"), ("swapped", "n.g0")):
        before = [tokenizer.bos_token_id, *encode_text(tokenizer, f"`{name}`:")]
        rows = [[*before, *encode_text(tokenizer, f" {choice}")] for choice in QUESTIONS[0].choices]
        assert item[key] == pytest.approx([row_logprob(base_subject, before, row) for row in rows], rel=1e-5)


def test_accuracies_by_hand() -> None:
    """First: likelihood takes 0 (right), per byte 1, PMI 0. Second: likelihood takes 1, per byte 0, PMI 2 (right)."""
    items = [
        {
            "answer": 0,
            "bytes": [10, 100],
            "named": [-20.0, -21.0],
            "nameless": [-30.0, -21.0],
            "swapped": [-40.0, -20.0],
        },
        {"answer": 1, "bytes": [100, 10], "named": [-20.0, -21.0], "nameless": [-20.0, -40.0]},
    ]
    found = multiple_choice.figures(items, None, 0)
    assert {name: estimate.value for name, estimate in found.items()} == {
        "acc": 0.5,
        "acc_norm": 0.0,
        "pmi": 1.0,
        "pmi_swapped": 0.0,
    }
    assert found["pmi_swapped"].n == 1
    worse = [items[0] | {"named": [-40.0, -20.0]}, items[1]]
    assert multiple_choice.figures(worse, items, 0)["pmi_difference"].value == -0.5


def test_a_model_that_reads_the_name_is_right_and_falls_to_chance_when_names_are_swapped(
    chat_subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scorer knows each function's sentence by its name: all right when named; swapped, the names of the other
    functions point at none of the candidates, and the prior over positions is what is left: one in four."""
    pool = [f"Sentence number {i}." for i in range(400)]
    rng = np.random.default_rng(0)
    questions = []
    for i in range(200):
        others = rng.choice([j for j in range(200) if j != i], 3, replace=False)
        choices = rng.permutation([i, *others])
        answer = int(np.flatnonzero(choices == i)[0])
        question = Question(f"f{i}", f"`f{i}`?", "this?", f"`f{i + 200}`?", tuple(pool[j] for j in choices), answer)
        questions.append(question)
    text_of = {pool[i]: f"f{i}" for i in range(400)}

    def knows(subject: Subject):
        return lambda question, choice: (question, choice)

    def likelihoods(subject: Subject, requests: list[tuple[str, str]]) -> np.ndarray:
        noise = np.random.default_rng(1).normal(size=len(requests))
        named = [
            question.split("`")[1] == text_of[choice] if "`" in question else False for question, choice in requests
        ]
        return noise + 50.0 * np.array(named)

    monkeypatch.setattr(multiple_choice, "_chat", knows)
    monkeypatch.setattr(Subject, "log_likelihoods", likelihoods)
    found = multiple_choice.figures(multiple_choice.score(chat_subject, questions, swapped=200), None, 0)
    assert found["pmi"].value == 1.0
    assert found["pmi_swapped"].low < 0.25 < found["pmi_swapped"].high
