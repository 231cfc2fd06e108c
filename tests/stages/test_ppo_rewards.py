"""ppo against a weighted sum of rewards: every kind of term in one run, what is logged, resuming, refusals."""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from pipeline.artifacts import Artifact, outside_model
from pipeline.data.chat import stop_token_id
from pipeline.data.tokenizers import load_tokenizer, train_bpe
from pipeline.errors import ConfigError, DataError, MismatchError, PipelineError, Stopped, TrainingError
from pipeline.model.reward import build_reward_model, save_reward_model
from pipeline.recipe import DataEntry, PeftConfig
from pipeline.reward_config import RewardTerm
from pipeline.rl.rollouts import Rollout
from pipeline.rl.scoring import Responses, Scorer
from pipeline.runtime import Runtime
from stages import ppo as stage
from tests.stages.ppo_runs import Done, ask_to_stop, same

if TYPE_CHECKING:
    from tests.conftest import Warm

FUNCTIONS = """
def vowels(prompts, responses, rows):
    return [sum(letter in "aeiou" for letter in response) / 10 for response in responses]

def nan(prompts, responses, rows):
    return [float("nan")] * len(rows)
"""


@dataclass(frozen=True)
class Parts:
    """What a run takes: the policy's start, the same with a longer context to judge, three reward models, files."""

    folder: Path
    init: Artifact
    judge: Artifact
    rewards: tuple[Artifact, ...]

    @property
    def constitution(self) -> Path:
        return self.folder / "constitution.md"

    def function(self, name: str) -> str:
        return f"{self.folder / 'rewards.py'}:{name}"


@pytest.fixture(scope="module")
def parts(init: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    folder = tmp_path_factory.mktemp("rewards")
    tokenizer = load_tokenizer(init.model)
    assert tokenizer.pad_token_id is not None
    rewards = []
    for seed in range(3):
        model = build_reward_model(init.model, tokenizer.pad_token_id, seed)
        path = folder / f"reward-{seed}"
        save_reward_model(
            model, path / "model", init, mean=0.1 * seed, std=0.5 + seed, suffix_ids=[stop_token_id(tokenizer)]
        )
        rewards.append(Artifact(f"tiny/{path.name}", path, "reward-model", f"of {path.name}", {"stage": path.name}))
    rows = [
        {"messages": [{"role": "user", "content": f"cat {i}"}, {"role": "assistant", "content": f"meow {i}"}]}
        for i in range(60)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(FUNCTIONS)
    (folder / "constitution.md").write_text("An answer is short.\n")
    shutil.copytree(init.model, folder / "judge")
    config = json.loads((folder / "judge/config.json").read_text())
    (folder / "judge/config.json").write_text(json.dumps(config | {"max_position_embeddings": 400}))
    return Parts(folder, init, outside_model(folder / "judge"), tuple(rewards))


def every_kind(parts: Parts) -> tuple[RewardTerm, ...]:
    """Six terms; their weights are no sums of one another."""
    return (
        RewardTerm(model="reward-0"),
        RewardTerm(models=("reward-1", "reward-2"), std_weight=0.5, weight=0.7),
        RewardTerm(function="number", weight=3.0),
        RewardTerm(function=parts.function("vowels"), weight=-0.3),
        RewardTerm(length=8, weight=0.01),
        RewardTerm(repetition=2, weight=0.11),
        RewardTerm(judge="judge", constitution=parts.constitution, weight=0.13),
    )


def run(parts: Parts, out: Path, reward: Any, *, stop_at: int = 0, **values: Any) -> list[dict[str, Any]]:
    """Run the stage; its metrics without what a clock measured."""
    small: dict[str, Any] = {
        "total_episodes": 24, "batch_size": 8, "response_length": 12, "learning_rate": 3e-3, "eval_steps": 0
    }  # fmt: skip
    data = (DataEntry(source=str(parts.folder / "rows.jsonl")),)
    config = stage.PPOConfig(reward=reward, **{"data": data, **small, **values})
    out.mkdir(parents=True, exist_ok=True)
    runtime = Runtime.start(out, seed=0, threads=1, quiet=True)
    runtime.bf16 = False
    ask_to_stop(runtime, stop_at)
    terms = reward if isinstance(reward, tuple) else ()
    by_name = {"init": parts.init, "judge": parts.judge} | {
        f"reward-{i}": artifact for i, artifact in enumerate(parts.rewards)
    }
    inputs = {
        "init": parts.init,
        "reward": parts.rewards[0] if isinstance(reward, str) else None,
        "reward.model": [by_name[term.model] for term in terms if term.model],
        "reward.models": [by_name[name] for term in terms for name in term.models or ()],
        "reward.judge": [by_name[term.judge] for term in terms if term.judge],
    }
    return Done(out, stage.run(config, inputs, out, runtime)).lines()


class Spy:
    """Keeps every scorer's answers with what it made of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[Responses, Tensor, dict[str, Tensor]]] = []
        original = Scorer.score

        def score(scorer: Scorer, rollout: Rollout, rows: list[dict[str, Any]]) -> tuple[Tensor, dict[str, Tensor]]:
            found = original(scorer, rollout, rows)
            self.seen.append((Responses(rollout, rows, scorer.tokenizer, scorer.stop_strings), *found))
            return found

        monkeypatch.setattr(Scorer, "score", score)


def test_a_sum_of_every_kind_of_term(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The score is the weighted sum of the figures, and these are what each term says of the answers alone."""
    spy = Spy(monkeypatch)
    first = run(parts, tmp_path, every_kind(parts), total_episodes=8, missing_eos_rule="keep", score_clip=None)[0]
    answers, total_B, figures = spy.seen[0]
    names = ("model", "ensemble", "number", "vowels", "length", "repetition", "judge")
    assert list(figures) == [f"reward_{name}" for name in names]
    weights = (1.0, 0.7, 3.0, -0.3, 0.01, 0.11, 0.13)
    for row in range(8):
        by_hand = sum(
            weight * figures[f"reward_{name}"][row].item() for name, weight in zip(names, weights, strict=True)
        )
        assert total_B[row].item() == pytest.approx(by_hand, abs=1e-5)
    for name in names:
        assert first[f"reward_{name}"] == pytest.approx(figures[f"reward_{name}"].mean().item(), abs=1e-5)
    assert first["score"] == first["reward"] == pytest.approx(total_B.mean().item(), abs=1e-5)

    assert figures["reward_vowels"].tolist() == pytest.approx(
        [sum(letter in "aeiou" for letter in text) / 10 for text in answers.texts]
    )
    lengths = answers.rollout.lengths_B.tolist()
    assert figures["reward_length"].tolist() == [-max(0, length - 8) for length in lengths]
    assert figures["reward_length"].min() < 0
    assert len(figures["reward_judge"].unique()) > 1
    assert all(0 < score < 1 for score in figures["reward_judge"].tolist())
    assert all(-1 < score <= 0 for score in figures["reward_repetition"].tolist())


@pytest.mark.slow
def test_an_ensemble_is_its_members(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """mean - std and min of the members, each scored by a term of its own on the same answers."""
    spy = Spy(monkeypatch)
    names = ("reward-0", "reward-1", "reward-2")
    terms = [RewardTerm(model=name, name=f"m{i}") for i, name in enumerate(names)]
    terms += [RewardTerm(models=names), RewardTerm(models=names, combine="min", name="worst")]
    run(parts, tmp_path, tuple(terms), total_episodes=8)
    figures = spy.seen[0][2]
    members_MB = torch.stack([figures[f"reward_m{i}"] for i in range(3)])
    for row, scores in enumerate(members_MB.T.tolist()):
        mean = sum(scores) / 3
        std = (sum((score - mean) ** 2 for score in scores) / 3) ** 0.5
        assert std > 0.01
        assert figures["reward_ensemble"][row].item() == pytest.approx(mean - std, abs=1e-5)
        assert figures["reward_worst"][row].item() == min(scores)


@pytest.mark.slow
def test_one_reward_model_as_a_term_is_the_reward_model(parts: Parts, tmp_path: Path):
    """The same bits, critic included; only the term's figure comes on top. Half of it is another reward and critic."""
    plain = run(parts, tmp_path / "plain", "reward")
    assert not [name for line in plain for name in line if name.startswith("reward_")]
    term = run(parts, tmp_path / "term", (RewardTerm(model="reward-0"),))
    assert [line.pop("reward_model") for line in term] == [line["score"] for line in plain]
    assert term == plain
    assert same(Done(tmp_path / "plain", {}).policy(), Done(tmp_path / "term", {}).policy())


@pytest.mark.parametrize(
    ("terms", "starts_from_it"),
    [
        ((RewardTerm(model="reward-0"),), True),
        ((RewardTerm(model="reward-0", weight=0.5),), True),
        ((RewardTerm(model="reward-0", weight=-1.0),), False),
        ((RewardTerm(model="reward-0"), RewardTerm(function="exact")), False),
        ((RewardTerm(models=("reward-0", "reward-1")),), False),
        ((RewardTerm(repetition=2),), False),
    ],
)
def test_the_critic_starts_from_a_reward_model_that_is_alone(
    parts: Parts, tmp_path: Path, terms: tuple[RewardTerm, ...], starts_from_it: bool
):
    """Its first values are then those of the reward, weight included: (x - mean) / std times the weight."""
    from pipeline.rl.scoring import load_scorer

    tokenizer = load_tokenizer(parts.init.model)
    (tmp_path / "out").mkdir()
    by_role = {"model": [parts.rewards[0]], "models": list(parts.rewards[:2])}
    inputs = {"init": parts.init, "reward": None} | {f"reward.{role}": each for role, each in by_role.items()}
    stop = stop_token_id(tokenizer)
    scorer = load_scorer(
        terms, inputs, tokenizer, stop_id=stop, pad_id=0, batch_size=4, bf16=False,
        runtime=Runtime.start(tmp_path / "out", seed=0, threads=1, quiet=True),
    )  # fmt: skip
    critic = scorer.critic(parts.init, 0)
    assert (scorer.origin is not None) == starts_from_it
    assert bool(critic.score.weight.any()) == starts_from_it
    mean, std = scorer.scale
    if starts_from_it:
        assert (mean, std) == (0.0, 0.5 / terms[0].weight)
    else:
        assert (mean, std) == (0.0, 1.0)


@pytest.mark.slow
def test_stopped_and_resumed_with_terms_gives_the_same_bits(parts: Parts, tmp_path: Path):
    terms = every_kind(parts)
    whole = run(parts, tmp_path / "whole", terms, eval_steps=2)
    with pytest.raises(Stopped, match="stopped at step 2"):
        run(parts, tmp_path / "parts", terms, stop_at=2, eval_steps=2)
    assert run(parts, tmp_path / "parts", terms, eval_steps=2) == whole
    assert same(Done(tmp_path / "whole", {}).policy(), Done(tmp_path / "parts", {}).policy())


@pytest.mark.slow
@pytest.mark.parametrize(
    "terms",
    [
        (RewardTerm(model="reward-0", weight=0.5),),
        (RewardTerm(models=("reward-0", "reward-1")), RewardTerm(function="number")),
    ],
)
def test_under_adapters_the_terms_score_alike(parts: Parts, tmp_path: Path, terms: tuple[RewardTerm, ...]):
    """Where the critic's adapters stand on the reward model they are off as it scores, in later steps too."""
    full = run(parts, tmp_path / "full", terms, learning_rate=1e-30, value_learning_rate=1e-30)
    adapted = run(
        parts, tmp_path / "adapted", terms, peft=PeftConfig(r=4), learning_rate=1e-30, value_learning_rate=0.1
    )
    for left, right in zip(full, adapted, strict=True):
        names = ["score", *(name for name in left if name.startswith("reward_"))]
        assert [right[name] for name in names] == pytest.approx([left[name] for name in names], abs=1e-5)


def test_groups_are_scored_and_logged_over_all_answers(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Dynamic sampling asks twice or more; the terms' means are of all that was asked, like the score's."""
    spy = Spy(monkeypatch)
    terms = (RewardTerm(function="number"), RewardTerm(repetition=1, weight=1e-9))
    first = run(
        parts, tmp_path, terms, algorithm="dapo", num_generations=4, max_sampling_rounds=2, total_episodes=8,
        missing_eos_rule="keep", overlong_buffer=None, eval_steps=0,
    )[0]  # fmt: skip
    assert first["sampling_rounds"] == len(spy.seen) == 2
    every = torch.cat([figures["reward_repetition"] for _, _, figures in spy.seen])
    assert len(every) == 16
    assert first["reward_repetition"] == pytest.approx(every.mean().item(), abs=1e-6)


class Grader(BaseHTTPRequestHandler):
    """An OpenAI-compatible judge that grades an answer by its letters a, and says nothing of one with an o."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = body["messages"][0]["content"].split("Answer:\n")[1].split("\n\nGrade the answer")[0]
        said = "well" if "o" in answer else str(1 + min(8, answer.count("a")))
        payload = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.slow
def test_a_judge_behind_an_address(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its mean and the share of replies without a grade are logged; such an answer scores 0."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    spy = Spy(monkeypatch)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Grader)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        term = RewardTerm(judge_url=url, judge_model="m", constitution=parts.constitution)
        first = run(parts, tmp_path, (term,), total_episodes=16, batch_size=16)[0]
    finally:
        server.shutdown()
        server.server_close()
    texts = spy.seen[0][0].texts
    unread = ["o" in text for text in texts]
    assert 0 < sum(unread) < 16
    scores = [0.0 if "o" in text else min(8, text.count("a")) / 8 for text in texts]
    assert sum(scores) > 0
    assert first["reward_judge"] == first["score"] == pytest.approx(sum(scores) / 16)
    assert first["reward_judge_unread"] == sum(unread) / 16


RECIPE = """\
run: tiny
stages:
  ppo:
    init: {init}
    reward:
      - {{model: {reward}}}
      - {{models: [{reward}, {other}], weight: 0.5}}
      - {{function: rewards.py:vowels}}
      - {{repetition: 2}}
      - {{judge: {judge}, constitution: ./constitution.md}}
    data: rows.jsonl
    total_episodes: 32
    batch_size: 16
    response_length: 12
    learning_rate: 3e-3
    bf16: false
"""


@pytest.mark.slow
def test_a_recipe_with_terms_by_one_process_and_by_two(parts: Parts, tmp_path: Path, warm: Warm):
    """The road through the command line: paths beside the recipe, manifest and fingerprint, each rank its own rows."""
    for name in ("rewards.py", "constitution.md", "rows.jsonl"):
        shutil.copy(parts.folder / name, tmp_path)
    text = RECIPE.format(
        init=parts.init.model, judge=parts.judge.model, reward=parts.rewards[0].model, other=parts.rewards[1].model
    )
    (tmp_path / "ppo.yaml").write_text(text.replace("function: rewards.py", "function: ./rewards.py"))
    lines = []
    for count in (1, 2):
        done = warm("run", "ppo.yaml", "--artifacts", count, "--num-processes", count)
        assert done.code == 0, done.stderr
        out = tmp_path / str(count) / "tiny/ppo"
        lines.append([json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()])
    names = [name for name in lines[0][0] if name.startswith("reward")]
    assert names == ["reward", *(f"reward_{name}" for name in ("model", "ensemble", "vowels", "repetition", "judge"))]
    for left, right in zip(*lines, strict=True):
        assert [left[name] for name in names] == pytest.approx([right[name] for name in names], abs=1e-4)
    manifest = json.loads((out / "manifest.json").read_text())
    assert {role: len(each) for role, each in manifest["inputs"].items() if each} == {
        "init": 1, "reward.model": 1, "reward.models": 2, "reward.judge": 1,
    }  # fmt: skip
    assert manifest["parts"]["config"]["reward.4.constitution"][0] == "constitution.md"

    (tmp_path / "constitution.md").write_text("An answer is long.\n")
    status = warm("status", "ppo.yaml", "--artifacts", 1)
    assert "ppo.reward.4.constitution" in status.stdout, status.stdout


# ---- refusals ----


def refused(parts: Parts, out: Path, kind: type[PipelineError], what: str, reward: Any, **values: Any) -> PipelineError:
    with pytest.raises(kind, match=what) as caught:
        run(parts, out, reward, **values)
    return caught.value


def test_a_member_of_another_tokenizer_is_refused(parts: Parts, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(parts.rewards[1].path, other)
    train_bpe(iter(["quite other words than those of the policy " * 3] * 8), 300).save_pretrained(other / "model")
    stranger = Artifact("tiny/other", other, "reward-model", "other", {"stage": "other"})
    settings = json.loads((other / "model/reward.json").read_text())
    settings["tokenizer_hash"] = stranger.tokenizer_hash
    (other / "model/reward.json").write_text(json.dumps(settings))
    mixed = replace(parts, rewards=(parts.rewards[0], stranger, parts.rewards[2]))
    term = RewardTerm(models=("reward-0", "reward-1"))
    refused(mixed, tmp_path / "out", MismatchError, "another tokenizer", (term,))


def test_a_member_of_another_template_is_refused(parts: Parts, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(parts.rewards[1].path, other)
    template = other / "model/chat_template.jinja"
    template.write_text(template.read_text() + "\n")
    stranger = Artifact("tiny/other", other, "reward-model", "other", {"stage": "other"})
    settings = json.loads((other / "model/reward.json").read_text())
    settings["template_hash"] = stranger.template_hash
    (other / "model/reward.json").write_text(json.dumps(settings))
    mixed = replace(parts, rewards=(parts.rewards[0], stranger, parts.rewards[2]))
    terms = (RewardTerm(function="number"), RewardTerm(model="reward-1"))
    refused(mixed, tmp_path / "out", MismatchError, "another chat template", terms)


def test_a_function_that_is_wrong_is_named_with_its_term(parts: Parts, tmp_path: Path):
    terms = (RewardTerm(function="exact"), RewardTerm(function=parts.function("nan"), name="mine"))
    error = refused(parts, tmp_path, TrainingError, "gave nan for the response", terms)
    assert error.where == f"reward term `mine`, {parts.function('nan')}"


@pytest.mark.parametrize(
    ("term", "answer", "what"),
    [
        (RewardTerm(function="exact"), None, "`exact` compares with the data's answer, and a row has no answer: 'cat'"),
        (RewardTerm(function="number"), "meow", "a row has no number in its answer: 'cat'"),
        (RewardTerm(function="regex", pattern="(?P<answer>.+)"), None, "a row has no answer"),
    ],
)
def test_rows_without_what_a_function_compares_with_are_refused(
    parts: Parts, tmp_path: Path, term: RewardTerm, answer: str | None, what: str
):
    rows = tmp_path / "rows.jsonl"
    said = [{"role": "user", "content": "cat"}]
    said += [] if answer is None else [{"role": "assistant", "content": answer}]
    rows.write_text(json.dumps({"messages": said}) + "\n")
    data = (DataEntry(source=str(rows)),)
    refused(parts, tmp_path / "out", DataError, what, (term,), data=data, held_out=0.0)


def test_a_judge_of_too_short_a_context_is_refused(parts: Parts, tmp_path: Path):
    (tmp_path / "long.md").write_text("An answer is short. " * 40)
    term = RewardTerm(judge="init", constitution=tmp_path / "long.md")
    refused(parts, tmp_path / "out", TrainingError, "reads 96 tokens", (term,))


@pytest.mark.parametrize(("content", "what"), [(b" \n", "the constitution is empty"), (b"\xff\xfe", "not UTF-8 text")])
def test_a_constitution_that_says_nothing_is_refused(parts: Parts, tmp_path: Path, content: bytes, what: str):
    (tmp_path / "rules.md").write_bytes(content)
    term = RewardTerm(judge="judge", constitution=tmp_path / "rules.md")
    error = refused(parts, tmp_path / "out", ConfigError, what, (term,))
    assert error.where == str(tmp_path / "rules.md")


def test_every_key_of_a_term_is_in_the_docs():
    text = (Path(__file__).parents[2] / "docs/ppo.md").read_text()
    assert [name for name in RewardTerm.model_fields if f"`{name}`" not in text] == []


def test_a_stop_string_ends_an_answer_and_is_no_part_of_it(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A letter that random text has soon: rows end at it, rewards see what is before it, and it counts as ended."""
    spy = Spy(monkeypatch)
    terms = (RewardTerm(function="regex", pattern="a"),)
    lines = run(parts, tmp_path, terms, stop_strings=("a",), total_episodes=16, missing_eos_rule="keep")
    said, total_B, _ = spy.seen[0]
    by_string = (said.rollout.is_ended_B & ~said.rollout.is_stopped_B).tolist()
    assert any(by_string)
    for text, ids, is_by_string in zip(said.texts, said.ids, by_string, strict=True):
        whole = said.tokenizer.decode(ids)
        assert ("a" in whole) == is_by_string
        assert text == (whole[: whole.index("a")] if is_by_string else whole)
    assert not total_B.any()  # no answer holds the letter
    assert lines[0]["ended"] == pytest.approx(sum(said.rollout.is_ended_B.tolist()) / len(by_string))


@pytest.mark.slow
def test_an_ensemble_by_its_one_name_is_its_members_by_theirs(parts: Parts, tmp_path: Path):
    """One artifact with two members against two artifacts; a bare name is mean - std; one model is no ensemble."""
    both = tmp_path / "both"
    shutil.copytree(parts.rewards[1].path / "model", both / "model")
    shutil.copytree(parts.rewards[2].path / "model", both / "member-1")
    made = Artifact("tiny/both", both, "reward-model", "of both", {"stage": "reward"})
    holding = replace(parts, rewards=(made, *parts.rewards[1:]))

    def scores(of: Parts, name: str, reward: Any) -> list[float]:
        return [line["reward"] for line in run(of, tmp_path / name, reward) if "reward" in line]

    for options in ({"std_weight": 0.5}, {"combine": "min"}, {}):
        one = (RewardTerm(models=("reward-0",), **options),)
        two = (RewardTerm(models=("reward-1", "reward-2"), **options),)
        found = scores(holding, f"one {options}", one)
        assert len(found) == 3
        assert found == scores(parts, f"two {options}", two)
    assert scores(holding, "bare", "reward-0") == found  # of {}: std_weight 1
    refused(parts, tmp_path / "out", ConfigError, "is one reward model", (RewardTerm(models=("reward-0",)),))
