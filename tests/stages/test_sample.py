"""sample: answers and scores against a naive loop, the same bytes after a kill and on two ranks, refusals."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.data.chat import encode_prompt, stop_token_id
from pipeline.data.formats import read_rows
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import ConfigError, DataError, MismatchError, Stopped
from pipeline.model.build import load_causal_lm
from pipeline.model.generation import Sampling, draw_uniforms, generate
from pipeline.recipe import DataEntry
from pipeline.rl.best_of_n import kl_bound
from pipeline.rl.parts import cut
from pipeline.rl.speaking import Speaker
from pipeline.runtime import Runtime, derive_seed
from stages import sample as stage
from tests.conftest import Warm
from tests.stages.conftest import make_model
from tests.stages.ppo_runs import Parts, artifact, naive_score
from tests.stages.sample_runs import config_of, killed_at, rows_in, sample


def one_at_a_time(parts: Parts, prompts: list[list[dict[str, str]]], **sampling: Any) -> list[list[list[int]]]:
    """The ids of 3 answers to each prompt, each written alone, with the numbers that the stage draws for it."""
    tokenizer, model = load_tokenizer(parts.init.model), load_causal_lm(parts.init.model).eval()
    stop = stop_token_id(tokenizer)
    found = []
    for place, prompt in enumerate(prompts):
        uniforms_GT = draw_uniforms(3, 10, torch.Generator().manual_seed(derive_seed(0, "sampling", place)))
        group = []
        for uniforms_T in uniforms_GT:
            written = generate(
                model,
                [encode_prompt(tokenizer, prompt)],
                max_new_tokens=10,
                stop_ids=[stop],
                pad_id=0,
                sampling=Sampling(**sampling),
                uniforms_BT=uniforms_T[None],
            )
            group += written.responses()
        found.append(group)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [{"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8}])
def test_best_of_n_is_that_of_a_naive_loop(parts: Parts, tmp_path: Path, sampling: dict[str, float]):
    rows, figures = sample(parts, tmp_path / "run", reward="model", keep="best", prompts=8, **sampling)
    prompts = [row["messages"][:-1] for row in rows]
    assert len(rows) == len({json.dumps(prompt) for prompt in prompts}) == 8
    tokenizer = load_tokenizer(parts.init.model)
    stop = stop_token_id(tokenizer)
    for row, prompt, group in zip(rows, prompts, one_at_a_time(parts, prompts, **sampling), strict=True):
        scores = [naive_score(parts, tmp_path, encode_prompt(tokenizer, prompt), ids) for ids in group]
        best = max(range(3), key=scores.__getitem__)
        ids = [token for token in group[best] if token != stop]
        assert row["messages"][-1] == {"role": "assistant", "content": tokenizer.decode(ids)}
        assert row["score"] == pytest.approx(scores[best], abs=1e-5)
    assert figures["score_best"] == pytest.approx(sum(row["score"] for row in rows) / 8, abs=1e-5)
    assert figures["kl_bound"] == kl_bound(3)


@pytest.mark.slow
def test_what_is_written_is_what_the_next_stage_takes(parts: Parts, tmp_path: Path):
    for keep, layout, count in (("all", "messages", 60), ("pairs", "preference", 20), ("reference", "preference", 60)):
        out = tmp_path / keep
        rows, figures = sample(parts, out, reward="vowels", keep=keep)
        read = read_rows((DataEntry(source=str(out / "rows.jsonl")),), layout, split="all")
        assert len(read) == len(rows) == figures["rows"]
        assert count - 6 <= len(rows) <= count
    assert {row["chosen"] for row in rows} <= set((parts.folder / "rows.jsonl").read_text().split('"'))


def test_one_reward_of_two_terms_is_its_sum(parts: Parts, tmp_path: Path):
    function = f"{parts.folder / 'rewards.py'}:vowels"
    terms = [{"function": function}, {"length": 4, "weight": 0.5}]
    values = {"data": str(parts.data), "reward": terms, "prompts": 4, "response_length": 10, "unfinished": "keep"}
    config = stage.SampleConfig.model_validate_json(json.dumps(values))
    out = tmp_path / "run"
    out.mkdir()
    figures = stage.run(config, {"init": parts.init}, out, Runtime.start(out, seed=0, threads=1, quiet=True))
    rows = rows_in(out)
    assert len(rows) == 16
    too_long = []
    for row in rows:
        vowels = sum(letter in "aeiou" for letter in row["messages"][-1]["content"]) / 10
        too_long.append(round((vowels - row["score"]) / 0.5, 4))
    assert set(too_long) <= set(range(7)), "whole tokens over four, of ten at most"
    assert figures["reward_length"] == pytest.approx(-sum(too_long) / 16)
    assert figures["score"] == pytest.approx(figures["reward_vowels"] + 0.5 * figures["reward_length"])


@pytest.mark.slow
def test_greedy_is_one_answer(parts: Parts, tmp_path: Path):
    rows, figures = sample(parts, tmp_path, temperature=0.0, num_generations=1)
    assert figures["answers"] == len(rows) == 20
    other, _ = sample(parts, tmp_path / "other", temperature=0.0, num_generations=1, batch_size=1, prompts=30)
    assert {row["messages"][-1]["content"] for row in rows} <= {row["messages"][-1]["content"] for row in other}


@pytest.mark.slow
def test_stopped_between_parts_it_goes_on(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole, _ = sample(parts, tmp_path / "whole", reward="vowels")
    answered = []
    runs = []
    write, plain = stage._write, Speaker.answer

    def begun(speaker: Speaker, runtime: Runtime) -> Any:
        runs.append(runtime)
        return write(speaker, runtime)

    def answer(speaker: Speaker, places: Any) -> Any:
        answered.append(places)
        if len(answered) == 2:
            runs[-1].halt.asked = Stopped
        return plain(speaker, places)

    monkeypatch.setattr(stage, "_write", begun)
    monkeypatch.setattr(Speaker, "answer", answer)
    with pytest.raises(Stopped, match="stopped at step 2 and saved"):
        sample(parts, tmp_path / "parts", reward="vowels")
    rows, _ = sample(parts, tmp_path / "parts", reward="vowels")
    assert rows == whole
    assert len(answered) == 5, "20 prompts by 4"
    assert sorted(place for places in answered for place in places) == list(range(20))


def test_parts_are_cut_by_length():
    assert cut([3, 9, 3, 5, 9], 2) == [[1, 4], [3, 0], [2]]


@pytest.mark.slow
def test_killed_it_ends_with_the_same_bytes(parts: Parts, tmp_path: Path):
    values: dict[str, Any] = {"reward": "model", "keep": "pairs", "prompts": 60, "batch_size": 3}
    sample(parts, tmp_path / "calm", **values)
    killed = tmp_path / "killed"
    assert killed_at((3, 11, 20, 61), killed, lambda: sample(parts, killed, **values)) == 3
    assert (killed / "rows.jsonl").read_bytes() == (tmp_path / "calm" / "rows.jsonl").read_bytes()


RECIPE = """\
run: tiny
stages:
  sample:
    init: {init}
    reward: {reward}
    data: {data}
    prompts: 21
    num_generations: 3
    batch_size: 9
    response_length: 12
    keep: pairs
    against: random
    unfinished: keep
    bf16: false
  dpo: {{init: {init}, data: [sample], max_steps: 2, held_out: 0.2, bf16: false}}
"""


@pytest.mark.slow
def test_two_processes_write_what_one_does_and_dpo_reads_it(parts: Parts, tmp_path: Path, warm: Warm):
    text = RECIPE.format(init=parts.init.model, reward=f"{parts.folder / 'rewards.py'}:vowels", data=parts.data)
    (tmp_path / "rounds.yaml").write_text(text)
    for count in (1, 2):
        done = warm("run", "rounds.yaml", "--artifacts", count, "--num-processes", count)
        assert done.code == 0, done.stderr
    one, two = ((tmp_path / str(count) / "tiny/sample/rows.jsonl").read_bytes() for count in (1, 2))
    assert one == two
    assert one.count(b"\n") > 15
    manifest = json.loads((tmp_path / "1/tiny/dpo/manifest.json").read_text())
    made = json.loads((tmp_path / "1/tiny/sample/manifest.json").read_text())
    assert manifest["inputs"]["data"] == [{"reference": "tiny/sample", "fingerprint": made["fingerprint"]}]
    assert made["metrics"]["answers"] == 63
    assert made["flops"] > 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"keep": "best"}, "there is no reward"),
        ({"keep": "pairs", "reward": "vowels", "num_generations": 1}, "num_generations is 1"),
        ({"threshold": 0.5}, "a threshold is of scores, and there is no reward"),
        ({"threshold": 0.5, "reward": "vowels", "keep": "reference"}, "keep: reference goes by none"),
        ({"min_margin": 0.5}, "min_margin is of pairs, and keep is all"),
        ({"against": "random", "reward": "vowels", "keep": "best"}, "against is of pairs, and keep is best"),
        ({"temperature": 0.0}, "at temperature 0 there is one answer"),
        ({"stop_strings": ("",)}, "one is empty"),
    ],
)
def test_fields_that_do_not_go_together(parts: Parts, values: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        config_of(parts, **values)


def written(folder: Path, *rows: dict[str, Any]) -> tuple[DataEntry, ...]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (DataEntry(source=str(path)),)


BLANK = {"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": "a"}]}
LONG = {"messages": [{"role": "user", "content": "name " * 60}, {"role": "assistant", "content": "a"}]}
OPEN = {"messages": [{"role": "user", "content": "name"}]}


@pytest.mark.parametrize(
    ("row", "values", "where", "message"),
    [
        (BLANK, {}, "sample.data", "an empty prompt"),
        (LONG, {}, "sample.data", "where response_length leaves 38 of the context"),
        (LONG, {"max_prompt_length": 20}, "sample.max_prompt_length", "all 1 prompts are longer than 20 tokens"),
        (OPEN, {"keep": "reference"}, "sample.keep", "nothing is kept .*1 no answer in the data"),
        (OPEN, {"reward": "constant", "keep": "pairs"}, "sample.keep", "nothing is kept .*1 tied"),
        (OPEN, {"reward": "vowels", "threshold": 50.0}, "sample.keep", "nothing is kept .*3 below the threshold"),
    ],
)
def test_nothing_to_ask_or_to_keep(
    parts: Parts, tmp_path: Path, row: dict[str, Any], values: dict[str, Any], where: str, message: str
):
    with pytest.raises(DataError, match=message) as caught:
        sample(parts, tmp_path / "run", data=written(tmp_path, row), **values)
    assert caught.value.where == where
    assert "ppo" not in str(caught.value)


@pytest.mark.slow
def test_prompts_that_eval_measures_with_are_named(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    monkeypatch.setattr(Runtime, "say", lambda runtime, text: said.append(text))
    built_in = (DataEntry(source="arithmetic"),)
    for split in ("train", "held_out"):
        said.clear()
        sample(parts, tmp_path / split, data=built_in, split=split, prompts=4, num_generations=1)
        assert any("not to train on" in text for text in said) == (split == "held_out")


@pytest.mark.slow
def test_what_is_held_out_is_not_there(parts: Parts, tmp_path: Path):
    with pytest.raises(ConfigError, match="no held-out row"):
        sample(parts, tmp_path, split="held_out")
    rows, _ = sample(parts, tmp_path, split="held_out", held_out=0.3, prompts=None)
    others, _ = sample(parts, tmp_path / "train", held_out=0.3, prompts=None)
    asked, trained = ({row["messages"][0]["content"] for row in each} for each in (rows, others))
    assert not asked & trained
    assert len(asked | trained) == len({json.loads(line)["messages"][0]["content"] for line in parts.data.open()})


def test_a_reward_model_of_another_tokenizer(parts: Parts, tmp_path: Path):
    make_model(tmp_path / "other")
    (tmp_path / "other" / "manifest.json").write_text("{}")
    other = artifact(tmp_path / "other", "causal-lm")
    config = config_of(parts, reward="model", response_length=4)
    out = tmp_path / "run"
    out.mkdir()
    with pytest.raises(MismatchError, match="another tokenizer"):
        stage.run(
            config, {"init": other, "reward": parts.reward}, out, Runtime.start(out, seed=0, threads=1, quiet=True)
        )


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on(parts: Parts, tmp_path: Path, warm: Warm):
    text = RECIPE.format(init=parts.init.model, reward=f"{parts.folder / 'rewards.py'}:vowels", data=parts.data)
    (tmp_path / "rounds.yaml").write_text(text)
    fields = [part for each in ("prompts=70", "batch_size=3") for part in ("--set", f"sample.{each}")]
    arguments = ("run", "rounds.yaml", "--until", "sample", *fields)
    assert warm(*arguments, "--artifacts", "one").code == 0
    running = warm.start(*arguments, "--artifacts", "two", "--num-processes", 2)
    folder = tmp_path / "two" / "tiny"
    running.wait_for(lambda: len(list(folder.glob(".sample.*.partial/checkpoints/parts/0*.json"))) >= 3)
    running.signal(signal.SIGTERM)
    stopped = running.wait()
    assert stopped.code == 75, stopped.stderr
    assert "and saved" in stopped.stderr
    done = warm(*arguments, "--artifacts", "two", "--num-processes", 2)
    assert done.code == 0, done.stderr
    assert json.loads((folder / "sample/manifest.json").read_text())["resumed_from"] >= 3
    one, two = ((tmp_path / each / "tiny/sample/rows.jsonl").read_bytes() for each in ("one", "two"))
    assert one == two
