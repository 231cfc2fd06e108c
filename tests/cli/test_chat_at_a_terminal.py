"""`llmpipe chat` at a real terminal: a pseudo-terminal with a person's keys, Ctrl-C among them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from pipeline.data.chat import stop_token_id
from pipeline.data.tokenizers import train_bpe
from pipeline.model.build import save_model
from pipeline.model.presets import Shape, build_config
from tests.conftest import PATIENCE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two chat models of random weights. Greedy, the second one writes on until its context of 4,096 is full."""
    tokenizer = train_bpe(iter(["say hello to the world"] * 8), 300)
    assert tokenizer.pad_token_id is not None
    made = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp("chat") / f"model-{seed}"
        torch.manual_seed(seed)
        shape = Shape(depth=1, width=32, heads=2, kv_heads=2, mlp_width=64, context=4096, vocab=300, tied=False)
        model = LlamaForCausalLM(build_config("llama", shape, {}))
        tokenizer.save_pretrained(folder / "tokenizer")
        save_model(model, folder / "model", folder / "tokenizer", [stop_token_id(tokenizer)], tokenizer.pad_token_id)
        made.append(folder / "model")
    return made


class Terminal:
    """A command on a pseudo-terminal of 100 × 24 characters."""

    def __init__(self, *args: str) -> None:
        self.master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", *args],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env={**os.environ, "TERM": "xterm"},
        )
        os.close(slave)
        self.seen = ""

    def read(self, until: Callable[[str], bool]) -> str:
        """What comes, without escape sequences, until it is enough; it is then taken as read."""
        end = time.monotonic() + PATIENCE
        while not until(self.seen):
            if time.monotonic() > end:
                self.process.kill()
                pytest.fail(f"nothing more comes:\n{self.seen}")
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    raw = os.read(self.master, 65536)
                except OSError:  # the other side has ended
                    raw = b""
                if not raw:
                    break
                self.seen += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw.decode("utf-8", "replace"))
        seen, self.seen = self.seen, ""
        return seen

    def ends_at(self, key: str) -> int:
        """The exit code, the key pressed again until it comes: one that falls between the prompt and the line editor's
        start is lost."""
        end = time.monotonic() + PATIENCE
        while self.process.poll() is None and time.monotonic() < end:
            self.type(key)
            time.sleep(0.5)
            if select.select([self.master], [], [], 0)[0]:
                with contextlib.suppress(OSError):
                    os.read(self.master, 65536)
        assert self.process.returncode is not None, "it does not end"
        return self.process.returncode

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())


def prompts(text: str) -> bool:
    """Whether the command waits for a line."""
    return text.endswith("> ")


def test_two_models_in_columns_commands_and_ctrl_c(folders: list[Path]) -> None:
    names = [str(folder) for folder in folders]
    terminal = Terminal("chat", *names, "--max-new-tokens", "4000")
    opening = terminal.read(prompts)
    assert re.search(r"model-0/model +loaded in \d+\.\d s", opening)
    assert "/help lists the commands" in opening

    terminal.type("/temperature\n")
    assert "temperature 0;" in terminal.read(prompts)

    terminal.type("say <|im_end|> it\n")
    terminal.read(lambda seen: seen.count("\n") > 60)  # it streams: frame after frame
    terminal.type("\x03")
    rest = terminal.read(prompts)
    lines = [line for line in rest.splitlines() if line.strip()]
    assert terminal.process.poll() is None, "the conversation goes on"
    heads = [line for line in lines if line.count("model") >= 2 or line.count("/") >= 2]
    assert heads, "both names in one line"
    widest = max(len(line.replace("^C", "").rstrip()) for line in lines)
    assert 50 < widest <= 100, "two columns"

    terminal.type("/reset\n")
    assert "forgotten" in terminal.read(prompts)
    assert terminal.ends_at("/quit\n") == 0


def test_two_models_in_a_pipe(warm: Any, folders: list[Path]) -> None:
    """What is piped in is the prompt; the same command says the same again, with its figures where asked for."""
    names = [str(folder) for folder in folders]
    command = ["chat", *names, "--max-new-tokens", "5", "-t", "0.8", "--seed", "3"]

    def piped(*flags: str) -> str:
        done = warm.start(*command, *flags, given="say\nhello\n").wait()
        assert done.code == 0, done.stderr
        return done.stdout

    found = json.loads(piped("--json"))
    assert (found["prompt"], found["temperature"], found["seed"]) == ("say\nhello", 0.8, 3)
    answers = [each["answer"] for each in found["answers"]]
    assert [each["model"] for each in found["answers"]] == names
    assert answers[0] != answers[1]
    assert all(each["tokens"] == 5 and not each["ended"] for each in found["answers"])
    assert piped() == f"{names[0]}:\n{answers[0]}\n\n{names[1]}:\n{answers[1]}\n"


def test_one_model_streams_and_the_end_of_input_ends_it(folders: list[Path]) -> None:
    terminal = Terminal("chat", str(folders[0]), "--max-new-tokens", "20")
    terminal.read(prompts)
    terminal.type("hello\n")
    answer = terminal.read(prompts).removesuffix("> ")
    echo, _, said = answer.partition("\n")
    assert echo.strip() == "hello"
    assert len(said.strip()) > 0
    assert terminal.ends_at("\x04") == 0
