"""What the tests share: an offline environment, `llmpipe` as a process, a small corpus and what stages make of it."""

import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["USE_HUB_KERNELS"] = "NO"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
for _name in ("LLMPIPE_SET", "LLMPIPE_ARTIFACTS", "LLMPIPE_DEBUG", "WORLD_SIZE", "RANK", "LOCAL_RANK"):
    os.environ.pop(_name, None)

PATIENCE = 240.0  # seconds before a command counts as hanging; a busy machine may be several times slower

TINY = """\
run: tiny
stages:
  tokenize:
    data: corpus.jsonl
    vocab_size: 512
  pretrain:
    model: {depth: 2, hidden_size: 32, num_attention_heads: 2}
    context_length: 32
    per_device_train_batch_size: 4
    max_steps: 30
    learning_rate: 0.01
    eval_documents: 20
    eval_steps: 20
    save_steps: 5
    logging_steps: 5
"""


def pytest_collection_finish() -> None:
    """What is imported by now is there to stay: accelerate collects garbage after every training, and looked through
    all of it each time."""
    gc.collect()
    gc.freeze()


class Result(NamedTuple):
    """How a command ended."""

    code: int
    stdout: str
    stderr: str


class Running:
    """A command at work, the leader of its own process group."""

    def __init__(self, pid: int, log: str, poll: Callable[[], int | None]) -> None:
        self.pid, self.log, self._poll = pid, log, poll
        self.code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        if self.code is None:
            self.code = self._poll()
        return self.code

    def stderr(self) -> str:
        return Path(f"{self.log}.err").read_text()

    def signal(self, number: int, *, group: bool = False) -> None:
        if self.poll() is None:
            (os.killpg if group else os.kill)(self.pid, number)

    def wait(self) -> Result:
        """Its end; the whole group is killed and the test fails where it does not come."""
        until = time.monotonic() + PATIENCE
        while self.poll() is None:
            if time.monotonic() > until:
                os.killpg(self.pid, signal.SIGKILL)
                pytest.fail(f"the command hangs:\n{self.stderr()}")
            time.sleep(0.02)
        assert self.code is not None
        return Result(self.code, Path(f"{self.log}.out").read_text(), self.stderr())

    def wait_for(self, found: Callable[[], bool]) -> None:
        """Wait until `found()`, which has to happen before the command ends."""
        until = time.monotonic() + PATIENCE
        while not found():
            if self.poll() is not None or time.monotonic() > until:
                pytest.fail(f"ended ({self.code}) or hangs before what was waited for:\n{self.stderr()}")
            time.sleep(0.005)


class Cli:
    """`llmpipe` in a folder of its own, in a fresh process for every call."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, text: str) -> Path:
        """Write a file in the folder."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def __call__(self, *args: object, env: dict[str, str] | None = None) -> Result:
        return self._fresh("-m", "pipeline", *map(str, args), env=env)

    def python(self, code: str) -> Result:
        """Run a piece of Python in a fresh process, in the folder."""
        return self._fresh("-c", code)

    def torchrun(self, *args: str) -> Result:
        """`llmpipe` in two processes that torchrun starts."""
        return self._fresh("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "pipeline", *args)

    def _fresh(self, *args: str, env: dict[str, str] | None = None) -> Result:
        done = subprocess.run(
            [sys.executable, *args],
            cwd=self.folder,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr)


class Warm(Cli):
    """`llmpipe` in a folder of its own, forked off a process that has imported torch: for commands that train."""

    def __init__(self, folder: Path, logs: Path, server: subprocess.Popen[str]) -> None:
        super().__init__(folder)
        self.logs, self.server, self.count = logs, server, 0

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        answer: dict[str, Any] = json.loads(self.server.stdout.readline())
        return answer

    def start(
        self, *args: object, env: dict[str, str] | None = None, code: str | None = None, given: str | None = None
    ) -> Running:
        """Start the command and don't wait for it; with `code` a piece of Python in its place. `given` is piped in."""
        self.count += 1
        log = str(self.logs / str(self.count))
        folder = self.folder if code is None else Path(__file__).parents[1]
        request = {
            "args": [*map(str, args)],
            "cwd": str(folder),
            "env": env or {},
            "log": log,
            "code": code,
            "given": given,
        }
        pid = int(self._ask(request)["pid"])
        return Running(pid, log, lambda: self._ask({"wait": pid})["code"])

    def __call__(self, *args: object, env: dict[str, str] | None = None) -> Result:
        return self.start(*args, env=env).wait()

    def script(self, code: str, *args: object) -> str:
        """What a piece of Python says on stdout, which may fork: torch is imported and has not been used in it."""
        done = self.start(*args, code=code).wait()
        assert done.code == 0, done.stderr
        return done.stdout


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """`llmpipe` in the test's own folder."""
    return Cli(tmp_path)


@pytest.fixture(scope="session")
def warm_server() -> Iterator["subprocess.Popen[str]"]:
    script = Path(__file__).with_name("warm_cli.py")
    server = subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield server
    server.communicate(timeout=PATIENCE)


@pytest.fixture
def warm(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, warm_server: "subprocess.Popen[str]") -> Warm:
    """`llmpipe` in the test's own folder, torch imported already."""
    return Warm(tmp_path, tmp_path_factory.mktemp("logs"), warm_server)


def invented_text(seed: int, words: int) -> str:
    """Sentences of a small invented language, a pure function of the seed: Zipf's law, each word fixing two others."""
    lexicon = random.Random(0)
    vocabulary = [
        "".join(lexicon.choice(["ka", "lo", "mi", "ru", "te", "sh", "an"]) for _ in range(n % 4 + 1))
        for n in range(300)
    ]
    draw = random.Random(seed)
    found, at = [], 0
    for index in range(words):
        rank = min(299, int(draw.paretovariate(0.9)) - 1)
        at = (7 * at + rank) % 300
        found.append(vocabulary[at] + (".\n" if index % 11 == 10 else ""))
    return " ".join(found)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl of 300 documents, about 200 kB."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    rows = [json.dumps({"text": invented_text(seed, 60 + 7 * (seed % 30))}) for seed in range(300)]
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture
def tiny(tmp_path: Path, corpus: Path) -> Path:
    """`tiny.yaml` beside its corpus in the test's folder: tokenize and pretrain in a second or two."""
    shutil.copy2(corpus, tmp_path / "corpus.jsonl")
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, corpus: Path, warm_server: "subprocess.Popen[str]") -> Path:
    """A folder in which `llmpipe run tiny.yaml` has run, undisturbed."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copy2(corpus, folder / "corpus.jsonl")
    (folder / "tiny.yaml").write_text(TINY)
    ran = Warm(folder, tmp_path_factory.mktemp("logs"), warm_server)("run", "tiny.yaml")
    assert ran.code == 0, ran.stderr
    return folder


@pytest.fixture
def tokenized(made: Path, tiny: Path, tmp_path: Path) -> Path:
    """`tiny.yaml` in the test's folder, where its tokenize stands and its pretrain does not."""
    shutil.copytree(made / "artifacts" / "tiny" / "tokenize", tmp_path / "artifacts" / "tiny" / "tokenize")
    return tiny


@pytest.fixture
def trained(made: Path, tiny: Path, tmp_path: Path) -> Path:
    """`tiny.yaml` in the test's folder, where both of its stages stand."""
    shutil.copytree(made / "artifacts", tmp_path / "artifacts")
    return tiny


@pytest.fixture(scope="session")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A runtime of one thread and seed 0 that says nothing, for what needs one and leaves nothing."""
    from pipeline.runtime import Runtime

    return Runtime.start(tmp_path_factory.mktemp("quiet"), seed=0, threads=1, quiet=True)
