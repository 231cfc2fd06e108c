"""A judge behind an address: a real server on this machine, and every way it can fail."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from pipeline.errors import TrainingError
from pipeline.rl.judge import judge_text
from pipeline.rl.judge_api import AT_ONCE, RemoteJudge, read_grade

QUESTION = [{"role": "user", "content": "How are you?"}]
Reply = tuple[int, bytes]


def said(text: str | None) -> Reply:
    """A chat completion of this text."""
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


class Server:
    """An OpenAI-compatible server: `answer(text, number of the request)` is its reply."""

    def __init__(self) -> None:
        self.answer: Callable[[str, int], Reply] = lambda text, number: said("5")
        self.seen: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.seen.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
                    number = len(server.seen)
                status, payload = server.answer(body["messages"][0]["content"], number)
                with server.lock:
                    server.at_once -= 1
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", payload.decode())
                    payload = b""
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            do_GET = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *_: None  # type: ignore[method-assign]  # one that hung up
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/v1"

    def judge(self, **values: Any) -> RemoteJudge:
        return RemoteJudge(self.url, "tiny", "Be kind.", **{"waits": (0.01, 0.02), "timeout": 5.0, **values})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    found = Server()
    yield found
    found.http.shutdown()
    found.http.server_close()


def test_each_answer_is_asked_about_and_graded(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k-123")
    server.answer = lambda text, number: said({"good": "9", "so so": " 5\n", "bad": "Grade: 1/9."}[text.split("\n")[6]])
    scores_B, unread_B = server.judge().score([QUESTION] * 3, ["bad", "good", "so so"])
    assert scores_B.tolist() == [0.0, 1.0, 0.5]
    assert unread_B.tolist() == [False] * 3
    asked = server.seen[0]
    assert (asked["path"], asked["key"], asked["model"]) == ("/v1/chat/completions", "Bearer k-123", "tiny")
    assert (asked["temperature"], asked["max_tokens"]) == (0, 16)
    texts = {seen["messages"][0]["content"] for seen in server.seen}
    assert texts == {judge_text("Be kind.", QUESTION, answer) for answer in ("bad", "good", "so so")}


def test_without_a_key_none_is_sent(server: Server):
    server.judge().score([QUESTION], ["x"])
    assert server.seen[0]["key"] is None


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("7", 7), (" 7 \n", 7), ("7/9", 7), ("Grade: 7 / 9.", 7), ("I give it a 1", 1), ("**8**", 8),
        ("", None), ("none", None), ("0", None), ("10", None), ("77", None), ("7.5", None), ("-3", None), ("1.", 1),
        ("between 3 and 5", None), ("7/10", None), ("٧", None),
    ],
)  # fmt: skip
def test_a_grade_is_one_number_from_1_to_9(reply: str, grade: int | None):
    assert read_grade(reply) == grade


def test_a_reply_without_a_grade_scores_lowest_and_is_counted(server: Server):
    server.answer = lambda text, number: said(
        "9" if "good" in text else None if "silent" in text else "I would rather not"
    )
    scores_B, unread_B = server.judge().score([QUESTION] * 4, ["good", "bad", "silent", "good"])
    assert scores_B.tolist() == [1.0, 0.0, 0.0, 1.0]
    assert unread_B.tolist() == [False, True, True, False]


@pytest.mark.parametrize("trouble", [(503, b"busy"), (429, b"slow down"), (200, b"<html>"), (200, b"{}"), (200, b"[]")])
def test_trouble_that_passes_is_waited_out(server: Server, trouble: Reply):
    server.answer = lambda text, number: trouble if number < 3 else said("9")
    assert server.judge().score([QUESTION], ["x"])[0].tolist() == [1.0]
    assert len(server.seen) == 3


def test_trouble_that_stays_ends_the_run(server: Server):
    server.answer = lambda text, number: (503, b"busy")
    with pytest.raises(TrainingError, match=r"the judge tiny does not answer: 503 .*busy") as caught:
        server.judge().score([QUESTION], ["x"])
    assert caught.value.where == server.url
    assert len(server.seen) == 3


def test_a_refusal_is_not_asked_again_and_the_key_is_not_shown(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k-123")
    server.answer = lambda text, number: (401, b"no such key: k-123")
    with pytest.raises(TrainingError, match="401") as caught:
        server.judge().score([QUESTION], ["x"])
    assert len(server.seen) == 1
    assert "k-123" not in str(caught.value)


def test_a_redirect_is_not_followed(server: Server):
    """urllib would send the key along."""
    server.answer = lambda text, number: (302, f"{server.url}/elsewhere".encode())
    with pytest.raises(TrainingError, match="302"):
        server.judge().score([QUESTION], ["x"])
    assert [seen["path"] for seen in server.seen] == ["/v1/chat/completions"]


def test_silence_is_a_time_out(server: Server):
    def sleep(text: str, number: int) -> Reply:
        time.sleep(0.5)
        return said("9")

    server.answer = sleep
    with pytest.raises(TrainingError, match="timed out"):
        server.judge(timeout=0.05, waits=(0.01,)).score([QUESTION], ["x"])


def test_a_refusal_whose_words_do_not_come_is_one(monkeypatch: pytest.MonkeyPatch):
    """Its header says 100 bytes, and none follows."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        held = []

        def serve() -> None:
            for _ in range(2):
                held.append(server.accept()[0])
                held[-1].recv(65536)
                held[-1].sendall(b"HTTP/1.1 503 Busy\r\nContent-Length: 100\r\n\r\n")

        threading.Thread(target=serve, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        judge = RemoteJudge(url, "tiny", "Be kind.", waits=(0.01,), timeout=0.2)
        with pytest.raises(TrainingError, match="the judge tiny does not answer: 503 Busy"):
            judge.score([QUESTION], ["a"])
        assert len(held) == 2
        for each in held:
            each.close()


def test_nobody_there(server: Server):
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(TrainingError, match="refused"):
        server.judge().score([QUESTION], ["x"])


def test_some_are_asked_at_once_and_come_back_in_order(server: Server):
    def slow(text: str, number: int) -> Reply:
        time.sleep(0.02)
        return said(text.split("\n")[6])

    server.answer = slow
    grades = [1 + i % 9 for i in range(40)]
    scores_B, _ = server.judge().score([QUESTION] * 40, [str(grade) for grade in grades])
    assert scores_B.tolist() == pytest.approx([(grade - 1) / 8 for grade in grades])
    assert 1 < server.most_at_once <= AT_ONCE
