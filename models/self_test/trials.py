"""Tests and their results."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from models.base import EngineConfig


@dataclass(frozen=True)
class Result:
    """The result of one test; the message has the figures, or the reason why it failed or was skipped."""

    name: str
    state: Literal["passed", "failed", "skipped"]
    message: str


@dataclass(frozen=True)
class Subject:
    """What is tested: a device, "cuda" or "cpu", and the directory of its compiled code, None on a CPU.

    `config` names weights to test too; None tests the device alone.
    """

    device: str
    directory: Path | None = None
    config: EngineConfig | None = None


@dataclass(frozen=True)
class Trial:
    """A test: it returns a message with figures, or raises Failed, Skipped or any other error, which is a failure."""

    name: str
    run: Callable[[Subject], str]


class Failed(Exception):
    """A test failed; the message says what was found and what was expected."""


class Skipped(Exception):
    """A test does not apply to this device; the message says why."""


def run(trials: Iterable[Trial], subject: Subject, announce: Callable[[str], object]) -> Iterator[Result]:
    """Run tests in order and yield their results; call `announce` with the name of each test before it runs."""
    for trial in trials:
        announce(trial.name)
        try:
            yield Result(trial.name, "passed", trial.run(subject))
        except Skipped as error:
            yield Result(trial.name, "skipped", str(error))
        except Failed as error:
            yield Result(trial.name, "failed", str(error))
        except Exception as error:
            first_line = str(error).strip().partition("\n")[0][:300]
            yield Result(trial.name, "failed", f"{type(error).__name__}: {first_line}")


def need_gpu(subject: Subject, why: str = "this test is about GPUs") -> None:
    """Raise Skipped, with the reason `why`, if the device is a CPU."""
    if subject.device == "cpu":
        raise Skipped(f"on a CPU: {why}")
