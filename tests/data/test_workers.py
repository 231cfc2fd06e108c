"""Processes that are called: results in order, errors as they are, and an end in the middle of work."""

import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from pipeline.data import passes
from pipeline.data.corpus import Survey
from pipeline.data.units import Unit, cut
from pipeline.data.workers import Crew, Tell, in_order, result_of
from pipeline.errors import DataError, MachineError, Stopped
from pipeline.recipe import DataEntry


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    with Crew(2) as found:
        yield found


def unit(path: Path, text: str) -> Unit:
    path.write_text(text)
    return cut([DataEntry(source=str(path))], 0.5, 0.1, lambda said: None)[0]


def survey(crew: Crew, found: Unit, told: list[int]) -> "Future[Survey]":
    return crew.submit(told.append, passes.survey_unit, found, 10**6, 1.0, 0, False)


def test_a_call_returns_what_the_function_does_and_tells_of_all_of_it(crew: Crew, tmp_path: Path) -> None:
    told: list[int] = []
    found = survey(crew, unit(tmp_path / "a.jsonl", '{"text": "ä"}\n' * 200), told).result()
    assert found == passes.survey_unit(unit(tmp_path / "a.jsonl", '{"text": "ä"}\n' * 200), 10**6, 1.0, 0, False, print)
    assert sum(told) == 400


def test_an_error_comes_back_as_it_is_and_the_worker_goes_on(crew: Crew, tmp_path: Path) -> None:
    torn = unit(tmp_path / "a.jsonl", '{"text": "x"}\n')
    torn.files[0].write_text('{"text": "x"}\n{"text": }\n')  # after it was cut, which looks at the first rows
    for _ in range(4):
        with pytest.raises(DataError, match="not JSON") as caught:
            survey(crew, torn, []).result()
        assert caught.value.where == f"{tmp_path}/a.jsonl:2"
    assert survey(crew, unit(tmp_path / "b.txt", "x"), []).result().counts == (1, 1, 0, 0)


def test_what_a_library_prints_is_no_answer(crew: Crew) -> None:
    assert crew.submit(print, print, "on stdout").result() is None


def test_what_is_no_error_of_ours_ends_the_worker() -> None:
    with Crew(1) as alone, pytest.raises(MachineError, match="ended with code 1 before its work was done"):
        alone.submit(print, int, "seven").result()


@pytest.mark.slow
def test_a_crew_ends_in_the_middle_of_work() -> None:
    with Crew(1) as alone:
        sleeping = alone.submit(print, sleep, 600)
        with pytest.raises(Stopped):
            result_of(sleeping, refuse)
    assert alone.workers[0].process.poll() == -signal.SIGKILL


def sleep(seconds: float, tell: Tell) -> None:
    time.sleep(seconds)


def refuse() -> None:
    raise Stopped("asked")


def test_results_come_in_order_and_only_some_are_under_way() -> None:
    submitted: list[int] = []

    def submit(item: int) -> None:
        submitted.append(item)

    for item, _ in in_order(range(20), submit, 3):
        assert submitted == list(range(min(20, item + 4)))
    assert len(submitted) == 20
