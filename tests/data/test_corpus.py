"""The division of a corpus, and the sample a tokenizer is trained on."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.data.corpus import Piece, Sample, Survey, pieces, tail_start
from pipeline.data.sources import share
from pipeline.data.units import cut
from pipeline.recipe import DataEntry


def entry(path: Path, texts: list[str], **options: object) -> DataEntry:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DataEntry(source=str(path), **options)


def all_pieces(entries: list[DataEntry], held_out: float, tail: float, say: Callable[[str], None]) -> list[Piece]:
    return [piece for unit in cut(entries, held_out, tail, say) for piece in pieces(unit)]


def divided(entries: list[DataEntry], held_out: float = 0.1, tail: float = 0.1) -> tuple[list[str], list[str]]:
    found = all_pieces(entries, held_out, tail, lambda text: None)
    return tuple([piece.text for piece in found if piece.is_held_out == side] for side in (False, True))


def test_many_documents_are_divided_by_their_hash(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(1000)]
    train, held_out = divided([entry(tmp_path / "a.jsonl", texts)])
    assert held_out == [text for text in texts if share(text) < 0.1]
    assert train == [text for text in texts if share(text) >= 0.1]
    assert 70 <= len(held_out) <= 130
    more = [*(f"another {i}" for i in range(50)), *reversed(texts), *texts]
    assert set(divided([entry(tmp_path / "b.jsonl", more)])[1]) >= set(held_out)
    assert not set(divided([entry(tmp_path / "b.jsonl", more)])[0]) & set(held_out)


def test_few_documents_give_their_last_tenth(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("".join(f"{i}: line {line:03}\n" for line in range(100)))
    said: list[str] = []
    found = all_pieces([DataEntry(source=str(tmp_path))], 0.5, 0.1, said.append)
    assert [piece.is_held_out for piece in found] == [False, True] * 3
    assert [found[i].text + found[i + 1].text for i in (0, 2, 4)] == [p.read_text() for p in sorted(tmp_path.iterdir())]
    assert found[1].text.startswith("0: line 090\n")
    assert found[1].text.count("\n") == 10
    assert said == [f"{tmp_path}: fewer than 100 documents, so the last 10% of each is held out"]


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("x" * 100, 90),  # no better place: exactly there
        ("x" * 89 + "\n" + "y" * 10, 90),
        ("words " * 167, 900),  # 1,002 letters, so 902 exactly; the last space before it is at 899
        ("x\n" + "y" * 98, 90),  # the line's start is too far off
        ("", 0),
    ],
)
def test_where_a_tail_begins(text: str, start: int) -> None:
    assert tail_start(text, 0.1) == start


def test_weights_repeat_what_the_tokenizer_sees_not_what_is_written(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(500)]
    entries = [entry(tmp_path / "a.jsonl", texts), entry(tmp_path / "b.jsonl", ["x"] * 200)]
    found = all_pieces(entries, 0.1, 0.1, print)
    assert [piece.source for piece in found] == [0] * 500 + [1] * 200
    survey = Survey(Sample(10_000_000))
    for piece in found[:500]:
        survey.add(piece, 1.5)
    train = survey.sample.texts
    assert survey.train_documents == len(set(train)) == sum(not piece.is_held_out for piece in found[:500])
    times = {text: train.count(text) for text in train}
    assert set(times.values()) == {1, 2}
    assert 0.4 < sum(count == 2 for count in times.values()) / len(times) < 0.6


@pytest.mark.slow
def test_pydocs_brings_its_own_division() -> None:
    train, held_out = divided([DataEntry(source="pydocs", limit=200)])
    assert len(train) == len(held_out) == 200  # the limit is of each side
    assert not set(train) & set(held_out)


def test_a_sample_has_its_size_whatever_the_order() -> None:
    texts = [f"{i:010}" for i in range(5000)]
    forward, backward = Sample(10_000), Sample(10_000)
    for text in texts:
        forward.add(text)
    for text in reversed(texts):
        backward.add(text)
    assert sorted(forward.texts) == sorted(backward.texts)
    assert forward.size == 10 * len(forward.texts) <= 10_000
    assert forward.size > 4_000  # halved until it fits: between a half and the whole
    assert forward.texts == sorted(forward.texts)  # in the order they came
    assert forward.texts == [text for text in texts if share(f"sample {text}") < forward.threshold]


def test_a_small_corpus_is_its_own_sample() -> None:
    sample = Sample(1000)
    for text in ("ä" * 10, "b" * 20):
        sample.add(text)
    assert (sample.texts, sample.size) == (["ä" * 10, "b" * 20], 40)
    assert sample.spread(5) == ["äääää"]  # of 40 bytes, every eighth text
    assert sample.spread(15) == ["ä" * 10]  # every second
    assert sample.spread(25) == ["ä" * 10, "b" * 20]


def test_a_survey_counts_both_sides_and_samples_one(tmp_path: Path) -> None:
    survey = Survey(Sample(10_000_000))
    survey.add(Piece("ä" * 1_500_000, False))
    survey.add(Piece("held out ä", True))
    assert (survey.train_documents, survey.train_bytes) == (1, 3_000_000)
    assert (survey.held_out_documents, survey.held_out_bytes) == (1, 11)
    assert survey.pieces == [Piece("ä" * 1_500_000, False), Piece("held out ä", True)]
    survey.add(Piece("a" * 7_000_000, True))
    assert survey.pieces is None, "more than the sample may hold is read again"
    survey.add(Piece("a", True))
    assert (survey.pieces, survey.held_out_documents) == (None, 3)
    assert [len(text) for text in survey.sample.texts] == [1 << 20, 1_500_000 - (1 << 20)]


def test_units_counted_apart_make_the_same_survey_and_sample() -> None:
    """Each with the threshold that was known when it was begun: of the first, some units before."""
    found = [[Piece(f"{unit} {i} " * 9, i % 10 == 0) for i in range(200)] for unit in range(20)]
    together = Survey(Sample(9_000), pieces=None)
    for pieces_ in found:
        for piece in pieces_:
            together.add(piece)
    thresholds, survey = [1.0], Survey(Sample(9_000))
    for number, pieces_ in enumerate(found):
        unit = Survey(Sample(9_000, thresholds[max(0, number - 3)]), pieces=[])
        for piece in pieces_:
            unit.add(piece)
        survey.add_unit(unit)
        thresholds.append(survey.sample.threshold)
    assert thresholds[-1] < 0.1
    assert survey.sample == together.sample
    assert survey.counts == together.counts == survey.units[-1]
    assert survey.units[0] == (180, *survey.units[0][1:2], 20, *survey.units[0][3:])
    assert survey.pieces is None


def test_units_of_a_small_corpus_are_kept_in_memory() -> None:
    survey = Survey(Sample(100))
    for text in ("a" * 40, "b" * 60):
        unit = Survey(Sample(100))
        unit.add(Piece(text, False))
        survey.add_unit(unit)
    assert survey.pieces == [Piece("a" * 40, False), Piece("b" * 60, False)]
    survey.add_unit(unit)
    assert survey.pieces is None
