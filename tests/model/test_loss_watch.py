"""What is said of the losses between two looks."""

import json
import math

import pytest
import torch

from pipeline.errors import TrainingError
from pipeline.model.loss_watch import LossWatch, StepLoss, Verdicts, spikes

ONE = torch.ones(())


def test_a_look_gives_the_steps_since_the_last_and_may_leave_them() -> None:
    watch = LossWatch()
    assert watch.look() == []
    for step, loss in ((4, 2.0), (5, math.inf)):
        watch.add(step, torch.tensor(loss, requires_grad=True), ONE)
    assert watch.look(keep=True) == watch.look() == [StepLoss(4, 2.0, 1.0), StepLoss(5, math.inf, 1.0)]
    assert watch.look() == []


def test_a_step_is_finite_where_its_loss_and_its_gradient_are() -> None:
    found = (StepLoss(4, 2.0), StepLoss(5, math.nan), StepLoss(6, 2.0, math.inf))
    assert [each.is_finite for each in found] == [True, False, False]
    assert [each.fault for each in found[1:]] == ["the loss is nan", "the gradient's norm is inf"]


def test_a_spike_stands_far_above_the_intervals_median() -> None:
    """3.00 to 3.09 and one more: median 3.05, robust deviation 1.4826 × 0.03, eight of which reach to 3.406."""
    steady = [StepLoss(step, 3 + step / 100) for step in range(10)]
    assert spikes(steady) == []
    assert spikes([*steady, StepLoss(10, 3.41)]) == [StepLoss(10, 3.41)]
    assert spikes([*steady, StepLoss(10, 3.40), StepLoss(11, math.nan)]) == []
    assert spikes(steady[:8]) == [], "too few to tell"
    before = [each.loss for each in steady]
    assert spikes([StepLoss(10, 3.41)], before) == [StepLoss(10, 3.41)], "an interval of one step, after others"
    assert spikes([StepLoss(10, 3.40)], before) == []


def verdicts(allowed: int, said: list[str] | None = None) -> Verdicts:
    return Verdicts(lambda step: [step, 7], 1, allowed, ([] if said is None else said).append)


def test_a_leap_is_said_with_its_documents_and_the_last_checkpoint_however_short_the_interval() -> None:
    said: list[str] = []
    looked = verdicts(0, said)
    for step in range(12):
        looked.saved_at = 8
        looked.steps_over(step, torch.tensor(3 + step / 100 + (step == 11)), ONE)
        looked.figures()
    assert said == ["step 12 (documents 11, 7 of train.ds): the loss leapt to 4.110 (the last checkpoint is of step 8)"]


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, math.nan), (2.0, math.inf), (math.inf, 1.0)])
def test_whichever_is_not_finite_ends_the_run_or_is_stepped_over(loss: float, norm: float) -> None:
    """The weights of a run that comes to its end do not depend on how many steps it was allowed to step over."""
    said: list[str] = []
    strict, allows = verdicts(0), verdicts(1, said)
    for each in (strict, allows):
        over = [
            each.steps_over(step, torch.tensor(x), torch.tensor(y)) for step, x, y in ((0, 2.0, 1.0), (1, loss, norm))
        ]
        over.append(each.steps_over(2, torch.tensor(2.0), ONE))
        assert over == [False, each is allows, False]
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
    for act in (strict.check, strict.figures):
        with pytest.raises(TrainingError) as caught:
            act()
        assert caught.value.what == f"{what}; there is no checkpoint yet"
        assert caught.value.where == "step 2 (documents 1, 7 of train.ds)"
        assert caught.value.mend.endswith("or skip_nonfinite: 1")
    allows.check()
    assert allows.figures() == ({"loss": 2.0, "grad_norm": 1.0, "skipped_steps": 1.0}, 3)
    assert said == [f"step 2 (documents 1, 7 of train.ds): {what}, stepped over"]
    allows.saved_at = 40
    with pytest.raises(TrainingError, match="the last checkpoint is of step 40") as caught:
        allows.steps_over(3, torch.tensor(loss), torch.tensor(norm))
    assert caught.value.mend.endswith("or skip_nonfinite: 2, which goes on from there")


def test_what_was_not_looked_at_yet_is_kept_through_a_checkpoint() -> None:
    losses = [3 + step / 7 for step in range(15)]
    straight, first = verdicts(0), verdicts(0)
    for step, loss in enumerate(losses[:12]):
        for each in (straight, first) if step < 9 else (straight,):
            each.steps_over(step, torch.tensor(loss), ONE)
            if step == 4:
                each.figures()
    state = json.loads(json.dumps(first.state(first.check())))
    ranks = [verdicts(0), verdicts(0)]
    for rank, each in enumerate(ranks):
        each.restore(state, 9, torch.device("cpu"), is_main=rank == 0)
        assert each.saved_at == 9
    for step in range(9, 12):
        ranks[0].steps_over(step, torch.tensor(losses[step]), ONE)
    assert ranks[0].figures() == straight.figures()
    assert ranks[0].recent == straight.recent
    assert [each.loss for each in ranks[1].watch.look()] == [0.0] * 4, "the ranks' parts are summed"


def test_a_loss_that_falls_from_where_it_began_has_not_leapt() -> None:
    """The first steps of a run stand above its first interval; what is behind a calm step or interval leaps."""
    steady = [StepLoss(step, 3 + step / 100) for step in range(2, 12)]
    falling = [StepLoss(0, 5.6), StepLoss(1, 4.5), *steady]
    assert spikes(falling) == []
    assert spikes(falling, before=[3.1]) == falling[:2]
    assert spikes([*falling, StepLoss(12, 5.0), StepLoss(13, 4.9)]) == [StepLoss(12, 5.0), StepLoss(13, 4.9)]
