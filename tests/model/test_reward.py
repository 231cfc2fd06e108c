"""Reward models: one number by length, on a known scale, never of another tokenizer."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from pipeline.artifacts import Artifact, outside_model
from pipeline.data.tokenizers import load_tokenizer, train_bpe
from pipeline.errors import MismatchError
from pipeline.model.reward import (
    RewardModel,
    build_reward_model,
    last_scores,
    load_reward_model,
    pooling_pad_id,
    save_reward_model,
)
from pipeline.runtime import Runtime

IDS_BT = torch.tensor([[5, 6, 7, 1, 0, 0], [8, 9, 10, 11, 12, 1], [13, 1, 0, 0, 0, 0]])
LENGTHS_B = torch.tensor([4, 6, 2])
STOP = 1


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A language model's folder."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_bpe(iter(["some words to learn a few merges from"] * 5), 270)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return outside_model(folder)


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    here = Runtime.start(tmp_path, seed=0, threads=1, quiet=True)
    here.bf16 = False
    return here


@pytest.fixture
def saved(base: Artifact, tmp_path: Path) -> Artifact:
    """A reward model with mean 0.5 and deviation 2."""
    folder = tmp_path / "reward"
    model = build_reward_model(base.model, 3, 0)
    save_reward_model(model, folder, base, mean=0.5, std=2.0, suffix_ids=[STOP])
    return outside_model(folder)


def test_the_head_is_drawn_from_the_seed_and_the_trunk_is_the_inits(base: Artifact) -> None:
    one, same, other = (build_reward_model(base.model, 3, seed) for seed in (0, 0, 1))
    assert torch.equal(one.score.weight, same.score.weight)
    assert not torch.equal(one.score.weight, other.score.weight)
    assert one.score.weight.shape == (1, 64)
    assert float(one.score.weight.detach().std()) == pytest.approx(65**-0.5, rel=0.3)
    start = LlamaForCausalLM.from_pretrained(base.model)
    assert torch.equal(one.model.layers[1].mlp.up_proj.weight, start.model.layers[1].mlp.up_proj.weight)


def test_scores_are_what_training_sees_scaled(saved: Artifact, runtime: Runtime) -> None:
    """RewardTrainer reads transformers' own pooled number of the padded batch; `score` is that, normalised."""
    reward = load_reward_model(saved, runtime)
    hub = AutoModelForSequenceClassification.from_pretrained(saved.model).eval()
    is_real_BT = torch.arange(6) < LENGTHS_B[:, None]
    padded_BT = torch.where(is_real_BT, IDS_BT, hub.config.pad_token_id)
    with torch.no_grad():
        trained = hub(input_ids=padded_BT, attention_mask=is_real_BT.long()).logits[:, 0]
    torch.testing.assert_close(reward.raw(IDS_BT, LENGTHS_B), trained, rtol=0, atol=1e-5)
    torch.testing.assert_close(reward.score(IDS_BT, LENGTHS_B), (trained - 0.5) / 2, rtol=0, atol=1e-5)


def test_padding_and_batch_do_not_count_even_where_pad_is_the_stop_token(saved: Artifact, runtime: Runtime) -> None:
    reward = load_reward_model(saved, runtime)
    alone = torch.cat([reward.raw(row[None, :n], torch.tensor([n])) for row, n in zip(IDS_BT, LENGTHS_B, strict=True)])
    for pad in (0, STOP, 12):
        is_real_BT = torch.arange(6) < LENGTHS_B[:, None]
        padded_BT = torch.where(is_real_BT, IDS_BT, pad)
        torch.testing.assert_close(reward.raw(padded_BT, LENGTHS_B), alone, rtol=0, atol=1e-5)


def test_pad_for_pooling_is_never_the_stop_token(base: Artifact) -> None:
    tokenizer = load_tokenizer(base.model)
    assert pooling_pad_id(tokenizer, tokenizer.eos_token_id) == tokenizer.pad_token_id
    tokenizer.pad_token = tokenizer.eos_token
    chosen = pooling_pad_id(tokenizer, tokenizer.eos_token_id)
    assert chosen != tokenizer.eos_token_id
    assert chosen in tokenizer.all_special_ids


def test_gradients_reach_trunk_and_head(saved: Artifact, runtime: Runtime) -> None:
    reward = load_reward_model(saved, runtime)
    last_scores(reward.model, IDS_BT, LENGTHS_B).sum().backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in reward.model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "has no reward.json"),
        ({"mean": None}, "normaliser's `mean` is missing"),
        ({"std": None}, "normaliser's `std` is missing"),
        ({"std": float("nan")}, "normaliser's `std` is missing"),
        ({"std": 0.0}, "normaliser's `std` is 0"),
        ({"pooling": "mean"}, "pooling 'mean', not 'last'"),
        ({"tokenizer_hash": "other"}, "the tokenizer in the folder is not the one"),
        ({"template_hash": "other"}, "the chat template in the folder is not the one"),
        ({"suffix_ids": []}, "`suffix_ids` is missing"),
    ],
)
def test_a_folder_whose_scores_mean_nothing_is_refused(
    saved: Artifact, runtime: Runtime, change: dict[str, Any] | None, message: str
) -> None:
    path = saved.model / "reward.json"
    if change is None:
        path.unlink()
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(MismatchError, match=message):
        load_reward_model(saved, runtime)


def test_a_policy_of_another_tokenizer_or_template_is_refused(
    saved: Artifact, base: Artifact, runtime: Runtime, tmp_path: Path
) -> None:
    reward = load_reward_model(saved, runtime)
    reward.check_fits(base)
    other = tmp_path / "other"
    shutil.copytree(base.model, other)
    (other / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(MismatchError, match="another chat template than"):
        reward.check_fits(outside_model(other))
    train_bpe(iter(["quite other words"] * 5), 265).save_pretrained(other)
    with pytest.raises(MismatchError, match="another tokenizer than"):
        reward.check_fits(outside_model(other))


def test_score_of_given_numbers(saved: Artifact, runtime: Runtime) -> None:
    """(raw - mean) / std by hand: a head of zeros gives raw 0, so (0 - 3) / 4."""
    reward = load_reward_model(saved, runtime)
    with torch.no_grad():
        reward.model.score.weight.zero_()
    by_hand = RewardModel(reward.model, 3.0, 4.0, (STOP,), "", "")
    assert by_hand.score(IDS_BT, LENGTHS_B).tolist() == [-0.75, -0.75, -0.75]
