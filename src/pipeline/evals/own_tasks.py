"""Tasks of the user's own, read: their rows, their examples, and how each is scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.data.files import file_rows, kind, read_text
from pipeline.data.sources import text_of
from pipeline.errors import ConfigError, DataError
from pipeline.evals import bits_per_byte, choices, exercises, lm_eval_tasks, win_rate
from pipeline.evals.exercises import Rules
from pipeline.evals.fewshot import Shown, shown_for
from pipeline.evals.layouts import Exercise, Question, read_file
from pipeline.evals.statistics import Estimate, PerItem
from pipeline.evaluation_config import Task
from pipeline.rl.verifiable import MARK, answer_number

Item = dict[str, Any]
CHOICES = ("mmlu", "arc", "hellaswag")
WORDS = ("gsm8k", "prompt")
PIECE = 2**15
"""Characters of a text that are scored in one go; a longer one is cut at the ends of lines."""
TEXTS = (".txt", ".text", ".md", ".rst")


@dataclass(frozen=True)
class OwnTask:
    """A task with its rows; those of lm-eval's are its own."""

    name: str
    kind: str
    """multiple_choice, generate, perplexity, win_rate or lm_eval."""
    task: Task
    questions: Sequence[Question] = ()
    exercises: Sequence[Exercise] = ()
    texts: Sequence[str] = ()
    shown: Callable[[str], Shown] = lambda subject: Shown("", ())
    letters: bool = False
    match: Literal["exact", "number"] = "exact"

    def rules(self, max_new_tokens: int) -> Rules:
        """How answers are made; `max_new_tokens` is the evaluation's."""
        task = self.task
        longest = max_new_tokens if task.max_new_tokens is None else task.max_new_tokens
        return Rules(self.match, task.samples, task.temperature, longest, task.until)


def read_own(task: Task, say: Callable[[str], None]) -> OwnTask:
    """The task with its rows and examples; DataError (file, line, reason) for a row that does not fit."""
    if task.is_lm_eval:
        lm_eval_tasks.need_harness(task)
        return OwnTask(task.name, "lm_eval", task)
    assert task.data is not None, "the graph has put it there"
    if task.kind == "perplexity" or (task.kind is None and kind(task.data) in TEXTS):
        texts = _texts(task.data, task.limit)
        say(f"{task.name}: perplexity, {len(texts):,} texts")
        return OwnTask(task.name, "perplexity", task, texts=texts)
    if task.kind is None and "text" in _first(task.data):
        return OwnTask(task.name, "perplexity", task, texts=_texts(task.data, task.limit))
    allowed = {None: (*CHOICES, *WORDS), "multiple_choice": CHOICES}.get(task.kind, WORDS)
    layout, rows, places = read_file(task.data, None, allowed)
    examples, rows, places = _examples(task, layout, rows, places, say)
    rows, places = rows[: task.limit], places[: task.limit]
    own = task.kind or ("multiple_choice" if layout in CHOICES else "generate")
    shots = f", {task.num_fewshot} examples" if task.num_fewshot else ""
    say(f"{task.name}: {own}, {len(rows):,} rows of the layout {layout}{shots}")
    if own == "multiple_choice":
        questions = [row for row in rows if isinstance(row, Question)]
        letters = layout == "mmlu" if task.letters is None else task.letters
        if letters and layout == "hellaswag":
            raise ConfigError("letters: HellaSwag's choices go on with a text", where=task.name, mend="leave it out")
        shown = [choices.example(row, letters) for row in examples if isinstance(row, Question)]
        find = shown_for(task.description, shown, task.num_fewshot)
        return OwnTask(task.name, own, task, questions=questions, shown=find, letters=letters)
    asked = [row for row in rows if isinstance(row, Exercise)]
    match = task.match or ("number" if any(MARK in row.reference for row in asked) else "exact")
    if own == "generate":
        _check_references(asked, places, match)
    said = [exercises.example(row, task.chain_of_thought) for row in examples if isinstance(row, Exercise)]
    return OwnTask(
        task.name, own, task, exercises=asked, match=match, shown=shown_for(task.description, said, task.num_fewshot)
    )


def _check_references(rows: Sequence[Exercise], places: Sequence[str], match: str) -> None:
    for row, where in zip(rows, places, strict=True):
        if not row.reference:
            raise DataError("no reference to compare an answer with", where=where, mend="add `answer`")
        if match == "number" and answer_number(row.reference) is None:
            raise DataError("no number in the reference", where=where, mend="match: exact, or mend the row")


def _examples(
    task: Task, layout: str, rows: list[Question | Exercise], places: list[str], say: Callable[[str], None]
) -> tuple[list[Question | Exercise], list[Question | Exercise], list[str]]:
    """(examples, the rows that are asked, where these stand)."""
    count = task.num_fewshot
    if not count:
        return [], rows, places
    if task.fewshot_data is not None:
        _, examples, _ = read_file(task.fewshot_data, None, (layout,))
        _check_examples(task, examples, {row.subject for row in rows})
        return examples, rows, places
    if len(rows) <= count:
        what = f"{len(rows)} rows, and {count} of them are examples: none is left to ask"
        raise ConfigError(what, where=str(task.data), mend="fewshot_data: another file, or fewer examples")
    say(f"{task.name}: the first {count} rows are examples and not asked")
    return [replace(row, subject="") for row in rows[:count]], rows[count:], places[count:]


def _check_examples(task: Task, examples: Sequence[Question | Exercise], subjects: set[str]) -> None:
    """ConfigError for a subject that is asked and has fewer examples than a question shall have."""
    is_by_subject = any(row.subject for row in examples)
    for subject in sorted(subjects):
        found = sum(row.subject == subject for row in examples) if is_by_subject and subject else len(examples)
        if found < task.num_fewshot:
            what = (
                f"{found} rows{f' of the subject {subject}' if subject else ''}, and num_fewshot is {task.num_fewshot}"
            )
            raise ConfigError(what, where=str(task.fewshot_data), mend=f"num_fewshot: {found}, or more rows")


def _first(path: Path) -> dict[str, Any]:
    return next((row for row, _ in file_rows(path)), {})


def _texts(path: Path, limit: int | None) -> list[str]:
    """The texts of a file in pieces: it is one, or each of its rows holds one as `text`."""
    if kind(path) in TEXTS:
        found = [read_text(path)]
    else:
        found = [text_of(row, "text", where) for row, where in file_rows(path)][:limit]
    pieces = [piece for text in found for piece in in_pieces(text)]
    if not pieces:
        raise DataError("no text in this file", where=str(path), mend="name a file with text")
    return pieces


def in_pieces(text: str, most: int = PIECE) -> list[str]:
    """The text cut at the ends of lines into pieces of `most` characters or less; a longer line is cut anywhere."""
    pieces, start = [], 0
    while start < len(text):
        end = start + most
        line = text.rfind("\n", start, end) + 1 if end < len(text) else 0
        end = line if line > start else end
        pieces.append(text[start:end])
        start = end
    return [piece for piece in pieces if piece.strip()]


def figures(own: OwnTask, items: Sequence[Item], baseline: Sequence[Item] | None, seed: int) -> dict[str, Estimate]:
    """The task's figures; `baseline` is the baseline's items, None for itself and where there is none."""
    if own.kind == "multiple_choice":
        return choices.figures(items, baseline, seed)
    if own.kind == "generate":
        return exercises.figures(items, baseline, seed)
    if own.kind == "perplexity":
        return bits_per_byte.perplexities(items, seed)
    assert own.kind == "win_rate", own.kind
    return win_rate.figures(items, seed)


def per_item(own: OwnTask, items: Sequence[Item]) -> PerItem:
    """The figures item by item, of those that are a mean or a ratio of sums."""
    if own.kind == "multiple_choice":
        return choices.per_item(items)
    if own.kind == "generate":
        return exercises.per_item(items)
    if own.kind == "perplexity":
        return bits_per_byte.per_item(items)
    assert own.kind == "win_rate", own.kind
    return win_rate.per_item(items)
