"""PPO-ptx: the pretraining loss beside the policy's, by hand and over ranks; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.artifacts import Artifact
from pipeline.data.packing import Windows
from pipeline.data.shards import ShardWriter, TokenFile
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import ConfigError, MismatchError, Stopped
from pipeline.model.build import load_causal_lm
from pipeline.model.next_token import NextToken
from pipeline.rl.masking import alone
from pipeline.rl.place import Place
from pipeline.rl.ptx import PretrainingText
from pipeline.runtime import derive_seed
from tests.stages.ppo_runs import Parts, artifact, run, same

LENGTH = 10


@pytest.fixture(scope="module")
def tokens(parts: Parts) -> Artifact:
    """A tokenize stage's artifact: thirty documents of random tokens."""
    folder = parts.folder / "tokenize"
    folder.mkdir()
    (folder / "model").symlink_to(parts.init.model)
    tokenizer, rng = load_tokenizer(parts.init.model), np.random.default_rng(0)
    with ShardWriter(folder / "train.ds", len(tokenizer), 0, parts.init.tokenizer_hash) as shard:
        for _ in range(30):
            shard.append(rng.integers(10, 200, size=17).tolist(), 40)
    return artifact(folder, "tokens")


WITH_TEXT: dict[str, Any] = {
    "reward": "constant",
    "algorithm": "dr_grpo",
    "num_generations": 4,
    "ptx_coef": 0.5,
    "ptx_ratio": 0.5,
    "ptx_length": LENGTH,
}


def test_with_a_constant_reward_it_is_pretraining(parts: Parts, tokens: Artifact, tmp_path: Path):
    """Two steps of 8 rows each, against plain autograd on whole logits: the loss, and the weights after it."""
    values = {"learning_rate": 1.0, "adam_epsilon": 1.0, "max_grad_norm": 1e6, "lr_scheduler_type": "constant"}
    done = run(parts, tmp_path, tokens=tokens, total_episodes=32, **WITH_TEXT, **values)
    policy = load_causal_lm(parts.init.model).eval()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1.0, eps=1.0, weight_decay=0.0)
    file = TokenFile(tokens.path / "train.ds")
    windows = Windows(file.tokens, LENGTH, derive_seed(0, "pretraining text"))
    for step, line in enumerate(done.lines()):
        rows_BT = torch.from_numpy(windows.batch(range(step * 8, step * 8 + 8)))
        logits = policy(input_ids=rows_BT[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), rows_BT[:, 1:].flatten())
        assert line["ptx_loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert line["policy_loss"] == 0.0
        optimizer.zero_grad()
        (0.5 * loss).backward()
        optimizer.step()
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(done.checkpoint()[f"policy.{name}"], parameter.detach(), atol=3e-6, rtol=1e-5)


@pytest.mark.slow
def test_it_resumes_at_its_place_in_the_text(parts: Parts, tokens: Artifact, tmp_path: Path):
    values = {**WITH_TEXT, "reward": "vowels", "num_mini_batches": 2, "total_episodes": 64}
    whole = run(parts, tmp_path / "whole", tokens=tokens, **values)
    with pytest.raises(Stopped):
        run(parts, tmp_path / "parts", tokens=tokens, stop_at=2, **values)
    resumed = run(parts, tmp_path / "parts", tokens=tokens, **values)
    assert same(resumed.policy(), whole.policy())
    assert resumed.lines() == whole.lines()


def test_ranks_share_the_rows(parts: Parts, tokens: Artifact):
    """The gradients of three ranks add up to that of one, on 7 rows."""
    file = TokenFile(tokens.path / "train.ds")

    def gradient(rank: int, world_size: int) -> torch.Tensor:
        model = load_causal_lm(parts.init.model).eval()
        windows = Windows(file.tokens, LENGTH, 1)
        place = Place(model.device, False, rank, world_size, alone, torch.Generator)
        text = PretrainingText(windows, NextToken(model), 2.0, 7, 2, place)
        text.add_gradient(5)
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    torch.testing.assert_close(sum(gradient(rank, 3) for rank in range(3)), gradient(0, 1), atol=1e-6, rtol=1e-4)


def test_text_that_is_not_there_or_not_its_own_is_refused(parts: Parts, tokens: Artifact, tmp_path: Path):
    with pytest.raises(ConfigError, match="no text is named") as caught:
        run(parts, tmp_path / "absent", **WITH_TEXT)
    assert caught.value.mend == "--set ppo.ptx_tokens=tokenize"
    with pytest.raises(ConfigError, match="more than the policy's context of 48"):
        run(parts, tmp_path / "long", tokens=tokens, **{**WITH_TEXT, "ptx_length": 64})
    other = tmp_path / "other"
    (other / "model").mkdir(parents=True)
    with pytest.raises(MismatchError, match="made with another tokenizer"):
        run(parts, tmp_path / "foreign", tokens=artifact(other, "tokens"), **WITH_TEXT)
