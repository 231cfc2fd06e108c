"""The rules of `llmpipe init` against numbers worked by hand."""

import pytest

from pipeline.cli import sizes
from pipeline.runtime import share_batch


def cubic(depth: int, context: int) -> tuple[float, float]:
    """A model whose parameters are 1e5 × depth³, and six FLOPs a token for each."""
    return 1e5 * depth**3, 6e5 * depth**3


def even(flops: float) -> tuple[float, float]:
    """Twenty tokens a parameter: 6 N · 20 N = flops."""
    parameters = (flops / 120) ** 0.5
    return parameters, 20 * parameters


def test_a_budget_is_split_by_the_law():
    """1e15 FLOPs: 2.89 M parameters, 57.7 M tokens; the nearest depth is 3 (2.7 M; 4 would be 6.4 M)."""
    found = sizes.pretraining(1e15, 1e9, [], even, cubic)
    assert found.depth == 3
    assert found.context == 256
    # 1e15 / (6 · 2.7e6) = 61.7 M tokens; over 1500 steps 41,152 a step, over 256 tokens 160.8 rows: 128
    assert found.batch == 128
    assert found.steps == round(1e15 / 1.62e7 / 128 / 256) == 1884
    assert not found.is_short_of_text


def test_little_text_makes_the_model_small_and_the_run_short():
    """1 M tokens, four times over: 4 M of the wanted 57.7 M, so 0.2 M parameters, unless the least pays."""
    found = sizes.pretraining(1e15, 1e6, [], even, cubic)
    assert found.is_short_of_text
    assert found.depth == sizes.LEAST_DEPTH  # 4 M tokens are 1,953 steps of 2,048: the demo's depth pays
    assert found.steps * found.batch * found.context == pytest.approx(4e6, rel=0.001)
    few = sizes.pretraining(1e15, 1e5, [], even, cubic)  # 195 steps of 2,048: it does not
    assert few.depth == 1


def test_the_context_holds_the_rows_that_come_later():
    """Of 20 rows 19 are of 300 tokens: 512. Of 1,500 it would be 2,048, more than four times 256, but half must fit."""
    assert sizes.context_for([], 256) == 256
    assert sizes.context_for([[300] * 19 + [5000]], 256) == 512
    assert sizes.context_for([[300] * 15 + [1500] * 5], 256) == 1024
    assert sizes.context_for([[300] * 20, [1500] * 11 + [10] * 9], 256) == 2048
    assert sizes.pretraining(1e15, 1e9, [[700] * 20], even, cubic).context == 1024


def test_few_rows_make_small_steps():
    """200 rows: 6 steps of 32, 12 of 16, 25 of 8, 50 of 4."""
    assert sizes.fewer_a_step(200, 32, 2) == 4
    assert sizes.fewer_a_step(200, 32, 8) == 8
    assert sizes.fewer_a_step(2000, 32, 2) == 32


def test_a_batch_is_one_that_the_processes_share():
    """What is nearest to it by their ratio: of 8 rows six on three and on six GPUs, ten on five, seven on seven."""
    assert [sizes.shared(8, processes) for processes in (1, 2, 3, 4, 5, 6, 7, 8, 16)] == [8, 8, 6, 8, 10, 6, 7, 8, 16]
    assert [sizes.shared(128, processes) for processes in (1, 3, 5, 6, 7)] == [128, 96, 160, 96, 112]
    assert [sizes.rows_a_step(rows, 32, 3) for rows in (3, 40, 100, 10_000)] == [3, 3, 6, 24]
    assert sizes.fewer_a_step(200, 24, 4) == 6  # three would be less than four
    assert sizes.fewer_a_step(200, 40, 5) == 5
    for processes in (1, 3, 5, 6, 7, 8):
        rows, steps = sizes.shared(64, processes), 1
        while rows > processes:  # as where the memory is short of it
            rows, steps = rows // 2, 2 * steps
            mine, mine_steps = share_batch(rows, steps, processes, "")
            assert processes * mine * mine_steps == sizes.shared(64, processes)
        assert rows == processes
    alone, three = (sizes.pretraining(1e15, 1e9, [], even, cubic, processes) for processes in (1, 3))
    assert (alone.batch, three.batch) == (128, 96)
    assert three.steps == round(1e15 / 1.62e7 / 96 / 256) == 2512


@pytest.mark.parametrize(("size", "tokens"), [(9e5, 1024), (1e6, 4096), (5e7, 8192), (5e8, 16_384), (1e12, 32_768)])
def test_a_vocabulary_grows_with_the_text(size: float, tokens: int):
    assert sizes.vocabulary(size) == tokens


def test_time_is_shared_among_the_stages_there_are():
    assert sizes.seconds_of(["tokenize", "pretrain", "sft", "eval"], 1.0) == pytest.approx(
        {"pretrain": 3600 * 0.85 * 10 / 14, "sft": 3600 * 0.85 * 4 / 14}
    )


def test_rates_steps_and_shares():
    assert sizes.learning_rate(1e6, False) == 1e-3
    assert sizes.learning_rate(3e9, False) == 2e-5
    assert sizes.learning_rate(1.35e8, False) == 9e-5  # 2e-5 √22.2
    assert sizes.learning_rate(7e9, True) == 2e-4
    assert [sizes.rows_a_step(rows, 32) for rows in (3, 40, 100, 10_000)] == [2, 4, 8, 32]
    assert sizes.power_of_two(100) == 64
    assert sizes.power_of_two(100, up=True) == 128
    assert sizes.power_of_two(0.3) == 1
    thousand = [n / 1000 for n in range(1000)]  # 50 of them below 0.05
    assert sizes.held_out_share([thousand]) == 0.05
    assert sizes.held_out_share([thousand, thousand[::5]]) == 0.1  # 20 of 200
    assert sizes.held_out_share([[0.5]]) == 0.2
    assert sizes.quantile([5, 1, 4, 2, 3], 0.5) == 3
    assert sizes.quantile([1, 2], 0.95) == 2
