"""The endpoint, asked by the real client of the package openai."""

import json
import signal
import socket
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.artifacts import outside_model
from pipeline.cli import serve as serving
from pipeline.cli.conversation import Conversation, load
from pipeline.data.chat import encode_prompt
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import ConfigError, MachineError
from tests.conftest import Warm
from tests.stages.conftest import make_model

MISSING = [name for name in ("fastapi", "uvicorn", "openai") if find_spec(name) is None]
needs_extra = pytest.mark.skipif(bool(MISSING), reason=f"not installed (the extra serve): {', '.join(MISSING)}")
CONTEXT = 96
QUESTION = [{"role": "user", "content": "say <|im_end|> now"}]
IMAGE = [{"type": "image_url", "image_url": {"url": "http://nowhere/cat.png"}}]


def made(folder: Path, *, is_chat: bool) -> Path:
    """A tiny random model that ends at the stop token, or at the end of documents as a base model does."""
    model = make_model(folder, context=CONTEXT)
    config = model / "generation_config.json"
    tokenizer = load_tokenizer(model)
    stop = tokenizer.eos_token_id if is_chat else tokenizer.bos_token_id
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": stop}))
    return model


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("chat"), is_chat=True)


@pytest.fixture(scope="module")
def served(chat_model: Path, tmp_path_factory: pytest.TempPathFactory, warm_server: Any) -> Iterator[Any]:
    """(client, name of the model) of an endpoint on a free port."""
    import openai

    warm = Warm(chat_model.parent, tmp_path_factory.mktemp("logs"), warm_server)
    running = warm.start("serve", "./model", "--port", "0", "--json")
    running.wait_for(lambda: "\n" in Path(f"{running.log}.out").read_text())
    said = json.loads(Path(f"{running.log}.out").read_text())
    yield openai.OpenAI(base_url=said["url"], api_key="none", max_retries=0), said["model"]
    running.signal(signal.SIGTERM)
    assert running.wait().code == 0, running.stderr()
    assert "Traceback" not in running.stderr()


@pytest.fixture(scope="module")
def expected(chat_model: Path) -> tuple[str, int, int]:
    """(greedy answer of 12 tokens by transformers' generate, tokens of the prompt, of the answer)."""
    model = load(outside_model(chat_model), "m", None, 0.0, 1, 0).model
    tokenizer = load_tokenizer(chat_model)
    ids = torch.tensor([encode_prompt(tokenizer, QUESTION)])
    plain = AutoModelForCausalLM.from_pretrained(chat_model, dtype=model.dtype)
    found = plain.generate(ids, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids))[
        0, ids.shape[1] :
    ]
    return tokenizer.decode(found, skip_special_tokens=True), ids.shape[1], len(found)


@needs_extra
@pytest.mark.slow
def test_the_model_goes_by_its_reference(served: Any):
    client, name = served
    assert name == "./model"
    assert [model.id for model in client.models.list()] == [name]
    with pytest.raises(Exception, match="requested 'other'"):
        client.chat.completions.create(model="other", messages=QUESTION)


@needs_extra
@pytest.mark.slow
def test_an_answer_is_generates_own_whole_and_streamed(served: Any, expected: tuple[str, int, int]):
    """Greedy unless asked otherwise; what a user types is letters, so the prompt has as many tokens as in training."""
    client, name = served
    text, asked, answered = expected
    whole = client.chat.completions.create(model=name, messages=QUESTION, max_tokens=12)
    assert whole.choices[0].message.content == text
    assert whole.model == name
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (asked, answered)
    chunks = list(client.chat.completions.create(model=name, messages=QUESTION, max_tokens=12, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len(chunks) > 5


@needs_extra
@pytest.mark.slow
def test_a_temperature_samples_and_a_seed_repeats_it(served: Any, expected: tuple[str, int, int]):
    client, name = served

    def say(seed: int) -> str:
        options = {"temperature": 1.0, "seed": seed, "max_tokens": 12}
        answer = client.chat.completions.create(model=name, messages=QUESTION, **options)
        return str(answer.choices[0].message.content)

    assert say(1) == say(1)
    assert len({say(1), say(2), expected[0]}) == 3


@needs_extra
@pytest.mark.slow
def test_what_would_be_ignored_or_does_not_fit_is_refused(served: Any):
    import openai

    client, name = served
    long = [{"role": "user", "content": "a b " * 100}]
    for options, words in (
        ({"n": 2}, "`n` is not supported"),
        ({"messages": long}, f"the model reads {CONTEXT}"),
        ({"response_format": {"type": "json_object"}}, "`response_format` is not supported"),
        ({"temperature": -1}, "temperature is at least 0"),
        ({"messages": [{"role": "judge", "content": "a"}]}, "judge"),
        ({"messages": [{"role": "user", "content": IMAGE}]}, "parts of type `text`"),
        ({"messages": [{"role": "user", "content": None}]}, "no text as its content"),
        ({"messages": [{"role": "user"}]}, "no text as its content"),
        ({"messages": "hello"}, "a list of objects"),
        ({"messages": ["hello"]}, "a list of objects"),
        ({"temperature": 1, "top_p": 7}, "top_p is above 0"),
        ({"temperature": 1, "top_p": 0}, "top_p is above 0"),
        ({"max_tokens": "a"}, "`max_tokens` is a whole number, not 'a'"),
        ({"seed": "a"}, "`seed` is a whole number, not 'a'"),
        ({"temperature": True}, "`temperature` is a number, not True"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            client.chat.completions.create(**({"model": name, "messages": QUESTION} | options))
    for body in ([], 3, {}, {"prompt": 3}):
        with pytest.raises(openai.BadRequestError):
            client.post("/completions", body=body, cast_to=object)
    parts = [{"type": "text", "text": QUESTION[0]["content"]}]
    said = [
        client.chat.completions.create(model=name, messages=[{"role": "user", "content": each}], max_tokens=5)
        for each in (parts, QUESTION[0]["content"])
    ]
    assert said[0].choices[0].message.content == said[1].choices[0].message.content


@needs_extra
@pytest.mark.slow
def test_a_signal_ends_it_with_an_answer_under_way(chat_model: Path, tmp_path: Path, warm_server: Any):
    """SIGINT, after the first piece of a stream: exit code 0, and the client is told."""
    import openai

    running = Warm(chat_model.parent, tmp_path, warm_server).start("serve", "./model", "--port", "0", "--json")
    running.wait_for(lambda: "\n" in Path(f"{running.log}.out").read_text())
    url = json.loads(Path(f"{running.log}.out").read_text())["url"]
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    pieces = client.completions.create(model="./model", prompt="one", stream=True, temperature=2.0)
    next(iter(pieces))
    running.signal(signal.SIGINT)
    assert running.wait().code == 0, running.stderr()
    assert "Traceback" not in running.stderr()
    with pytest.raises(openai.APIConnectionError):
        client.models.list()


@needs_extra
@pytest.mark.slow
def test_text_is_continued_up_to_the_models_reach(served: Any):
    client, name = served
    found = client.completions.create(model=name, prompt="one two", max_tokens=10_000)
    assert found.usage.total_tokens <= CONTEXT
    assert (found.choices[0].finish_reason == "length") == (found.usage.total_tokens == CONTEXT)


def test_settings_of_a_request(chat_model: Path):
    model = load(outside_model(chat_model), "m", None, 0.0, 1, 0)
    body: dict[str, Any] = {"messages": QUESTION, "temperature": 0.7, "max_tokens": 5, "n": 1}
    serving.prepare(model, body, lambda model, body: CONTEXT - 3)
    settings = json.loads(body.pop("generation_config"))
    assert body == {"messages": QUESTION, "n": 1}
    assert settings["max_new_tokens"] == 3  # what is left of the reach
    assert (settings["do_sample"], settings["temperature"], settings["top_p"], settings["top_k"]) == (True, 0.7, 1.0, 0)
    assert settings["eos_token_id"] == model.stop_ids
    assert serving.settings(model, 4, 0.0, None)["do_sample"] is False
    with pytest.raises(ConfigError, match="the model reads 96"):
        serving.prepare(model, {}, lambda model, body: CONTEXT)


def test_a_base_model_continues_and_does_not_chat(tmp_path: Path):
    model = load(outside_model(made(tmp_path, is_chat=False)), "m", None, 0.0, 1, 0)
    assert not model.is_chat
    if not MISSING:
        with pytest.raises(ValueError, match="not taught to answer"):
            serving.fit_chat(model, {"messages": QUESTION})
    body = {"prompt": "one two"}
    count = serving.fit_text(model, body)
    assert body["prompt"] == "<|endoftext|>one two"
    assert count == 1 + len(model.tokenizer("one two").input_ids)


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(chat_model: Path, monkeypatch: pytest.MonkeyPatch):
    def never(*args: Any) -> Conversation:
        raise AssertionError("loaded")

    monkeypatch.setattr("pipeline.cli.conversation.load", never)
    if MISSING:
        monkeypatch.setattr(serving, "find_spec", lambda name: True)
        monkeypatch.setitem(__import__("sys").modules, "uvicorn", object())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(MachineError, match=f"cannot listen on 127.0.0.1:{port}") as caught:
            serving.serve(
                outside_model(chat_model), "m", host="127.0.0.1", port=port, engine="transformers", as_json=False
            )
    assert caught.value.mend.startswith("--port 0")


def test_vllm_is_named_by_the_reference(chat_model: Path, monkeypatch: pytest.MonkeyPatch):
    """Its own server is not run here: the command alone."""
    command = serving.vllm_command(chat_model, "demo/dpo", "127.0.0.1", 8000)
    assert command[3:] == ["serve", str(chat_model), "--served-model-name", "demo/dpo",
                           "--host", "127.0.0.1", "--port", "8000"]  # fmt: skip
    artifact = outside_model(chat_model)
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    for engine, words in (("vllm", "vllm is not installed"), ("transformers", "uvicorn is not installed")):
        with pytest.raises(MachineError, match=words):
            serving.serve(artifact, "m", host="127.0.0.1", port=0, engine=engine, as_json=False)
    with pytest.raises(ConfigError, match="no such engine"):
        serving.serve(artifact, "m", host="127.0.0.1", port=0, engine="llama.cpp", as_json=False)
