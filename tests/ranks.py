"""A stage's work by one process and by two gloo ranks, forked from a process that has imported what they need."""

import os
import socket
import sys
from collections.abc import Callable
from typing import Any


def run_script(warm: Any, script: str, *arguments: object) -> None:
    """Run a script whose last argument is a free port; what it wrote to stderr is shown where it fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    warm.script(script, *arguments, port)


def one_and_two(work: Callable[[int], None], port: int) -> bool:
    """`work` of the number of ranks, by one process and by two ranks of a group at `port`; whether all came to the end.
    Called in a script: torch may not have been used in it."""
    children = []
    for world, rank in ((1, 0), (2, 0), (2, 1)):
        pid = os.fork()
        if pid == 0:
            if world == 2:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
            code = 1
            try:
                work(world)
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(pid)
    return sum(os.waitpid(pid, 0)[1] for pid in children) == 0
