"""The embedded default data: the documentation of the Python that runs this.

The docstrings of the standard library, of `pydoc_data.topics` and of a fixed list of llmpipe's own
dependencies, about 30 MB of English about Python (`harvest.py`). Offline, and the same wherever Python and
the packages are the same. One split, by a hash of the first sentence, serves every view here: what is held
out of one is in none. Everything is chosen by hashes: there is no random state, and every view gives the same
rows in the same order every time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.data.harvest import Entry, fingerprint, harvest, hash32, normalise, words

__all__ = [
    "Entry",
    "Question",
    "Split",
    "corpus",
    "document",
    "fingerprint",
    "gold",
    "harvest",
    "instruction_rows",
    "preference_rows",
    "questions",
]

Split = Literal["train", "held_out", "all"]
Message = dict[str, str]
QUESTIONS = ("What does `{}` do?", "Describe `{}` in one sentence.", "What is `{}` for?")
NAMELESS = "What does this do?"
NEIGHBOURS = 24  # how far, in the order of length, a sentence of about the same length is looked for


@dataclass(frozen=True, slots=True)
class Question:
    """Which of four sentences describes this function?

    `question` names the function, `nameless` does not (for likelihoods without the name), `swapped` names
    another held-out function, none of whose sentences stands in `choices`: asked so, accuracy is chance.
    """

    name: str
    question: str
    nameless: str
    swapped: str
    choices: tuple[str, ...]
    answer: int  # index into choices


def _of(which: Split) -> list[Entry]:
    return [entry for entry in harvest() if which == "all" or entry.is_held_out == (which == "held_out")]


def _described(which: Split) -> list[Entry]:
    """The entries with a sentence, one a sentence, shortest sentence first."""
    distinct: dict[str, Entry] = {}
    for entry in _of(which):
        if entry.sentence:
            distinct.setdefault(normalise(entry.sentence), entry)
    return sorted(distinct.values(), key=lambda entry: (len(entry.sentence), entry.name))


def document(entry: Entry) -> str:
    """An entry as text: the name, its sentence, the call, the rest.

    `json.loads`: Deserialize `s` to a Python object.

    loads(s, *, cls=None)

    ...
    """
    call = entry.name.rpartition(".")[2] + entry.signature if entry.signature else ""
    head = f"`{entry.name}`: {entry.sentence}" if entry.sentence else f"`{entry.name}`:"
    return "\n\n".join(part for part in (head, call, entry.body) if part)


def corpus(which: Split) -> Iterator[str]:
    """The documents, one an entry, in the order of the harvest."""
    return (document(entry) for entry in _of(which))


def instruction_rows(which: Split) -> Iterator[dict[str, list[Message]]]:
    """`{"messages": [question, first sentence]}`, one a sentence; held out, all are asked in the same words.

    Shuffled by hash, as the preference rows and the questions are: any first n are a sample.
    """
    for entry in sorted(_described(which), key=lambda entry: hash32("instruction", entry.name)):
        yield {"messages": [*_prompt(entry), {"role": "assistant", "content": entry.sentence}]}


def _prompt(entry: Entry) -> list[Message]:
    phrasing = 0 if entry.is_held_out else max(0, hash32("phrasing", entry.name) % 4 - 1)  # half are the first
    return [{"role": "user", "content": QUESTIONS[phrasing].format(entry.name)}]


def preference_rows(which: Split) -> Iterator[dict[str, Any]]:
    """`{"prompt", "chosen", "rejected", "kind"}`: the true sentence over a worse answer, one a sentence.

    Kinds: "other" (half of the rows) is another function's sentence, as likely longer as shorter by a little;
    "truncated" the true sentence cut short; "rambling" the true one with another function's behind it. Other
    functions are of the same side of the split.
    """
    sides: tuple[Split, ...] = ("train", "held_out") if which == "all" else (which,)
    for pool in (_described(side) for side in sides):
        for place in sorted(range(len(pool)), key=lambda i: hash32("preference", pool[i].name)):
            kind, rejected = _worse(pool, place)
            yield {
                "prompt": _prompt(pool[place]),
                "chosen": [{"role": "assistant", "content": pool[place].sentence}],
                "rejected": [{"role": "assistant", "content": rejected}],
                "kind": kind,
            }


def _worse(pool: list[Entry], place: int) -> tuple[str, str]:
    entry = pool[place]
    kind = ("other", "other", "truncated", "rambling")[hash32("kind", entry.name) % 4]
    if kind == "truncated" and len(entry.sentence.split()) < 2:
        kind = "other"  # one word cannot be cut short
    if kind == "truncated":
        parts = entry.sentence.split()
        share = 0.3 + 0.4 * hash32("cut", entry.name) / 2**32
        cut = " ".join(parts[: max(1, int(share * len(parts)))]).rstrip(".,;:")
        return kind, cut + "." * (hash32("stop", entry.name) % 2)  # a full stop is not what tells them apart
    other = pool[_near(pool, place, "other")[0]].sentence
    return kind, f"{entry.sentence} {other}" if kind == "rambling" else other


def _near(pool: list[Entry], place: int, purpose: str) -> list[int]:
    """Places of sentences about as long as that at `place`, in an order of their own."""
    first, last = max(0, place - NEIGHBOURS), min(len(pool) - 1, place + NEIGHBOURS)
    around = [i for i in range(first, last + 1) if i != place]
    return sorted(around, key=lambda i: hash32(purpose, pool[place].name, pool[i].name))


def questions(which: Split = "held_out", limit: int | None = None) -> list[Question]:
    """Multiple choice over the described entries of one side, at most `limit`, in an order by hash.

    Four candidates, all first sentences of that side, of about the same length.
    """
    pool = _described(which)
    order = sorted(range(len(pool)), key=lambda i: hash32("question", pool[i].name))[:limit]
    asked = []
    for place in order:
        name = pool[place].name
        near = _near(pool, place, "choice")[:3]
        answer = hash32("answer", name) % 4
        chosen = [*near[:answer], place, *near[answer:]]
        step = 1 + hash32("swap", name) % (len(pool) - 1)
        while (place + step) % len(pool) in chosen:
            step += 1
        other = pool[(place + step) % len(pool)].name
        asked.append(
            Question(
                name=name,
                question=QUESTIONS[0].format(name),
                nameless=NAMELESS,
                swapped=QUESTIONS[0].format(other),
                choices=tuple(pool[i].sentence for i in chosen),
                answer=answer,
            )
        )
    return asked


def gold(answer: str, truth: str, ended: bool) -> float:
    """ROUGE-L F1 of the words of an answer (Lin 2004): 2PR / (P + R) of their longest common subsequence.

    0 for an answer that did not end itself (`ended`: it came to its stop token), and for an empty one.
    """
    said, true = words(answer), words(truth)
    if not ended or not said or not true:
        return 0.0
    row = [0] * (len(true) + 1)
    for word in said:
        previous = row
        row = [0]
        for j, other in enumerate(true):
            row.append(previous[j] + 1 if word == other else max(previous[j + 1], row[j]))
    return 2 * row[-1] / (len(said) + len(true))
