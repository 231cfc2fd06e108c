"""The order of rows: every row, seeded, little padding, tokens counted."""

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.runtime import Runtime
from pipeline.schedule import Schedule, schedule
from pipeline.trainer_config import TrainerConfig


def config(**fields: Any) -> TrainerConfig:
    return TrainerConfig(**({"bf16": False} | fields))


LENGTHS = [5 + (7 * index) % 40 for index in range(100)]


def test_an_epoch_has_every_row_once_and_ends_without_a_short_step(quiet: Runtime) -> None:
    plan = schedule(LENGTHS, config(num_train_epochs=2.0, train_sampling_strategy="random"), quiet)
    assert (plan.batch, plan.steps, len(plan.order)) == (8, 25, 200)
    assert sorted(plan.order[:100]) == sorted(plan.order[100:]) == list(range(100))
    assert list(plan.order[:100]) != list(plan.order[100:]), "every epoch is shuffled anew"
    odd = schedule(LENGTHS[:21], config(per_device_train_batch_size=4), quiet)
    assert (odd.steps, len(odd.order)) == (6, 24), "21 rows: the sixth step is filled from the next pass"
    assert np.bincount(odd.order, minlength=21).sum() == 24
    assert set(odd.order) == set(range(21))


def test_grouped_by_length_has_the_same_rows_and_little_padding(quiet: Runtime) -> None:
    def padding(plan: Schedule) -> float:
        lengths = np.array(LENGTHS)[plan.order].reshape(plan.steps, plan.batch)
        return 1 - float(lengths.sum() / (lengths.max(axis=1) * plan.batch).sum())

    shuffled, grouped = (
        schedule(LENGTHS, config(num_train_epochs=3.0, train_sampling_strategy=strategy), quiet)
        for strategy in ("random", "group_by_length")
    )
    assert sorted(grouped.order) == sorted(shuffled.order)
    assert padding(shuffled) > 0.3
    assert padding(grouped) < 0.05
    steps = np.array(LENGTHS)[grouped.order].reshape(grouped.steps, -1).mean(axis=1)
    assert not np.array_equal(steps, np.sort(steps)), "steps are not in order of length"


def test_the_order_is_a_function_of_seed_and_batch_alone(quiet: Runtime, tmp_path: Path) -> None:
    whole = schedule(LENGTHS, config(), quiet)
    split = schedule(LENGTHS, config(per_device_train_batch_size=2, gradient_accumulation_steps=4), quiet)
    assert np.array_equal(whole.order, split.order)
    assert np.array_equal(whole.order, schedule(LENGTHS, config(), quiet).order)
    other = Runtime.start(tmp_path, seed=1, threads=1, quiet=True)
    assert not np.array_equal(whole.order, schedule(LENGTHS, config(), other).order)


def test_tokens_are_counted_by_step(quiet: Runtime) -> None:
    plan = schedule([3, 3, 3, 3], config(per_device_train_batch_size=2, max_steps=5), quiet)
    assert plan.tokens.tolist() == [6, 12, 18, 24, 30]
