"""Fill in the middle: nothing of a text is lost, the parts stand where the marks say, and a position has one sample."""

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from pipeline.data.infilling import NAMES, Infilled, Marks, marks_of
from pipeline.data.packing import Windows
from pipeline.data.tokenizers import encode_text, train_bpe
from pipeline.errors import ConfigError

TEXTS = ["the cat sat on the mat, quietly.", "naïve 中文 text", "x = {1: 2}\n\n\tif x:\n\t\tpass\n", "ab"] * 6


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    found = train_bpe(iter(TEXTS * 3), 330)
    found.add_special_tokens({"extra_special_tokens": list(NAMES[0])}, replace_extra_special_tokens=False)
    return found


def stream_of(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    assert tokenizer.bos_token_id is not None
    ids: list[int] = []
    for text in TEXTS:
        ids += [*encode_text(tokenizer, text), tokenizer.bos_token_id]
    return np.array(ids)


def infilled(tokenizer: PreTrainedTokenizerFast, length: int, rate: float = 1.0, spm: float = 0.0, apart: bool = False):
    separator = tokenizer.bos_token_id
    assert separator is not None
    return Infilled(
        Windows(stream_of(tokenizer), length, 0),
        rate=rate,
        spm_share=spm,
        marks=marks_of(tokenizer),
        separator=separator,
        decode=tokenizer.decode,
        encode=lambda text: encode_text(tokenizer, text),
        seed=5,
        apart=apart,
    )


def retold(ids: list[int], marks: Marks, is_spm: bool) -> tuple[list[int], list[int], list[int]]:
    """(before, between, after) of one document by its marks; in the second form before and between stand together."""
    prefix, suffix, middle = (ids.index(mark) for mark in (marks.prefix, marks.suffix, marks.middle))
    assert prefix == 0
    if is_spm:
        assert suffix == 1
        return ids[middle + 1 :], [], ids[2:middle]
    return ids[1:suffix], ids[middle + 1 :], ids[suffix + 1 : middle]


@pytest.mark.parametrize("is_spm", [False, True])
def test_every_document_is_all_there_in_another_order(tokenizer: PreTrainedTokenizerFast, is_spm: bool):
    length = len(stream_of(tokenizer)) - 1
    made = infilled(tokenizer, length, spm=float(is_spm))
    ids = made.sample(made.order.take([0]).rows_BT[0].tolist(), 0)
    assert ids[-1] == made.separator
    documents = " ".join(map(str, ids)).split(f" {made.separator}")
    found = []
    for text in documents[:-1]:
        part = list(map(int, text.split()))
        if made.marks.middle in part:
            before, between, after = retold(part, made.marks, is_spm)
            found.append("".join(map(tokenizer.decode, (before, between, after))))
        else:
            found.append(tokenizer.decode(part))
            assert len(part) < 4
    assert found == TEXTS


def test_cuts_fall_anywhere_between_characters(tokenizer: PreTrainedTokenizerFast):
    made = infilled(tokenizer, 20)
    ids = encode_text(tokenizer, TEXTS[0])
    cuts = []
    for i in range(4000):
        before, between, _ = retold(made.told_anew(ids, [i / 4000, (i * 0.618) % 1, 0.5]), made.marks, False)
        cuts += [len(tokenizer.decode(before)), len(tokenizer.decode(before) + tokenizer.decode(between))]
    counts = np.bincount(cuts, minlength=len(TEXTS[0]) + 1)
    assert len(counts) == len(TEXTS[0]) + 1
    assert counts.min() > 0.8 * 8000 / len(counts)


def test_a_character_that_a_window_has_cut_stays_as_it_is(tokenizer: PreTrainedTokenizerFast):
    made = infilled(tokenizer, 20)
    ids = encode_text(tokenizer, "語 and more text")[1:]
    assert made.told_anew(ids, [0.3, 0.6, 0.5]) == ids


def test_samples_have_one_length_and_padding_is_no_target(tokenizer: PreTrainedTokenizerFast):
    made = infilled(tokenizer, 40, rate=0.7, spm=0.5, apart=True)
    batch = made.take(range(12))
    assert batch.rows_BT.shape == (12, 41)
    assert batch.is_target_BT is not None
    assert batch.positions_BT is not None
    assert batch.is_target_BT.mean() > 0.9
    assert ((batch.positions_BT == 0) >= (batch.rows_BT[:, :-1] == made.separator)).all()
    again = [made.take([position]).rows_BT[0] for position in (7, 3, 11)]
    assert (np.stack(again) == batch.rows_BT[[7, 3, 11]]).all()
    plain = infilled(tokenizer, 40, rate=0.0).take(range(12))
    assert (plain.rows_BT == made.order.take(range(12)).rows_BT).all()
    assert (batch.rows_BT == made.marks.middle).any(axis=1).mean() > 0.5


def test_a_tokenizer_without_the_marks_is_refused():
    with pytest.raises(ConfigError, match="no tokens for filling in") as caught:
        marks_of(train_bpe(iter(TEXTS), 300))
    assert "added_tokens: [<|fim_prefix|>, <|fim_suffix|>, <|fim_middle|>]" in str(caught.value)
