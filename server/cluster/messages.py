"""Messages that a runner sends to the head."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from models.base import EngineInfo, LoadProgress
from server.queue.jobs import Outcome


@dataclass(frozen=True)
class JobProgress:
    """One completed step, with a preview as a data URI if there is one."""

    request_id: str
    step: int
    num_steps: int
    preview: str | None


@dataclass(frozen=True)
class JobLog:
    """A line for a job's log."""

    request_id: str
    message: str
    level: str


@dataclass(frozen=True)
class JobFinished:
    """A job's outcome, and the contents of its files by name."""

    request_id: str
    outcome: Outcome
    contents: Mapping[str, bytes] = field(repr=False)


@dataclass(frozen=True)
class JobReleased:
    """A job that this runner will not finish, so the head requeues it."""

    request_id: str


@dataclass(frozen=True)
class JobRejected:
    """A job whose input files the runner could not store, so the head replaces the runner."""

    request_id: str


@dataclass(frozen=True)
class CrashReported:
    """The jobs to charge with a crash, because the runner's process must exit while it runs them."""

    request_ids: Sequence[str]


@dataclass(frozen=True)
class StepMeasured:
    """The duration of one forward pass, which several requests may share, and the size of its images in pixels."""

    size: tuple[int, int]
    acceleration: str
    seconds: float


@dataclass(frozen=True)
class ImagesGenerated:
    """The number of images of one request, and how many of them are flagged as unsafe."""

    endpoint: str
    num_images: int
    num_flagged: int


@dataclass(frozen=True)
class RunnerState:
    """A runner's state: its loading progress, whether it is ready, and the status of each engine by its weights."""

    loading: LoadProgress
    is_ready: bool
    engines: Mapping[str, EngineInfo]


@dataclass(frozen=True)
class LogRecord:
    """A log record of the runner, for the head's log."""

    record: logging.LogRecord


@dataclass(frozen=True)
class RunnerStopped:
    """The last message of a runner; `failure` is the reason if the runner stopped unasked."""

    failure: str | None = None


Message = (
    JobProgress
    | JobLog
    | JobFinished
    | JobReleased
    | JobRejected
    | CrashReported
    | StepMeasured
    | ImagesGenerated
    | RunnerState
    | LogRecord
    | RunnerStopped
)
