"""Messages that a runner sends to the head."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from models.base import EngineInfo, LoadProgress
from server.queue.jobs import Outcome


@dataclass(frozen=True)
class JobProgress:
    """One completed step, with a preview if there is one."""

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
    """A job that this runner will not finish."""

    request_id: str


@dataclass(frozen=True)
class JobRejected:
    """A job whose input files the runner could not store."""

    request_id: str


@dataclass(frozen=True)
class CrashReported:
    """A process that must exit while running these jobs."""

    request_ids: Sequence[str]


@dataclass(frozen=True)
class StepMeasured:
    """The duration of one forward, for one request or shared by several."""

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
    """The loading progress, whether the runner is ready, and its engines by their weights."""

    loading: LoadProgress
    is_ready: bool
    engines: Mapping[str, EngineInfo]


@dataclass(frozen=True)
class LogRecord:
    """A record for the log of the head."""

    record: logging.LogRecord


@dataclass(frozen=True)
class RunnerStopped:
    """The last message of a runner, with the reason if the runner was not asked to stop."""

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
