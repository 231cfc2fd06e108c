"""A judge behind an OpenAI-compatible address: `transformers serve`, vLLM, llama.cpp or a provider's.

Each answer is one request of `POST <url>/chat/completions` (a judge's at temperature 0), up to eight at a time. The key
is read from OPENAI_API_KEY; it is never written down, and not sent on to wherever an answer redirects to.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import TrainingError
from pipeline.rl.judge import judge_text, score_of

AT_ONCE = 8
MAX_TOKENS = 16
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each new try
PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # statuses that may be gone at the next try
GRADE = re.compile(r"\D*(?<![-.])([1-9])(?:\s*/\s*9)?\D*", re.ASCII)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: urllib would hand the key to its target."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass(frozen=True)
class RemoteModel:
    """A model behind `url` (which ends in `/v1` or the like), and how it is asked."""

    url: str
    model: str
    max_tokens: int = MAX_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    waits: tuple[float, ...] = WAITS
    timeout: float = 60.0
    """Seconds without an answer that a try lasts."""

    def reply(self, text: str) -> tuple[str, bool]:
        """(the reply to one message, "" where there is none in it; whether it came to its end).

        Raises TrainingError where the address does not answer, or refuses, after all tries.
        """
        for wait in (*self.waits, math.inf):
            try:
                return self._post(text)
            except urllib.error.HTTPError as error:
                why = f"{error.code} {error.reason}: {_beginning(error)}"
                may_pass = error.code in PASSING
            except (OSError, http.client.HTTPException, ValueError) as error:  # URLError and time-outs are OSErrors
                why, may_pass = f"{type(error).__name__}: {error}", True
            if not may_pass or wait == math.inf:
                key = os.environ.get("OPENAI_API_KEY")
                raise TrainingError(
                    f"the judge {self.model} does not answer: {why.replace(key, '…') if key else why}",
                    where=self.url,
                    mend="see to the server or OPENAI_API_KEY; the same command goes on from the last checkpoint",
                )
            time.sleep(wait)
        raise AssertionError

    def _post(self, text: str) -> tuple[str, bool]:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        if self.top_p < 1:
            body["top_p"] = self.top_p
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers, method="POST"
        )
        opener = urllib.request.build_opener(_NoRedirects)
        with opener.open(request, timeout=self.timeout) as response:
            return _content(json.loads(response.read()))


@dataclass(frozen=True)
class RemoteJudge:
    """A judge behind an address; the fields are RemoteModel's."""

    url: str
    model: str
    constitution: str
    waits: tuple[float, ...] = WAITS
    timeout: float = 60.0

    def score(self, prompts: Sequence[Sequence[dict[str, str]]], answers: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(scores from 0 to 1, True where the reply held no grade), each [B]; such an answer scores 0, the lowest.

        Raises TrainingError where an address does not answer, or refuses, after all tries.
        """
        texts = [judge_text(self.constitution, *both) for both in zip(prompts, answers, strict=True)]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            replies = list(pool.map(self.ask, texts))
        grades = [read_grade(reply) for reply in replies]
        scores_B = torch.tensor([0.0 if grade is None else score_of(grade) for grade in grades])
        return scores_B, torch.tensor([grade is None for grade in grades])

    def ask(self, text: str) -> str:
        """The reply to one message, "" where there is none in it."""
        return RemoteModel(self.url, self.model, waits=self.waits, timeout=self.timeout).reply(text)[0]


def _beginning(error: urllib.error.HTTPError) -> str:
    """The first of what came with a refusal; "" where that does not come."""
    try:
        return error.read(200).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return ""


def _content(reply: Any) -> tuple[str, bool]:
    """The text of a chat completion and whether it came to its end; ValueError where that is none."""
    try:
        choice = reply["choices"][0]
        return str(choice["message"]["content"] or ""), choice.get("finish_reason") != "length"
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"no chat completion: {json.dumps(reply)[:80]}") from error


def read_grade(reply: str) -> int | None:
    """The grade in a reply that holds one number from 1 to 9 ("7", "Grade: 7/9."), None for any other reply."""
    found = GRADE.fullmatch(reply)
    return int(found[1]) if found else None
