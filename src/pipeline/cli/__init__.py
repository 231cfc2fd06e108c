"""The command line. `main` is the console script; everything heavy is imported by the command that needs it."""

from __future__ import annotations

import os
import sys

from pipeline.errors import Halt, PipelineError
from pipeline.progress import leave_on_signals


def main() -> None:
    """Run the command line; a PipelineError becomes a message and its exit code."""
    leave_on_signals(speaks=os.environ.get("RANK", "0") == "0")
    from pipeline.cli.app import app

    try:
        app()
    except KeyboardInterrupt:  # chat's; elsewhere a signal ends the process
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        from pipeline.failure import say_error
        from pipeline.forking import ChildFailed
        from pipeline.launch import rank_from_outside

        if not isinstance(error, ChildFailed) and not (isinstance(error, Halt) and rank_from_outside()):
            say_error(error)
        sys.exit(error.exit_code if isinstance(error, PipelineError) else 1)
