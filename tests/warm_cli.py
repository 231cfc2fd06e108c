"""A process that has imported what training needs and forks a child a command: no test program waits for torch twice.

Reads one JSON object a line on stdin and answers with one a line on stdout:

    {"args": [...], "cwd": "...", "env": {...}, "log": "..."}    starts `llmpipe args`   -> {"pid": 123}
    {"code": "...", …}                                            runs Python instead, as `python -c code args`
    {"given": "...", …}                                           is piped in; else there is no stdin
    {"wait": 123}                                                 has it ended?          -> {"code": 0}, null while not

The child leads a process group of its own, so that a test can kill the whole of it. Its stdout and stderr go to
`log`.out and `log`.err. What is imported here is not looked through by a child's garbage collections.
"""

import functools
import gc
import importlib
import importlib.metadata
import json
import os
import pkgutil
import signal
import sys
import traceback
from pathlib import Path

import torch
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import pipeline
import pipeline.trainer
from pipeline import hardware
from pipeline.cli import main
from pipeline.cli.stages import STAGES, load_stage
from pipeline.fingerprint import code_parts


def start(
    args: list[str], cwd: str, env: dict[str, str], log: str, code: str | None = None, given: str | None = None
) -> int:
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
    os.dup2(os.open(os.devnull, os.O_RDONLY) if given is None else filled_pipe(given), 0)
    for descriptor, file in logs.items():
        os.dup2(file, descriptor)
    status = 1
    try:
        if code is None:
            sys.argv = ["llmpipe", *args]
            main()
        else:
            sys.argv = ["-c", *args]
            sys.path[0] = cwd
            exec(compile(code, "<script>", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def filled_pipe(text: str) -> int:
    """The end to read of a pipe with so much in it, which is closed at the other."""
    end, other = os.pipe()
    os.write(other, text.encode())
    os.close(other)
    return end


def quick_rate(device: torch.device, size: int, bf16: bool, seconds: float) -> float:
    """As `hardware.product_rate`, of small matrices and for a moment: each stage measures its own, for its `mfu`."""
    return measured_rate(device, 128, bf16, 0.01)


def ended(pid: int) -> int | None:
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


for _module in pkgutil.walk_packages(pipeline.__path__, "pipeline."):
    if not _module.name.endswith("__main__"):
        importlib.import_module(_module.name)
measured_rate, hardware.product_rate = hardware.product_rate, quick_rate
get_checkpoint_conversion_mapping("llama")  # compiles a thousand patterns, once in a process
for _stage in STAGES:  # what every command that looks at a recipe reads of the code; a child has it from here
    code_parts(load_stage(_stage, Path()))
for _name in ("metadata", "version"):  # read and parsed anew for every question; nothing is installed meanwhile
    setattr(importlib.metadata, _name, functools.cache(getattr(importlib.metadata, _name)))
gc.collect()
gc.freeze()
signal.signal(signal.SIGINT, signal.SIG_DFL)
for line in sys.stdin:
    request = json.loads(line)
    answer = {"code": ended(request["wait"])} if "wait" in request else {"pid": start(**request)}
    print(json.dumps(answer), flush=True)
os._exit(0)  # nobody waits for torch to be torn down
