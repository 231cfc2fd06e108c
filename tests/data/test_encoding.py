"""Encoding in bulk: tiktoken's ids are tokenizer.json's own, in any number of processes, or it is not used."""

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.data import encoding
from pipeline.data.tokenizers import encode_text


@pytest.fixture(scope="module")
def folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(path)
    return path


def random_texts(count: int) -> list[str]:
    draw = random.Random(1)
    alphabet = "the king speaks a b\n\t0123'é中🙂<|im_end|>"
    return ["".join(draw.choices(alphabet, k=draw.randrange(60))) for _ in range(count)]


def test_tiktoken_gives_the_ids_of_tokenizer_json(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    encoder, choice = encoding.choose(folder, random_texts(20))
    assert encoder.fast is not None
    assert "tiktoken: the same ids as tokenizer.json on 26 texts" in choice
    texts = [*random_texts(500), *encoding.ODD_TEXTS]
    assert [ids.tolist() for ids in encoder.encode(texts)] == [encode_text(tokenizer, text) for text in texts]


def test_special_strings_are_letters_either_way(folder: Path) -> None:
    text = "<|im_end|><|endoftext|>"
    for use_tiktoken in (True, False):
        ids = encoding.BulkEncoder(folder, use_tiktoken).encode([text])[0]
        assert ids.min() > 3
        assert len(ids) > 4


def test_processes_do_not_change_the_result(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 100)  # many batches
    encoder = encoding.BulkEncoder(folder, use_tiktoken=True)
    tagged = list(enumerate(random_texts(300)))
    alone, together = (list(encoding.encode_all(iter(tagged), encoder, processes)) for processes in (1, 2))
    assert [tag for tag, _ in alone] == list(range(300)) == [tag for tag, _ in together]
    assert all((a == b).all() for (_, a), (_, b) in zip(alone, together, strict=True))
    assert [ids.tolist() for _, ids in alone] == [ids.tolist() for ids in encoder.encode([t for _, t in tagged])]


def test_only_a_bounded_part_of_the_corpus_is_under_way(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 1)  # a text a batch
    taken = []

    def endless() -> "iter[tuple[int, str]]":
        for number in range(1000):
            taken.append(number)
            yield number, "the king"

    for number, _ in encoding.encode_all(endless(), encoding.BulkEncoder(folder, True), 2):
        assert len(taken) <= number + 6
        if number == 50:
            break


def save(folder: Path, state: dict[str, object]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(state))
    return folder


def test_a_tokenizer_on_which_tiktoken_would_differ_is_not_given_to_it(folder: Path, tmp_path: Path) -> None:
    state = json.loads((folder / "tokenizer.json").read_text())
    first, second = state["model"]["merges"][:2]
    state["model"]["merges"][:2] = [second, first]  # ranks and merges no longer agree
    assert encoding.as_tiktoken(state) is None
    encoder, choice = encoding.choose(save(tmp_path / "a", state), [])
    assert encoder.fast is None
    assert choice == "encoding with tokenizers: tiktoken has no form of this tokenizer"


@pytest.mark.parametrize("change", ["normalizer", "added", "byte", "prefix", "dropout", "pattern"])
def test_what_tiktoken_has_no_form_of(folder: Path, change: str) -> None:
    state = json.loads((folder / "tokenizer.json").read_text())
    assert encoding.as_tiktoken(state) is not None
    if change == "normalizer":
        state["normalizer"] = {"type": "NFC"}
    elif change == "added":
        state["added_tokens"].append({**state["added_tokens"][0], "id": 320, "content": "<x>", "special": False})
    elif change == "byte":
        del state["model"]["vocab"]["Ġ"]
    elif change == "prefix":
        state["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True
    elif change == "dropout":
        state["model"]["dropout"] = 0.1
    else:
        state["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "MergedWithNext"
    assert encoding.as_tiktoken(state) is None


def test_a_difference_on_the_sample_is_said_and_obeyed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "pattern_of", lambda pre_tokenizer: r"(?s).")  # no merges
    encoder, choice = encoding.choose(folder, ["the king\n\n\nspeaks 12"])
    assert encoder.fast is None
    assert "tiktoken differs from tokenizer.json on" in choice
    assert encoding.choose(folder, [])[0].slow.encode("the").ids == encoder.encode(["the"])[0].tolist()


def test_gpt2s_own_pre_tokenisation_is_known(tmp_path: Path) -> None:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(random_texts(200), trainer)
    encoder, choice = encoding.choose(save(tmp_path / "a", json.loads(bpe.to_str())), random_texts(300))
    assert encoder.fast is not None, choice


def test_a_megabyte_of_white_space_goes_the_slow_way(folder: Path) -> None:
    encoder = encoding.BulkEncoder(folder, use_tiktoken=True)
    assert encoder.fast is not None
    text = "a" + " " * 1_000_000 + "b"  # on which tiktoken panics
    assert encoder.encode([text])[0].tolist() == encoder.slow.encode(text, add_special_tokens=False).ids


def test_the_letters_of_bytes() -> None:
    letters = encoding.byte_of_letter()
    assert sorted(letters.values()) == list(range(256))
    assert set(letters) == set(pre_tokenizers.ByteLevel.alphabet())
    assert (letters["a"], letters["Ġ"], letters["Ċ"]) == (97, 32, 10)


def test_how_many_processes_pay() -> None:
    assert encoding.processes_for(1_000_000) == 1
    assert encoding.processes_for(10**12) >= 1


def test_bytes_per_token(folder: Path) -> None:
    encoder = encoding.BulkEncoder(folder, use_tiktoken=True)
    tokens = len(encoder.encode(["the king ä"])[0])
    assert encoding.bytes_per_token(encoder, ["the king ä"]) == 11 / tokens
