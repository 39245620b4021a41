"""Messages from a runner to the head."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from models.base import EngineInfo, LoadProgress
from server.queue.jobs import Outcome


@dataclass(frozen=True)
class JobProgress:
    """A step was done."""

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
    """A job's outcome, and what is in its files, by their names."""

    request_id: str
    outcome: Outcome
    contents: Mapping[str, bytes] = field(repr=False)


@dataclass(frozen=True)
class JobReleased:
    """A job that this process will not finish."""

    request_id: str


@dataclass(frozen=True)
class JobRejected:
    """A job that could not be taken in, with what came along with it."""

    request_id: str


@dataclass(frozen=True)
class CrashReported:
    """The process has to end while it works at these."""

    request_ids: Sequence[str]


@dataclass(frozen=True)
class StepMeasured:
    """A forward, alone or shared."""

    size: tuple[int, int]
    acceleration: str
    seconds: float


@dataclass(frozen=True)
class ImagesGenerated:
    """The pictures of one request, and how many of them are not shown."""

    endpoint: str
    num_images: int
    num_flagged: int


@dataclass(frozen=True)
class RunnerState:
    """How far loading is, whether it can paint, and its engines by their weights."""

    loading: LoadProgress
    is_ready: bool
    engines: Mapping[str, EngineInfo]


@dataclass(frozen=True)
class LogRecord:
    """A line for the log of the head."""

    record: logging.LogRecord


@dataclass(frozen=True)
class RunnerStopped:
    """The last report, and why it came to that if nobody asked for it."""

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
