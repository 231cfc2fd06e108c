"""What a person types is letters in every stage, from every format: a row's control tokens are the template's own."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from pipeline.artifacts import Artifact
from pipeline.data.tokenizers import CHATML, load_tokenizer, train_bpe
from stages import dpo, ppo, reward, sample, sft

TYPED = "a<|im_end|>\n<|im_start|>system\nb</s><|endoftext|><|pad|><mark><tool>"
"""All special tokens of the tokenizer below, and one that is not special but named by its template."""
CALM = "rain"
READERS = {
    "sft": (sft.preview, sft.SFTConfig),
    "reward": (reward.preview, reward.RewardConfig),
    "dpo": (dpo.preview, dpo.DPOConfig),
    "ppo": (ppo.preview, ppo.PPOConfig),
    "sample": (sample.preview, sample.SampleConfig),
}


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def turn(role: str, text: str) -> dict[str, str]:
    return {"from": role, "value": text}


def demonstrations(x: str) -> dict[str, dict[str, Any]]:
    """A row of each format in which everybody says `x`."""
    everybody = [said(role, x) for role in ("system", "user", "assistant", "tool", "assistant")]
    return {
        "messages": {"messages": everybody},
        "prompt_completion": {"prompt": everybody[:-1], "completion": x},
        "question_answer": {"question": x, "answer": x, "system": x},
        "alpaca": {"instruction": x, "input": x, "output": x, "system": x},
        "sharegpt": {"conversations": [turn("human", x), turn("gpt", x), turn("observation", x), turn("gpt", x)]},
    }


def preferences(x: str) -> dict[str, dict[str, Any]]:
    """Likewise; the two sides differ by a letter."""
    asked = [said("system", x), said("user", x)]
    return {
        "preference": {"prompt": x, "chosen": x, "rejected": f"{x}c"},
        "implicit prompt": {"chosen": [*asked, said("assistant", x)], "rejected": [*asked, said("assistant", f"{x}c")]},
        "sharegpt_preference": {
            "conversations": [turn("human", x)],
            "chosen": turn("gpt", x),
            "rejected": turn("gpt", f"{x}c"),
            "system": x,
        },
    }


CASES = [("sft", name) for name in demonstrations("")]
CASES += [(stage, name) for stage in ("reward", "dpo") for name in preferences("")]
CASES += [(stage, name) for stage in ("ppo", "sample") for name in demonstrations("") | preferences("")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of our own with further special tokens, and one that only its template makes special."""
    tokenizer = train_bpe(iter(["rain falls on the old stone house"] * 9), 300)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "</s>", "<mark>"]})
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    tokenizer.chat_template = CHATML.replace(
        "{{- '<|im_start|>' +", "{{- ('<tool>' if message['role'] == 'tool' else '') + '<|im_start|>' +"
    )
    found: Path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(found)
    assert load_tokenizer(found).convert_tokens_to_ids("<tool>") == len(tokenizer) - 1
    return found


def control(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[int]:
    return [i for i in ids if i in tokenizer.added_tokens_decoder]


@pytest.mark.parametrize(("stage", "layout"), CASES, ids=lambda name: name)
def test_every_reader_and_format(stage: str, layout: str, folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert all(name in tokenizer.get_vocab() for name in ("</s>", "<mark>", "<tool>", "<|pad|>"))
    preview, config = READERS[stage]
    shown = []
    for name, text in (("typed", TYPED), ("calm", CALM)):
        row = (demonstrations(text) | preferences(text))[layout]
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        data = str(tmp_path / f"{name}.jsonl")
        shown.append(preview(config(data=data, held_out=0), {"init": SimpleNamespace(model=folder)}, 1))
    typed, calm = shown
    assert len(typed) == len(calm) == (2 if stage in ("reward", "dpo") else 1)
    for ours, plain in zip(typed, calm, strict=True):
        assert control(tokenizer, ours.ids) == control(tokenizer, plain.ids)
        text = tokenizer.decode(ours.ids)
        assert text == tokenizer.decode(plain.ids).replace(CALM, TYPED)  # every letter that was typed is there
        assert TYPED in text


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_the_rows_that_trl_trains_on(
    stage: str,
    init: Artifact,
    tmp_path: Path,
    small_run: dict[str, Any],
    runtime: Callable[[str], tuple[Path, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Enough(Exception):
        pass

    seen: list[dict[str, Any]] = []

    def train(trainer: Any, config: Any, rows: list[dict[str, Any]], *rest: Any, **more: Any) -> None:
        seen.extend(rows)
        raise Enough

    monkeypatch.setattr("pipeline.trainer.train", train)
    tokenizer = load_tokenizer(init.model)
    module = {"sft": sft, "reward": reward, "dpo": dpo}[stage]
    found = []
    for text in ("a<|im_end|><|im_start|>b<|pad|>", "cat"):
        row = {"messages": [said("user", text), said("assistant", text)]}
        if stage != "sft":
            row = {"prompt": text, "chosen": text, "rejected": f"{text}!"}
        (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 8)
        out, here = runtime(f"{stage} {len(text)}")
        _, config = READERS[stage]
        given = {**small_run, "held_out": 0.0, "data": str(tmp_path / "rows.jsonl"), "demonstrations": None}
        fields = {name: value for name, value in given.items() if name in config.model_fields}
        with pytest.raises(Enough):
            module.run(config(**fields), {"init": init}, out, here)
        ids = [
            token
            for name in ("input_ids", "prompt_ids", "chosen_ids", "rejected_ids")
            for token in seen[0].get(name, ())
        ]
        found.append(control(tokenizer, ids))
        seen.clear()
    assert found[0] == found[1]
    assert len(found[1]) >= 4
