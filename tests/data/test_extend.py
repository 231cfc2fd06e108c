"""Extended tokenizers: merges worked by hand, the base's ids kept, and a plain merge loop as the reference."""

import json
import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.data.encoding import BulkEncoder, choose
from pipeline.data.extend import add_specials, extend, in_tokens, is_extension, learn_merges, pieces
from pipeline.data.tokenizers import encode_text, plain_text, split_pattern, train_bpe
from pipeline.errors import ConfigError, MismatchError

CODE = "def falls(self, king): return self.water[king] # <|im_end|> Füße 中文中文 12 1234\n\n\tself.falls(king)\n"
TEXTS = [CODE * 3, CODE.upper(), "self. water\r\n  falls falls falls (self)" * 4]


def changed(tokenizer: PreTrainedTokenizerFast, **model: object) -> PreTrainedTokenizerFast:
    """A tokenizer with other settings of its BPE."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"] |= model
    bpe = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )


def merged(base: PreTrainedTokenizerFast, merges: list[tuple[str, str]], text: str) -> list[str]:
    """The base's tokens of each word of `text`, then every merge in turn, from left to right."""
    found = plain_text(base).prefixed.encode(text, add_special_tokens=False)
    words: dict[int, list[str]] = {}
    for token, word in zip(found.tokens, found.word_ids, strict=True):
        words.setdefault(word, []).append(token)
    for parts in words.values():
        for left, right in merges:
            i = 0
            while i < len(parts) - 1:
                if parts[i] == left and parts[i + 1] == right:
                    parts[i : i + 2] = [left + right]
                i += 1
    return [token for parts in words.values() for token in parts]


def random_texts(count: int) -> list[str]:
    """Texts of pieces that stand in TEXTS, and of any characters."""
    draw = random.Random(0)
    source = "".join(TEXTS)
    texts = []
    for _ in range(count):
        starts = [draw.randrange(len(source) - 12) for _ in range(8)]
        cuts = [source[start : start + draw.randrange(1, 12)] for start in starts]
        texts.append("".join([*cuts, chr(draw.choice([draw.randrange(32, 127), draw.randrange(0xD800)]))]))
    return texts


def test_the_merges_are_those_worked_by_hand(tmp_path: Path) -> None:
    # The base has "ab" (260) and "Ġab" (261). "abab" is ab|ab once, " abab" is Ġab|ab twice: that is the first merge.
    base = train_bpe(iter(["ab ab ab ab cd"]), 262)
    text = "abab abab abab"
    assert encode_text(base, text) == [260, 260, 261, 260, 261, 260]
    assert learn_merges(base, [text], 9) == [("Ġab", "ab"), ("ab", "ab")]
    one = extend(base, [text], 1, tmp_path / "one")
    assert encode_text(one, text) == [260, 260, 262, 262]
    two = extend(base, [text], 2, tmp_path / "two")
    assert encode_text(two, text) == [263, 262, 262]
    assert two.convert_ids_to_tokens([260, 261, 262, 263]) == ["ab", "Ġab", "Ġabab", "abab"]
    assert pieces(base, two) == {262: [261, 260], 263: [260, 260]}
    assert pieces(one, two) == {263: [260, 260]}


def test_a_merge_that_makes_an_old_token_is_left_out_and_what_builds_on_it() -> None:
    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3}
    a, b, c = (chr(0x10000 + i) for i in range(3))
    pairs = [(a, b), (a + b, c), (b, c), (a, b + c), (a + b + c, a), (c, c)]
    assert in_tokens(pairs, vocab, 9) == [("b", "c"), ("a", "bc"), ("abc", "a"), ("c", "c")]
    assert in_tokens(pairs, vocab, 2) == [("b", "c"), ("a", "bc")]


@pytest.mark.parametrize("ignore_merges", [False, True])
@pytest.mark.parametrize("split", ["gpt2", "gpt4"])
def test_a_text_is_the_bases_tokens_and_then_the_new_merges(split: str, ignore_merges: bool, tmp_path: Path) -> None:
    base = train_bpe(iter(["the king falls on the water, a 12 self 中"] * 9), 300, pattern=split_pattern(2, split))
    base = changed(base, ignore_merges=ignore_merges)
    merges = learn_merges(base, TEXTS, 60)
    assert len(merges) == 60
    longer = extend(base, TEXTS, 60, tmp_path / "longer")
    for text in [*TEXTS, *random_texts(300)]:
        ids = encode_text(longer, text)
        assert longer.convert_ids_to_tokens(ids) == merged(base, merges, text)
        assert longer.decode(ids, clean_up_tokenization_spaces=False) == text
    encoder, choice = choose(tmp_path / "longer", random_texts(100))
    assert choice.startswith("encoding with tiktoken: the same ids")
    for text in random_texts(300):
        assert encoder.encode([text])[0].tolist() == encode_text(longer, text)


def test_old_ids_stay_and_new_ones_follow(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    longer = extend(tokenizer, TEXTS, 50, tmp_path)
    assert is_extension(tokenizer, longer)
    assert not is_extension(longer, tokenizer)
    assert sorted(set(longer.get_vocab().values()) - set(tokenizer.get_vocab().values())) == [*range(320, 370)]
    assert (longer.bos_token_id, longer.eos_token_id, longer.pad_token_id) == (0, 1, 3)
    assert longer.chat_template == tokenizer.chat_template
    old_text = "rain and bread"  # no new merge applies
    assert encode_text(longer, old_text) == encode_text(tokenizer, old_text)
    base, more = (sum(len(encode_text(each, text)) for text in TEXTS) for each in (tokenizer, longer))
    assert (base, more) == (442, 212)
    assert 1 in longer("a<|im_end|>b")["input_ids"]
    assert 1 not in encode_text(longer, "a<|im_end|>b")


def test_added_tokens_before_and_after_the_merges(fresh: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    before = fresh.get_vocab()
    assert add_specials(fresh, ["<|tool|>", "<|think|>", "<|tool|>", "<|im_end|>"]) == (
        "2 special tokens added; special already: <|im_end|>"
    )
    assert fresh.convert_tokens_to_ids(["<|tool|>", "<|think|>"]) == [320, 321]
    longer = extend(fresh, TEXTS, 40, tmp_path)
    assert len(longer) == 362
    assert longer.get_vocab().items() >= before.items()
    assert longer.encode("<|tool|>self<|im_start|>")[::2] == [320, 2]
    assert not {0, 1, 2, 3, 320, 321} & set(encode_text(longer, "<|tool|> <|im_start|>"))
    assert "special already: <|tool|>" in add_specials(longer, ["<|tool|>", "<|last|>"])
    assert longer.convert_tokens_to_ids("<|last|>") == 362, "not the id of a merge"
    assert choose(tmp_path, TEXTS)[1].startswith("encoding with tiktoken")


def test_a_special_word_that_texts_would_be_looked_up_for_is_refused(
    fresh: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    add_specials(fresh, ["SPECIAL"])
    longer = extend(fresh, [*TEXTS, "SPECIAL"], 30, tmp_path / "longer")
    ids = encode_text(longer, "SPECIAL")
    assert 320 not in ids
    assert longer.decode(ids) == "SPECIAL"
    assert longer.convert_ids_to_tokens(320) == "SPECIAL"
    assert BulkEncoder(tmp_path / "longer", use_tiktoken=True).encode(["SPECIAL"])[0].tolist() == ids
    with pytest.raises(MismatchError, match="'SPECIAL' is one word"):
        extend(changed(fresh, ignore_merges=True), TEXTS, 30, tmp_path / "refused")


def test_pieces_of_every_kind_of_token(fresh: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    base = changed(fresh)
    add_specials(fresh, ["<|tool|>"])
    fresh.add_tokens([AddedToken("king speaks", special=False)])
    longer = extend(fresh, TEXTS, 60, tmp_path / "longer")
    parts = pieces(base, longer)
    assert sorted(parts) == [*range(320, 382)]
    assert parts[320] == []
    assert parts[321] == encode_text(base, "king speaks")
    tokens = base.convert_ids_to_tokens
    assert all("".join(tokens(parts[i])) == longer.convert_ids_to_tokens(i) for i in range(322, 382))
    assert pieces(base, base) == {}


def test_another_tokenizer_is_no_extension(tokenizer: PreTrainedTokenizerFast) -> None:
    other = train_bpe(iter(TEXTS), 330)
    assert not is_extension(tokenizer, other)
    assert is_extension(tokenizer, tokenizer)


def test_special_tokens_that_are_refused(fresh: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="'Ġold' is an ordinary token") as caught:
        add_specials(fresh, ["<|tool|>", "Ġold"])
    assert caught.value.where == "tokenize.added_tokens"
    assert caught.value.exit_code == 2
    assert len(fresh) == 320
    with pytest.raises(ConfigError, match="' ' is empty"):
        add_specials(fresh, [" "])


def test_too_little_text_is_refused_with_what_there_is(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="makes only 3 new tokens") as caught:
        extend(tokenizer, ["xyz xyz"], 50, tmp_path)
    assert caught.value.mend == "added_merges: 3 or less, or more text"


def test_what_is_no_byte_level_bpe_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    word_piece = Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    characters = Tokenizer(models.BPE({"a": 0, "<0x61>": 1}, [], byte_fallback=True))
    characters.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram = Tokenizer(models.Unigram([("a", 0.0)], 0))
    for bpe, what in [(word_piece, "WordPiece"), (unigram, "Unigram"), (characters, "a BPE of characters")]:
        with pytest.raises(MismatchError, match=f"byte-level BPE alone, and this is {what}|{what}") as caught:
            learn_merges(PreTrainedTokenizerFast(tokenizer_object=bpe), TEXTS, 5)
        assert caught.value.mend.startswith("leave out added_merges")
    with pytest.raises(MismatchError, match="drops merges at random"):
        learn_merges(changed(tokenizer, dropout=0.1), TEXTS, 5)
