"""What the Trainer tells after each step, turned into metrics, progress, a stop and whole checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from pipeline.errors import Halt, TrainingError
from pipeline.progress import Bar
from pipeline.runtime import Runtime
from pipeline.schedule import Schedule

OWES = "measurement_left_out"
"""In a checkpoint's state: whoever goes on from it measures first."""


class Watch(TrainerCallback):  # type: ignore[misc]
    """What the Trainer tells after each step, turned into metrics, progress, stop and whole checkpoints."""

    def __init__(
        self,
        plan: Schedule,
        runtime: Runtime,
        bar: Bar,
        shown: Mapping[str, str],
        state: Mapping[str, Any],
        more: Callable[[], Mapping[str, float]],
        share_of_peak: float,
        member: int,
        tokens_before: int,
    ) -> None:
        self.plan, self.runtime, self.bar, self.shown, self.state, self.more = plan, runtime, bar, shown, state, more
        self.measure: Callable[[], Mapping[str, float]] | None = None
        self.measure_steps = 0
        self.share_of_peak = share_of_peak
        """Utilisation that one token a second is."""
        self.member, self.tokens_before = member, tokens_before
        self.is_stopping = self.owes = False
        self.began, self.first = 0.0, 0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.began, self.first = time.monotonic(), state.global_step
        self.bar.start_at(state.global_step)
        if self.owes and self.measure is not None:  # the weights of the checkpoint are there by now
            self.owes = False
            if not self._measure(self.measure, state.global_step):  # the checkpoint still owes it
                self.runtime.stop(state.global_step + self.member * self.plan.steps)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.is_stopping = self.runtime.stop_requested()
        if self.is_stopping:
            control.should_save = control.should_training_stop = True
        if control.should_save or state.global_step == self.plan.steps:
            control.should_log = True  # the line before it is saved: no figure spans a checkpoint, no NaN is kept
        step = state.global_step
        is_due = bool(self.measure_steps) and step % self.measure_steps == 0 and step < self.plan.steps
        if self.measure is not None and is_due and not self.is_stopping and not self._measure(self.measure, step):
            self.is_stopping = control.should_save = control.should_training_stop = control.should_log = True
        self.owes = is_due and self.is_stopping  # who asks to stop waits for the save alone

    def _measure(self, measure: Callable[[], Mapping[str, float]], step: int) -> bool:
        """A line of figures; neither the run's random numbers nor its speed is touched. False, and no line, where any
        rank was asked to stop meanwhile: `measure`, in which no rank waits for another, raises Halt there."""
        start = time.monotonic()
        figures: Mapping[str, float] = {}
        with torch.random.fork_rng(), suppress(Halt):
            figures = measure()
        self.began += time.monotonic() - start
        if self.runtime.stop_requested():
            return False
        self.runtime.metrics.log(step, int(self.plan.tokens[step - 1]), **figures)
        return True

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any) -> None:
        state.log_history.clear()  # metrics.jsonl is the record; this would be written into every checkpoint
        if "loss" not in logs:
            return
        step = state.global_step
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise TrainingError(
                    f"the {name} is {logs[name]}",
                    where=f"step {step:,}",
                    mend="a lower learning_rate or a longer warmup; the last checkpoint is kept",
                )
        tokens = int(self.plan.tokens[step - 1])
        before = int(self.plan.tokens[self.first - 1]) if self.first else 0
        speed = (tokens - before) / (time.monotonic() - self.began)
        figures = {name: value for name, value in logs.items() if name not in ("epoch", "num_tokens")}
        figures |= self.more()
        if self.runtime.device.type == "cuda":
            figures["peak_memory_bytes"] = float(torch.cuda.max_memory_allocated())
        if self.member:
            figures["member"] = self.member
        total = self.tokens_before + tokens
        rates = {"tokens_per_second": speed, "mfu": speed * self.share_of_peak}
        self.runtime.metrics.log(step + self.member * self.plan.steps, total, **figures, **rates)
        key = {label: logs[name] for label, name in self.shown.items() if name in logs}
        self.bar.advance(step - self.bar.done, **key, **{"tok/s": speed, "mfu": rates["mfu"]})

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.runtime.barrier()  # every rank has written its part
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        kept = {**self.state, OWES: True} if self.owes else self.state
        self.runtime.checkpoints.adopt(folder, checkpoint_step(self.plan, self.member, state.global_step), kept)


def checkpoint_step(plan: Schedule, member: int, step: int) -> int:
    """The number of a member's checkpoint among all of a stage: step 0, before its first, has a number of its own."""
    return member * (plan.steps + 1) + step
