"""Which of the answers to a prompt are kept, and as what rows: all, the best, pairs, or the data's own over them.

An answer that is empty is never kept. One that was cut off before its end is left out too unless `keeps_unfinished`: a
stage that trains on it would teach its stop token there. Of answers that were to be revised (revising.py) one that no
round came to an end with is left out. Everything is counted by why it was left out. Needs no torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Message = dict[str, str]
Row = dict[str, Any]
Keep = Literal["all", "best", "pairs", "reference", "revised"]

UNFINISHED = "unfinished"
EMPTY = "empty"
LOW = "below the threshold"
TIED = "tied"
EQUAL = "equal to the other side"
NOT_REVISED = "without a critique and revision of use"

REVISED, UNCHANGED, NO_FAULT = "revised", "unchanged", "no fault"
"""What comes of a round of critique and revision that came to its end."""


@dataclass(frozen=True)
class Answer:
    """One answer and what it is worth."""

    text: str
    is_ended: bool
    score: float | None = None
    revised: str | None = None
    """It after the rounds of critique and revision, where there were any."""
    rounds: Sequence[Row] = ()

    @property
    def went_through(self) -> bool:
        """Whether a round came to its end: the answer was written anew, or found without fault."""
        return any(each["outcome"] in (REVISED, UNCHANGED, NO_FAULT) for each in self.rounds)


@dataclass(frozen=True)
class Group:
    """A prompt and the answers to it. `reference` is the data's own answer, "" without one."""

    prompt: list[Message]
    reference: str
    answers: Sequence[Answer]


@dataclass(frozen=True)
class Keeping:
    """What is kept of a group."""

    keep: Keep
    against: Literal["worst", "random"]
    """pairs: what the best one is set against."""
    threshold: float | None
    """The lowest score that is kept; of a pair, of its better side."""
    min_margin: float
    """pairs: the sides' scores differ by more than this."""
    keeps_unfinished: bool
    draw: Callable[[int, int], int]
    """(number of the group, n) -> one of 0 … n - 1, by chance: the other side where `against` is random."""

    def rows(self, groups: Sequence[Group]) -> tuple[list[Row], Counter[str]]:
        """The rows of all groups, in their order, and how many answers (of pairs: groups) were left out, by why.

        Scores are written to 6 decimals. Of equal scores the first answer counts as the best, and as the worst.
        """
        rows: list[Row] = []
        why: Counter[str] = Counter()
        for number, group in enumerate(groups):
            answers = self._usable(group, why)
            if self.keep == "pairs":
                rows += self._pair(number, group, answers, why)
            elif self.keep == "reference":
                rows += _under_reference(group, answers, why)
            elif self.keep == "revised":
                rows += _over_original(group, answers, why)
            else:
                rows += self._demonstrations(group, answers, why)
        return rows, why

    def _usable(self, group: Group, why: Counter[str]) -> list[Answer]:
        usable = []
        for answer in group.answers:
            if not answer.text.strip():
                why[EMPTY] += 1
            elif not (answer.is_ended or self.keeps_unfinished):
                why[UNFINISHED] += 1
            elif answer.revised is not None and not answer.went_through:
                why[NOT_REVISED] += 1
            else:
                usable.append(answer)
        return usable

    def _is_low(self, answer: Answer) -> bool:
        return self.threshold is not None and _score(answer) < self.threshold

    def _demonstrations(self, group: Group, answers: list[Answer], why: Counter[str]) -> list[Row]:
        chosen = [max(answers, key=_score)] if answers and self.keep == "best" else answers
        high = [answer for answer in chosen if not self._is_low(answer)]
        why[LOW] += len(chosen) - len(high)
        return [
            {"messages": [*group.prompt, {"role": "assistant", "content": _final(answer)}]}
            | _scored("score", answer)
            | ({"original": answer.text, "revisions": list(answer.rounds)} if answer.rounds else {})
            for answer in high
        ]

    def _pair(self, number: int, group: Group, answers: list[Answer], why: Counter[str]) -> list[Row]:
        if len(answers) < 2:
            why["fewer than two answers"] += 1
            return []
        best = max(answers, key=_score)
        others = [answer for answer in answers if answer is not best]
        other = min(others, key=_score) if self.against == "worst" else others[self.draw(number, len(others))]
        margin = _score(best) - _score(other)
        if self._is_low(best):
            why[LOW] += 1
        elif best.text.strip() == other.text.strip():
            why[EQUAL] += 1
        elif margin <= self.min_margin:
            why[TIED] += 1
        else:
            sides = {"chosen": best.text, "rejected": other.text}
            scores = _scored("score_chosen", best) | _scored("score_rejected", other)
            return [{"prompt": group.prompt, **sides, **scores, "margin": round(margin, 6)}]
        return []


def _under_reference(group: Group, answers: list[Answer], why: Counter[str]) -> list[Row]:
    """The data's own answer over each of the model's (SPIN, Chen et al. 2024)."""
    if not group.reference.strip():
        why["no answer in the data"] += 1
        return []
    rows = []
    for answer in answers:
        if answer.text.strip() == group.reference.strip():
            why[EQUAL] += 1
        else:
            row = {"prompt": group.prompt, "chosen": group.reference, "rejected": answer.text}
            rows.append(row | _scored("score_rejected", answer))
    return rows


def _over_original(group: Group, answers: list[Answer], why: Counter[str]) -> list[Row]:
    """Each revised answer over what it was at first."""
    rows = []
    for answer in answers:
        if _final(answer).strip() == answer.text.strip():
            why[EQUAL] += 1
        else:
            sides = {"chosen": _final(answer), "rejected": answer.text}
            rows.append({"prompt": group.prompt, **sides, "revisions": list(answer.rounds)})
    return rows


def _final(answer: Answer) -> str:
    return answer.text if answer.revised is None else answer.revised


def _score(answer: Answer) -> float:
    assert answer.score is not None, "what is chosen by scores has scores"
    return answer.score


def _scored(name: str, answer: Answer) -> Row:
    return {} if answer.score is None else {name: round(answer.score, 6)}


def figures(groups: Sequence[Group]) -> dict[str, float]:
    """Of all answers: the share that came to an end, and the share of texts that none before it in its group has; with
    scores their mean, the mean deviation within a group, and the mean of each group's best."""
    answers = [answer for group in groups for answer in group.answers]
    distinct = sum(len({answer.text for answer in group.answers}) for group in groups)
    found = {
        "ended": sum(answer.is_ended for answer in answers) / len(answers),
        "distinct": distinct / len(answers),
    }
    if answers[0].score is None:
        return found
    scores = [[_score(answer) for answer in group.answers] for group in groups]
    found["score"] = math.fsum(map(math.fsum, scores)) / len(answers)
    found["score_std"] = math.fsum(map(_deviation, scores)) / len(groups)
    found["score_best"] = math.fsum(map(max, scores)) / len(groups)
    return found


def revising_figures(groups: Sequence[Group]) -> dict[str, float]:
    """Of the rounds of critique and revision: the share of each outcome (`revised`, `no_fault`, `critique_empty`, …),
    and of the answers that went into the first round the share that is another text after the last one."""
    answers = [answer for group in groups for answer in group.answers if answer.rounds]
    outcomes = Counter(each["outcome"] for answer in answers for each in answer.rounds)
    found = {f"rounds_{name.replace(' ', '_')}": count / outcomes.total() for name, count in sorted(outcomes.items())}
    if answers:
        found["changed"] = sum(_final(answer).strip() != answer.text.strip() for answer in answers) / len(answers)
    return found


def _deviation(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
