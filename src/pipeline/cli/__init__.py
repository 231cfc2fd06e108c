"""The command line. `main` is the console script; everything heavy is imported by the command that needs it."""

from __future__ import annotations

import signal
import sys
from types import FrameType

from pipeline.errors import Halt, PipelineError, Stopped


def main() -> None:
    """Run the command line; a PipelineError becomes a message and its exit code."""
    from pipeline.cli.app import app

    signal.signal(signal.SIGTERM, _terminated)
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        from pipeline.launch import ChildFailed, rank_from_outside, say_error

        if not isinstance(error, ChildFailed) and not (isinstance(error, Halt) and rank_from_outside()):
            say_error(error)
        sys.exit(error.exit_code if isinstance(error, PipelineError) else 1)


def _terminated(number: int, frame: FrameType | None) -> None:
    """SIGTERM while no stage is at work: importing, checking, waiting for a lock."""
    raise Stopped("stopped before there was anything to save", mend="run the same command again")
