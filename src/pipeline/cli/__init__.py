"""The command line. `main` is the console script; everything heavy is imported by the command that needs it."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; a PipelineError becomes a message and its exit code."""
    from pipeline.cli.app import app

    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        from pipeline.errors import PipelineError
        from pipeline.launch import ChildFailed, say_error

        if not isinstance(error, ChildFailed):
            say_error(error)
        sys.exit(error.exit_code if isinstance(error, PipelineError) else 1)
