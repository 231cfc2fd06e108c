"""Every error a user can meet, drawn once.

    PipelineError                     exit 1    something failed
    ├── ConfigError                   exit 2    wrong usage or configuration
    │   ├── RecipeError                         … in a recipe: file and line
    │   └── MissingInputError                   a file, folder, model or artifact that is not there
    ├── DataError                     exit 1    a row or a document that cannot be used: file and line
    │   └── RowError                            … that the chat template cannot write
    ├── ArtifactError                           an artifact that is broken, locked or of the wrong kind
    ├── MismatchError                           parts that do not belong together (tokenizer, template, reward model)
    ├── CheckpointError                         training state that does not fit the run
    ├── TrainingError                           training went wrong (a loss that is not finite, …)
    ├── MachineError                            the machine lacks something (disk, memory, an extra)
    ├── GateError                               a figure that an evaluation's `require` asks for is not reached
    └── Halt                                    not a failure: the run was asked to stop
        ├── Stopped               exit 75   SIGTERM: saved, the same command goes on from here
        └── Interrupted           exit 130  SIGINT: likewise

A message says what is wrong, where, and the command or line that mends it. `assert` is for our own invariants.
"""

from __future__ import annotations

from collections.abc import Sequence


class PipelineError(Exception):
    """What is wrong, where it is, and the line that mends it; `exit_code` is the process's."""

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", mend: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.mend = what, where, mend

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        mend = f"\n  mend: {self.mend}" if self.mend else ""
        return f"{place}{self.what}{mend}"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.mend)


def _rebuild(kind: type[PipelineError], what: str, where: str, mend: str) -> PipelineError:
    return kind(what, where=where, mend=mend)


class ConfigError(PipelineError):
    """Wrong usage or configuration."""

    exit_code = 2


class RecipeError(ConfigError):
    """A recipe that cannot be run as written; `where` is `file:line`."""


class MissingInputError(ConfigError):
    """A file, folder, model or artifact that is named and not there."""


class DataError(PipelineError):
    """A row or document that cannot be used; `where` is `file:line`."""


class RowError(DataError):
    """A row that the chat template cannot write; by `messages`, its own or the first of them, its place is found."""

    messages: Sequence[dict[str, str]] = ()


class ArtifactError(PipelineError):
    """An artifact that is broken, locked or of the wrong kind."""


class MismatchError(PipelineError):
    """Two parts that do not belong together: tokenizer, chat template, reward model, pooling."""


class CheckpointError(PipelineError):
    """Training state that does not fit the run that would resume from it."""


class TrainingError(PipelineError):
    """Training that went wrong, such as a loss that is not finite."""


class MachineError(PipelineError):
    """Something the machine lacks: disk, memory, a device, an extra that is not installed."""


class GateError(PipelineError):
    """An evaluation's figure is not what `require` says; the figures are kept."""


class Halt(PipelineError):
    """The run was asked to stop and has saved what it had."""


class Stopped(Halt):
    """SIGTERM: saved and resumable."""

    exit_code = 75


class Interrupted(Halt):
    """SIGINT: saved and resumable."""

    exit_code = 130
