"""What is said of the losses between two looks."""

import math

import torch

from pipeline.model.loss_watch import LossWatch, StepLoss, spikes


def test_a_look_gives_the_steps_since_the_last_and_may_leave_them() -> None:
    watch = LossWatch()
    assert watch.look() == []
    for step, loss in ((4, 2.0), (5, math.inf)):
        watch.add(step, torch.tensor(loss, requires_grad=True))
    assert watch.look(keep=True) == watch.look() == [StepLoss(4, 2.0), StepLoss(5, math.inf)]
    assert watch.look() == []
    assert [each.is_finite for each in (StepLoss(4, 2.0), StepLoss(5, math.nan))] == [True, False]


def test_a_spike_stands_far_above_the_intervals_median() -> None:
    """3.00 to 3.09 and one more: median 3.05, robust deviation 1.4826 × 0.03, eight of which reach to 3.406."""
    steady = [StepLoss(step, 3 + step / 100) for step in range(10)]
    assert spikes(steady) == []
    assert spikes([*steady, StepLoss(10, 3.41)]) == [StepLoss(10, 3.41)]
    assert spikes([*steady, StepLoss(10, 3.40), StepLoss(11, math.nan)]) == []
    assert spikes(steady[:8]) == [], "too few to tell"
