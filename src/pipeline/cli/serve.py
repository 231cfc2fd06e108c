"""`llmpipe serve REF`: an OpenAI-compatible endpoint, by the handlers of `transformers serve` or by vLLM.

What stands here is what `transformers serve` (5.23) does otherwise for a model of one's own: the model's name in the
API is the reference, and /v1/models lists it instead of the hub's cache (without one it fails); prompts become tokens
as in training, so that a typed `<|im_end|>` is letters; a temperature above 0 samples, without top-k, though the
model's own config is greedy; an answer ends where the model's reach does; what would be ignored is refused.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifacts import Artifact
from pipeline.errors import ConfigError, DataError, MachineError

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from pipeline.cli.conversation import Conversation

ENGINES = ("transformers", "vllm")
REFUSED = {
    "n": 1,
    "best_of": 1,
    "logprobs": False,
    "top_logprobs": 0,
    "echo": False,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {},
    "response_format": {"type": "text"},
    "tools": [],
    "functions": [],
    "generation_config": "",
}
"""Field of a request -> the value at which it does nothing; any other is refused, since it would not be heeded."""
NUMBERS = {"temperature": float, "top_p": float, "max_tokens": int, "max_completion_tokens": int, "seed": int}
"""Field of a request -> what it is where it is given."""


def serve(artifact: Artifact | Path, reference: str, *, host: str, port: int, engine: str, as_json: bool) -> None:
    """Serve until a signal. Raises ConfigError for what is no language model, MachineError for a missing extra and
    a port that is taken."""
    if engine not in ENGINES:
        raise ConfigError(f"no such engine: {engine!r}", where="--engine", mend=f"one of {', '.join(ENGINES)}")
    if isinstance(artifact, Artifact) and artifact.kind != "causal-lm":
        mend = "llmpipe status lists models"
        raise ConfigError(f"{artifact.kind} is no kind that can talk", where=reference, mend=mend)
    if engine == "vllm":
        _by_vllm(artifact, reference, host, port)
    for module in ("uvicorn", "fastapi", "openai"):
        if find_spec(module) is None:
            raise MachineError(f"{module} is not installed", where="llmpipe serve", mend='pip install "llmpipe[serve]"')
    import uvicorn

    from pipeline.cli.conversation import load

    listening = _listen(host, port)
    model = load(artifact, reference, None, 0.0, 1, 0)
    config = uvicorn.Config(application(model, reference), log_level="warning", timeout_graceful_shutdown=3)
    server = uvicorn.Server(config)
    _say(reference, model.is_chat, host, listening.getsockname()[1], as_json)
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn ends on them, and hands them on to what was set before
        signal.signal(number, lambda number, frame: None)
    server.run(sockets=[listening])
    sys.stdout.flush()
    os._exit(0)  # nothing is left to save, and taking torch down in order takes seconds


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens, bound before the model is loaded so that a port that is taken is told at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        what = f"cannot listen on {host}:{port}: {error.strerror or error}"
        raise MachineError(what, where="--port", mend="--port 0 takes a free one") from error


def _say(reference: str, is_chat: bool, host: str, port: int, as_json: bool) -> None:
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    if as_json:
        print(json.dumps({"url": url, "model": reference}), flush=True)
    else:
        print(f"{reference} at {url}   (model: {reference}, any key; Ctrl-C ends)", flush=True)
    if not is_chat:
        print(f"{reference} is a base model: /v1/completions continues text", file=sys.stderr)
    if host not in ("127.0.0.1", "::1", "localhost"):
        print(f"no key is asked for: whoever reaches {host} can use it", file=sys.stderr)


def vllm_command(folder: Path, reference: str, host: str, port: int) -> list[str]:
    """vLLM's server for the folder, under the reference's name."""
    options = ["--served-model-name", reference, "--host", host, "--port", str(port)]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder), *options]


def _by_vllm(artifact: Artifact | Path, reference: str, host: str, port: int) -> None:
    """Become vLLM's server."""
    if find_spec("vllm") is None:
        raise MachineError("vllm is not installed", where="--engine vllm", mend='pip install "llmpipe[vllm]"')
    if not isinstance(artifact, Artifact):
        raise ConfigError("vLLM serves a finished stage", where=reference, mend="--engine transformers")
    command = vllm_command(artifact.model, reference, host, port)
    os.execv(command[0], command)


def application(model: Conversation, reference: str) -> Starlette:
    """The endpoints /v1/chat/completions, /v1/completions, /v1/models and /health of one model, named `reference`."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.utils import GenerationState
    from transformers.utils import logging

    logging.set_verbosity_error()
    manager, state = _manager(model, reference), GenerationState()
    began = int(time.time())

    def answering(handler: Any, fit: Callable[[Conversation, dict[str, Any]], int]) -> Any:
        async def answer(request: Request) -> Response:
            try:
                body = await request.json()
                prepare(model, body, fit)
            except (DataError, ConfigError, ValueError, KeyError, TypeError) as error:
                raise HTTPException(400, str(error) or type(error).__name__) from error
            found: Response = await handler.handle_request(body, str(uuid.uuid4()))
            return found

        return answer

    async def models(request: Request) -> Response:
        entry = {"id": reference, "object": "model", "created": began, "owned_by": "llmpipe"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        fields = {"message": error.detail, "type": "invalid_request_error", "code": error.status_code}
        return JSONResponse({"error": fields}, status_code=error.status_code)

    chat, text = ChatCompletionHandler(manager, state), CompletionHandler(manager, state)
    routes = [
        Route("/v1/chat/completions", answering(chat, fit_chat), methods=["POST"]),
        Route("/v1/completions", answering(text, fit_text), methods=["POST"]),
        Route("/v1/models", models),
        Route("/health", health),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: refused})


def _manager(model: Conversation, reference: str) -> Any:
    """transformers' manager of models, which holds this one under the reference's name and loads no other."""
    import torch
    from transformers import BatchEncoding
    from transformers.cli.serving.model_manager import ModelManager, TimedModel

    from pipeline.data.chat import encode_prompt

    def apply_chat_template(messages: list[dict[str, str]], **options: Any) -> BatchEncoding:
        ids = torch.tensor([encode_prompt(model.tokenizer, messages)])
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    words = copy.deepcopy(model.tokenizer)
    words.apply_chat_template = apply_chat_template  # typed control tokens are letters
    manager = ModelManager()
    manager.process_model_name = lambda name: name  # it would add @main
    manager.loaded_models[reference] = TimedModel(model.model, -1, processor=words)
    manager.force_model = reference
    return manager


def prepare(model: Conversation, body: dict[str, Any], fit: Callable[[Conversation, dict[str, Any]], int]) -> None:
    """Put the settings of a request where the handlers heed them. `fit` says how many tokens the prompt has.

    ValueError for what would be ignored, ConfigError for a prompt that leaves no room for an answer.
    """
    check(body)
    for name, nothing in REFUSED.items():
        if body.get(name) not in (None, nothing) and not (name == "logprobs" and body[name] == 0):
            raise ValueError(f"`{name}` is not supported here")
    count = fit(model, body)
    room = model.context - count
    if room < 1:
        raise ConfigError(f"the prompt has {count:,} tokens, and the model reads {model.context:,}")
    asked = [body.pop(name, None) for name in ("max_completion_tokens", "max_tokens")]
    most = next((int(each) for each in asked if each is not None), room)
    temperature, top_p = (body.pop(name, None) for name in ("temperature", "top_p"))
    body["generation_config"] = json.dumps(
        settings(model, min(most, room), 0.0 if temperature is None else float(temperature), top_p)
    )


def check(body: Any) -> None:
    """ValueError for a request that is no object, and for a number that is none."""
    if not isinstance(body, dict):
        raise ValueError("a request is a JSON object")
    for name, kind in NUMBERS.items():
        given = body.get(name)
        if given is not None and (isinstance(given, bool) or not isinstance(given, (int, kind))):
            raise ValueError(f"`{name}` is {'a whole number' if kind is int else 'a number'}, not {given!r}")


def check_messages(messages: Any) -> None:
    """ValueError for what is no list of messages, and for a content that is no text: silence would leave it out."""
    if not isinstance(messages, list) or not all(isinstance(each, dict) and each.get("role") for each in messages):
        raise ValueError("`messages` is a list of objects with `role` and `content`")
    for content in (each.get("content") for each in messages):
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
            raise ValueError("a content is a text, or a list of parts of type `text`: nothing else is read")
        if not all(isinstance(part.get("text"), str) for part in parts):
            raise ValueError("a message has no text as its content")


def settings(model: Conversation, most: int, temperature: float, top_p: float | None) -> Mapping[str, Any]:
    """The generation config of a request; greedy at temperature 0."""
    if temperature < 0 or most < 1:
        raise ValueError("temperature is at least 0, and max_tokens at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError("top_p is above 0 and at most 1")
    ends = {"max_new_tokens": most, "eos_token_id": model.stop_ids, "pad_token_id": model.tokenizer.pad_token_id}
    if temperature == 0:
        return ends | {"do_sample": False}
    return ends | {"do_sample": True, "temperature": temperature, "top_p": top_p or 1.0, "top_k": 0}


def fit_chat(model: Conversation, body: dict[str, Any]) -> int:
    """Tokens of the conversation; ValueError of a base model, which was not taught to answer."""
    from transformers.cli.serving.utils import BaseHandler, Modality

    from pipeline.data.chat import encode_prompt

    if not model.is_chat:
        raise ValueError("a base model was not taught to answer: /v1/completions continues text")
    check_messages(body.get("messages"))
    messages = BaseHandler.get_processor_inputs_from_messages(body["messages"], Modality.LLM)
    return len(encode_prompt(model.tokenizer, messages))


def fit_text(model: Conversation, body: dict[str, Any]) -> int:
    """Tokens of the text, which stands behind the start token where the model is a base model."""
    prompt = body.get("prompt")
    if not isinstance(prompt, str):
        raise ValueError("prompt is a text")
    if not model.is_chat and model.tokenizer.bos_token:
        body["prompt"] = prompt = model.tokenizer.bos_token + prompt
    return len(model.tokenizer(prompt).input_ids)
