"""How long the phases of a step take."""

from __future__ import annotations

import time

import torch


class Clock:
    """Seconds of each phase, as `seconds_<phase>`; a phase that comes again adds up."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict[str, float]()
        self.began = self.last = self._now()

    def lap(self, phase: str) -> None:
        """What was done since the last lap was this phase's."""
        now = self._now()
        name = f"seconds_{phase}"
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now

    @property
    def total(self) -> float:
        """Seconds up to the last lap."""
        return self.last - self.began

    def _now(self) -> float:
        """Seconds, when all that was asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
