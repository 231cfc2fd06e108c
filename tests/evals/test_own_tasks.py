"""Tasks of one's own: the layouts, how questions are asked, figures by hand, likelihoods against a naive loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data.chat import encode_messages, encode_prompt
from pipeline.data.tokenizers import encode_text
from pipeline.errors import ConfigError, DataError
from pipeline.evals import bits_per_byte, choices, exercises, own_tasks, win_rate
from pipeline.evals.exercises import Rules
from pipeline.evals.fewshot import Asker, Shown
from pipeline.evals.layouts import Exercise, Question, read_file
from pipeline.evals.own_tasks import in_pieces, read_own
from pipeline.evals.subject import Subject
from pipeline.evaluation_config import Task
from pipeline.model.sampling import draw_uniforms
from pipeline.rl.comparing import Compared

MMLU = {"question": "Which one sorts?", "choices": ["open", "sort", "read", "close"], "answer": 1, "subject": "verbs"}
ARC = {"question": "What is read?", "choices": {"text": ["a door", "a file"], "label": ["1", "2"]}, "answerKey": "2"}
OLD_ARC = {
    "question": {"stem": "What?", "choices": [{"text": "x", "label": "A"}, {"text": "y", "label": "B"}]},
    "answerKey": "B",
}
HELLASWAG = {
    "activity_label": "Doors",
    "ctx_a": "A man opens the door.",
    "ctx_b": "he [step] then",
    "endings": ["closes it.", "reads  a list."],
    "label": "1",
}
GSM8K = {"question": "2 + 2?", "answer": "2 + 2 = 4\n#### 4"}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(tmp_path: Path, *rows: dict[str, Any], **fields: Any) -> own_tasks.OwnTask:
    return read_own(Task(task="mine", data=write(tmp_path / "mine.jsonl", *rows), **fields), lambda text: None)


@pytest.mark.parametrize(
    ("row", "layout", "question"),
    [
        (MMLU, "mmlu", Question(0, "Which one sorts?", ("open", "sort", "read", "close"), 1, "verbs", False)),
        (MMLU | {"answer": "b"}, "mmlu", Question(0, "Which one sorts?", tuple(MMLU["choices"]), 1, "verbs", False)),
        (MMLU | {"answer": "sort"}, "mmlu", Question(0, "Which one sorts?", tuple(MMLU["choices"]), 1, "verbs", False)),
        (MMLU | {"choices": list("3456"), "answer": "4"}, "mmlu",
         Question(0, "Which one sorts?", tuple("3456"), 1, "verbs", False)),
        (ARC, "arc", Question(0, "What is read?", ("a door", "a file"), 1, "", False)),
        (OLD_ARC, "arc", Question(0, "What?", ("x", "y"), 1, "", False)),
        (
            HELLASWAG,
            "hellaswag",
            Question(
                0, "Doors: A man opens the door. He then", ("closes it.", "reads a list."), 1, "", True
            ),
        ),
        (GSM8K, "gsm8k", Exercise(0, "2 + 2?", "2 + 2 = 4\n#### 4", "")),
        ({"instruction": "Add.", "input": "1 1", "output": "2"}, "prompt", Exercise(0, "Add.\n\n1 1", "2", "")),
    ],
)  # fmt: skip
def test_layouts_are_known_by_their_fields(
    tmp_path: Path, row: dict[str, Any], layout: str, question: Question | Exercise
) -> None:
    assert read_file(write(tmp_path / "rows.jsonl", row), None, (layout,))[:2] == (layout, [question])


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (MMLU | {"answer": 4}, "field `answer` names none of the 4 choices"),
        (MMLU | {"answer": "E"}, "field `answer` names none of the 4 choices"),
        (MMLU | {"answer": "²"}, "field `answer` names none of the 4 choices"),
        (MMLU | {"choices": list("1234"), "answer": "2"}, "'2' is the text of choice 1 and stands for choice 2"),
        (MMLU | {"choices": list("CABD"), "answer": "A"}, "'A' is the text of choice 1 and stands for choice 0"),
        (MMLU | {"answer": True}, "field `answer` names none of the 4 choices"),
        (MMLU | {"choices": ["one"]}, "field `choices` is no list of two texts or more"),
        (MMLU | {"question": " "}, "field `question` holds no text"),
        (ARC | {"answerKey": "3"}, "field `answerKey` names none of the 2 choices"),
        (ARC | {"choices": {"text": ["a", "b"], "label": ["1"]}}, "a label for each of its choices"),
        (HELLASWAG | {"label": ""}, "field `label` names none of the 2 choices"),
        ({"title": "?"}, "no known layout has the fields title"),
    ],
)
def test_a_bad_row_is_told_with_its_line(tmp_path: Path, row: dict[str, Any], why: str) -> None:
    good = MMLU if "choices" in row and "answerKey" not in row else ARC if "answerKey" in row else HELLASWAG
    rows = [row] if "title" in row else [good, row]
    with pytest.raises(DataError, match=why) as found:
        read(tmp_path, *rows)
    assert found.value.where.endswith(f"mine.jsonl:{len(rows)}")


def test_what_a_task_refuses(tmp_path: Path) -> None:
    for rows, fields, error, why in (
        ([GSM8K], {"kind": "multiple_choice"}, DataError, "these are gsm8k rows"),
        ([MMLU, MMLU], {"num_fewshot": 2}, ConfigError, "none is left to ask"),
        ([GSM8K | {"answer": "four"}], {"match": "number"}, DataError, "no number in the reference"),
        ([{"prompt": "?"}], {}, DataError, "no reference"),
        ([HELLASWAG], {"letters": True}, ConfigError, "letters"),
    ):
        with pytest.raises(error, match=why):
            read(tmp_path, *rows, **fields)
    few = write(tmp_path / "few.jsonl", MMLU)
    with pytest.raises(ConfigError, match="1 rows of the subject verbs, and num_fewshot is 2"):
        read(tmp_path, MMLU, num_fewshot=2, fewshot_data=few)


def test_examples_are_the_first_rows_and_not_asked(tmp_path: Path) -> None:
    rows = [MMLU | {"question": f"Q{i}?", "answer": i % 4} for i in range(5)]
    own = read(tmp_path, *rows, num_fewshot=2, description="About {subject}.", limit=2)
    assert [question.item for question in own.questions] == [2, 3]
    listed = "\nA. open\nB. sort\nC. read\nD. close\nAnswer:"
    assert own.shown("verbs") == Shown("About verbs.", ((f"Q0?{listed}", " A"), (f"Q1?{listed}", " B")))
    other = write(tmp_path / "dev.jsonl", *(row | {"subject": s} for s in ("nouns", "verbs") for row in rows[:2]))
    own = read(tmp_path, *rows, num_fewshot=1, fewshot_data=other)
    assert [question.item for question in own.questions] == [0, 1, 2, 3, 4]
    assert own.shown("nouns").examples == own.shown("verbs").examples == ((f"Q0?{listed}", " A"),)


def test_no_subject_gets_fewer_examples_than_were_asked_for(tmp_path: Path) -> None:
    """Of the rows themselves the first ones are before every question; of another file there must be enough."""
    rows = [MMLU | {"question": f"Q{i}?", "subject": "ab"[i % 2]} for i in range(6)]
    own = read(tmp_path, *rows, num_fewshot=3)
    for subject in "ab":
        assert [question[:3] for question, _ in own.shown(subject).examples] == ["Q0?", "Q1?", "Q2?"]
    few = write(tmp_path / "few.jsonl", *rows[:3])
    with pytest.raises(ConfigError, match="1 rows of the subject b, and num_fewshot is 2") as found:
        read(tmp_path, *rows, num_fewshot=2, fewshot_data=few)
    assert found.value.mend == "num_fewshot: 1, or more rows"
    own = read(tmp_path, *rows, num_fewshot=1, fewshot_data=few)
    assert [question[:3] for question, _ in own.shown("b").examples] == ["Q1?"]


def logprob(subject: Subject, before: list[int], after: list[int]) -> float:
    with torch.inference_mode():
        values = subject.model(input_ids=torch.tensor([[*before, *after]])).logits[0].log_softmax(-1)
    return sum(float(values[len(before) + i - 1, token]) for i, token in enumerate(after))


def test_a_base_model_reads_description_examples_and_question_as_one_text(
    base_subject: Subject, tmp_path: Path
) -> None:
    subject, tokenizer = base_subject, base_subject.tokenizer
    row = {"question": "a list?", "choices": {"text": ["sum", "file"], "label": ["A", "B"]}, "answerKey": "B"}
    own = read(tmp_path, row, row | {"question": "two?"}, num_fewshot=1, description="Do.")
    (item,) = choices.score(Asker(subject, False), own.questions, own.shown, own.letters)
    text = "Do.\n\nQuestion: a list?\nAnswer: file\n\nQuestion: two?\nAnswer:"
    before = [subject.start_token, *encode_text(tokenizer, text)]
    for name, start in (("named", before), ("nameless", [subject.start_token, *encode_text(tokenizer, "Answer:")])):
        expected = [logprob(subject, start, encode_text(tokenizer, f" {choice}")) for choice in ("sum", "file")]
        assert item[name] == pytest.approx(expected, abs=1e-4)
    assert item["characters"] == [3, 4]
    assert item["item"] == 1


def test_a_chat_model_gets_examples_as_turns(chat_subject: Subject) -> None:
    tokenizer = chat_subject.tokenizer
    shown = Shown("Do.", (("one?", " sum"),))
    request = Asker(chat_subject, True).request(shown, "two?", " file")
    turns = [("user", "Do.\n\none?"), ("assistant", "sum"), ("user", "two?")]
    said = [{"role": role, "content": text} for role, text in turns]
    assert list(request.prompt) == encode_prompt(tokenizer, said)
    row = encode_messages(tokenizer, [*said, {"role": "assistant", "content": "file"}]).input_ids
    assert [*request.prompt, *request.completion] == row
    other = Asker(chat_subject, True).request(shown, "sort a list?", " file")
    assert request.shared == other.shared > len(encode_prompt(tokenizer, said[:1]))
    assert request.prompt[: request.shared] == other.prompt[: request.shared]


def test_accuracies_by_hand() -> None:
    """First: likelihood takes 0 (right), by character 1, PMI 1. Second, of four: 2 (right), 2, 2. The baseline has the
    first right only, by likelihood."""
    items: list[dict[str, Any]] = [
        {"item": 0, "answer": 0, "subject": "a", "characters": [2, 10], "named": [-4.0, -5.0],
         "nameless": [-4.0, -6.0]},
        {"item": 1, "answer": 2, "subject": "b", "characters": [4, 4, 4, 4], "named": [-4.0, -4.0, -1.0, -4.0],
         "nameless": [-1.0] * 4},
    ]  # fmt: skip
    worse = [items[0], items[1] | {"named": [-1.0, -4.0, -4.0, -4.0]}]
    found = {name: each.value for name, each in choices.figures(items, worse, 0).items()}
    assert found == pytest.approx(
        {
            "acc": 1.0,
            "acc_norm": 0.5,
            "pmi": 0.5,
            "acc_centred": 1.0,
            "acc/a": 1.0,
            "acc/b": 1.0,
            "acc_difference": 0.5,
            "acc_norm_difference": 0.5,
            "pmi_difference": 0.5,
        }
    )
    chance = choices.figures(worse, None, 0)["acc_centred"].value
    assert chance == pytest.approx((0.5 - 0.375) / 0.625), "a half right, and by guessing 1/2 and 1/4"
    assert choices.per_item(items)["acc_norm"] == {0: (0.0, 1.0), 1: (1.0, 1.0)}


def test_the_most_frequent_answer_counts() -> None:
    answers = ["so 4", "it is 5", "5.0", "4", "4"]
    item = {"answers": answers, "ended": [True, True, True, True, False], "correct": [1.0, 0.0, 0.0, 1.0, 0.0]}
    assert exercises._majority(item, "number") == 1.0, "two and two: the first, and who was cut off has no vote"
    assert exercises._majority(item | {"ended": [False, True, True, True, False]}, "number") == 0.0
    assert exercises._majority(item | {"ended": [False] * 5}, "number") == 0.0
    found = exercises.figures(
        [
            {"item": 0, "correct": [1.0, 0.0], "lengths": [2, 4], "ended": [True, False], "majority": 1.0},
            {"item": 7, "correct": [0.0, 0.0], "lengths": [4, 6], "ended": [True, True], "majority": 0.0},
        ],
        [{"item": 0, "correct": [0.0, 0.0], "lengths": [1, 1], "ended": [True, True], "majority": 0.0}],
        0,
    )
    assert {name: each.value for name, each in found.items()} == {
        "accuracy": 0.25,
        "length": 4.0,
        "ended": 0.75,
        "majority": 0.5,
        "difference": 0.5,
        "majority_difference": 1.0,
    }


def test_samples_of_a_question_are_the_same_whoever_is_beside_it(base_subject: Subject, tmp_path: Path) -> None:
    rows = [{"question": f"{i} and {i}?", "answer": f"#### {i}"} for i in range(5)]
    own = read(tmp_path, *rows)
    assert own.match == "number"
    rules = Rules("number", 3, 1.0, 6, ("the", "\n\n"))
    uniforms = draw_uniforms(15, 6, torch.Generator().manual_seed(0)).view(5, 3, 6)
    asker = Asker(base_subject, False)
    whole = exercises.score(asker, own.exercises, own.shown, rules, uniforms)
    parts = [
        item
        for places in ([0, 3], [1, 2, 4])
        for item in exercises.score(asker, [own.exercises[i] for i in places], own.shown, rules, uniforms[places])
    ]
    assert sorted(parts, key=lambda item: item["item"]) == whole
    assert len({answer for item in whole for answer in item["answers"]}) > 5
    assert not any("the" in answer for item in whole for answer in item["answers"])


@pytest.mark.parametrize("samples", [1, 2])
def test_examples_before_answers_are_read_once(base_subject: Subject, tmp_path: Path, samples: int) -> None:
    """Two subjects with an example each: the answers are those of questions one by one, each with its examples."""
    rows = [{"question": f"{i}?", "answer": f"{i}", "subject": "ab"[i % 2]} for i in range(4)]
    own = read(tmp_path, *[row | {"answer": "sum"} for row in rows], fewshot_data=write(tmp_path / "few.jsonl", *rows),
               num_fewshot=1)  # fmt: skip
    rules = Rules("exact", samples, 1.0, 6, ())
    drawn = draw_uniforms(4 * samples, 6, torch.Generator().manual_seed(0)).view(4, samples, 6)
    uniforms = drawn if samples > 1 else None
    read_tokens: list[int] = []

    def count(module: torch.nn.Module, arguments: tuple[()], given: dict[str, torch.Tensor]) -> None:
        read_tokens.append(given["input_ids"].numel())

    def answers(places: list[int]) -> list[dict[str, Any]]:
        asked = [own.exercises[place] for place in places]
        return exercises.score(
            Asker(base_subject, False), asked, own.shown, rules, None if uniforms is None else uniforms[places]
        )

    with base_subject.model.register_forward_pre_hook(count, with_kwargs=True):
        whole = answers([0, 1, 2, 3])
    asker = Asker(base_subject, False)
    prompts = [asker.prompt(own.shown(each.subject), exercises.asked(each)) for each in own.exercises]
    assert len({(prompt[:shared]) for prompt, shared in prompts}) == 2, "a beginning for each subject"
    lengths = [(len(prompt), shared) for prompt, shared in prompts]
    assert read_tokens[0] == lengths[0][1] > 8
    assert read_tokens[1] == 2 * max(length - shared for length, shared in lengths[::2])
    assert whole == [item for place in range(4) for item in answers([place])]


def test_a_text_is_cut_at_the_ends_of_lines() -> None:
    assert in_pieces("ab\ncd\nefghij\n \n", 6) == ["ab\ncd\n", "efghij"]
    assert "".join(in_pieces("word\n" * 30000)) == "word\n" * 30000


def test_perplexities_by_hand() -> None:
    items = [{"item": i, "nats": 2.0 * (i + 1), "bytes": 4, "words": 2, "tokens": 2} for i in range(2)]
    found = bits_per_byte.perplexities(items, 0)
    assert found["byte_perplexity"].value == pytest.approx(np.exp(6 / 8))
    assert found["word_perplexity"].value == pytest.approx(np.exp(6 / 4))
    assert found["bits_per_byte"].value == pytest.approx(6 / 8 / np.log(2))
    alone = bits_per_byte.perplexities(items[:1], 0)["bits_per_byte"]
    assert np.isnan([alone.low, alone.high]).all()


class Likes:
    """A judge that prefers the longer answer, and in a tie the first."""

    def compare(self, prompts: Any, pairs: Any) -> list[Compared]:
        return [Compared(0.9 if len(a) > len(b) else 0.1, len(a) == len(b)) for a, b in pairs]


def _lengths(prompts: Any, texts: Any) -> list[float]:
    return [float(len(text)) for text in texts]


@pytest.mark.parametrize(
    ("judge", "score", "wins"), [(Likes(), None, [0.9, 0.1, 0.1]), (None, _lengths, [1.0, 0.0, 0.5])]
)
def test_win_rates_by_hand(judge: Likes | None, score: Callable[..., list[float]] | None, wins: list[float]) -> None:
    def said(*answers: str) -> list[dict[str, Any]]:
        return [{"item": 2 * i, "prompt": [], "answer": answer} for i, answer in enumerate(answers)]

    items = win_rate.compared(said("long", "a", "same", "unanswered"), said("lo", "bb", "emas"), judge, score)
    assert [item["win"] for item in items] == wins
    found = win_rate.figures(items, 0)
    assert found["win_rate"].value == pytest.approx(sum(wins) / 3)
    if judge is not None:
        assert found["swayed"].value == pytest.approx(1 / 3)
