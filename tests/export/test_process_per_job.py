"""One process per job."""

import os
import signal
import time

import pytest

from worldvln_edge.export.process_per_job import Died, run_each


def square(number: int) -> int:
    return number * number


def own_process(number: int) -> int:
    return os.getpid()


def die_or_answer(number: int) -> int:
    if number == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def fail(number: int) -> int:
    raise ValueError("a fault")


def sleep(number: int) -> int:
    time.sleep(60)
    return number


@pytest.mark.parametrize("parallel", [1, 2])
def test_every_job_is_done_in_a_process_of_its_own(parallel: int) -> None:
    found = {finished.job: finished.result for finished in run_each(square, [1, 2, 3], parallel=parallel)}
    assert found == {1: 1, 2: 4, 3: 9}
    processes = {finished.result for finished in run_each(own_process, [1, 2, 3], parallel=parallel)}
    assert len(processes | {os.getpid()}) == 4


def test_one_job_at_a_time_keeps_their_order() -> None:
    assert [finished.job for finished in run_each(square, [3, 1, 2])] == [3, 1, 2]


def test_a_killed_process_takes_its_own_job_only() -> None:
    found = {finished.job: finished.result for finished in run_each(die_or_answer, [0, 1, 2], parallel=2)}
    assert found == {0: Died(-signal.SIGKILL), 1: 1, 2: 2}


def test_a_fault_ends_with_its_exit_code() -> None:
    (finished,) = run_each(fail, [1])
    assert finished.result == Died(1)


def test_what_still_runs_is_ended_when_nobody_wants_the_rest() -> None:
    start = time.monotonic()
    results = run_each(die_or_sleep, [0, 1], parallel=2)
    assert next(results).job == 0
    results.close()
    assert time.monotonic() - start < 30


def die_or_sleep(number: int) -> int:
    return sleep(number) if number else number
