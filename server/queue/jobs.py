"""A job: one request, from its acceptance to its result."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self, TypedDict

from pydantic_core import to_json

from server.errors import ServerError
from server.storage.file_store import DEFAULT_LIFECYCLE, Lifecycle, StoredFile


class State(StrEnum):
    """fal's three statuses. COMPLETED means that the job has ended: by success, failure or cancellation."""

    IN_QUEUE = "IN_QUEUE"
    IN_PROGRESS = "IN_PROGRESS"
    COMPLETED = "COMPLETED"


class Mode(StrEnum):
    """The API that a request came through. Only queue jobs outlive their client's connection."""

    QUEUE = "queue"
    RUN = "run"
    STREAM = "stream"
    REALTIME = "realtime"


class Priority(StrEnum):
    """The values of fal's header X-Fal-Queue-Priority."""

    NORMAL = "normal"
    LOW = "low"


class Provenance(TypedDict, total=False):
    """The things that the images of a job depend on besides its input and the model. What is unknown is left out.

    Fields:
        acceleration: the tier.
        dtype: the number type of the computation, by PyTorch's name.
        weights: the form of the transformer's weights in their files, such as "safetensors" or "GGUF Q4_0".
        memory: the memory plan, by which the weights may be quantized.
    """

    acceleration: str
    dtype: str
    weights: str
    memory: str


#: The names of these fields, which are columns too.
PROVENANCE = tuple(Provenance.__annotations__)


@dataclass(frozen=True)
class Submission:
    """A client's validated request.

    `input` is JSON. `start_deadline` is in seconds since 1970. With `store_io` False, the result is deleted soon after
    its first fetch. `max_queue_length` is the client's own limit: if that many requests wait, this one is refused.
    """

    endpoint: str
    owner: str
    input: str
    base_url: str
    mode: Mode = Mode.QUEUE
    priority: Priority = Priority.NORMAL
    start_deadline: float | None = None
    webhook_url: str | None = None
    idempotency_key: str | None = None
    body_hash: str = ""
    #: The files that the input refers to: the path of each field, such as "loras.0.path", and the name of its file in
    #: the inputs directory.
    input_files: Mapping[str, str] = field(default_factory=dict)
    store_io: bool = True
    lifecycle: Lifecycle = DEFAULT_LIFECYCLE
    max_queue_length: int | None = None
    runner_hint: str | None = None


#: Added to the rank of low-priority jobs: larger than any sequence number.
LOW_PRIORITY_OFFSET = 1 << 62


@dataclass(slots=True)
class Job:
    """The in-memory copy of a row. The copy changes only after the same change to the row is committed.

    The row gets the logs when the job finishes. Progress and previews are never stored.
    """

    sequence: int
    request_id: str
    endpoint: str
    owner: str
    mode: Mode
    priority: Priority
    base_url: str
    state: State
    attempt: int = 0
    crash_count: int = 0
    start_deadline: float | None = None
    is_cancelled: bool = False
    store_io: bool = True
    lifecycle: Lifecycle = DEFAULT_LIFECYCLE
    input_files: Mapping[str, str] = field(default_factory=dict)
    #: Size of the input's JSON in bytes.
    input_size: int = 0
    #: Size of the response in bytes once the job is completed; may be 0 for a small response.
    output_size: int = 0
    #: Whether the row's list of input files is unreadable.
    is_damaged: bool = False
    error: str | None = None
    error_type: str | None = None
    inference_time: float | None = None
    provenance: Provenance = field(default_factory=Provenance)
    step: int = 0
    num_steps: int = 0
    #: The newest preview of the image as a data URI, for streams and for status requests that ask for previews.
    preview: str | None = None
    wants_previews: bool = False
    #: fal's X-Fal-Runner-Hint: requests with the same hint prefer the same GPU. Not kept over a restart.
    runner_hint: str | None = None
    #: Set by a server for tests: the safety checker's verdict on every image, and the seconds between the job's end and
    #: its webhook.
    verdict: bool | None = None
    webhook_delay: float = 0.0
    logs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def rank(self) -> int:
        """The sort key in the queue: normal priority first, then order of arrival. A single integer sorts fast."""
        return self.sequence + LOW_PRIORITY_OFFSET if self.priority == Priority.LOW else self.sequence


@dataclass(frozen=True)
class Outcome:
    """The end of a job: the status and JSON body of the response, and the files that the response names."""

    status: int
    body: str
    error: str | None = None
    error_type: str | None = None
    inference_time: float | None = None
    provenance: Provenance = field(default_factory=Provenance)
    files: tuple[StoredFile, ...] = ()
    #: Megapixels, rounded up for each image: the unit that fal bills for this model.
    billable_units: int = 0

    @classmethod
    def from_error(cls, error: ServerError) -> Self:
        """Build the outcome of a job that fails with this error."""
        return cls(error.status, to_json(error.body).decode(), str(error), error.error_type)


def log_line(message: str, level: str, timestamp: str) -> dict[str, Any]:
    """Build one log entry with every field that any of the SDKs requires."""
    labels = {"level": level, "source": "USER"}
    return {"message": message, "timestamp": timestamp, "level": level, "source": "USER", "labels": labels}
