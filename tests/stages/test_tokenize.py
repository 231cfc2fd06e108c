"""The tokenize stage on small corpora: what it writes, what it refuses, and that it is the same every time."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pipeline import artifacts
from pipeline.artifacts import Artifact
from pipeline.data import extend
from pipeline.data.shards import TokenFile
from pipeline.data.sources import share
from pipeline.data.tokenizers import CHATML, SMALLEST_VOCAB, encode_text, load_tokenizer, train_bpe, train_bytes
from pipeline.errors import ConfigError, DataError, MachineError, Stopped
from pipeline.hashes import tokenizer_hash
from pipeline.runtime import Runtime
from stages import tokenize

WORDS = ["king", "speaks", "water", "stone", "bread", "rain", "falls", "house", "<|im_end|>", "Ä", "42"]


def documents(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [f"{i}: " + " ".join(draw.choices(WORDS, k=draw.randrange(5, 40))) + ".\n" for i in range(count)]


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def run(out: Path, data: object, given: Artifact | None = None, **options: object) -> dict[str, float]:
    out.mkdir(exist_ok=True)
    config = tokenize.TokenizeConfig(data=data, **{"vocab_size": 300, "held_out": 0.1, **options})
    runtime = Runtime.start(out, seed=0, threads=1, quiet=True)
    return tokenize.run(config, {"tokenizer": given}, out, runtime)


def decoded(file: TokenFile, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [tokenizer.decode(file.document(i)[:-1]) for i in range(file.metadata.documents)]


def test_both_sides_hold_their_documents_word_for_word(tmp_path: Path) -> None:
    texts = documents(300)
    figures = run(tmp_path / "out", str(write(tmp_path / "corpus.jsonl", texts)))
    tokenizer = load_tokenizer(tmp_path / "out" / "model")
    train, valid = (TokenFile(tmp_path / "out" / name) for name in ("train.ds", "valid.ds"))
    held_out = [text for text in texts if share(text) < 0.1]
    assert decoded(valid, tokenizer) == held_out
    assert decoded(train, tokenizer) == [text for text in texts if share(text) >= 0.1]
    assert valid.document_bytes.tolist() == [len(text.encode()) for text in held_out]
    assert train.metadata.text_bytes + valid.metadata.text_bytes == sum(len(text.encode()) for text in texts)

    assert valid.document(0).tolist() == [*encode_text(tokenizer, held_out[0]), 0]
    assert int(np.sum(train.tokens == 0)) == train.metadata.documents  # the separator and nothing else
    assert 1 not in train.tokens  # the <|im_end|> of the texts is letters
    assert train.metadata.dtype == "uint16"
    assert train.metadata.tokenizer_hash == tokenizer_hash(tmp_path / "out" / "model") != ""

    assert figures["vocab_size"] == len(tokenizer) == 300
    assert figures["train_tokens"] == len(train)
    assert figures["train_documents"] + figures["valid_documents"] == 300
    text_tokens = len(train) - train.metadata.documents
    assert figures["bytes_per_token"] == train.metadata.text_bytes / text_tokens
    line = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["tokens"] == len(train)
    assert line["valid_bytes"] == valid.metadata.text_bytes


@pytest.mark.parametrize(("algorithm", "vocab"), [("bytes", 260), ("characters", 261)])
def test_bytes_and_characters_hold_every_text_too(algorithm: str, vocab: int, tmp_path: Path) -> None:
    texts = documents(100)
    figures = run(tmp_path / "out", str(write(tmp_path / "corpus.jsonl", texts)), algorithm=algorithm)
    tokenizer = load_tokenizer(tmp_path / "out" / "model")
    assert figures["vocab_size"] == len(tokenizer) == vocab  # of the characters only Ä has two bytes
    train = TokenFile(tmp_path / "out" / "train.ds")
    kept = [text for text in texts if share(text) >= 0.1]
    assert decoded(train, tokenizer) == kept
    units = sum(len(text.encode()) if algorithm == "bytes" else len(text) for text in kept)
    assert figures["train_tokens"] == units + len(kept)


def test_the_model_folder_is_hugging_faces(tmp_path: Path) -> None:
    run(tmp_path / "out", str(write(tmp_path / "corpus.jsonl", documents(200))))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 3)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "king"}], add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(ids) == "<|im_start|>user\nking<|im_end|>\n<|im_start|>assistant\n"


def test_the_tokenizer_never_sees_held_out_text(tmp_path: Path) -> None:
    texts = documents(300)
    secret = [text + " zyxwvut" * 200 if share(text + " zyxwvut" * 200) < 0.1 else text for text in texts]
    assert secret != texts
    kept = [text for text in secret if share(text) >= 0.1]
    assert not any("zyxwvut" in text for text in kept)
    run(tmp_path / "with", str(write(tmp_path / "a.jsonl", secret)))
    tokens = load_tokenizer(tmp_path / "with" / "model").get_vocab()
    assert not any("zy" in token for token in tokens)


@pytest.mark.slow
def test_the_same_bits_whatever_the_processes(tmp_path: Path) -> None:
    corpus = str(write(tmp_path / "corpus.jsonl", documents(400)))
    run(tmp_path / "a", corpus)
    run(tmp_path / "b", corpus, num_proc=2)
    names = [path.relative_to(tmp_path / "a") for path in sorted((tmp_path / "a").rglob("*")) if path.is_file()]
    names = [name for name in names if name.parts[0] != "checkpoints"]
    assert len(names) == 12  # two token files of four parts, the tokenizer's three, metrics.jsonl
    for name in names:
        if name.name != "metrics.jsonl":
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_one_book_gives_its_last_tenth(tmp_path: Path) -> None:
    book = "".join(documents(500))
    (tmp_path / "book.txt").write_text(book)
    run(tmp_path / "out", str(tmp_path / "book.txt"))
    tokenizer = load_tokenizer(tmp_path / "out" / "model")
    (train,), (valid,) = (decoded(TokenFile(tmp_path / "out" / f"{side}.ds"), tokenizer) for side in ("train", "valid"))
    assert train + valid == book
    assert 0.1 <= len(valid) / len(book) < 0.111
    assert train.endswith(".\n")


@pytest.mark.slow
def test_pydocs_is_divided_as_pydocs_says(tmp_path: Path) -> None:
    from pipeline.data import pydocs

    figures = run(tmp_path / "out", {"source": "pydocs", "limit": 300}, vocab_size=600)
    tokenizer = load_tokenizer(tmp_path / "out" / "model")
    valid = decoded(TokenFile(tmp_path / "out" / "valid.ds"), tokenizer)
    assert figures["train_documents"] == figures["valid_documents"] == 300
    assert valid == [text for text, _ in zip(pydocs.corpus("held_out"), range(300), strict=False)]


def model_folder(folder: Path, template: str | None, tokenizer: PreTrainedTokenizerFast) -> Artifact:
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return Artifact(str(folder), folder, "causal-lm", "", {})


def test_a_models_tokenizer_is_taken_as_it_is(tmp_path: Path) -> None:
    corpus = str(write(tmp_path / "corpus.jsonl", documents(200)))
    run(tmp_path / "base", corpus, vocab_size=305)
    template = "{{ messages[0]['content'] }}<|im_end|>"
    base = model_folder(tmp_path / "model", template, load_tokenizer(tmp_path / "base" / "model"))
    figures = run(tmp_path / "out", corpus, base)
    assert figures["vocab_size"] == 305
    assert tokenizer_hash(tmp_path / "out" / "model") == tokenizer_hash(tmp_path / "model")
    assert load_tokenizer(tmp_path / "out" / "model").chat_template == template
    assert (tmp_path / "out" / "train.ds").read_bytes() == (tmp_path / "base" / "train.ds").read_bytes()

    bare = model_folder(tmp_path / "bare", None, load_tokenizer(tmp_path / "base" / "model"))
    run(tmp_path / "dressed", corpus, bare)
    assert "im_start" in str(load_tokenizer(tmp_path / "dressed" / "model").chat_template)


def test_a_models_tokenizer_is_extended(tmp_path: Path) -> None:
    """200 documents in a language the tokenizer has not seen: the same text in fewer tokens, the old ids as before."""
    texts = documents(200)
    run(tmp_path / "base", str(write(tmp_path / "other.jsonl", [text.upper() for text in texts])), vocab_size=305)
    old = load_tokenizer(tmp_path / "base" / "model")
    base = model_folder(tmp_path / "model", old.chat_template, old)
    corpus = str(write(tmp_path / "corpus.jsonl", texts))
    plain = run(tmp_path / "plain", corpus, base, tokenizer="./model")
    figures = run(tmp_path / "out", corpus, base, tokenizer="./model", added_merges=40, added_tokens=("<|tool|>",))

    assert figures["vocab_size"] == 305 + 1 + 40
    assert (plain["train_tokens"], figures["train_tokens"]) == (22_234, 6_946)
    tokenizer = load_tokenizer(tmp_path / "out" / "model")
    assert extend.is_extension(old, tokenizer)
    assert tokenizer.convert_tokens_to_ids("<|tool|>") == 305
    train = TokenFile(tmp_path / "out" / "train.ds")
    assert decoded(train, tokenizer) == [text for text in texts if share(text) >= 0.1]
    assert train.tokens.max() == 345
    assert train.metadata.tokenizer_hash == tokenizer_hash(tmp_path / "out" / "model")

    # Learnt on what is trained on alone; the same text gives the same merges.
    sample = [text for text in texts if share(text) >= 0.1]
    folder = tmp_path / "by_hand"
    extend.add_specials(old, ["<|tool|>"])
    extend.extend(old, sample, 40, folder)
    assert tokenizer_hash(folder) == tokenizer_hash(tmp_path / "out" / "model")


def test_special_tokens_are_added_to_a_trained_tokenizer(tmp_path: Path) -> None:
    corpus = str(write(tmp_path / "corpus.jsonl", [f"{text} <|tool|>" for text in documents(200)]))
    figures = run(tmp_path / "out", corpus, added_tokens=("<|tool|>", "<|pad|>"))
    tokenizer = load_tokenizer(tmp_path / "out" / "model")
    assert figures["vocab_size"] == len(tokenizer) == 301
    assert tokenizer.encode("king<|tool|>")[-1] == 300
    train = TokenFile(tmp_path / "out" / "train.ds")
    assert 300 not in train.tokens, "typed in a text it is letters"
    assert decoded(train, tokenizer)[0].endswith("<|tool|>")


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, corpus = tmp_path / "out", str(write(tmp_path / "corpus.jsonl", documents(200)))
    given = model_folder(tmp_path / "given", CHATML, train_bytes())
    cases: list[tuple[Callable[[], object], type[Exception], str, int]] = [
        (lambda: train_bpe(iter(()), 259), ConfigError, "no room for the 256 bytes", 2),
        (lambda: run(out, corpus, vocab_size=50_000), ConfigError, r"make only \d+ different tokens", 2),
        (lambda: run(out, str(write(tmp_path / "e.jsonl", ["", " "]))), DataError, "no text in the data", 1),
        (lambda: run(out, corpus, added_tokens=("Ġking",)), ConfigError, "'Ġking' is an ordinary token", 2),
        (lambda: run(out, corpus, given, tokenizer="x", added_merges=9000), ConfigError, r"only \d+ new tokens", 2),
        (lambda: run(out, corpus, held_out=1e-9), DataError, "none of the 200 documents is held out", 1),
        (lambda: run(out, corpus, held_out=0.999999), DataError, "all documents are held out", 1),
    ]
    for act, kind, message, code in cases:
        with pytest.raises(kind, match=message) as caught:
            act()
        assert caught.value.exit_code == code
        assert caught.value.mend
    usage = artifacts.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(artifacts.shutil, "disk_usage", lambda folder: usage._replace(free=100))
    with pytest.raises(MachineError, match="writing the token files needs"):
        run(out, corpus)


def test_a_vocabulary_without_room_is_refused_before_anything_is_read() -> None:
    assert tokenize.SMALLEST == SMALLEST_VOCAB
    with pytest.raises(ValidationError, match="the 256 bytes and 4 special tokens take 260 of it"):
        tokenize.TokenizeConfig(data="x", vocab_size=259)
    for more in ({"algorithm": "bytes"}, {"tokenizer": "./base"}):
        assert tokenize.TokenizeConfig(data="x", vocab_size=259, **more).vocab_size == 259


def test_a_wish_to_stop_is_heard_between_documents(tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus.jsonl", documents(200))
    runtime = Runtime.start(tmp_path, seed=0, threads=1, quiet=True)
    runtime.halt.asked = Stopped
    config = tokenize.TokenizeConfig(data=str(corpus), vocab_size=300)
    with pytest.raises(Stopped) as caught:
        tokenize.run(config, {"tokenizer": None}, tmp_path, runtime)
    assert caught.value.exit_code == 75
    assert not (tmp_path / "train.ds").exists()
