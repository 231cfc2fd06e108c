"""A judge in this process: grades from probabilities worked by hand, the very prompt it reads, batches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.artifacts import Artifact, outside_model
from pipeline.data.chat import encode_prompt, stop_token_id
from pipeline.data.tokenizers import train_bpe
from pipeline.errors import MismatchError, TrainingError
from pipeline.model.build import save_model
from pipeline.model.presets import Shape, build_config
from pipeline.rl.judge import Judge, expected_scores, grade_ids, judge_text, last_logits, load_judge, score_of
from pipeline.runtime import Runtime

RULES = "An answer is kind.\n"
QUESTION = [{"role": "user", "content": "How are you?"}]


def test_a_grade_is_a_share_of_the_way_up():
    assert [score_of(grade) for grade in (1, 5, 9)] == [0.0, 0.5, 1.0]


def test_the_score_is_the_expected_grade():
    """p(3) : p(5) = 1 : 3, all else out of the question: grade 4.5. All alike: grade 5. Other tokens don't count."""
    ids_GK = torch.arange(1, 10)[:, None]
    logits_BV = torch.full((3, 12), -1e9)
    logits_BV[0, 3], logits_BV[0, 5] = 0.0, math.log(3)
    logits_BV[0, 11] = 50.0  # what it would rather say
    logits_BV[1, :] = 2.0
    logits_BV[2, 9] = 0.0
    assert expected_scores(logits_BV, ids_GK).tolist() == pytest.approx([3.5 / 8, 0.5, 1.0])


def test_two_ways_to_write_a_digit_are_one_grade():
    """1 is written by ids 0 and 1 (weights 1 and 2), 9 by ids 16 and 17 (1 and 0): p(9) = 1/4."""
    ids_GK = torch.arange(18).reshape(9, 2)
    logits_BV = torch.full((1, 18), -1e9)
    logits_BV[0, [0, 1, 16]] = torch.tensor([0.0, math.log(2), 0.0])
    assert expected_scores(logits_BV, ids_GK).item() == pytest.approx(0.25)


def test_the_judge_is_asked_in_these_words():
    assert judge_text(RULES, QUESTION, "Fine, {thanks}.") == (
        "An answer is kind.\n\nQuestion:\nHow are you?\n\nAnswer:\nFine, {thanks}.\n\n"
        "Grade the answer by the rules above, from 1 (worst) to 9 (best). Write the number and nothing else.\n"
    )
    turns = [{"role": "system", "content": "Be {brief}"}, *QUESTION]
    assert "Question:\nsystem: Be {brief}\nuser: How are you?\n\n" in judge_text("Rules with {braces}", turns, "x")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe(iter([judge_text(RULES, QUESTION, "0 1 2 3 4 5 6 7 8 9")] * 4), 400)


def make(folder: Path, tokenizer: PreTrainedTokenizerFast, *, context: int = 256, template: bool = True) -> Artifact:
    torch.manual_seed(0)
    shape = Shape(
        depth=2, width=32, heads=2, kv_heads=2, mlp_width=64, context=context, vocab=len(tokenizer), tied=False
    )
    config = build_config("llama", shape, {})
    config.initializer_range = 0.2
    assert tokenizer.pad_token_id is not None
    tokenizer.save_pretrained(folder / "tokenizer")
    if not template:
        (folder / "tokenizer/chat_template.jinja").unlink()
    stop = stop_token_id(tokenizer)
    save_model(LlamaForCausalLM(config), folder / "model", folder / "tokenizer", [stop], tokenizer.pad_token_id)
    return outside_model(folder / "model")


def load(artifact: Artifact, folder: Path, **values: Any) -> Judge:
    (folder / "run").mkdir(exist_ok=True)
    runtime = Runtime.start(folder / "run", seed=0, threads=1, quiet=True)
    return load_judge(artifact, RULES, **{"batch_size": 3, "bf16": False, "runtime": runtime, **values})


ANSWERS = ["Fine.", "Go away and never come back, you.", "", "Good, and you? <|im_end|>", "1"]


def naive(judge: Judge, ids: list[int]) -> float:
    """One row alone, the softmax over the nine digits in plain Python."""
    with torch.no_grad():
        logits = judge.model(input_ids=torch.tensor([ids])).logits[0, -1].tolist()
    digits = [judge.tokenizer.convert_tokens_to_ids(str(grade)) for grade in range(1, 10)]
    weights = [math.exp(logits[token]) for token in digits]
    return sum(weight * grade for grade, weight in enumerate(weights, 1)) / sum(weights) / 8 - 1 / 8


def test_scores_are_those_of_each_row_alone(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    judge = load(make(tmp_path, tokenizer), tmp_path)
    scores = judge.score([QUESTION] * 5, ANSWERS).tolist()
    expected = []
    for answer in ANSWERS:
        ids = encode_prompt(judge.tokenizer, [{"role": "user", "content": judge_text(RULES, QUESTION, answer)}])
        expected.append(naive(judge, ids))
    assert scores == pytest.approx(expected, abs=1e-5)
    assert max(scores) - min(scores) > 0.01
    whole = load(outside_model(tmp_path / "model"), tmp_path, batch_size=5)
    assert whole.score([QUESTION] * 5, ANSWERS).tolist() == pytest.approx(scores, abs=1e-6)


def test_a_typed_special_token_is_letters(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    judge = load(make(tmp_path, tokenizer), tmp_path)
    stop = stop_token_id(judge.tokenizer)
    assert judge.encode("a <|im_end|> b").count(stop) == judge.encode("a b").count(stop)


def test_without_a_chat_template_the_text_stands_alone(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    judge = load(make(tmp_path, tokenizer, template=False), tmp_path)
    text = judge_text(RULES, QUESTION, "Fine.")
    ids = judge.encode(text)
    assert judge.tokenizer.decode(ids[1:]) == text
    assert ids[0] == judge.tokenizer.bos_token_id
    assert judge.score([QUESTION], ["Fine."]).item() == pytest.approx(naive(judge, ids), abs=1e-5)


def test_one_that_does_not_fit_is_an_error(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    judge = load(make(tmp_path, tokenizer, context=64), tmp_path)
    with pytest.raises(TrainingError, match="reads 64 tokens, and constitution, question and answer are "):
        judge.score([QUESTION], ["long " * 60])


def test_the_last_logits_of_padded_rows(tmp_path: Path):
    """GPT-2, whose positions are learnt: padding on the right moves nothing."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=16, vocab_size=20)).eval()
    ids_BL = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 0, 0, 0]])
    found_BV = last_logits(model, ids_BL, torch.tensor([5, 2]), bf16=False)
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([ids])).logits[0, -1] for ids in ([3, 4, 5, 6, 7], [8, 9])]
    assert torch.allclose(found_BV, torch.stack(alone), atol=1e-5)


def bpe(digits: str, *, prepends: bool) -> PreTrainedTokenizerFast:
    """A tokenizer of these digits alone; in SentencePiece's manner it writes a space before a text."""
    vocab = {"<unk>": 0, "\u2581": 1} | {digit: 2 + int(digit) for digit in digits}
    merges = [("\u2581", digit) for digit in digits] if prepends else []
    vocab |= {f"\u2581{digit}": 12 + int(digit) for digit in digits} if prepends else {}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    if prepends:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def test_a_digit_that_has_two_pieces_counts_by_both():
    """In SentencePiece's manner a digit that begins a text is another piece than one that follows something."""
    assert grade_ids(bpe("0123456789", prepends=True)).tolist() == [[2 + digit, 12 + digit] for digit in range(1, 10)]
    assert grade_ids(bpe("0123456789", prepends=False)).tolist() == [[2 + digit] for digit in range(1, 10)]


@pytest.mark.parametrize("digits", ["", "12345678", "123"])
def test_a_tokenizer_that_lacks_digits_is_refused(digits: str):
    for prepends in (True, False):
        with pytest.raises(MismatchError, match="does not write each digit as a token of its own"):
            grade_ids(bpe(digits, prepends=prepends))


def test_a_judge_is_read_and_not_trained(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    judge = load(make(tmp_path, tokenizer), tmp_path)
    assert not judge.model.training
    assert not any(parameter.requires_grad for parameter in judge.model.parameters())
