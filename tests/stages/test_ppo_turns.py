"""The ppo stage with an environment that replies: learning, exactness, ranks, evaluations, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.errors import ConfigError, Stopped, TrainingError
from pipeline.model.build import save_model
from pipeline.model.reward import build_reward_model, save_reward_model
from stages import ppo as stage
from tests.rl.talking import PAD, E, word_tokenizer
from tests.stages.ppo_runs import Done, Parts, artifact, furthest, run, same

if TYPE_CHECKING:
    from tests.conftest import Warm

TOOLS = """
def reply(conversations, rows):
    assert all(each[-1]["role"] == "assistant" for each in conversations)
    assert all(each[0] == row["prompt"][0] for each, row in zip(conversations, rows))
    return [{"role": "tool", "content": "0 1"} if len(each) == 2 else None for each in conversations]

def wrong(conversations, rows):
    return [None]
"""
REWARDS = """
def ones(prompts, responses, rows):
    # Only what is said after the tool has replied is paid: the share of its words that are 1.
    words = [response.split() if len(row["messages"]) == 4 else [] for response, row in zip(responses, rows)]
    return [said.count("1") / max(1, len(said)) for said in words]

def spoken(prompts, responses, rows):
    assert all(response == row["messages"][-1]["content"] for response, row in zip(responses, rows))
    return [float(len(row["messages"])) for row in rows]
"""


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """A policy of 14 words, so that a random one ends its turns often; tools and rewards for it."""
    folder = tmp_path_factory.mktemp("talking")
    word_tokenizer().save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=14, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=48, initializer_range=0.1, tie_word_embeddings=True,
    )  # fmt: skip
    save_model(LlamaForCausalLM(config), folder / "sft" / "model", folder / "tokenizer", [E], PAD)
    init = artifact(folder / "sft", "causal-lm")
    save_reward_model(
        build_reward_model(init.model, PAD, 0), folder / "reward" / "model", init, mean=0.3, std=0.7, suffix_ids=[E]
    )
    rows = [
        {"messages": [{"role": "user", "content": f"{a} {b} {c}"}, {"role": "assistant", "content": "q"}]}
        for a in "pqrx" for b in "pqrx" for c in "pqrx"
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "tools.py").write_text(TOOLS)
    return Parts(folder, init, artifact(folder / "reward", "reward-model"), folder / "rows.jsonl")


def talk(parts: Parts, out: Path, name: str = "reply", **values: Any) -> Done:
    small = {"response_length": 16, "environment": f"{parts.folder / 'tools.py'}:{name}", "missing_eos_rule": "keep"}
    return run(parts, out, **{**small, **values})


@pytest.mark.slow
def test_what_is_paid_after_the_tools_reply_is_learnt(talking: Parts, tmp_path: Path):
    """The policy must end its first turn to be answered at all, and then say what the tool said."""
    values = {"total_episodes": 25 * 64, "batch_size": 64, "per_device_train_batch_size": 64, "kl_coef": 0.0}
    done = talk(talking, tmp_path, reward="ones", learning_rate=1e-2, **values)
    lines = done.lines()
    first, last = (
        [sum(line[name] for line in part) / 4 for name in ("reward", "turns")] for part in (lines[:4], lines[-4:])
    )
    assert last[0] > first[0] + 0.3
    assert last[1] > first[1] + 0.2
    assert max(line["turns"] for line in lines) <= 2
    assert max(line["rollout_gap"] for line in lines) < 1e-5
    assert all(line["clip_fraction"] == 0 for line in lines)  # ratio 1 on the policy's tokens


@pytest.mark.slow
def test_the_reward_and_the_reward_model_read_the_whole_conversation(
    talking: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert talk(talking, tmp_path / "function", reward="spoken", score_clip=None).lines()[0]["score"] > 2
    done = talk(talking, tmp_path / "model", eval_steps=1, held_out=0.3, total_episodes=16)
    assert {"eval_reward", "eval_win_rate", "turns"} <= done.lines()[0].keys()


@pytest.mark.slow
def test_max_turns_of_one_is_no_conversation(talking: Parts, tmp_path: Path):
    """The environment is never asked, and all is as without it."""
    plain = talk(talking, tmp_path / "plain", environment=None)
    one = talk(talking, tmp_path / "one", "wrong", max_turns=1)
    assert same(plain.policy(), one.policy())
    assert all(line["turns"] == 1 for line in one.lines())
    assert "turns" not in plain.lines()[0]


@pytest.mark.slow
def test_stopped_and_resumed_gives_the_same_bits(talking: Parts, tmp_path: Path):
    values: dict[str, Any] = {"total_episodes": 4 * 16, "reward": "ones", "save_steps": 2}
    whole = talk(talking, tmp_path / "whole", **values)
    with pytest.raises(Stopped):
        talk(talking, tmp_path / "parts", stop_at=2, **values)
    resumed = talk(talking, tmp_path / "parts", **values)
    assert same(resumed.checkpoint(), whole.checkpoint())
    assert resumed.lines() == whole.lines()
    assert max(line["turns"] for line in whole.lines()) > 1


@pytest.mark.slow
def test_batch_sizes_do_not_count(talking: Parts, tmp_path: Path):
    usual = talk(talking, tmp_path / "usual", reward="ones", total_episodes=32)
    other = talk(
        talking, tmp_path / "other", reward="ones", total_episodes=32, local_rollout_forward_batch_size=3,
        per_device_train_batch_size=1,
    )  # fmt: skip
    assert furthest(usual.policy(), other.policy()) < 2e-5
    for left, right in zip(usual.lines(), other.lines(), strict=True):
        assert left == pytest.approx(right, abs=1e-4, rel=1e-3)


RECIPE = """\
run: tiny
stages:
  ppo:
    init: {folder}/sft/model
    reward: ./rewards.py:ones
    data: {folder}/rows.jsonl
    environment: ./tools.py:reply
    max_turns: 3
    total_episodes: 48
    batch_size: 16
    response_length: 16
    missing_eos_rule: keep
    learning_rate: 3e-3
    bf16: false
    eval_steps: 0
"""


def write_recipe(talking: Parts, folder: Path) -> None:
    for name in ("tools.py", "rewards.py"):
        (folder / name).write_text((talking.folder / name).read_text())
    (folder / "ppo.yaml").write_text(RECIPE.format(folder=talking.folder))


@pytest.mark.slow
def test_two_processes_give_one_processs_numbers(talking: Parts, tmp_path: Path, warm: Warm):
    write_recipe(talking, tmp_path)
    for count in (1, 2):
        done = warm("run", "ppo.yaml", "--artifacts", count, "--num-processes", count)
        assert done.code == 0, done.stderr
    one, two = (Done(tmp_path / str(count) / "tiny/ppo", {}) for count in (1, 2))
    assert len(one.lines()) == 3
    for left, right in zip(one.lines(), two.lines(), strict=True):
        assert left == pytest.approx(right, abs=1e-4, rel=1e-3)
        assert left["turns"] > 1
    assert furthest(one.policy(), two.policy()) < 1e-4


@pytest.mark.slow
def test_an_edited_environment_is_another_run(talking: Parts, tmp_path: Path, warm: Warm):
    write_recipe(talking, tmp_path)
    assert warm("run", "ppo.yaml", "--artifacts", "a").code == 0
    (tmp_path / "tools.py").write_text((tmp_path / "tools.py").read_text().replace("0 1", "1 1"))
    status = warm("status", "ppo.yaml", "--artifacts", "a")
    assert "code: tools.py" in status.stdout, status.stdout


def test_environments_that_cannot_be_are_refused(talking: Parts, tmp_path: Path):
    with pytest.raises(TrainingError, match=r"gave 1 replies for \d+ conversations"):
        talk(talking, tmp_path / "wrong", "wrong", reward="ones")
    with pytest.raises(ConfigError, match="defines no `nothing`"):
        talk(talking, tmp_path / "nothing", "nothing", reward="ones")
    with pytest.raises(ValueError, match=r"is not a function of your own: \./tools\.py:reply"):
        stage.PPOConfig(environment="calculator")
