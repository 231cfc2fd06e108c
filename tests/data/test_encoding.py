"""Encoding in bulk: tiktoken's ids are tokenizer.json's own, in any number of processes, or it is not used."""

import json
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiktoken
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.data import encoding, workers
from pipeline.data.tokenizers import encode_text
from pipeline.errors import MachineError


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


@pytest.fixture
def crew(monkeypatch: pytest.MonkeyPatch) -> list[workers.Worker]:
    """The workers that were started, in order; a text a batch."""
    started: list[workers.Worker] = []

    class Watched(workers.Worker):
        def __init__(self) -> None:
            super().__init__()
            started.append(self)

    monkeypatch.setattr(workers, "Worker", Watched)
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 1)
    return started


@pytest.mark.parametrize("when", [0, 20])
def test_a_worker_that_is_killed_ends_the_work_with_an_error(
    folder: Path, crew: list[workers.Worker], when: int
) -> None:
    """At its start (0), before it has read anything, and in the midst of its work."""

    def texts() -> Iterator[tuple[int, str]]:
        for number in range(100):
            if number == when:
                crew[1].process.kill()
            yield number, "the king"

    done: list[tuple[int, object]] = []
    with pytest.raises(MachineError, match="was ended by SIGKILL before its work was done") as caught:
        done.extend(encoding.encode_all(texts(), encoding.BulkEncoder(folder, True), 2))
    assert [number for number, _ in done] == list(range(len(done)))
    assert max(0, when - 5) <= len(done) < 100
    assert "num_proc: 1" in caught.value.mend
    assert [worker.process.poll() for worker in crew] == [0, -signal.SIGKILL], "the other one was told to end"


def test_a_worker_that_cannot_start_ends_the_work_with_an_error(folder: Path, tmp_path: Path) -> None:
    encoder = encoding.BulkEncoder(folder, True)
    encoder.folder = tmp_path
    with pytest.raises(MachineError, match="ended with code 1 before its work was done"):
        list(encoding.encode_all([(0, "the king")], encoder, 2))


def test_workers_end_with_their_work(folder: Path, crew: list[workers.Worker]) -> None:
    work = encoding.encode_all(((i, "the king") for i in range(100)), encoding.BulkEncoder(folder, True), 2)
    next(work)
    assert [worker.process.poll() for worker in crew] == [None, None]
    work.close()
    assert [worker.process.poll() for worker in crew] == [0, 0]


SCRIPT = """
import itertools, os, signal, sys
from pathlib import Path
from pipeline.data import encoding, workers
signal.signal(signal.SIGINT, lambda *_: print("heard", flush=True))
encoding.BATCH_CHARACTERS = 1
count = itertools.count() if sys.argv[2] == "endless" else range(20)
work = encoding.encode_all(((i, "the king") for i in count), encoding.BulkEncoder(Path(sys.argv[1]), True), 2)
for number, ids in work:
    if number in (0, 9):
        os.killpg(0, signal.SIGINT)
    print(number, ids.tolist(), flush=True)
"""


def script(folder: Path, tmp_path: Path, which: str) -> "subprocess.Popen[str]":
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(folder), which]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.slow
def test_a_script_without_a_main_guard_and_an_interrupt_of_the_whole_group(folder: Path, tmp_path: Path) -> None:
    """What is the parent's to handle does not reach the workers, and they do not import the parent's script."""
    running = script(folder, tmp_path, "twenty")
    out, errors = running.communicate(timeout=120)
    assert (running.returncode, errors) == (0, "")
    ids = encoding.BulkEncoder(folder, True).encode(["the king"])[0].tolist()
    lines = out.splitlines()
    assert lines.count("heard") == 2
    assert [line for line in lines if line != "heard"] == [f"{number} {ids}" for number in range(20)]


@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed(folder: Path, tmp_path: Path) -> None:
    """Their stderr is the parent's: the pipe is at its end when the last of them is gone."""
    running = script(folder, tmp_path, "endless")
    assert running.stdout is not None
    while "20 " not in running.stdout.readline():
        pass
    running.kill()
    assert running.communicate(timeout=120)[1] == ""


def save(folder: Path, state: dict[str, object]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(state))
    return folder


def trained(folder: Path, pre_tokenizer: object, alphabet: list[str], texts: list[str]) -> Path:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    return save(folder, json.loads(bpe.to_str()))


def digit_texts(count: int) -> list[str]:
    draw = random.Random(2)
    alphabet = "  \n\t 012½٣xy-.'s\U00011de0\U00016ff4\u00a0é"
    return ["".join(draw.choices(alphabet, k=draw.randrange(30))) for _ in range(count)]


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
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    folder = trained(tmp_path / "a", pre_tokenizers.ByteLevel(add_prefix_space=False), alphabet, random_texts(200))
    encoder, choice = encoding.choose(folder, random_texts(300))
    assert encoder.fast is not None, choice


@pytest.mark.slow
def test_a_digit_a_token_before_gpt2s_pre_tokenisation_is_one_regex(tmp_path: Path) -> None:
    """SmolLM2's and StarCoder's. Every other mixture of digits, spaces and letters is a way for it to go wrong."""
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = digit_texts(5000)
    encoder, choice = encoding.choose(
        trained(tmp_path / "a", pre_tokenizers.Sequence(steps), alphabet, texts), [*texts, *random_texts(500)]
    )
    assert encoder.fast is not None, choice
    assert "the same ids as tokenizer.json on 5,506 texts" in choice
    steps[0] = pre_tokenizers.Digits(individual_digits=False)
    encoder, choice = encoding.choose(trained(tmp_path / "b", pre_tokenizers.Sequence(steps), alphabet, texts), [])
    assert encoder.fast is None


@pytest.mark.slow
def test_what_is_a_digit_is_the_same_in_both_engines() -> None:
    """Over all of Unicode: a `tokenizers` that knows a newer one needs its new digits in NUMERIC."""
    every = "".join(f"a{chr(code)}" for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    pieces = pre_tokenizers.Digits(individual_digits=True).pre_tokenize_str(every)
    digits = "".join(piece for piece, _ in pieces if len(piece) == 1 and piece != "a")
    ranks = {bytes([byte]): byte for byte in range(256)}
    found = tiktoken.Encoding("digits", pat_str=f"[{encoding.NUMERIC}]", mergeable_ranks=ranks, special_tokens={})
    assert found.decode(found.encode_ordinary(every)) == digits
    assert len(digits) == 1924


def test_a_text_with_a_byte_that_is_no_token_goes_the_slow_way(tmp_path: Path) -> None:
    """As with SmolLM2, which lacks 21 of the 256: its tokenizer.json leaves such bytes out."""
    texts = random_texts(200)
    folder = trained(tmp_path / "a", pre_tokenizers.ByteLevel(add_prefix_space=False), [], texts)
    odd = ["\x04", "the\x04 king", "ж", "the ж\n", "\U0010ffff", "k" + "\x06" * 9 + "ing", ""]
    encoder, choice = encoding.choose(folder, [*texts, *odd])
    assert encoder.fast is not None, choice
    state = json.loads((folder / "tokenizer.json").read_text())
    missing = 256 - sum(len(token) == 1 for token in state["model"]["vocab"])
    assert missing > 200
    assert encoder.fast.max_token_value == 299 + missing
    assert [encoder.fast.encode_ordinary(text) for text in texts] == [ids.tolist() for ids in encoder.encode(texts)]
    together = encoder.encode(["the\x04 king", "the king"])
    assert together[0].tolist() == encoder.slow.encode("the\x04 king").ids
    assert max(ids.max() for ids in together) < 300
    lacking = next(letter for letter in encoding.byte_of_letter() if letter not in state["model"]["vocab"])
    state["model"]["vocab"][f"k{lacking}"] = 300  # tiktoken would make it, and HF has no merge that could
    assert encoding.as_tiktoken(state) is None


def test_a_tokenizer_that_is_no_bpe_goes_the_slow_way(tmp_path: Path) -> None:
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("the", -1.0), (" king", -2.0)], unk_id=0))
    encoder, _ = encoding.choose(save(tmp_path / "a", json.loads(unigram.to_str())), ["the king"])
    assert encoder.fast is None
    assert encoder.encode(["the king"])[0].tolist() == [1, 2]


@pytest.mark.slow
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
