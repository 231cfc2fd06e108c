"""sample with critique and revision: against a loop that asks one at a time, by a judge, behind an address, killed."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.artifacts import Artifact, outside_model
from pipeline.data.chat import encode_prompt, stop_token_id
from pipeline.data.formats import read_rows
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import DataError
from pipeline.model.build import load_causal_lm
from pipeline.model.generation import Sampling, draw_uniforms, generate
from pipeline.recipe import DataEntry
from pipeline.rl.revising import CRITIQUE, REVISION, filled
from pipeline.runtime import Runtime, derive_seed
from stages import sample as stage
from tests.conftest import Warm
from tests.stages.conftest import make_model
from tests.stages.ppo_runs import Parts
from tests.stages.sample_runs import Row, config_of, killed_at, rows_in, sample

RULES = "- Be short.\n- Be kind.\n"
SIZES: dict[str, Any] = {
    "prompts": 6,
    "num_generations": 2,
    "batch_size": 6,
    "response_length": 8,
    "critique_length": 9,
}


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A model whose context has room for the prompts."""
    return outside_model(make_model(tmp_path_factory.mktemp("talker"), context=512))


def revise(parts: Parts, out: Path, judge: Artifact | None = None, **values: Any) -> tuple[list[Row], dict[str, float]]:
    out.mkdir(parents=True, exist_ok=True)
    rules = parts.folder / "rules.md"
    rules.write_text(RULES)
    config = config_of(parts, **{**SIZES, "constitution": rules, "revisions": 2, **values})
    runtime = Runtime.start(out, seed=0, threads=1, quiet=True)
    figures = stage.run(config, {"init": parts.init, "judge": judge}, out, runtime)
    return rows_in(out), figures


def one_at_a_time(judge: Artifact, text: str, length: int, step: str, *key: int) -> str:
    tokenizer, model = load_tokenizer(judge.model), load_causal_lm(judge.model).eval()
    stop = stop_token_id(tokenizer)
    draw = torch.Generator().manual_seed(derive_seed(0, step, *key))
    written = generate(
        model,
        [encode_prompt(tokenizer, [{"role": "user", "content": text}])],
        max_new_tokens=length,
        stop_ids=[stop],
        pad_id=0,
        sampling=Sampling(1.0),
        uniforms_BT=draw_uniforms(1, length, draw),
    )
    return tokenizer.decode([token for token in written.responses()[0] if token != stop])


@pytest.mark.slow
@pytest.mark.parametrize("has_judge", [False, True])
def test_rounds_are_those_of_a_naive_loop(parts: Parts, talker: Artifact, tmp_path: Path, has_judge: bool):
    """The answers of the tiny model, or of the talker itself; every text that could be used, asked for alone."""
    own = parts if has_judge else replace(parts, init=talker)
    rows, figures = revise(own, tmp_path / "run", talker if has_judge else None)
    assert len(rows) == figures["rows"] == 12
    for number, row in enumerate(rows):
        key = divmod(number, 2)
        text, question = row["original"], row["messages"][0]["content"]
        for turn, each in enumerate(row["revisions"]):
            values = {"question": question, "answer": text, "principle": each["principle"]}
            critique = one_at_a_time(talker, filled(CRITIQUE, values), 9, "critique", *key, turn)
            assert each["critique"] == critique.strip()
            values["critique"] = critique
            revision = one_at_a_time(talker, filled(REVISION, values), 8, "revision", *key, turn)
            assert each["revision"] == revision.strip()
            assert each["outcome"] == "revised"
            text = each["revision"]
        assert row["messages"][-1] == {"role": "assistant", "content": text}
        assert {each["principle"] for each in row["revisions"]} == {"Be short.", "Be kind."}
    assert figures["changed"] == figures["rounds_revised"] == 1.0


@pytest.mark.slow
def test_pairs_and_demonstrations_are_what_the_next_stages_take(parts: Parts, talker: Artifact, tmp_path: Path):
    rows, _ = revise(parts, tmp_path / "all", talker)
    pairs, _ = revise(parts, tmp_path / "pairs", talker, keep="revised")
    assert [(row["original"], row["messages"][-1]["content"]) for row in rows] == [
        (pair["rejected"], pair["chosen"]) for pair in pairs
    ]
    assert [pair["revisions"] for pair in pairs] == [row["revisions"] for row in rows]
    for name, layout in (("all", "messages"), ("pairs", "preference")):
        source = DataEntry(source=str(tmp_path / name / "rows.jsonl"))
        assert len(read_rows((source,), layout, split="all")) == 12


def test_what_does_not_fit_is_counted(parts: Parts, tmp_path: Path):
    """The tiny model reads 48 tokens: no request fits beside the length of a reply."""
    prompt = tmp_path / "critique.txt"
    prompt.write_text("{answer}{principle}" + "e" * 40)
    with pytest.raises(DataError, match=r"nothing is kept .*12 without a critique and revision of use"):
        revise(parts, tmp_path / "run", revisions=1, critique_prompt=prompt)
    items = [
        item
        for file in (tmp_path / "run/checkpoints/parts").glob("*.json")
        for item in json.loads(file.read_text())["items"]
    ]
    outcomes = [each["rounds"][0]["outcome"] for item in items for each in item["answers"]]
    assert outcomes == ["critique too long"] * 12


class Critic(BaseHTTPRequestHandler):
    """An OpenAI-compatible model: finds fault with what holds no `!`, and revises by writing one."""

    asked: list[dict[str, Any]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Critic.asked.append(body)
        text = body["messages"][0]["content"]
        answer = text.split("Answer:\n")[1].split("\n\n")[0]
        reason = "stop"
        if "Principle:\n" in text:
            said = "NONE" if "!" in answer else "It is dull."
        elif len(answer) % 3 == 0:
            said, reason = f"{answer} and so", "length"
        else:
            said = f"Revised answer: {answer}!"
        choice = {"message": {"content": said}, "finish_reason": reason}
        payload = json.dumps({"choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Critic.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Critic)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_behind_an_address(parts: Parts, tmp_path: Path, url: str):
    values: dict[str, Any] = {"judge_url": url, "judge_model": "m", "temperature": 0.7}
    sizes = {name: size for name, size in SIZES.items() if name != "critique_length"}
    plain, _ = sample(parts, tmp_path / "plain", temperature=0.7, **sizes)
    assert not Critic.asked
    rows, figures = revise(parts, tmp_path / "run", **values)
    before = [row["messages"][-1]["content"].strip() for row in plain if row["messages"][-1]["content"].strip()]
    assert [row["original"].strip() for row in rows] == before
    for row, text in zip(rows, before, strict=True):
        if "!" in text:
            expected = text
        elif len(text) % 3 == 0:  # cut off, and kept; a second round of it
            longer = f"{text} and so"
            expected = f"{longer} and so" if len(longer) % 3 == 0 else f"{longer}!"
        else:
            expected = f"{text}!"
        assert row["messages"][-1]["content"].strip() == expected
    assert {(body["model"], body["temperature"], body["max_tokens"]) for body in Critic.asked} == {
        ("m", 0.7, 9),
        ("m", 0.7, 8),
    }
    assert figures["rounds_no_fault"] > 0


@pytest.mark.slow
def test_what_would_not_be_kept_is_not_criticised(parts: Parts, tmp_path: Path, url: str):
    shared: dict[str, Any] = {"unfinished": "leave_out", "stop_strings": ("the",), "prompts": 19, "num_generations": 2}
    kept, _ = sample(parts, tmp_path / "plain", **shared)
    judge = {"judge_url": url, "judge_model": "m", "revisions": 1}
    rows, _ = revise(parts, tmp_path / "run", response_length=10, **judge, **shared)
    criticised = [body["messages"][0]["content"] for body in Critic.asked if body["max_tokens"] == 9]
    texts = sorted(row["messages"][-1]["content"].strip() for row in kept)
    assert 0 < len(texts) < 38
    assert sorted(text.split("Answer:\n")[1].split("\n\n")[0] for text in criticised) == texts
    usable = [text for text in texts if "!" in text or len(text) % 3]
    assert sorted(row["original"].strip() for row in rows) == usable, "a revision that was cut off changes nothing"


@pytest.mark.slow
def test_killed_it_ends_with_the_same_bytes(parts: Parts, talker: Artifact, tmp_path: Path):
    values: dict[str, Any] = {"prompts": 40, "batch_size": 4, "judge": talker, "keep": "revised"}
    revise(parts, tmp_path / "calm", **values)
    killed = tmp_path / "killed"
    assert killed_at((2, 9, 41), killed, lambda: revise(parts, killed, **values)) == 2
    assert (killed / "rows.jsonl").read_bytes() == (tmp_path / "calm" / "rows.jsonl").read_bytes()


RECIPE = """\
run: tiny
stages:
  sample: {{init: {init}, judge: {judge}, constitution: rules.md, revisions: 1, data: {data}, prompts: 21,
            num_generations: 2, batch_size: 8, response_length: 8, critique_length: 8, unfinished: keep, bf16: false}}
  pairs: {{stage: sample, init: {init}, judge: {judge}, constitution: rules.md, revisions: 1, data: {data}, prompts: 21,
           num_generations: 2, batch_size: 8, response_length: 8, critique_length: 8, unfinished: keep, bf16: false,
           keep: revised}}
  sft: {{init: {init}, data: [sample], max_steps: 2, held_out: 0.2, bf16: false}}
  dpo: {{init: sft, data: [pairs], max_steps: 2, held_out: 0.2, bf16: false}}
"""


@pytest.mark.slow
def test_two_processes_write_what_one_does_and_sft_and_dpo_read_it(
    parts: Parts, talker: Artifact, tmp_path: Path, warm: Warm
):
    (tmp_path / "rules.md").write_text(RULES)
    (tmp_path / "cai.yaml").write_text(RECIPE.format(init=parts.init.model, judge=talker.model, data=parts.data))
    for count in (1, 2):
        until = ("--until", "pairs") if count == 2 else ()
        done = warm("run", "cai.yaml", *until, "--artifacts", count, "--num-processes", count)
        assert done.code == 0, done.stderr
    one, two = ((tmp_path / str(count) / "tiny/pairs/rows.jsonl").read_bytes() for count in (1, 2))
    assert one == two
    assert one.count(b"\n") > 30
    manifest = json.loads((tmp_path / "1/tiny/sample/manifest.json").read_text())
    assert [each["reference"] for each in manifest["inputs"]["judge"]] == [str(talker.model)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"revisions": 0}, "constitution is of critique and revision, and revisions is 0"),
        ({"revisions": 0, "constitution": None, "keep": "revised"}, "keep: revised, and revisions is 0"),
        ({"constitution": None}, "revisions needs constitution"),
        ({"reward": "vowels"}, "not a reward: a label stage scores what is kept"),
        ({"keep": "reference"}, "not keep: reference"),
        ({"judge": "x", "judge_url": "http://127.0.0.1/v1", "judge_model": "m"}, "one of them"),
        ({"judge_url": "http://127.0.0.1/v1"}, "go together"),
        ({"judge_url": "http://key@127.0.0.1/v1", "judge_model": "m"}, "OPENAI_API_KEY"),
    ],
)
def test_fields_that_do_not_go_together(parts: Parts, values: dict[str, Any], message: str):
    given = {"revisions": 1, "constitution": parts.folder / "rules.md", **values}
    if given["constitution"] is None:
        del given["constitution"]
    with pytest.raises(ValueError, match=message):
        config_of(parts, **given)
