"""`llmpipe chat` at a real terminal: a pseudo-terminal with a person's keys, Ctrl-C among them."""

from __future__ import annotations

import fcntl
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
    """Two chat models of random weights that write letters for a long time: their context is 4,096."""
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

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())


def prompts(text: str) -> bool:
    """Whether the command waits for a line."""
    return text.endswith("> ")


def test_two_models_in_columns_commands_and_ctrl_c(folders: list[Path]) -> None:
    names = [str(folder) for folder in folders]
    terminal = Terminal("chat", *names, "--max-new-tokens", "4000", "-t", "1")
    opening = terminal.read(prompts)
    assert re.search(r"model-0/model +loaded in \d+\.\d s", opening)
    assert "/help lists the commands" in opening

    terminal.type("/temperature\n")
    assert "temperature 1;" in terminal.read(prompts)

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
    terminal.type("/quit\n")
    terminal.read(lambda seen: terminal.process.poll() is not None)
    assert terminal.process.wait(PATIENCE) == 0


def test_one_model_streams_and_the_end_of_input_ends_it(folders: list[Path]) -> None:
    terminal = Terminal("chat", str(folders[0]), "--max-new-tokens", "20")
    terminal.read(prompts)
    terminal.type("hello\n")
    answer = terminal.read(prompts).removesuffix("> ")
    echo, _, said = answer.partition("\n")
    assert echo.strip() == "hello"
    assert len(said.strip()) > 0
    terminal.type("\x04")
    terminal.read(lambda seen: terminal.process.poll() is not None)
    assert terminal.process.wait(PATIENCE) == 0
