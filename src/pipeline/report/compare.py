"""Two runs beside each other."""

from __future__ import annotations

from pipeline.errors import ConfigError
from pipeline.report.records import RunRecord


def comparison_of(ours: RunRecord, theirs: RunRecord, price: float) -> str:
    """The page of two runs."""
    raise ConfigError(
        f"{ours.name} and {theirs.name}: two runs cannot be compared yet", mend=f"llmpipe report {ours.name}"
    )
