"""Tests of child processes: their results arrive one by one, and their failures with a reason."""

import os
import signal
import sys
from collections.abc import Iterator

import pytest

from models.base import DeviceLost
from models.benchmark.processes import ChildFailed, run_in_child


def count(number: int) -> Iterator[tuple[int, int]]:
    for index in range(number):
        yield index, os.getpid()


def fail(message: str) -> Iterator[str]:
    yield "before"
    raise DeviceLost(message)


def die(number: int) -> Iterator[str]:
    yield "before"
    os.kill(os.getpid(), number)


def leave(code: int) -> Iterator[str]:
    yield "before"
    sys.exit(code)


def test_results_come_from_another_process() -> None:
    results = list(run_in_child(count, 3))
    assert [index for index, _ in results] == [0, 1, 2]
    assert os.getpid() not in {process for _, process in results}


def test_the_child_ends_when_its_results_are_not_wanted_any_more() -> None:
    results = run_in_child(count, 1_000_000)
    _, process = next(results)
    results.close()  # type: ignore[attr-defined]
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


@pytest.mark.parametrize(
    ("function", "argument", "reason"),
    [
        (fail, "the card is gone", "the card is gone"),
        (die, signal.SIGKILL, "the process was killed; perhaps the machine's memory ran out"),
        (die, signal.SIGABRT, "the process ended by signal 6"),
        (leave, 3, "the process ended with exit code 3"),
    ],
)
def test_a_failure_keeps_the_results_before_it(function, argument, reason) -> None:  # type: ignore[no-untyped-def]
    results = run_in_child(function, argument)
    assert next(results) == "before"
    with pytest.raises(ChildFailed) as error:
        next(results)
    assert str(error.value) == reason
