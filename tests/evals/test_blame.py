"""Which stage taught it this: figures worked by hand on models whose probabilities are set by hand."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from pipeline.data.chat import encode_prompt
from pipeline.data.tokenizers import encode_text
from pipeline.errors import ConfigError
from pipeline.evals.blame import attribute, token_logprobs
from pipeline.evals.subject import Subject
from tests.evals.lines import Line, bigram_model, put_manifest, put_model


def test_gains_and_owners_by_hand():
    """V = 8. Token 0: 1/8 → 1/4 → 1/2, equal gains, the older has it; 1: 1/8 → 1/16 → 1/2; 2: ever lower."""
    logprobs = np.log(np.array([[1 / 4, 1 / 16, 1 / 16], [1 / 2, 1 / 2, 1 / 32]]))
    found = attribute(logprobs, -math.log(8))
    two = math.log(2)
    assert found.gains_ST == pytest.approx(np.array([[two, -two, -two], [two, 3 * two, -two]]))
    assert found.owner_T == [0, 1, None]


def test_logprobs_are_those_of_transformers(chat_subject: Subject):
    """The model's own loss with all but one label masked is -log p of that token."""
    prompt, answer = (encode_text(chat_subject.tokenizer, text) for text in ("read a file", "and close"))
    found = token_logprobs(chat_subject.model, prompt, answer)
    ids = torch.tensor([[*prompt, *answer]])
    for t in range(len(answer)):
        labels = torch.full_like(ids, -100)
        labels[0, len(prompt) + t] = answer[t]
        with torch.no_grad():
            loss = chat_subject.model(input_ids=ids, labels=labels).loss
        assert found[t] == pytest.approx(-float(loss), abs=1e-5)


@pytest.fixture
def line(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Line:
    return Line(tmp_path, tokenizer)


def test_each_token_belongs_to_the_stage_that_raised_it_most(line: Line):
    """ln(V/2) by sft for the first token; ln(V/4) by sft and ln 3 by dpo for the others; pretrain guesses."""
    found = line.blame()
    assert found["answer"] == "sum of"
    assert (found["generated"], found["ended"]) == (True, True)
    assert [token["id"] for token in found["tokens"]] == line.answer
    count, v = len(line.answer), line.vocabulary
    assert found["start_logprob"] == pytest.approx(-math.log(v))
    head, *tail = found["tokens"]
    assert head["gains"] == pytest.approx([0, math.log(v / 2), 0], abs=1e-4)
    for token in tail:
        assert token["logprobs"] == pytest.approx([-math.log(v), math.log(1 / 4), math.log(3 / 4)], abs=1e-4)
        assert token["gains"] == pytest.approx([0, math.log(v / 4), math.log(3)], abs=1e-4)
    assert {token["owner"] for token in found["tokens"]} == {1}
    pretrain, sft, dpo = found["stages"]
    assert [each["reference"] for each in (pretrain, sft, dpo)] == ["tiny/pretrain", "tiny/sft", "tiny/dpo"]
    assert [each["over"] for each in (pretrain, sft, dpo)] == ["uniform", "tiny/pretrain", "tiny/sft"]
    assert [each["tokens"] for each in (pretrain, sft, dpo)] == [0, count, 0]
    assert sft["gain"] == pytest.approx(math.log(v / 2) + (count - 1) * math.log(v / 4), abs=1e-4)
    assert dpo["gain"] == pytest.approx((count - 1) * math.log(3), abs=1e-4)
    assert sft["gain"] + dpo["gain"] == pytest.approx(dpo["logprob"] - pretrain["logprob"])
    assert found["left_out"] == []
    json.dumps(found)


def test_an_answer_that_was_cut_off_has_no_stop_token(line: Line):
    found = line.blame(max_new_tokens=1)
    assert [token["id"] for token in found["tokens"]] == line.answer[:1]
    assert found["ended"] is False


def test_a_given_answer_and_the_tokens_that_no_stage_raised(line: Line):
    """Of "sum file" the second word was never taught: (1 − 1/4) / (V − 1) under sft, (1 − 3/4) / (V − 1) under dpo."""
    found = line.blame(answer="sum file")
    assert found["generated"] is False
    ids = encode_text(line.tokenizer, "sum file")
    assert [token["id"] for token in found["tokens"]] == [*ids, line.stop]
    strange = next(t for t, (a, b) in enumerate(zip(ids, line.answer, strict=False)) if a != b)
    v = line.vocabulary
    expected = [-math.log(v), math.log(0.75 / (v - 1)), math.log(0.25 / (v - 1))]
    assert found["tokens"][strange]["logprobs"] == pytest.approx(expected, abs=1e-4)
    assert found["tokens"][strange]["owner"] is None


def test_the_nearest_rows_are_those_that_were_planted(line: Line):
    """sft's row with the same answer and not its other row; nothing of stages that raised no word."""
    found = line.blame()
    sft = next(each for each in found["nearest"] if each["stage"] == "tiny/sft")
    assert [each["stage"] for each in found["nearest"]] == ["tiny/sft"]
    assert sft["rows"][0]["where"].endswith("rows.jsonl:2")
    assert (sft["rows"][0]["text"], sft["rows"][0]["prompt"], sft["rows"][0]["shared"]) == ("sum of", "add", "sum of")
    assert len(sft["rows"]) == 1


def test_a_base_model_is_asked_in_plain_text_and_points_at_its_shards(line: Line):
    """Its own line is itself: all of a token's gain is over the uniform guess."""
    ids = encode_text(line.tokenizer, "the sum of")
    follow = {a: {b: 0.5} for a, b in itertools.pairwise(ids)}
    base = line.put("pretrain", follow, {"tokens": [line.tokens]}, stop=line.tokenizer.bos_token_id)
    given = line.tokenizer.decode(ids[1:])
    found = line.blame(base, prompt=line.tokenizer.decode(ids[:1]), answer=given)
    assert found["asked_in"] == "plain text"
    assert [token["id"] for token in found["tokens"]] == ids[1:]
    for token in found["tokens"]:
        assert token["gains"] == pytest.approx([math.log(line.vocabulary / 2)], abs=1e-4)
        assert token["owner"] == 0
    (pretrain,) = found["nearest"]
    assert pretrain["rows"][0]["where"] == "tiny/tokenize/train.ds document 6 (books)"
    assert pretrain["rows"][0]["shared"] == given
    with pytest.raises(ConfigError, match="no system message"):
        line.blame(base, system="be kind")


def test_the_system_message_is_part_of_the_prompt(line: Line):
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "open the door"}]
    prompt = encode_prompt(line.tokenizer, messages)
    model = bigram_model(line.vocabulary, {prompt[-1]: {line.answer[0]: 0.5}})
    other = put_model(line.store, "sft", model, line.tokenizer, line.stop, {})
    assert line.blame(other, system="be kind", answer="sum of")["tokens"][0]["logprobs"] == pytest.approx(
        [math.log(0.5)], abs=1e-4
    )


def test_what_is_missing_or_made_again_ends_the_line(line: Line):
    put_manifest(line.store, "pretrain", "causal-lm", {}, fingerprint="another")
    found = line.blame()
    assert [each["reference"] for each in found["stages"]] == ["tiny/sft", "tiny/dpo"]
    (left,) = found["left_out"]
    assert left["reference"] == "tiny/pretrain"
    assert "made again" in left["why"]
    (line.store.folder("tiny", "sft") / "manifest.json").unlink()
    found = line.blame()
    assert [each["reference"] for each in found["stages"]] == ["tiny/dpo"]
    assert "no artifact tiny/sft" in found["left_out"][0]["why"]


def test_an_ancestor_whose_weights_were_taken_away_is_left_out(line: Line):
    shutil.rmtree(line.sft.model)
    found = line.blame()
    assert [each["reference"] for each in found["stages"]] == ["tiny/pretrain", "tiny/dpo"]
    assert found["left_out"] == [{"reference": "tiny/sft", "why": "its model is no longer there"}]


def test_an_ancestor_of_another_tokenizer_is_left_out(line: Line):
    """The middle one: what comes after it is over the nearest that is left."""
    file = line.sft.model / "tokenizer.json"
    content = json.loads(file.read_text())
    content["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(content))
    found = line.blame()
    assert [each["reference"] for each in found["stages"]] == ["tiny/pretrain", "tiny/dpo"]
    assert found["stages"][1]["over"] == "tiny/pretrain"
    assert found["left_out"] == [{"reference": "tiny/sft", "why": "it has another tokenizer"}]


def test_a_chat_model_of_another_template_is_left_out_and_a_base_model_is_not(line: Line):
    for artifact in (line.sft, line.pretrain):
        file = artifact.model / "chat_template.jinja"
        file.write_text(file.read_text() + "{# of another hand #}")
    found = line.blame()
    assert [each["reference"] for each in found["stages"]] == ["tiny/pretrain", "tiny/dpo"]
    assert found["left_out"] == [{"reference": "tiny/sft", "why": "it was taught in another chat template"}]


def test_an_ancestor_that_reads_less_is_left_out(line: Line):
    length = len(line.prompt) + len(line.answer)
    short = bigram_model(line.vocabulary, {}, reach=length - 1)
    put_model(line.store, "pretrain", short, line.tokenizer, line.stop, {})
    assert "tokens, and these are more" in line.blame()["left_out"][0]["why"]
    exact = bigram_model(line.vocabulary, {}, reach=length)
    put_model(line.store, "pretrain", exact, line.tokenizer, line.stop, {})
    assert line.blame()["left_out"] == []


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"prompt": " "}, "prompt is empty"),
        ({"answer": "\n"}, "answer is empty"),
        ({"prompt": "open the door " * 40}, "the model reads 64"),
        ({"answer": "open the door " * 40}, "the model reads 64"),
    ],
)
def test_bad_questions(line: Line, settings: dict[str, str], named: str):
    with pytest.raises(ConfigError, match=named):
        line.blame(**settings)


def test_what_is_no_language_model(line: Line):
    with pytest.raises(ConfigError, match="tokens is no language model"):
        line.blame(line.tokens)
    with pytest.raises(ConfigError, match="reward-model is no language model"):
        line.blame(replace(line.dpo, kind="reward-model"))
