"""Stop strings: against a search in the whole text, and by hand."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pipeline.model.stop_strings import MARGIN, StopStrings, before_stop


def byte_tokenizer() -> Tokenizer:
    """One token a byte, a few tokens of several, and one that writes nothing."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.add_tokens(["ab\n\nQ", "\n\n", "END."])
    tokenizer.add_special_tokens(["<silent>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_a_row_ends_where_the_whole_text_first_holds_a_stop_string():
    tokenizer = byte_tokenizer()
    strings = ["\nQ", "END", "é–"]
    pieces = ["E", "N", "D", "\n", "Q", "é", "–", "ab\n\nQ", "\n\n", "END.", "<silent>", "x", "😀"]
    draw, ended = random.Random(0), 0
    for _ in range(300):
        text = "".join(draw.choices(pieces, k=14))
        ids = tokenizer.encode(text).ids
        stops = StopStrings(strings, tokenizer.decode)
        for end in range(1, len(ids) + 1):
            expected = any(string in tokenizer.decode(ids[:end]) for string in strings)
            assert stops.found(ids[:end]) == expected
            if expected:
                ended += 1
                break
    assert 150 < ended < 300


def test_no_more_than_its_reach_is_read():
    read: list[int] = []

    def decode(ids: list[int]) -> str:
        read.append(len(ids))
        return "".join(chr(token) for token in ids)

    stops = StopStrings(["stop", "–"], decode)  # the dash is three bytes
    assert not stops.found([ord("s")] * 1000)
    assert max(read) == 4 + MARGIN
    assert stops.found([*[ord("s")] * 1000, *map(ord, "stop")])


def test_letters_that_are_not_whole_yet_end_nothing():
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("xé").ids
    stops = StopStrings(["é"], tokenizer.decode)
    assert [stops.found(ids[:end]) for end in (1, 2, 3)] == [False, False, True]


def test_before_stop_by_hand():
    assert before_stop("4\n\nQ: 5", ["Q:", "\n\n"]) == "4"
    assert before_stop("4", ["Q:"]) == "4"
    assert before_stop("Q: 5", ["Q:"]) == ""


def test_an_empty_stop_string_is_refused():
    with pytest.raises(AssertionError):
        StopStrings(["a", ""], str)
