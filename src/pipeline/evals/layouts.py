"""The layouts of local rows that eval's own tasks read, recognised by their fields.

    mmlu       {"question", "choices": [text, …], "answer": 2 or "C"}                       and optionally "subject"
    arc        {"question", "choices": {"text": […], "label": ["A", …]}, "answerKey": "C"}
               {"question": {"stem", "choices": [{"text", "label"}, …]}, "answerKey": "C"}
    hellaswag  {"ctx" or "ctx_a" and "ctx_b", "endings": [text, …], "label": 2}             and "activity_label"
    gsm8k      {"question", "answer"}       the answer is what is behind its last ####, where there is one
    prompt     {"prompt"} or {"instruction", "input"}, and optionally "completion", "output", "reference" or "target"

Questions are worded as lm-eval words those of these benchmarks, so that figures compare.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.files import Row, file_rows
from pipeline.errors import DataError
from pipeline.rl.verifiable import MARK

LAYOUTS = ("mmlu", "arc", "hellaswag", "gsm8k", "prompt")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
REFERENCES = ("completion", "output", "reference", "target", "answer")


@dataclass(frozen=True)
class Question:
    """A question with its choices; `item` is its row's place in the file."""

    item: int
    text: str
    choices: tuple[str, ...]
    answer: int
    subject: str
    is_continued: bool
    """The choices go on with the text (HellaSwag), else they answer it."""


@dataclass(frozen=True)
class Exercise:
    """A question that is answered in the model's own words."""

    item: int
    text: str
    reference: str
    """"" where there is none."""
    subject: str


def recognise(row: Row, where: str) -> str:
    """The layout by a row's fields; DataError where none fits."""
    if "endings" in row and ("ctx" in row or "ctx_a" in row):
        return "hellaswag"
    if "answerKey" in row and "question" in row:
        return "arc"
    if "question" in row and "choices" in row and "answer" in row:
        return "mmlu"
    if "question" in row and "answer" in row:
        return "gsm8k"
    if "prompt" in row or "instruction" in row:
        return "prompt"
    known = "mmlu: question, choices, answer; arc: question, choices, answerKey; hellaswag: ctx, endings, label; "
    known += "gsm8k: question, answer; prompt: prompt, completion"
    raise DataError(
        f"no known layout has the fields {', '.join(row) or '(none)'}", where=where, mend=f"rename the fields: {known}"
    )


def read_file(
    path: Path, limit: int | None, allowed: tuple[str, ...]
) -> tuple[str, list[Question | Exercise], list[str]]:
    """(layout, its questions, where each stands). DataError (file, line, reason) for a row that does not fit."""
    layout, found, places = "", [], []
    for number, (row, where) in enumerate(file_rows(path)):
        if number == limit:
            break
        layout = layout or recognise(row, where)
        if layout not in allowed:
            mend = f"rows of {' or '.join(allowed)}, or another `kind`"
            raise DataError(f"these are {layout} rows, and the task takes others", where=where, mend=mend)
        found.append(READERS[layout](number, row, where))
        places.append(where)
    if not found:
        raise DataError("no row in this file", where=str(path), mend="name a file with rows")
    return layout, found, places


def _mmlu(item: int, row: Row, where: str) -> Question:
    choices = _choices(row.get("choices"), "choices", where)
    answer = _by_letter_or_text(row.get("answer"), choices, where)
    subject = row.get("subject")
    text = _text(row, "question", where).strip()
    return Question(
        item,
        text,
        choices,
        _place(answer, choices, "answer", where),
        subject if isinstance(subject, str) else "",
        False,
    )


def _by_letter_or_text(answer: Any, choices: tuple[str, ...], where: str) -> Any:
    """The place that a letter, a number or a choice's text names, -1 for none; DataError where it names two."""
    if not isinstance(answer, str):
        return answer
    key = answer.strip()
    place = int(key) if key.isdecimal() else LETTERS.find(key.upper()) if len(key) == 1 else -1
    place = place if place < len(choices) else -1
    named = choices.index(answer) if answer in choices else -1
    if place >= 0 and named >= 0 and place != named:
        what = f"field `answer`: {answer!r} is the text of choice {named} and stands for choice {place}"
        raise DataError(what, where=where, mend=f"write the place as a number, 0 to {len(choices) - 1}, not as a text")
    return max(place, named)


def _arc(item: int, row: Row, where: str) -> Question:
    asked = row["question"]
    text, given = (asked.get("stem"), asked.get("choices")) if isinstance(asked, dict) else (asked, row.get("choices"))
    if isinstance(given, dict):
        texts, labels = given.get("text"), given.get("label")
    elif isinstance(given, list) and all(isinstance(each, dict) for each in given):
        texts, labels = [each.get("text") for each in given], [each.get("label") for each in given]
    else:
        texts, labels = None, None
    choices = _choices(texts, "choices", where)
    if not isinstance(text, str) or not isinstance(labels, list) or len(labels) != len(choices):
        raise DataError("an arc row has a question and a label for each of its choices", where=where)
    key = str(row.get("answerKey"))
    answer = [str(label) for label in labels].index(key) if key in map(str, labels) else -1
    return Question(item, text, choices, _place(answer, choices, "answerKey", where), "", False)


def _hellaswag(item: int, row: Row, where: str) -> Question:
    if isinstance(row.get("ctx_a"), str) and isinstance(row.get("ctx_b"), str):
        text = f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
    else:
        text = _text(row, "ctx", where)
    if isinstance(row.get("activity_label"), str):
        text = f"{row['activity_label']}: {text}"
    choices = tuple(_cleaned(choice) for choice in _choices(row.get("endings"), "endings", where))
    return Question(item, _cleaned(text), choices, _place(row.get("label"), choices, "label", where), "", True)


def _cleaned(text: str) -> str:
    """Without what WikiHow left in HellaSwag's texts: `[title]`, `[step]`, and two spaces in a row."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _gsm8k(item: int, row: Row, where: str) -> Exercise:
    subject = row.get("subject")
    reference = _text(row, "answer", where).strip()
    return Exercise(item, _text(row, "question", where).strip(), reference, subject if isinstance(subject, str) else "")


def _prompt(item: int, row: Row, where: str) -> Exercise:
    text = _text(row, "prompt" if "prompt" in row else "instruction", where)
    if isinstance(row.get("input"), str) and row["input"] and "prompt" not in row:
        text += f"\n\n{row['input']}"
    reference = next((row[key] for key in REFERENCES if isinstance(row.get(key), str)), "")
    return Exercise(item, text.strip(), reference.strip(), "")


READERS: dict[str, Callable[[int, Row, str], Question | Exercise]] = {
    "mmlu": _mmlu, "arc": _arc, "hellaswag": _hellaswag, "gsm8k": _gsm8k, "prompt": _prompt,
}  # fmt: skip


def final_answer(reference: str) -> str:
    """What is behind the last ####, all of it where there is none."""
    return reference.rpartition(MARK)[2].strip()


def _text(row: Row, key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        what = "is missing" if key not in row else "holds no text"
        raise DataError(f"field `{key}` {what}", where=where, mend="mend the row, or take it out")
    return value


def _choices(value: Any, key: str, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) and each for each in value) or len(value) < 2:
        raise DataError(f"field `{key}` is no list of two texts or more", where=where, mend="mend the row")
    if len(value) > len(LETTERS):
        raise DataError(f"{len(value)} choices, more than there are letters", where=where, mend="take the row out")
    return tuple(value)


def _place(value: Any, choices: tuple[str, ...], key: str, where: str) -> int:
    """The place of the right choice, from 0."""
    place = int(value) if isinstance(value, str) and value.isdecimal() else value
    if not isinstance(place, int) or isinstance(place, bool) or not 0 <= place < len(choices):
        letters = f"0 to {len(choices) - 1}, or one of its labels"
        raise DataError(f"field `{key}` names none of the {len(choices)} choices", where=where, mend=letters)
    return place
