"""ppo with frozen models put away: whatever is read while it is away would be NaN here, and the run would stop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.rl.offload import Offload
from tests.stages.ppo_runs import Parts, run, same


class Away:
    """Weights are NaN while a model is away. Keeps what was put away, and how often what was brought."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kept: dict[int, list[torch.Tensor]] = {}
        self.brought = 0
        away = self

        def put_away(offload: Offload, models: Sequence[Any]) -> None:
            for model in models:
                away.kept[id(model)] = [parameter.data for parameter in model.parameters()]
                away.spoil(model)

        @contextmanager
        def brought(offload: Offload, models: Sequence[Any]) -> Iterator[None]:
            for model in models:
                away.brought += 1
                for parameter, home in zip(model.parameters(), away.kept[id(model)], strict=True):
                    parameter.data = home
            yield
            for model in models:
                away.spoil(model)

        monkeypatch.setattr(Offload, "put_away", put_away)
        monkeypatch.setattr(Offload, "brought", brought)

    @staticmethod
    def spoil(model: Any) -> None:
        for parameter in model.parameters():
            parameter.data = torch.full_like(parameter.data, torch.nan)


@pytest.mark.parametrize(
    ("values", "models"),
    [
        ({}, 2),  # reference, reward model
        ({"algorithm": "grpo", "num_generations": 4}, 2),
        ({"peft": {"r": 2}}, 0),  # both are what the adapters stand on
        ({"peft": {"r": 2}, "algorithm": "rloo", "num_generations": 4}, 1),  # no critic stands on the reward model
        ({"gold": "reward", "eval_steps": 2, "held_out": 0.3}, 3),
    ],
)
@pytest.mark.slow
def test_what_is_put_away_is_brought_for_its_phase(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], models: int
):
    usual = run(parts, tmp_path / "usual", **values)
    away = Away(monkeypatch)
    offloaded = run(parts, tmp_path / "offloaded", offload=True, **values)
    assert len(away.kept) == models
    assert away.brought >= 3 * min(models, 2)
    assert same(offloaded.checkpoint(), usual.checkpoint())
    assert offloaded.lines() == usual.lines()


@pytest.mark.slow
def test_on_a_cpu_it_does_nothing(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    moved = []
    original = torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", lambda model, *args: moved.append(args) or original(model, *args))
    done = [run(parts, tmp_path / str(offload), offload=offload, total_episodes=16) for offload in (False, True)]
    assert same(done[0].policy(), done[1].policy())
    assert all(str(argument[0]) == "cpu" for argument in moved)
