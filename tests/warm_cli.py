"""A process that has imported what training needs and forks a child a command: no test program waits for torch twice.

Reads one JSON object a line on stdin and answers with one a line on stdout:

    {"args": [...], "cwd": "...", "env": {...}, "log": "..."}    starts `llmpipe args`   -> {"pid": 123}
    {"wait": 123}                                                 has it ended?          -> {"code": 0}, null while not

The child leads a process group of its own, so that a test can kill the whole of it. Its stdout and stderr go to
`log`.out and `log`.err.
"""

import json
import os
import signal
import sys
from pathlib import Path

import pipeline.cli.app
import pipeline.cli.run
import pipeline.cli.session
import pipeline.data.encoding
import pipeline.data.tokenizers
import pipeline.model.continued
import pipeline.runtime
import pipeline.trainer  # noqa: F401
from pipeline.cli import main
from pipeline.cli.stages import STAGES, load_stage
from pipeline.fingerprint import code_parts


def start(args: list[str], cwd: str, env: dict[str, str], log: str) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    logs = {1: os.open(f"{log}.out", flags), 2: os.open(f"{log}.err", flags)}
    pid = os.fork()
    if pid:
        os.setpgid(pid, pid)  # here as well as there: whoever comes first
        for file in logs.values():
            os.close(file)
        return pid
    os.setpgid(0, 0)
    os.chdir(cwd)
    os.environ.update(env)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, file in logs.items():
        os.dup2(file, descriptor)
    sys.argv = ["llmpipe", *args]
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int) -> int | None:
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


for _stage in STAGES:  # what every command that looks at a recipe reads of the code; a child has it from here
    code_parts(load_stage(_stage, Path()))
signal.signal(signal.SIGINT, signal.SIG_DFL)
for line in sys.stdin:
    request = json.loads(line)
    answer = {"code": ended(request["wait"])} if "wait" in request else {"pid": start(**request)}
    print(json.dumps(answer), flush=True)
os._exit(0)  # nobody waits for torch to be torn down
