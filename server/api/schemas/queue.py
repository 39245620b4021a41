"""Types of the responses of fal's queue."""

from typing import Annotated, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict


class LogLabels(TypedDict):
    """The labels of a log line."""

    level: str
    source: str


class LogLine(TypedDict):
    """One line of a request's log."""

    message: str
    timestamp: Annotated[str, Field(description="When the line was written, as an ISO 8601 time.")]
    level: Annotated[str, Field(description="STDERR, STDOUT, ERROR, INFO, WARN or DEBUG.")]
    source: Annotated[str, Field(description="Where the line comes from.")]
    labels: LogLabels


class QueueMetrics(TypedDict):
    """Figures about a finished request."""

    inference_time: NotRequired[Annotated[float, Field(description="The seconds of computation.")]]
    acceleration: NotRequired[Annotated[str, Field(description="The acceleration that the request ran with.")]]
    dtype: NotRequired[Annotated[str, Field(description="The number type of the computation, such as bfloat16.")]]
    weights: NotRequired[
        Annotated[str, Field(description="The form of the weights in their files, such as safetensors or GGUF Q4_0.")]
    ]
    memory: NotRequired[
        Annotated[
            str, Field(description="The memory plan. Some plans quantize the weights: fp8, fp8-storage, int8, int4.")
        ]
    ]


class QueueStatus(TypedDict):
    """The status of a request in the queue."""

    status: Annotated[
        Literal["IN_QUEUE", "IN_PROGRESS", "COMPLETED"],
        Field(description="The state of the request. A failed request is COMPLETED too."),
    ]
    request_id: Annotated[str, Field(description="The request id.")]
    response_url: Annotated[str, Field(description="The URL of the result.")]
    status_url: Annotated[str, Field(description="The URL of this status.")]
    cancel_url: Annotated[str, Field(description="The URL that cancels the request.")]
    logs: Annotated[
        list[LogLine] | None, Field(description="The log, or null if the client did not ask for it with logs=1.")
    ]
    metrics: QueueMetrics
    queue_position: NotRequired[
        Annotated[int, Field(ge=0, description="The number of requests that run first, while this request waits.")]
    ]
    error: NotRequired[Annotated[str, Field(description="Why the request failed.")]]
    error_type: NotRequired[Annotated[str, Field(description="fal's type of the error.")]]


class Cancellation(TypedDict):
    """The answer to a cancellation."""

    status: Annotated[
        Literal["OK", "CANCELLATION_REQUESTED"],
        Field(description="OK if the request was waiting, CANCELLATION_REQUESTED if it is running."),
    ]
